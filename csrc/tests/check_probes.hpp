// What probes must write, word by word: Philox-4x32-10 in plain integers, Box-Muller in long double.
#pragma once
#include <array>

#include "check.hpp"

namespace fastsharp::test {

using Words = std::array<std::uint32_t, 4>;

inline Words philox(std::uint64_t seed, std::uint64_t q, std::uint64_t stream) {
    auto low = [](std::uint64_t x) { return static_cast<std::uint32_t>(x & 0xFFFFFFFFU); };
    auto high = [](std::uint64_t x) { return static_cast<std::uint32_t>(x >> 32); };
    Words c{low(q), high(q), low(stream), high(stream)};
    std::uint32_t k0 = low(seed), k1 = high(seed);
    for (int round = 0; round < 10; ++round) {
        const std::uint64_t p0 = std::uint64_t{0xD2511F53U} * c[0], p1 = std::uint64_t{0xCD9E8D57U} * c[2];
        c = {high(p1) ^ c[1] ^ k0, low(p1), high(p0) ^ c[3] ^ k1, low(p0)};
        k0 += 0x9E3779B9U;
        k1 += 0xBB67AE85U;
    }
    return c;
}

// out (b, n) with rows ldo apart, the gaps still NaN.
template <class T> void check_probes(Kind kind, std::uint64_t seed, i64 first, const std::vector<T>& out, i64 ldo, i64 b, i64 n) {
    CHECK((philox(0, 0, 0) == Words{0x6627e8d5U, 0xe169c58dU, 0xbc57ac4cU, 0x9b00dbd8U}), "the oracle misses the known answer");
    const real turn = 2 * std::acos(-1.0L);
    const i64 per_block = kind == Kind::rademacher ? 128 : 4;
    for (i64 r = 0; r < b; ++r) {
        Words c{};
        for (i64 i = 0; i < n; ++i) {
            if (i % per_block == 0)
                c = philox(seed, static_cast<std::uint64_t>(i / per_block), static_cast<std::uint64_t>(first + r));
            const double got = static_cast<double>(out[static_cast<std::size_t>(r * ldo + i)]);
            if (kind == Kind::rademacher) {
                const bool negative = (c[static_cast<std::size_t>(i % 128 / 32)] >> (i % 32) & 1U) != 0;
                CHECK(got == (negative ? -1.0 : 1.0), "probe[%lld] is %g", static_cast<long long>(i), got);
                continue;
            }
            const std::size_t pair = i % 4 < 2 ? 0 : 2;
            const real radius = std::sqrt(-2 * std::log((static_cast<real>(c[pair]) + 1) * 0x1p-32L));
            const real angle = turn * (static_cast<real>(c[pair + 1]) * 0x1p-32L);
            const real want = radius * (i % 2 == 0 ? std::cos(angle) : std::sin(angle));
            // the rounding to float32, and 2^-49 of the radius for the functions of float64
            close(got, want, 1, half_ulp<float>(static_cast<double>(want)) + static_cast<double>(radius) * 0x1p-49, "normal probe", i);
        }
        for (i64 i = n; i < ldo && r + 1 < b; ++i)
            CHECK(std::isnan(static_cast<double>(out[static_cast<std::size_t>(r * ldo + i)])), "a gap between probes was written");
    }
}

} // namespace fastsharp::test
