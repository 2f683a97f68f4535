// probes on the CPU: counter-based random vectors; the definition of the stream stands in fastsharp/ops/krylov.py.
//
// Note on numerical properties. Rademacher entries are exact. A normal is computed in double with a relative error of about 2^-49 and
// rounded once to float, so it is the correctly rounded value except where that lies within 2^-49 of a midpoint, about one entry
// in ten million. Entries do not depend on threads; across instruction sets they agree in the same sense.
#include "fastsharp/krylov.hpp"

#include "fastsharp/parallel.hpp"

namespace fastsharp::cpu {

namespace {

struct Key {
    std::uint64_t seed, stream;
};

struct Generators { // blocks [q, q + blocks) of the stream, whole blocks
    void (*rademacher)(Key, i64 q, i64 blocks, float*);
    void (*normal)(Key, i64 q, i64 blocks, float*);
};

} // namespace

} // namespace fastsharp::cpu

#define FS_KERNELS "probes_kernels.inl"
#include "levels.inl"
#undef FS_KERNELS

namespace fastsharp::cpu {

namespace {

constexpr i64 kPiece = 4096; // entries of a row made at once, on the stack
constexpr i64 kTask = 16;    // pieces

const Generators& generators() {
#if FASTSHARP_X86
    if (simd() == Simd::avx512)
        return avx512::kGenerators;
    if (simd() == Simd::avx2)
        return avx2::kGenerators;
#endif
    return scalar::kGenerators;
}

} // namespace

template <class T> Status probes(Kind kind, std::uint64_t seed, i64 first, T* out, i64 ldo, i64 b, i64 n, int threads) {
    const bool signs = kind == Kind::rademacher;
    const auto generate = signs ? generators().rademacher : generators().normal;
    const i64 per_block = signs ? 128 : 4;
    const i64 tasks = ceil_div(n, kTask * kPiece);
    parallel_for(b * tasks, threads, [=](i64 task) noexcept {
        alignas(64) float piece[kPiece];
        const i64 row = task / tasks;
        const i64 start = task % tasks * kTask * kPiece;
        const i64 end = n - start < kTask * kPiece ? n : start + kTask * kPiece;
        for (i64 i = start; i < end; i += kPiece) {
            const i64 length = end - i < kPiece ? end - i : kPiece;
            generate({seed, static_cast<std::uint64_t>(first + row)}, i / per_block, ceil_div(length, per_block), piece);
            T* to = out + row * ldo + i;
            for (i64 k = 0; k < length; ++k)
                to[k] = static_cast<T>(piece[k]);
        }
    });
    return {"probes"};
}

template Status probes<float>(Kind, std::uint64_t, i64, float*, i64, i64, i64, int);
template Status probes<double>(Kind, std::uint64_t, i64, double*, i64, i64, i64, int);

} // namespace fastsharp::cpu
