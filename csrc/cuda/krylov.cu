// alpha, dots and update on a GPU. All three read V once and are limited by memory; the work is to keep enough loads in flight.
//
// The ladder (bytes are counted per element of V; rates are to be measured by bench/gpu.sh):
//   v1  one block per row and cublas-like dot: w is read again for every row, 2x the bytes of V.
//   v2  a block keeps a tile of w in shared memory and loops over the rows: V once, but two __syncthreads per row and tile
//       to reduce across the block, so warps wait for the slowest of eight between any two loads.
//   v3  a warp keeps 256 elements of w in registers, 8 per lane, and loops over the rows by itself: no barrier in the loop. Five
//       shuffles per row and KiB are about a tenth of the issue slots at the full rate. The chunk of 256 is also the
//       length over which float products may be added in float.
//   v4  v3 with four rows unrolled: 128 bytes in flight per lane, enough at half occupancy to cover the latency.   <- this file
// Row sums of a chunk go to lane (row mod 32) and once per 32 rows to shared memory in double, one slot per warp and row, so
// the block needs a single barrier at its end. Rows come in groups of kRowGroup, which bounds the shared memory for any j.
// update keeps its sum over rows in double: one conversion and one FMA per element, below the bandwidth also where the double
// rate is 1/64.
//
// Note on numerical properties: those of csrc/cpu/krylov.cpp; float products are added 8 to a lane, then by a butterfly.
// Determinism: chunks are dealt to warps by LaunchConfig, a function of n alone; no atomics. Rows whose addresses are not multiples
// of 16 bytes take the path without vector loads, which deals elements to lanes differently: the last bits then differ.
#include "fastsharp/krylov.hpp"

#include <cstdint>
#include <type_traits>

#include "reduce.cuh"

namespace fastsharp::cuda {

namespace {

constexpr int kPerLane = 8;
constexpr i64 kChunk = kWarp * kPerLane;
constexpr int kUnroll = 4;
constexpr i64 kRowGroup = 256;
constexpr int kMaxGrid = 2048;
constexpr int kBlock = 256;

template <class T> struct alignas(16) Pack {
    T x[16 / sizeof(T)];
};

// The position in a chunk of element k of a lane: neighbours in a 16-byte pack, or one element per lane at a time.
template <class T, bool Packed> __device__ inline i64 position(int lane, int k) {
    constexpr int P = Packed ? static_cast<int>(16 / sizeof(T)) : 1;
    return static_cast<i64>(k / P) * (kWarp * P) + lane * P + k % P;
}

// Access of a lane to its part of a chunk. Full: the chunk lies wholly below n, so that no element is tested.
template <class T, bool Packed, bool Full> struct Chunk {
    static constexpr int P = Packed && Full ? static_cast<int>(16 / sizeof(T)) : 1;

    static __device__ void load(const T* p, i64 left, int lane, T (&x)[kPerLane]) {
        for (int k = 0; k < kPerLane; k += P) {
            const i64 i = position<T, Packed>(lane, k);
            if constexpr (P > 1) {
                const Pack<T> pack = *reinterpret_cast<const Pack<T>*>(p + i);
                for (int e = 0; e < P; ++e)
                    x[k + e] = pack.x[e];
            } else {
                x[k] = Full || i < left ? p[i] : T(0);
            }
        }
    }

    static __device__ void store(T* p, i64 left, int lane, const T (&x)[kPerLane]) {
        for (int k = 0; k < kPerLane; k += P) {
            const i64 i = position<T, Packed>(lane, k);
            if constexpr (P > 1) {
                Pack<T> pack;
                for (int e = 0; e < P; ++e)
                    pack.x[e] = x[k + e];
                *reinterpret_cast<Pack<T>*>(p + i) = pack;
            } else if (Full || i < left) {
                p[i] = x[k];
            }
        }
    }
};

template <class T> __device__ inline double dot(const T (&x)[kPerLane], const T (&y)[kPerLane], double s) {
    for (int k = 0; k < kPerLane; ++k)
        s += static_cast<double>(x[k]) * static_cast<double>(y[k]);
    return s;
}

template <class T> __device__ inline void subtract(double a, const T (&y)[kPerLane], double (&x)[kPerLane]) {
    for (int k = 0; k < kPerLane; ++k)
        x[k] -= a * static_cast<double>(y[k]);
}

struct Place { // of a thread in the first stage
    int lane, warp, warps;
    i64 first, step; // chunks of its warp

