// Random entries by Philox-4x32-10, as many blocks at once as a register has 64-bit lanes; see levels.inl.

namespace fastsharp::cpu::FS_LEVEL {

namespace {

#include "registers.inl"

#include "stream.inl"

// Words live in the low halves of 64-bit lanes: that is what the widening product takes. High halves hold leftovers until the end.
using Word64 = std::uint64_t __attribute__((vector_size(FS_BYTES)));
using Word32 = std::uint32_t __attribute__((vector_size(FS_BYTES)));
using Flag32 = std::int32_t __attribute__((vector_size(FS_BYTES)));

struct Block {
    Word64 a, b, c, d;
};

FS_INLINE Block philox(Word64 q, Key key) {
    const Word64 low = Word64{} + 0xFFFFFFFFU;
    Word64 a = q, b = q >> 32, c = Word64{} + key.stream, d = Word64{} + (key.stream >> 32);
    std::uint32_t k0 = static_cast<std::uint32_t>(key.seed), k1 = static_cast<std::uint32_t>(key.seed >> 32);
    for (int round = 0; round < 10; ++round) {
        const Word64 p0 = FS_PRODUCT(a, (Word64{} + 0xD2511F53U));
        const Word64 p1 = FS_PRODUCT(c, (Word64{} + 0xCD9E8D57U));
        a = (p1 >> 32) ^ b ^ std::uint64_t{k0};
        b = p1;
        c = (p0 >> 32) ^ d ^ std::uint64_t{k1};
        d = p0;
        k0 += 0x9E3779B9U;
        k1 += 0xBB67AE85U;
    }
    return {a & low, b & low, c & low, d & low};
}

FS_INLINE Word64 counters(i64 q) {
    Word64 x{};
    for (i64 k = 0; k < kWide; ++k)
        x[k] = static_cast<std::uint64_t>(q + k);
    return x;
}

// 128 entries a block: -1 where the bit is set.
FS_TARGET void rademacher(Key key, i64 q, i64 blocks, float* out) {
    Word32 bits{};
    for (unsigned k = 0; k < FS_BYTES / 4; ++k)
        bits[k] = 1U << k;
    const Word32 plus = Word32{} + 0x3F800000U;
    const Word32 sign = Word32{} + 0x80000000U;
    for (i64 done = 0; done < blocks; done += kWide) {
        const Block x = philox(counters(q + done), key);
        const Word64 words[4] = {x.a, x.b, x.c, x.d};
        for (i64 k = 0; k < kWide && done + k < blocks; ++k) {
            for (int m = 0; m < 4; ++m) {
                const auto word = static_cast<std::uint32_t>(words[m][k]);
                float* to = out + (done + k) * 128 + m * 32;
                for (unsigned s = 0; s < 32; s += FS_BYTES / 4) {
                    const Word32 mine = (Word32{} + (word >> s)) & bits;
                    const Word32 entries = plus | (sign & (Word32)(Flag32)(mine == bits));
                    __builtin_memcpy(to + s, &entries, sizeof entries);
                }
            }
        }
    }
}

// Integers below 2^32 as doubles: they are the low bits of 2^52 + x.
FS_INLINE Wide real(Word64 x) { return (Wide)(x | 0x4330000000000000U) - 0x1p52; }

FS_INLINE Wide choose(Word64 mask, Wide yes, Wide no) { return (Wide)(((Word64)yes & mask) | ((Word64)no & ~mask)); }

// ln u for normal u > 0: u = m 2^e with m in [sqrt(1/2), sqrt(2)), ln m = 2 artanh((m - 1) / (m + 1)); relative error below 2^-50.
FS_INLINE Wide logarithm(Wide u) {
    const Word64 bits = (Word64)u;
    const Word64 shifted = bits - 0x3FE6A09E667F3BCDU;                 // sqrt(1/2)
    const Word64 exponent = (shifted >> 52) - ((shifted >> 63) << 12); // signed
    const Wide m = (Wide)(bits - (exponent << 52));
    const Wide e = (Wide)((exponent + 0x400U) | 0x4330000000000000U) - (0x1p52 + 0x400);
    const Wide s = (m - 1.0) / (m + 1.0);
    const Wide z = s * s;
    Wide p = Wide{} + 1.0 / 21;
    for (const double odd : {19.0, 17.0, 15.0, 13.0, 11.0, 9.0, 7.0, 5.0, 3.0})
        p = p * z + 1.0 / odd;
    return e * 0.693147180559945309417 + (2 * s + 2 * s * z * p);
}

struct Angle {
    Wide cos, sin;
};

// cos and sin of 2 pi x for x in [0, 1): x = q / 4 + r with |r| <= 1/8, Taylor polynomials to 2^-53 on [-pi/4, pi/4].
FS_INLINE Angle turn(Wide x) {
    const Wide shifter = Wide{} + 0x1.8p52;
    const Wide rounded = x * 4.0 + shifter;
    const Word64 q = (Word64)rounded & 3U;
    const Wide t = (x - (rounded - shifter) * 0.25) * 6.283185307179586476925;
    const Wide z = t * t;
    Wide s = Wide{} - 1.0 / 1307674368000.0;
    for (const double c : {1.0 / 6227020800.0, -1.0 / 39916800.0, 1.0 / 362880.0, -1.0 / 5040.0, 1.0 / 120.0, -1.0 / 6.0})
        s = s * z + c;
    s = t + t * z * s;
    Wide c = Wide{} + 1.0 / 20922789888000.0;
    for (const double k : {-1.0 / 87178291200.0, 1.0 / 479001600.0, -1.0 / 3628800.0, 1.0 / 40320.0, -1.0 / 720.0, 1.0 / 24.0, -0.5})
        c = c * z + k;
    c = c * z + 1.0;
    const Word64 odd = Word64{} - (q & 1U);
    const Word64 cos_sign = ((q + 1U) & 2U) << 62;
    const Word64 sin_sign = (q & 2U) << 62;
    return {(Wide)((Word64)choose(odd, s, c) ^ cos_sign), (Wide)((Word64)choose(odd, c, s) ^ sin_sign)};
}

FS_INLINE Wide root(Wide x) {
    for (i64 k = 0; k < kWide; ++k)
        x[k] = __builtin_sqrt(x[k]);
    return x;
}

// 4 entries a block: Box-Muller of two pairs of words.
FS_TARGET void normal(Key key, i64 q, i64 blocks, float* out) {
    for (i64 done = 0; done < blocks; done += kWide) {
        const Block x = philox(counters(q + done), key);
        float z[4][kWide];
        const Word64 words[4] = {x.a, x.b, x.c, x.d};
        for (int pair = 0; pair < 2; ++pair) {
            const Wide radius = FS_ROOT(-2.0 * logarithm((real(words[2 * pair]) + 1.0) * 0x1p-32));
            const Angle angle = turn(real(words[2 * pair + 1]) * 0x1p-32);
            store(z[2 * pair], radius * angle.cos);
            store(z[2 * pair + 1], radius * angle.sin);
        }
        float* to = out + done * 4;
        if (done + kWide <= blocks) { // a constant count, for the compiler to interleave whole registers
            for (i64 k = 0; k < kWide; ++k) {
                for (int m = 0; m < 4; ++m)
                    to[k * 4 + m] = z[m][k];
            }
        } else {
            for (i64 k = 0; k < blocks - done; ++k) {
                for (int m = 0; m < 4; ++m)
                    to[k * 4 + m] = z[m][k];
            }
        }
    }
}

template <class T> FS_TARGET void fill(Generate generate, i64 per_block, Key key, i64 start, i64 end, T* row, bool past) {
    alignas(64) float piece[kPiece];
    for (i64 i = start; i < end; i += kPiece) {
        const i64 length = end - i < kPiece ? end - i : kPiece;
        generate(key, i / per_block, ceil_div(length, per_block), piece);
        if constexpr (sizeof(T) == sizeof(float)) {
            put_row(row + i, piece, length, past);
        } else {
            alignas(64) T wide[kPiece];
            for (i64 k = 0; k < length; ++k)
                wide[k] = one(piece[k]);
            put_row(row + i, wide, length, past);
        }
    }
    FS_STREAMED();
}

} // namespace

template <class T> inline constexpr Generators<T> kGenerators{rademacher, normal, fill<T>};

} // namespace fastsharp::cpu::FS_LEVEL
