// The ops on the CPU: against long double sums at odd sizes, for members, several vectors and every storage type, on every instruction
// set, the same bits for any thread count. All buffers have exactly the size that may be touched and outputs start as NaN.
#include <cstring>

#include "check_probes.hpp"
#include "fastsharp/krylov.hpp"
#include "fastsharp/parallel.hpp"
#include "fastsharp/simd.hpp"

using namespace fastsharp;
using test::poisoned;

namespace {

template <class T> bool same(const std::vector<T>& x, const std::vector<T>& y) { // bits: NaN in the gaps is equal to itself
    return x.size() == y.size() && (x.empty() || std::memcmp(x.data(), y.data(), x.size() * sizeof(T)) == 0);
}

template <class S, class T> struct Results {
    std::vector<double> alpha, dots, update;
    std::vector<T> after_dots, after_update, X;
    std::vector<S> row;

    bool operator==(const Results& o) const {
        return same(alpha, o.alpha) && same(dots, o.dots) && same(update, o.update) && same(after_dots, o.after_dots) &&
               same(after_update, o.after_update) && same(X, o.X) && same(row, o.row);
    }
};

constexpr i64 kCombinations = 3;

std::vector<double> combinations(i64 j) {
    test::Sequence next;
    std::vector<double> C;
    for (i64 i = 0; i < kCombinations * j; ++i)
        C.push_back(next());
    return C;
}

// A row is written and terms are removed where b = 1, as the border allows.
template <class S, class T> Results<S, T> run(const test::Case<S, T>& k, int threads) {
    const bool alone = k.b == 1;
    Results<S, T> r{
        poisoned(k.E), poisoned(k.E * k.b * (k.j + 1)), poisoned(k.E * k.b), k.w, k.w, test::poisoned_as<T>(kCombinations * k.n), {}};
    if (alone)
        r.row = test::poisoned_as<S>(k.E * k.n);
    auto small = poisoned(cpu::workspace_size(k.E, k.b, k.n, 0));
    auto large = poisoned(cpu::workspace_size(k.E, k.b, k.n, k.j));
    const Vectors<const T> v{k.last.data(), k.n}, w{k.w.data(), k.w_member};
    CHECK(cpu::alpha<T>(k.E, k.n, v, w, {r.alpha.data(), 1}, small.data(), threads).ok(), "alpha");
    const Removed<T> removed = alone ? k.removed() : Removed<T>{};
    CHECK(cpu::dots(k.on(r.after_dots), removed, k.results(r.dots, k.j + 1), large.data(), threads).ok(), "dots");
    const NextRow<S> next = alone ? k.next_row(r.row) : NextRow<S>{};
    CHECK(cpu::update(k.on(r.after_update), k.coefficients(), next, k.results(r.update, 1), small.data(), threads).ok(), "update");
    const std::vector<double> C = combinations(k.j);
    CHECK(cpu::combine(C.data(), k.j, kCombinations, k.V.data(), k.V_row, k.j, k.n, r.X.data(), k.n, threads).ok(), "combine");
    return r;
}

template <class S, class T> void check(i64 E, i64 b, i64 j, i64 n, i64 pad) {
    const test::Case<S, T> k(E, b, j, n, pad);
    const Results<S, T> r = run(k, 1);
    k.check_alpha(r.alpha);
    k.check_dots(r.after_dots, b == 1, r.dots);
    k.check_update(r.after_update, r.update, r.row);
    k.check_combine(combinations(j), kCombinations, r.X);
    for (const int threads : {2, 5})
        CHECK(run(k, threads) == r, "%d threads change the bits at j = %d", threads, static_cast<int>(j));
}

// An infinite v_j under a zero coefficient must not reach w as 0 * inf.
void zero_coefficient_skips_its_term() {
    const float inf = std::numeric_limits<float>::infinity();
    const std::vector<float> V{1, 1, 1, inf, inf, inf};
    std::vector<float> w{1, 2, 3};
    const std::vector<double> ab{0, 2};
    auto out = poisoned(3);
    auto work = poisoned(cpu::workspace_size(1, 1, 3, 2));
    const Problem<float, float> p{1, 1, 2, 3, V.data(), 6, 3, w.data(), 3, 3};
    CHECK(cpu::dots(p, {ab.data(), 2, {V.data() + 3, 3}, {V.data(), 3}}, {out.data(), 3, 3}, work.data(), 1).ok(), "dots");
    CHECK((w == std::vector<float>{-1, 0, 1}), "w is %g %g %g", static_cast<double>(w[0]), static_cast<double>(w[1]),
          static_cast<double>(w[2]));
    CHECK(out[2] == 2, "w'w is %g", out[2]);
}

template <class T> void check_probes(i64 n) {
    for (const Kind kind : {Kind::rademacher, Kind::normal}) {
        const i64 ldo = n + 3, b = 2;
        const i64 first = (i64{1} << 33) + 7;
        const std::uint64_t seed = 0xFEDCBA9876543210U;
        auto out = test::poisoned_as<T>((b - 1) * ldo + n);
        CHECK(cpu::probes(kind, seed, first, out.data(), ldo, b, n, 3).ok(), "probes");
        test::check_probes(kind, seed, first, out, ldo, b, n);
    }
}

} // namespace

int main() {
    test::for_each_level([] {
        for (const i64 n : {1, 7, 31, 257, 1025, 2049, 6007}) {
            for (const i64 j : {1, 2, 4, 9}) {
                check<float, float>(1, 1, j, n, 3);
                check<double, double>(1, 1, j, n, 0);
                check<Half, float>(2, 1, j, n, 1);
                check<BFloat16, float>(1, 3, j, n, 5);
            }
        }
        for (const i64 b : {2, 5, 8, 15}) {
            check<float, float>(2, b, 5, 2309, 3);
            check<Half, float>(1, b, 6, 2309, 2);
            check<double, double>(2, b, 3, 1100, 1);
        }
        check<BFloat16, float>(3, 1, 5, 2309, 3);
        for (const i64 n : {1, 3, 127, 129, 4099}) {
            check_probes<float>(n);
            check_probes<double>(n);
        }
        check_probes<float>(70001);
        check<float, float>(1, 1, 2, 180007, 0); // 2 MiB of combinations: written past the caches
        check_probes<double>(132003);
        zero_coefficient_skips_its_term();
    });
    CHECK(!set_simd("avx1024"), "an unknown instruction set was accepted");
    CHECK(!openmp().found(), "this test is to run on std::thread, but found %s", openmp().path.c_str());
}