    __device__ Place()
        : lane(static_cast<int>(threadIdx.x) % kWarp), warp(static_cast<int>(threadIdx.x) / kWarp),
          warps(static_cast<int>(blockDim.x) / kWarp), first(static_cast<i64>(blockIdx.x) * warps + warp),
          step(static_cast<i64>(gridDim.x) * warps) {}

    // f(start, elements left, full) for every chunk of this warp; `full` is a constant, so that whole chunks test nothing.
    template <class F> __device__ void for_each_chunk(i64 n, F f) const {
        for (i64 chunk = first; chunk * kChunk < n; chunk += step) {
            const i64 start = chunk * kChunk;
            if (n - start >= kChunk) {
                f(start, n - start, std::true_type{});
            } else {
                f(start, n - start, std::false_type{});
            }
        }
    }
};

// partial[blockIdx.x] = the sum of x over the block, warps in order.
__device__ inline void block_sum(double x, const Place& at, double* partial) {
    FS_SHARED(double, s, 32);
    x = warp_sum(x);
    if (at.lane == 0)
        s[at.warp] = x;
    __syncthreads();
    if (threadIdx.x == 0) {
        double total = 0;
        for (int k = 0; k < at.warps; ++k)
            total += s[k];
        partial[blockIdx.x] = total;
    }
}

template <class T, bool Packed> __global__ void __launch_bounds__(kBlock) alpha_kernel(const T* v, const T* w, i64 n, double* partial) {
    const Place at;
    double s = 0;
    at.for_each_chunk(n, [&](i64 start, i64 left, auto full) {
        using Part = Chunk<T, Packed, decltype(full)::value>;
        T x[kPerLane];
        T y[kPerLane];
        Part::load(v + start, left, at.lane, x);
        Part::load(w + start, left, at.lane, y);
        s = dot(x, y, s);
    });
    block_sum(s, at, partial);
}

// The products of one chunk x of w with U rows; lane u0 + u keeps the sum of row u in `mine`.
template <int U, class Part, class T>
__device__ inline void row_products(const T* V, i64 ldv, i64 left, int lane, const T (&x)[kPerLane], int u0, T& mine) {
    T y[U][kPerLane];
    for (int u = 0; u < U; ++u)
        Part::load(V + u * ldv, left, lane, y[u]);
    for (int u = 0; u < U; ++u) {
        T s = 0;
        for (int k = 0; k < kPerLane; ++k)
            s += y[u][k] * x[k];
        s = warp_sum(s);
        if (lane == u0 + u)
            mine = s;
    }
}

// Rows [0, rows) of V, and with `first` the removal of the two last terms before and w'w after. partial is (rows + first, grid).
template <class T, bool Packed> __global__ void __launch_bounds__(kBlock, 2)
    dots_kernel(const T* V, i64 ldv, T* w, const double* ab, const T* v1, const T* v2, i64 rows, i64 n, bool first, double* partial) {
    FS_DYNAMIC_SHARED(double, sums); // (warps, width)
    const Place at;
    const int width = static_cast<int>(rows) + (first ? 1 : 0);
    double* const own = sums + at.warp * width; // element k is touched by lane k mod 32 alone, until the barrier
    for (int k = at.lane; k < width; k += kWarp)
        own[k] = 0;
    const double a = first ? ab[0] : 0;
    const double b = first && v2 != nullptr ? ab[1] : 0;
    double ww = 0;
    at.for_each_chunk(n, [&](i64 start, i64 left, auto full) {
        using Part = Chunk<T, Packed, decltype(full)::value>;
        T x[kPerLane];
        Part::load(w + start, left, at.lane, x);
        if (a != 0 || b != 0) {
            T y[kPerLane];
            double exact[kPerLane];
            for (int k = 0; k < kPerLane; ++k)
                exact[k] = static_cast<double>(x[k]);
            if (a != 0) {
                Part::load(v1 + start, left, at.lane, y);
                subtract(a, y, exact);
            }
            if (b != 0) {
                Part::load(v2 + start, left, at.lane, y);
                subtract(b, y, exact);
            }
            for (int k = 0; k < kPerLane; ++k)
                x[k] = static_cast<T>(exact[k]);
            Part::store(w + start, left, at.lane, x);
        }
        if (first)
            ww = dot(x, x, ww);
        for (i64 base = 0; base < rows; base += kWarp) {
            const int count = static_cast<int>(rows - base < kWarp ? rows - base : kWarp);
            const T* row = V + base * ldv + start;
            T mine = 0;
            int r = 0;
            for (; r + kUnroll <= count; r += kUnroll)
                row_products<kUnroll, Part>(row + r * ldv, ldv, left, at.lane, x, r, mine);
            for (; r < count; ++r)
                row_products<1, Part>(row + r * ldv, ldv, left, at.lane, x, r, mine);
            if (at.lane < count)
                own[base + at.lane] += static_cast<double>(mine);
        }
    });
    ww = warp_sum(ww);
    if (first && at.lane == static_cast<int>(rows) % kWarp)
        own[rows] = ww;
    __syncthreads();
    for (int k = static_cast<int>(threadIdx.x); k < width; k += static_cast<int>(blockDim.x)) {
        double total = 0;
        for (int warp = 0; warp < at.warps; ++warp)
            total += sums[warp * width + k];
        partial[static_cast<i64>(k) * gridDim.x + blockIdx.x] = total;
    }
}

template <int U, class Part, class T>
__device__ inline void subtract_rows(const T* V, i64 ldv, i64 left, int lane, const double* c, double (&exact)[kPerLane]) {
    T y[U][kPerLane];
    for (int u = 0; u < U; ++u)
        Part::load(V + u * ldv, left, lane, y[u]);
    for (int u = 0; u < U; ++u)
        subtract(c[u], y[u], exact);
}

template <class T, bool Packed> __global__ void __launch_bounds__(kBlock, 2)
    update_kernel(const T* V, i64 ldv, T* w, const double* c, i64 j, i64 n, double* partial) {
    const Place at;
    double s = 0;
    at.for_each_chunk(n, [&](i64 start, i64 left, auto full) {
        using Part = Chunk<T, Packed, decltype(full)::value>;
        const T* row = V + start;
        T x[kPerLane];
        double exact[kPerLane];
        Part::load(w + start, left, at.lane, x);
        for (int k = 0; k < kPerLane; ++k)
            exact[k] = static_cast<double>(x[k]);
        i64 r = 0;
        for (; r + kUnroll <= j; r += kUnroll)
            subtract_rows<kUnroll, Part>(row + r * ldv, ldv, left, at.lane, c + r, exact);
        for (; r < j; ++r)
            subtract_rows<1, Part>(row + r * ldv, ldv, left, at.lane, c + r, exact);
        for (int k = 0; k < kPerLane; ++k)
            x[k] = static_cast<T>(exact[k]);
        Part::store(w + start, left, at.lane, x);
        s = dot(x, x, s); // beyond n all of x is zero
    });
    block_sum(s, at, partial);
}

template <class... P> bool packed(i64 stride_bytes, P... pointers) {
    return stride_bytes % 16 == 0 && ((reinterpret_cast<std::uintptr_t>(pointers) % 16 == 0) && ...);
}

void second_stage(const double* partial, LaunchConfig config, i64 width, double* out, void* stream) {
    if (config.block < kSecondStage) { // the emulation runs small blocks
        FS_LAUNCH(sum_partials<kWarp>, width, kWarp, 0, stream, partial, config.grid, out);
    } else {
        FS_LAUNCH(sum_partials<kSecondStage>, width, kSecondStage, 0, stream, partial, config.grid, out);
    }
}

} // namespace

LaunchConfig LaunchConfig::of(i64 n) {
    const i64 blocks = ceil_div(n, kChunk * (kBlock / kWarp));
    return {static_cast<int>(blocks < kMaxGrid ? blocks : kMaxGrid), kBlock};
}

i64 workspace_size(LaunchConfig config, i64 j) {
    const i64 rows = j < kRowGroup ? j : kRowGroup;
    return config.grid * (rows + 1);
}

template <class T> Status alpha(const T* v, const T* w, i64 n, double* out, double* work, LaunchConfig config, int device, void* stream) {
    const DeviceGuard guard(device);
    if (guard.error() != cudaSuccess)
        return status_of("alpha", guard.error());
    auto kernel = packed(0, v, w) ? alpha_kernel<T, true> : alpha_kernel<T, false>;
    FS_LAUNCH(kernel, config.grid, config.block, 0, stream, v, w, n, work);
    second_stage(work, config, 1, out, stream);
    return status_of("alpha", cudaGetLastError());
}

template <class T> Status dots(const T* V, i64 ldv, T* w, const double* ab, i64 j, i64 n, double* out, double* work, LaunchConfig config,
                               int device, void* stream) {
    const DeviceGuard guard(device);
    if (guard.error() != cudaSuccess)
        return status_of("dots", guard.error());
    auto kernel = packed(ldv * static_cast<i64>(sizeof(T)), V, w) ? dots_kernel<T, true> : dots_kernel<T, false>;
    const T* v1 = V + (j - 1) * ldv;
    const T* v2 = j >= 2 ? v1 - ldv : nullptr;
    // The last group goes first and has w'w as its last sum, so that every group's sums are consecutive in out.
    const i64 groups = ceil_div(j, kRowGroup);
    for (i64 g = groups - 1; g >= 0; --g) {
        const bool first = g == groups - 1;
        const i64 rows = first ? j - g * kRowGroup : kRowGroup;
        const i64 width = rows + (first ? 1 : 0);
        const i64 shared = config.block / kWarp * width * static_cast<i64>(sizeof(double));
        FS_LAUNCH(kernel, config.grid, config.block, shared, stream, V + g * kRowGroup * ldv, ldv, w, ab, v1, v2, rows, n, first, work);
        second_stage(work, config, width, out + g * kRowGroup, stream);
    }
    return status_of("dots", cudaGetLastError());
}

template <class T> Status update(const T* V, i64 ldv, T* w, const double* c, i64 j, i64 n, double* out, double* work, LaunchConfig config,
                                 int device, void* stream) {
    const DeviceGuard guard(device);
    if (guard.error() != cudaSuccess)
        return status_of("update", guard.error());
    auto kernel = packed(ldv * static_cast<i64>(sizeof(T)), V, w) ? update_kernel<T, true> : update_kernel<T, false>;
    FS_LAUNCH(kernel, config.grid, config.block, 0, stream, V, ldv, w, c, j, n, work);
    second_stage(work, config, 1, out, stream);
    return status_of("update", cudaGetLastError());
}

#define FS_INSTANTIATE(T)                                                                                                                  \
    template Status alpha<T>(const T*, const T*, i64, double*, double*, LaunchConfig, int, void*);                                         \
    template Status dots<T>(const T*, i64, T*, const double*, i64, i64, double*, double*, LaunchConfig, int, void*);                       \
    template Status update<T>(const T*, i64, T*, const double*, i64, i64, double*, double*, LaunchConfig, int, void*);
FS_INSTANTIATE(float)
FS_INSTANTIATE(double)
#undef FS_INSTANTIATE

} // namespace fastsharp::cuda
