// probes on the CPU: counter-based random vectors; the definition of the stream stands in fastsharp/ops/krylov.py.
//
// Note on numerical properties. Rademacher entries are exact. A normal is computed in double with a relative error of about 2^-49 and
// rounded once to float, so it is the correctly rounded value except where that lies within 2^-49 of a midpoint, about one entry
// in ten million. Entries do not depend on threads; across instruction sets they agree in the same sense.
#include "fastsharp/krylov.hpp"

#include "tiles.hpp"

namespace fastsharp::cpu {

namespace {

struct Key {
    std::uint64_t seed, stream;
};

using Generate = void (*)(Key, i64 q, i64 blocks, float*); // blocks [q, q + blocks) of the stream, whole blocks

// Entries [start, end) of a row; a block has `per_block` of them.
template <class T> using Fill = void (*)(Generate, i64 per_block, Key, i64 start, i64 end, T* row, bool past);

constexpr i64 kPiece = 4096; // entries of a row made at once, on the stack

template <class T> struct Generators {
    Generate rademacher, normal;
    Fill<T> fill;
};

} // namespace

} // namespace fastsharp::cpu

#define FS_KERNELS "probes_kernels.inl"
#include "levels.inl"
#undef FS_KERNELS

namespace fastsharp::cpu {

namespace {

constexpr i64 kTask = 16; // pieces

template <class T> const Generators<T>& generators() {
#if FASTSHARP_X86
    if (simd() == Simd::avx512)
        return avx512::kGenerators<T>;
    if (simd() == Simd::avx2)
        return avx2::kGenerators<T>;
#endif
    return scalar::kGenerators<T>;
}

} // namespace

template <class T> Status probes(Kind kind, std::uint64_t seed, i64 first, T* out, i64 ldo, i64 b, i64 n, int threads) {
    const bool signs = kind == Kind::rademacher;
    const Generators<T>& g = generators<T>();
    const Generate generate = signs ? g.rademacher : g.normal;
    const Fill<T> fill = g.fill;
    const bool past = b * n * static_cast<i64>(sizeof(T)) >= kStreamed;
    const i64 per_block = signs ? 128 : 4;
    const i64 tasks = ceil_div(n, kTask * kPiece);
    parallel_for(b * tasks, threads, [=](i64 task) noexcept {
        const i64 row = task / tasks;
        const i64 start = task % tasks * kTask * kPiece;
        const i64 end = n - start < kTask * kPiece ? n : start + kTask * kPiece;
        fill(generate, per_block, {seed, static_cast<std::uint64_t>(first + row)}, start, end, out + row * ldo, past);
    });
    return {"probes"};
}

template Status probes<float>(Kind, std::uint64_t, i64, float*, i64, i64, i64, int);
template Status probes<double>(Kind, std::uint64_t, i64, double*, i64, i64, i64, int);

} // namespace fastsharp::cpu
