// The oracle and the checks shared by the C++ tests: long double sums, and buffers of exactly the size that a kernel may touch.
#pragma once
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <vector>

#include "fastsharp/krylov.hpp"
#include "fastsharp/simd.hpp"
#include "rounding.hpp"

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

using real = long double;

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

inline std::vector<double> poisoned(i64 size) { return std::vector<double>(static_cast<std::size_t>(size), kNaN); }
template <class S> std::vector<S> poisoned_as(i64 size) { return std::vector<S>(static_cast<std::size_t>(size), rounded<S>(kNaN)); }

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

// |got - want| <= bound * terms, the terms being those of the sum that `got` approximates.
inline void close(double got, real want, real terms, double bound, const char* what, i64 k) {
    const real allowed = static_cast<real>(bound) * terms + static_cast<real>(std::numeric_limits<double>::min());
    CHECK(std::fabs(static_cast<real>(got) - want) <= allowed, "%s[%lld]: got %.17g, expected %.17Lg, allowed error %.3Lg", what,
          static_cast<long long>(k), got, want, allowed);
}

// f() for every instruction set of this CPU.
template <class F> void for_each_level(F f) {
    for (const char* level : {"scalar", "avx2", "avx512"}) {
        if (!set_simd(level)) {
            std::printf("%s: not on this CPU\n", level);
            continue;
        }
        f();
        std::printf("%s: ok\n", level);
    }
}

// A sum of products and of their moduli.
struct Sum {
    real value = 0, terms = 0;
    void add(double x, double y) {
        const real term = static_cast<real>(x) * static_cast<real>(y);
        value += term;
        terms += std::fabs(term);
    }
};

