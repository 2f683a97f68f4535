// The oracle and the checks shared by the C++ tests: long double sums, and buffers of exactly the size that a kernel may touch.
#pragma once
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <vector>

#include "fastsharp/types.hpp"

namespace fastsharp::test {

#define CHECK(condition, ...)                                                                                                              \
    do {                                                                                                                                   \
        if (!(condition)) {                                                                                                                \
            std::fprintf(stderr, "%s:%d: %s\n  ", __FILE__, __LINE__, #condition);                                                         \
            std::fprintf(stderr, __VA_ARGS__);                                                                                             \
            std::fprintf(stderr, "\n");                                                                                                    \
            std::exit(1);                                                                                                                  \
        }                                                                                                                                  \
    } while (false)

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

inline std::vector<double> poisoned(i64 size) { return std::vector<double>(static_cast<std::size_t>(size), kNaN); }

// A fixed sequence in [-1, 1): tests need variety, not randomness.
class Sequence {
public:
    double operator()() {
        state_ = state_ * 6364136223846793005ULL + 1442695040888963407ULL;
        return static_cast<double>(state_ >> 11) / 4503599627370496.0 - 1.0;
    }

private:
    unsigned long long state_ = 12345;
};

template <class T> struct Problem {
    i64 j, n, ldv;
    std::vector<T> V, w; // V ends with its last row: no padding behind it to read into
    std::vector<double> ab, c;

    Problem(i64 rows, i64 columns, i64 stride) : j(rows), n(columns), ldv(stride) {
        Sequence next;
        V.assign(static_cast<std::size_t>((j - 1) * ldv + n), std::numeric_limits<T>::quiet_NaN());
        for (i64 r = 0; r < j; ++r) {
            for (i64 i = 0; i < n; ++i)
                V[at(r, i)] = static_cast<T>(next());
        }
        for (i64 i = 0; i < n; ++i)
            w.push_back(static_cast<T>(next()));
        ab = {next(), next()};
        for (i64 r = 0; r < j; ++r)
            c.push_back(next());
    }
    [[nodiscard]] std::size_t at(i64 r, i64 i) const { return static_cast<std::size_t>(r * ldv + i); }

    // |got - want| <= bound eps sum|terms|, the terms being those of the sum that `got` approximates.
    static void close(double got, long double want, long double terms, double bound, const char* what, i64 k) {
        const long double error = std::fabs(static_cast<long double>(got) - want);
        CHECK(error <= static_cast<long double>(bound) * terms + static_cast<long double>(std::numeric_limits<double>::min()),
              "%s[%lld]: got %.17g, expected %.17Lg, allowed error %.3Lg", what, static_cast<long long>(k), got, want,
              static_cast<long double>(bound) * terms);
    }

    void check_alpha(const std::vector<double>& out) const {
        long double s = 0, terms = 0;
        for (i64 i = 0; i < n; ++i)
            add(V[at(0, i)], w[static_cast<std::size_t>(i)], s, terms);
        close(out[0], s, terms, 1e-13, "alpha", 0);
    }
    void check_dots(const std::vector<T>& after, const std::vector<double>& coefficients, const std::vector<double>& out) const {
        const double eps = std::numeric_limits<T>::epsilon();
        long double ww = 0, ww_terms = 0;
        for (i64 i = 0; i < n; ++i) {
            const T x = after[static_cast<std::size_t>(i)];
            long double want = w[static_cast<std::size_t>(i)];
            want -= static_cast<long double>(coefficients[0]) * static_cast<long double>(V[at(j - 1, i)]);
            if (j >= 2)
                want -= static_cast<long double>(coefficients[1]) * static_cast<long double>(V[at(j - 2, i)]);
            close(static_cast<double>(x), want, 4, eps, "w after dots", i);
            add(x, x, ww, ww_terms);
        }
        close(out[static_cast<std::size_t>(j)], ww, ww_terms, 1e-13, "dots", j);
        for (i64 r = 0; r < j; ++r) {
            long double s = 0, terms = 0;
            for (i64 i = 0; i < n; ++i)
                add(V[at(r, i)], after[static_cast<std::size_t>(i)], s, terms);
            close(out[static_cast<std::size_t>(r)], s, terms, 16 * eps, "dots", r);
        }
    }
    void check_update(const std::vector<T>& after, const std::vector<double>& out) const {
        long double ww = 0, ww_terms = 0;
        for (i64 i = 0; i < n; ++i) {
            const T x = after[static_cast<std::size_t>(i)];
            long double want = w[static_cast<std::size_t>(i)], terms = std::fabs(want);
            for (i64 r = 0; r < j; ++r) {
                const long double term = static_cast<long double>(c[static_cast<std::size_t>(r)]) * static_cast<long double>(V[at(r, i)]);
                want -= term;
                terms += std::fabs(term);
            }
            // one rounding to T of the result, and double roundings of the terms
            const double bound = static_cast<double>(std::numeric_limits<T>::epsilon() * std::fabs(want) + 1e-14L * terms);
            close(static_cast<double>(x), want, 1, bound, "w after update", i);
            add(x, x, ww, ww_terms);
        }
        close(out[0], ww, ww_terms, 1e-13, "update", 0);
    }

private:
    static void add(T x, T y, long double& s, long double& terms) {
        const long double term = static_cast<long double>(x) * static_cast<long double>(y);
        s += term;
        terms += std::fabs(term);
    }
};

} // namespace fastsharp::test
