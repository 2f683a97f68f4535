// Includes FS_KERNELS once per instruction set with
//   FS_LEVEL   namespace        FS_TARGET   target attribute        FS_BYTES   bytes of a vector register
// and with conversions of whole registers, since compilers split __builtin_convertvector in two:
//   FS_TO_DOUBLE(x)  FS_TO_FLOAT(x)   between as many floats as a register has doubles, and doubles
//   FS_HALVES(p)     FS_BFLOATS(p)    a register of floats from memory     FS_HALVES_2, FS_BFLOATS_2   half a register
//   FS_STORE_HALVES(p, x)             half a register of floats to memory, to nearest even
//   FS_PRODUCT(x, y)                  products of the low 32 bits of 64-bit lanes
//   FS_ROOT(x)                        square roots of doubles
//   FS_STREAM(p, x)  FS_STREAMED()    a register to memory past the caches, p a multiple of FS_BYTES; behind the last one of a task
#include "fastsharp/simd.hpp"
#if FASTSHARP_X86
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized" // gcc 12 takes the undefined source of an unmasked intrinsic for ours
#endif
#include <immintrin.h>
#endif

#define FS_LEVEL scalar
#define FS_TARGET
#define FS_BYTES 16
#define FS_TO_DOUBLE(x) __builtin_convertvector(x, Wide)
#define FS_TO_FLOAT(x) __builtin_convertvector(x, HalfFloat)
#define FS_HALVES(p) each<Float>(p)
#define FS_HALVES_2(p) each<HalfFloat>(p)
#define FS_BFLOATS(p) each<Float>(p)
#define FS_BFLOATS_2(p) each<HalfFloat>(p)
#define FS_STORE_HALVES(p, x) store_each(p, x)
#define FS_PRODUCT(x, y) ((x & 0xFFFFFFFFU) * (y & 0xFFFFFFFFU))
#define FS_ROOT(x) root(x)
#define FS_STREAM(p, x) __builtin_memcpy(p, &x, sizeof x)
#define FS_STREAMED()
#include FS_KERNELS
#include "undefine.inl"

#if FASTSHARP_X86
#define FS_LEVEL avx2
#define FS_TARGET __attribute__((target("avx2,fma,f16c")))
#define FS_BYTES 32
#define FS_TO_DOUBLE(x) _mm256_cvtps_pd(x)
#define FS_TO_FLOAT(x) _mm256_cvtpd_ps(x)
#define FS_HALVES(p) _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))
#define FS_HALVES_2(p) _mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))
#define FS_BFLOATS(p)                                                                                                                      \
    _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16))
#define FS_BFLOATS_2(p) _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))), 16))
#define FS_STORE_HALVES(p, x) _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT))
#define FS_PRODUCT(x, y) (Word64)(_mm256_mul_epu32((__m256i)(x), (__m256i)(y)))
#define FS_ROOT(x) _mm256_sqrt_pd(x)
#define FS_STREAM(p, x) _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)(x))
#define FS_STREAMED() _mm_sfence()
#include FS_KERNELS
#include "undefine.inl"

#define FS_LEVEL avx512
#define FS_TARGET __attribute__((target("avx512f,avx512dq,avx512vl,avx2,fma,f16c")))
#define FS_BYTES 64
#define FS_TO_DOUBLE(x) _mm512_cvtps_pd(x)
#define FS_TO_FLOAT(x) _mm512_cvtpd_ps(x)
#define FS_HALVES(p) _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))
#define FS_HALVES_2(p) _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))
#define FS_BFLOATS(p)                                                                                                                      \
    _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16))
#define FS_BFLOATS_2(p)                                                                                                                    \
    _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16))
#define FS_STORE_HALVES(p, x) _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT))
#define FS_PRODUCT(x, y) (Word64)(_mm512_mul_epu32((__m512i)(x), (__m512i)(y)))
#define FS_ROOT(x) _mm512_sqrt_pd(x)
#define FS_STREAM(p, x) _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)(x))
#define FS_STREAMED() _mm_sfence()
#include FS_KERNELS
#include "undefine.inl"
#endif
