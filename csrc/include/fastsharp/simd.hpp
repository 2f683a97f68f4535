// Which instruction set is live. One kernel source is compiled once per set (GNU vector extensions of the set's width, so
// there is one text to read and to test), and the choice is made at run time: no -march flag, one wheel for every CPU.
// `scalar` means what the compiler may assume everywhere on this architecture (SSE2 on x86-64, NEON on arm64).
//
// FASTSHARP_SIMD=scalar|avx2|avx512 in the environment, or set_simd(), force a lower set; a higher one is refused.
#pragma once
#include <atomic>
#include <cstdlib>
#include <string>

#if (defined(__x86_64__) || defined(__i386__)) && defined(__GNUC__)
#define FASTSHARP_X86 1
#include <cpuid.h>
#else
#define FASTSHARP_X86 0
#endif

// In front of a short loop over arrays that shall live in registers.
#if defined(__clang__)
#define FASTSHARP_UNROLL _Pragma("unroll")
#else
#define FASTSHARP_UNROLL _Pragma("GCC unroll 16")
#endif

namespace fastsharp {

enum class Simd : int { scalar = 0, avx2 = 1, avx512 = 2 };

inline const char* name(Simd level) { return level == Simd::avx512 ? "avx512" : level == Simd::avx2 ? "avx2" : "scalar"; }

inline Simd simd_supported() {
#if FASTSHARP_X86
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0; // not every compiler's builtin knows it
    const bool avx2 = f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return Simd::avx512;
    if (avx2)
        return Simd::avx2;
#endif
    return Simd::scalar;
}

// True and `level` set when the text names a set that this CPU has.
inline bool parse_simd(const char* text, Simd& level) {
    for (const Simd candidate : {Simd::scalar, Simd::avx2, Simd::avx512}) {
        if (std::string(name(candidate)) == text && candidate <= simd_supported()) {
            level = candidate;
            return true;
        }
    }
    return false;
}

namespace detail {

inline std::atomic<Simd>& live_simd() {
    static std::atomic<Simd> level = [] {
        Simd chosen = simd_supported();
        if (const char* wish = std::getenv("FASTSHARP_SIMD"))
            parse_simd(wish, chosen);
        return chosen;
    }();
    return level;
}

} // namespace detail

inline Simd simd() { return detail::live_simd().load(std::memory_order_relaxed); }

inline bool set_simd(const char* text) {
    Simd level{};
    if (!parse_simd(text, level))
        return false;
    detail::live_simd().store(level, std::memory_order_relaxed);
    return true;
}

} // namespace fastsharp
