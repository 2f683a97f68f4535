// A warp's share of the vectors: chunks of 256 elements, 8 to a lane, and how a lane loads, converts and stores them.
//
// Which elements a lane holds is set by the storage type of the rows alone: packs of 16 bytes, 8 half-precision elements or 4
// floats. Where the addresses allow it, a pack is one load; elsewhere the same elements come one by one (a warp's loads
// still fill whole sectors through L1). So sums have the same bits at any alignment, in an ensemble of any size, and for
// any number of right-hand sides.
#pragma once
#include <cstdint>
#include <type_traits>

#include "reduce.cuh"

namespace fastsharp::cuda {

constexpr int kPerLane = 8;
constexpr i64 kChunk = kWarp * kPerLane;

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(Half x) { return __half2float(__ushort_as_half(x.bits)); }
__device__ inline float widen(BFloat16 x) { return __bfloat162float(__ushort_as_bfloat16(x.bits)); }

// Rounded once, to nearest even.
template <class S> __device__ inline S narrow(double x) {
    if constexpr (std::is_same_v<S, Half>) {
        return {__half_as_ushort(__double2half(x))};
    } else if constexpr (std::is_same_v<S, BFloat16>) {
        return {__bfloat16_as_ushort(__double2bfloat16(x))};
    } else {
        return static_cast<S>(x);
    }
}

template <class S> constexpr int kPack = static_cast<int>(16 / sizeof(S)); // elements

template <class S> struct alignas(16) Pack {
    S x[kPack<S>];
};

// The position in a chunk of element k of a lane, in packs of P elements.
template <int P> __device__ inline i64 position(int lane, int k) { return static_cast<i64>(k / P) * (kWarp * P) + lane * P + k % P; }

// Access of a lane to its part of a chunk laid out in packs of P. Whole: the chunk lies below n and all addresses are multiples
// of 16 bytes, so that packs move as one. Otherwise `left` elements are there; beyond them zeros are loaded, nothing is stored.
template <int P, bool Whole> struct Part {
    // The position in the chunk of element k of a lane, and whether it is there.
    static __device__ i64 place(int lane, int k) { return position<P>(lane, k); }
    static __device__ bool has(i64 left, int lane, int k) { return Whole || position<P>(lane, k) < left; }

    template <class S, class T> static __device__ void load(const S* p, i64 left, int lane, T (&x)[kPerLane]) {
        if constexpr (Whole) {
            for (int k = 0; k < kPerLane; k += kPack<S>) {
                const Pack<S> pack = *reinterpret_cast<const Pack<S>*>(p + position<P>(lane, k));
                for (int i = 0; i < kPack<S>; ++i)
                    x[k + i] = widen(pack.x[i]);
            }
        } else {
            for (int k = 0; k < kPerLane; ++k) {
                const i64 i = position<P>(lane, k);
                x[k] = i < left ? static_cast<T>(widen(p[i])) : T(0);
            }
        }
    }

    template <class S, class T> static __device__ void store(S* p, i64 left, int lane, const T (&x)[kPerLane]) {
        if constexpr (Whole) {
            for (int k = 0; k < kPerLane; k += kPack<S>) {
                Pack<S> pack;
                for (int i = 0; i < kPack<S>; ++i)
                    pack.x[i] = narrow<S>(x[k + i]);
                *reinterpret_cast<Pack<S>*>(p + position<P>(lane, k)) = pack;
            }
        } else {
            for (int k = 0; k < kPerLane; ++k) {
                const i64 i = position<P>(lane, k);
                if (i < left)
                    p[i] = narrow<S>(x[k]);
            }
        }
    }
};

// f(start, elements left, Part) for one chunk.
template <class S, bool Packed, class F> __device__ inline void at_chunk(i64 n, i64 chunk, F f) {
    const i64 start = chunk * kChunk;
    if constexpr (Packed) {
        if (n - start >= kChunk) {
            f(start, n - start, Part<kPack<S>, true>{});
            return;
        }
    }
    f(start, n - start, Part<kPack<S>, false>{});
}

struct Place { // of a thread in the first stage
    int lane, warp, warps;
    i64 first, step; // of its warp among the warps of all blocks of this member

    __device__ Place()
        : lane(static_cast<int>(threadIdx.x) % kWarp), warp(static_cast<int>(threadIdx.x) / kWarp),
          warps(static_cast<int>(blockDim.x) / kWarp), first(static_cast<i64>(blockIdx.x) * warps + warp),
          step(static_cast<i64>(gridDim.x) * warps) {}

    template <class S, bool Packed, class F> __device__ void for_each_chunk(i64 n, F f) const {
        for (i64 chunk = first; chunk * kChunk < n; chunk += step)
            at_chunk<S, Packed>(n, chunk, f);
    }
};

template <class T> __device__ inline double square(const T (&x)[kPerLane], double s) {
    for (int k = 0; k < kPerLane; ++k)
        s += static_cast<double>(x[k]) * static_cast<double>(x[k]);
    return s;
}

template <class T> __device__ inline void subtract(double a, const T (&y)[kPerLane], double (&x)[kPerLane]) {
    for (int k = 0; k < kPerLane; ++k)
        x[k] -= a * static_cast<double>(y[k]);
}

} // namespace fastsharp::cuda