// Inputs of one problem: V (E, j, n) and w (E, b, n), rows `pad` and members `2 pad` elements further apart than they must be. The gaps
// hold NaN: nobody may read them. Both storages end with their last row.
template <class S, class T> struct Case {
    i64 E, b, j, n, V_row, V_member, w_row, w_member;
    std::vector<S> V;
    std::vector<T> w, last, before;
    std::vector<double> ab, c, factor;

    Case(i64 members, i64 vectors, i64 rows, i64 columns, i64 pad)
        : E(members), b(vectors), j(rows), n(columns), V_row(n + pad), V_member(j * V_row + pad), w_row(n + pad),
          w_member(b * w_row + pad) {
        Sequence next;
        V = poisoned_as<S>((E - 1) * V_member + (j - 1) * V_row + n);
        w = poisoned_as<T>((E - 1) * w_member + (b - 1) * w_row + n);
        for (i64 e = 0; e < E; ++e) {
            for (i64 r = 0; r < j; ++r) {
                for (i64 i = 0; i < n; ++i)
                    V[V_at(e, r, i)] = rounded<S>(next());
            }
            for (i64 k = 0; k < b; ++k) {
                for (i64 i = 0; i < n; ++i)
                    w[w_at(e, k, i)] = rounded<T>(next());
            }
        }
        for (i64 i = 0; i < E * n; ++i) {
            last.push_back(rounded<T>(next()));
            before.push_back(rounded<T>(next()));
        }
        for (i64 i = 0; i < 2 * E; ++i)
            ab.push_back(next());
        for (i64 i = 0; i < E * b * j; ++i)
            c.push_back(next());
        for (i64 e = 0; e < E; ++e)
            factor.push_back(3 * next());
    }

    [[nodiscard]] std::size_t V_at(i64 e, i64 r, i64 i) const { return static_cast<std::size_t>(e * V_member + r * V_row + i); }
    [[nodiscard]] std::size_t w_at(i64 e, i64 k, i64 i) const { return static_cast<std::size_t>(e * w_member + k * w_row + i); }
    static std::size_t at(i64 i) { return static_cast<std::size_t>(i); }

    // The arguments of a kernel, with `x` (laid out as w) in place of w.
    [[nodiscard]] Problem<S, T> on(std::vector<T>& x) const { return {E, b, j, n, V.data(), V_member, V_row, x.data(), w_member, w_row}; }
    [[nodiscard]] Removed<T> removed() const { return {ab.data(), 2, {last.data(), n}, {j >= 2 ? before.data() : nullptr, n}}; }
    [[nodiscard]] Scalars<const double> coefficients() const { return {c.data(), b * j, j}; }
    [[nodiscard]] NextRow<S> next_row(std::vector<S>& row) const { return {row.data(), n, factor.data(), 1}; }
    [[nodiscard]] Scalars<double> results(std::vector<double>& out, i64 width) const { return {out.data(), b * width, width}; }

    // out[e] = last_e'w of the first vector of each member.
    void check_alpha(const std::vector<double>& out) const {
        for (i64 e = 0; e < E; ++e) {
            Sum s;
            for (i64 i = 0; i < n; ++i)
                s.add(value(last[at(e * n + i)]), value(w[w_at(e, 0, i)]));
            close(out[at(e)], s.value, s.terms, 1e-13, "alpha", e);
        }
    }

    // With `removal` as removed() asks; else w must be as it was. out is (E, b, j + 1).
    void check_dots(const std::vector<T>& after, bool removal, const std::vector<double>& out) const {
        const double eps = std::numeric_limits<T>::epsilon();
        check_gaps(after);
        for (i64 e = 0; e < E; ++e) {
            for (i64 k = 0; k < b; ++k) {
                Sum ww;
                for (i64 i = 0; i < n; ++i) {
                    const double x = value(after[w_at(e, k, i)]);
                    real want = value(w[w_at(e, k, i)]);
                    if (removal)
                        want -= static_cast<real>(ab[at(2 * e)]) * last[at(e * n + i)];
                    if (removal && j >= 2)
                        want -= static_cast<real>(ab[at(2 * e + 1)]) * before[at(e * n + i)];
                    close(x, want, removal ? 4 : 0, eps, "w after dots", i);
                    ww.add(x, x);
                }
                const double* mine = out.data() + (e * b + k) * (j + 1);
                close(mine[j], ww.value, ww.terms, 1e-13, "dots", j);
                for (i64 r = 0; r < j; ++r) {
                    Sum s;
                    for (i64 i = 0; i < n; ++i)
                        s.add(value(V[V_at(e, r, i)]), value(after[w_at(e, k, i)]));
                    close(mine[r], s.value, s.terms, 16 * eps, "dots", r);
                }
            }
        }
    }

    // out is (E, b); row (E, n) or empty.
    void check_update(const std::vector<T>& after, const std::vector<double>& out, const std::vector<S>& row) const {
        check_gaps(after);
        for (i64 e = 0; e < E; ++e) {
            for (i64 k = 0; k < b; ++k) {
                Sum ww;
                for (i64 i = 0; i < n; ++i) {
                    const double x = value(after[w_at(e, k, i)]);
                    real want = value(w[w_at(e, k, i)]), terms = std::fabs(want);
                    for (i64 r = 0; r < j; ++r) {
                        const real term = static_cast<real>(c[at((e * b + k) * j + r)]) * value(V[V_at(e, r, i)]);
                        want -= term;
                        terms += std::fabs(term);
                    }
                    // one rounding to T of the result, and double roundings of the terms
                    const real bound = std::numeric_limits<T>::epsilon() * std::fabs(want) + 1e-14L * terms;
                    close(x, want, 1, static_cast<double>(bound), "w after update", i);
                    ww.add(x, x);
                    if (!row.empty()) {
                        const double target = factor[at(e)] * x;
                        close(value(row[at(e * n + i)]), target, 1, half_ulp<S>(target) * (1 + 1e-3), "row", i);
                    }
                }
                close(out[at(e * b + k)], ww.value, ww.terms, 1e-13, "update", k);
            }
        }
    }

    // X (k, n) = C (k, j) V for the first member.
    void check_combine(const std::vector<double>& C, i64 k, const std::vector<T>& X) const {
        for (i64 q = 0; q < k; ++q) {
            for (i64 i = 0; i < n; ++i) {
                Sum s;
                for (i64 r = 0; r < j; ++r)
                    s.add(C[at(q * j + r)], value(V[V_at(0, r, i)]));
                const real bound = std::numeric_limits<T>::epsilon() * std::fabs(s.value) + 1e-14L * s.terms;
                close(value(X[at(q * n + i)]), s.value, 1, static_cast<double>(bound), "combine", i);
            }
        }
    }

private:
    void check_gaps(const std::vector<T>& after) const {
        CHECK(after.size() == w.size(), "the size of w changed");
        for (std::size_t i = 0; i < w.size(); ++i)
            CHECK(!std::isnan(value(w[i])) || std::isnan(value(after[i])), "a gap between rows was written at %zu", i);
    }
};

} // namespace fastsharp::test
