// Values and roundings of the storage types by arithmetic alone, the oracle for the bit tricks and instructions of the kernels.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>

#include "fastsharp/types.hpp"

namespace fastsharp::test {

struct Format {
    int digits;   // of the significand, the hidden one included
    int least;    // exponent of the smallest subnormal
    double limit; // the largest finite number
};

template <class S> constexpr Format kFormat{};
template <> constexpr Format kFormat<Half>{11, -24, 65504.0};
template <> constexpr Format kFormat<BFloat16>{8, -133, 3.3895313892515355e38};
template <> constexpr Format kFormat<float>{24, -149, 3.4028234663852886e38};
template <> constexpr Format kFormat<double>{53, -1074, std::numeric_limits<double>::max()};

// The exponent of the last bit of a number of this size.
inline int quantum(Format f, double x) { return x == 0 ? f.least : std::max(std::ilogb(x) - (f.digits - 1), f.least); }

template <class S> double half_ulp(double x) { return std::ldexp(0.5, quantum(kFormat<S>, x)); }

// The finite number of this format nearest to x, ties to even; beyond the largest, infinity.
inline double nearest(Format f, double x) {
    if (!std::isfinite(x) || x == 0)
        return x;
    const int q = quantum(f, x);
    const double y = std::ldexp(std::nearbyint(std::ldexp(x, -q)), q);
    return std::fabs(y) <= f.limit ? y : std::copysign(std::numeric_limits<double>::infinity(), x);
}

inline double value(double x) { return x; }
inline double value(float x) { return static_cast<double>(x); }
inline double value16(std::uint16_t bits, int mantissa_bits, int bias) {
    const int exponent_bits = 15 - mantissa_bits;
    const int m = bits & ((1 << mantissa_bits) - 1);
    const int e = (bits >> mantissa_bits) & ((1 << exponent_bits) - 1);
    const double sign = (bits >> 15) != 0 ? -1 : 1;
    if (e == (1 << exponent_bits) - 1)
        return m != 0 ? std::numeric_limits<double>::quiet_NaN() : sign * std::numeric_limits<double>::infinity();
    return e == 0 ? sign * std::ldexp(m, 1 - bias - mantissa_bits) : sign * std::ldexp(m + (1 << mantissa_bits), e - bias - mantissa_bits);
}
inline double value(Half x) { return value16(x.bits, 10, 15); }
inline double value(BFloat16 x) { return value16(x.bits, 7, 127); }

inline std::uint16_t bits16(double x, Format f, int mantissa_bits, int bias) {
    const unsigned sign = std::signbit(x) ? 0x8000U : 0U;
    const unsigned infinite = ((1U << (15 - mantissa_bits)) - 1U) << mantissa_bits;
    if (std::isnan(x))
        return static_cast<std::uint16_t>(infinite | (1U << (mantissa_bits - 1)));
    const double y = std::fabs(nearest(f, x));
    if (std::isinf(y))
        return static_cast<std::uint16_t>(sign | infinite);
    const auto significand = static_cast<unsigned>(std::ldexp(y, -quantum(f, y)));
    const unsigned hidden = 1U << mantissa_bits;
    if (significand < hidden)
        return static_cast<std::uint16_t>(sign | significand); // subnormal or zero
    const auto e = static_cast<unsigned>(std::ilogb(y) + bias);
    return static_cast<std::uint16_t>(sign | (e << mantissa_bits) | (significand - hidden));
}

// x in the format of S, rounded to nearest even.
template <class S> S rounded(double x);
template <> inline double rounded<double>(double x) { return x; }
template <> inline float rounded<float>(double x) { return static_cast<float>(x); }
template <> inline Half rounded<Half>(double x) { return {bits16(x, kFormat<Half>, 10, 15)}; }
template <> inline BFloat16 rounded<BFloat16>(double x) { return {bits16(x, kFormat<BFloat16>, 7, 127)}; }

inline bool operator==(Half a, Half b) { return a.bits == b.bits; }
inline bool operator==(BFloat16 a, BFloat16 b) { return a.bits == b.bits; }

} // namespace fastsharp::test
