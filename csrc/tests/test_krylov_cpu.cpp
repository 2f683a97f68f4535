// alpha, dots and update on the CPU: against long double sums at odd sizes, on every instruction set, the same bits for any
// thread count. All buffers have exactly the size that may be touched and outputs start as NaN.
#include "check.hpp"
#include "fastsharp/krylov.hpp"
#include "fastsharp/parallel.hpp"
#include "fastsharp/simd.hpp"

using namespace fastsharp;
using test::poisoned;

namespace {

template <class T> struct Results {
    std::vector<double> alpha, dots, update, bare;
    std::vector<T> after_dots, after_update, after_bare;

    bool operator==(const Results& o) const {
        return alpha == o.alpha && dots == o.dots && update == o.update && bare == o.bare && after_dots == o.after_dots &&
               after_update == o.after_update && after_bare == o.after_bare;
    }
};

template <class T> Results<T> run(const test::Problem<T>& p, int threads) {
    Results<T> r{poisoned(1), poisoned(p.j + 1), poisoned(1), poisoned(p.j + 1), p.w, p.w, p.w};
    const std::vector<double> none{0, 0};
    auto small = poisoned(cpu::workspace_size(p.n, 0));
    auto large = poisoned(cpu::workspace_size(p.n, p.j));
    CHECK(cpu::alpha(p.V.data(), p.w.data(), p.n, r.alpha.data(), small.data(), threads).ok(), "alpha");
    CHECK(cpu::dots(p.V.data(), p.ldv, r.after_dots.data(), p.ab.data(), p.j, p.n, r.dots.data(), large.data(), threads).ok(), "dots");
    CHECK(cpu::dots(p.V.data(), p.ldv, r.after_bare.data(), none.data(), p.j, p.n, r.bare.data(), large.data(), threads).ok(), "dots");
    CHECK(cpu::update(p.V.data(), p.ldv, r.after_update.data(), p.c.data(), p.j, p.n, r.update.data(), small.data(), threads).ok(), "up");
    return r;
}

template <class T> void check(i64 j, i64 n, i64 ldv) {
    const test::Problem<T> p(j, n, ldv);
    const Results<T> r = run(p, 1);
    p.check_alpha(r.alpha);
    p.check_dots(r.after_dots, p.ab, r.dots);
    p.check_dots(r.after_bare, {0, 0}, r.bare);
    CHECK(r.after_bare == p.w, "zero coefficients changed w");
    p.check_update(r.after_update, r.update);
    for (const int threads : {2, 3, 7})
        CHECK(run(p, threads) == r, "%d threads change the bits at j = %d", threads, static_cast<int>(j));
}

// An infinite v_j under a zero coefficient must not reach w as 0 * inf.
void zero_coefficient_skips_its_term() {
    const float inf = std::numeric_limits<float>::infinity();
    const std::vector<float> V{1, 1, 1, inf, inf, inf};
    std::vector<float> w{1, 2, 3};
    const std::vector<double> ab{0, 2};
    auto out = poisoned(3);
    auto work = poisoned(cpu::workspace_size(3, 2));
    CHECK(cpu::dots(V.data(), 3, w.data(), ab.data(), 2, 3, out.data(), work.data(), 1).ok(), "dots");
    CHECK((w == std::vector<float>{-1, 0, 1}), "w is %g %g %g", static_cast<double>(w[0]), static_cast<double>(w[1]),
          static_cast<double>(w[2]));
    CHECK(out[2] == 2, "w'w is %g", out[2]);
}

} // namespace

int main() {
    for (const char* level : {"scalar", "avx2", "avx512"}) {
        if (!set_simd(level)) {
            std::printf("%s: not on this CPU\n", level);
            continue;
        }
        for (const i64 n : {1, 2, 7, 31, 255, 257, 1023, 1025, 12289, 20011}) {
            for (const i64 j : {1, 2, 3, 4, 5, 9, 50}) {
                check<float>(j, n, n + 3);
                check<double>(j, n, n);
            }
        }
        zero_coefficient_skips_its_term();
        std::printf("%s: ok\n", level);
    }
    CHECK(!set_simd("avx1024"), "an unknown instruction set was accepted");
    CHECK(!openmp().found(), "this test is to run on std::thread, but found %s", openmp().path.c_str());
}
