// Random vectors on a GPU: Philox-4x32-10 as fastsharp/ops/krylov.py defines it, so that every device draws the same numbers.
//
// v1  a thread per Philox block: no work twice, but 128 neighbours per thread, so that a warp's stores touch 32 separate lines.
// v2  a thread writes four neighbours of a row, one 16-byte store for float. For Rademacher entries 32 threads compute the same
//     block, about 90 integer instructions for 16 bytes: less than the store takes, as counted, not measured.      <- this file
//
// Note on numerical properties: normals in double, rounded once to float; sincospi takes its argument exactly, and differs from the
// definition's cos(2 pi x) by its last bit or so.
#include <cmath>

#include "plan.cuh"

namespace fastsharp::cuda {

namespace {

constexpr int kFour = 4;

struct Words {
    std::uint32_t x[kFour];
};

__device__ inline Words philox(std::uint64_t seed, std::uint64_t q, std::uint64_t row) {
    auto k0 = static_cast<std::uint32_t>(seed);
    auto k1 = static_cast<std::uint32_t>(seed >> 32);
    Words c{{static_cast<std::uint32_t>(q), static_cast<std::uint32_t>(q >> 32), static_cast<std::uint32_t>(row),
             static_cast<std::uint32_t>(row >> 32)}};
    for (int round = 0; round < 10; ++round) {
        const std::uint64_t a = std::uint64_t{0xD2511F53U} * c.x[0];
        const std::uint64_t b = std::uint64_t{0xCD9E8D57U} * c.x[2];
        c = {{static_cast<std::uint32_t>(b >> 32) ^ c.x[1] ^ k0, static_cast<std::uint32_t>(b),
              static_cast<std::uint32_t>(a >> 32) ^ c.x[3] ^ k1, static_cast<std::uint32_t>(a)}};
        k0 += 0x9E3779B9U;
        k1 += 0xBB67AE85U;
    }
    return c;
}

// Entries 4 quad .. 4 quad + 3 of the vector.
__device__ inline void rademacher(std::uint64_t seed, i64 quad, std::uint64_t row, float (&z)[kFour]) {
    const Words w = philox(seed, static_cast<std::uint64_t>(quad / 32), row);
    const int word = static_cast<int>(quad / 8 % 4);
    const int bit = static_cast<int>(quad % 8) * kFour;
    // indexing with a variable would put the words into local memory
    const std::uint32_t bits = word < 2 ? (word == 0 ? w.x[0] : w.x[1]) : (word == 2 ? w.x[2] : w.x[3]);
    for (int k = 0; k < kFour; ++k)
        z[k] = (bits >> (bit + k) & 1U) != 0U ? -1.0F : 1.0F;
}

__device__ inline void normal(std::uint64_t seed, i64 quad, std::uint64_t row, float (&z)[kFour]) {
    const Words w = philox(seed, static_cast<std::uint64_t>(quad), row);
    for (int k = 0; k < kFour; k += 2) {
        const double u = (static_cast<double>(w.x[k]) + 1.0) * 0x1p-32;
        const double radius = sqrt(-2.0 * log(u));
        double sine = 0, cosine = 0;
        sincospi(static_cast<double>(w.x[k + 1]) * 0x1p-31, &sine, &cosine);
        z[k] = static_cast<float>(radius * cosine);
        z[k + 1] = static_cast<float>(radius * sine);
    }
}

template <class T> struct alignas(16) Quad {
    T x[kFour];
};

template <class T, Kind kKind, bool Packed> __global__ void __launch_bounds__(kBlock)
    probes_kernel(std::uint64_t seed, i64 first, T* out, i64 ldo, i64 b, i64 n) {
    for (i64 i = blockIdx.y; i < b; i += gridDim.y) {
        T* const row = out + i * ldo;
        for (i64 quad = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x; quad * kFour < n;
             quad += static_cast<i64>(gridDim.x) * blockDim.x) {
            float z[kFour];
            if constexpr (kKind == Kind::rademacher) {
                rademacher(seed, quad, static_cast<std::uint64_t>(first + i), z);
            } else {
                normal(seed, quad, static_cast<std::uint64_t>(first + i), z);
            }
            if (Packed && quad * kFour + kFour <= n) {
                *reinterpret_cast<Quad<T>*>(row + quad * kFour) = {{T(z[0]), T(z[1]), T(z[2]), T(z[3])}};
                continue;
            }
            for (int k = 0; k < kFour; ++k) {
                if (quad * kFour + k < n)
                    row[quad * kFour + k] = T(z[k]);
            }
        }
    }
}

} // namespace

template <class T>
Status probes(Kind kind, std::uint64_t seed, i64 first, T* out, i64 ldo, i64 b, i64 n, LaunchConfig config, int device, void* stream) {
    const DeviceGuard guard(device);
    if (guard.error() != cudaSuccess)
        return status_of("probes", guard.error());
    const bool packed = aligned(out, 1, 0, b, ldo);
    auto kernel = kind == Kind::rademacher ? packed ? probes_kernel<T, Kind::rademacher, true> : probes_kernel<T, Kind::rademacher, false>
                  : packed                 ? probes_kernel<T, Kind::normal, true>
                                           : probes_kernel<T, Kind::normal, false>;
    FS_LAUNCH(kernel, config.grid, b < config.members ? b : config.members, config.block, 0, stream, seed, first, out, ldo, b, n);
    return status_of("probes", cudaGetLastError());
}

#define FS_INSTANTIATE(T) template Status probes<T>(Kind, std::uint64_t, i64, T*, i64, i64, i64, LaunchConfig, int, void*);
FS_INSTANTIATE(float)
FS_INSTANTIATE(double)
#undef FS_INSTANTIATE

} // namespace fastsharp::cuda
