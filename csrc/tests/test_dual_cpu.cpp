// The dual ops on the CPU under sanitizers: buffers of exactly the size that may be touched, outputs and gaps that start as NaN, every
// instruction set, the same bits for any thread count. Values: derivatives and products against finite differences and plain sums in long
// double; the whole formulas are tested against autograd in tests/ops/test_dual.py.
#include "check_dual.hpp"
#include "fastsharp/dual_activation.hpp"
#include "fastsharp/dual_norm.hpp"
#include "fastsharp/dual_softmax_ce.hpp"

using namespace fastsharp;
using test::at;
using test::poisoned;
using test::real;
using test::Room;
using test::same;

namespace {

template <class T> void check_activation(Extent e, i64 pad) {
    const Extent one{1, e.rows, e.columns};
    const double eps = std::numeric_limits<T>::epsilon();
    Room<T> x(one, pad, true), q(one, pad, true), d1(one, pad, false), d2(one, pad, false), x_t(e, pad, true), y_gt(e, pad, true);
    for (int kind = 0; kind < 8; ++kind) {
        const Curve f{static_cast<Activation>(kind), kind == 0 ? 0.0 : 1.0, kind == 6 ? 20.0 : 1.0, 1};
        CHECK(cpu::activation_prepare<T>(f, one, x.read(), nullptr, d1.view(), d2.view(), 2).ok(), "-");
        d1.check();
        d2.check();
    }
    Room<T> y_t(e, pad, false), first(e, pad, false);
    CHECK(cpu::activation_tangent<T>(e, d1.read(), x_t.read(), {}, y_t.view(), 2).ok(), "-");
    y_t.check();
    std::vector<T> sums_of_one;
    for (const int threads : {1, 3}) {
        Room<T> out(e, pad, false);
        std::vector<T> bias(at(e.b * e.columns), 0);
        auto work = poisoned(cpu::activation_workspace(e));
        CHECK(cpu::activation_adjoint<T>(e, d1.read(), y_gt.read(), q.read(), x_t.read(), out.view(), {bias.data(), e.columns}, work.data(),
                                         threads)
                  .ok(),
              "-");
        out.check();
        for (i64 k = 0; k < e.b; ++k) {
            for (i64 c = 0; c < e.columns; ++c) {
                real sum = 0;
                for (i64 r = 0; r < e.rows; ++r) {
                    const real want = static_cast<real>(d1(0, r, c)) * y_gt(k, r, c) + static_cast<real>(q(0, r, c)) * x_t(k, r, c);
                    test::close(out(k, r, c), want, 4, eps, "adjoint", c);
                    test::close(y_t(k, r, c), static_cast<real>(d1(0, r, c)) * x_t(k, r, c), 2, eps, "tangent", c);
                    sum += out(k, r, c);
                }
                test::close(static_cast<double>(bias[at(k * e.columns + c)]), sum, std::fabs(sum) + static_cast<real>(e.rows), eps, "bias",
                            c);
            }
        }
        CHECK(threads == 1 || (same(bias, sums_of_one) && same(out.data, first.data)), "%d threads change the bits", threads);
        sums_of_one = bias;
        first.data = out.data;
    }
}

template <class T> void check_norm(Extent e, i64 pad, bool center) {
    const Extent one{1, e.rows, e.columns};
    const double eps = std::numeric_limits<T>::epsilon();
    Room<T> x(one, pad, true), y_g(one, pad, true), x_t(e, pad, true), y_gt(e, pad, true), y_t(e, pad, false);
    std::vector<T> w(at(e.columns), static_cast<T>(0.5)), w_t(at(e.b * e.columns), 1);
    auto stats = poisoned(2 * e.rows), x_sums = poisoned(2 * e.b * e.rows), g_sums = poisoned(2 * e.rows);
    auto work = poisoned(cpu::norm_workspace(e));
    CHECK(cpu::norm_prepare<T>(one, x.read(), 0.1, center, stats.data(), 2).ok(), "-");
    const Norm<T> f{x.read(), w.data(), stats.data(), center};
    CHECK(cpu::norm_tangent<T>(e, f, x_t.read(), {w_t.data(), e.columns}, {}, y_t.view(), x_sums.data(), 2).ok(), "-");
    CHECK(cpu::norm_adjoint<T>(one, f, y_g.read(), {}, {}, g_sums.data(), {}, work.data(), 2).ok(), "-");
    y_t.check();
    Room<T> first(e, pad, false);
    for (const int threads : {1, 3}) {
        Room<T> out(e, pad, false);
        std::vector<T> w_gt(at(e.b * e.columns), 0), bias_gt(at(e.b * e.columns), 0);
        const NormSecond<T> second{y_g.read(), g_sums.data(), x_t.read(), x_sums.data(), {w_t.data(), e.columns}};
        CHECK(cpu::norm_adjoint<T>(e, f, y_gt.read(), second, out.view(), nullptr, {{w_gt.data(), e.columns}, {bias_gt.data(), e.columns}},
                                   work.data(), threads)
                  .ok(),
              "-");
        out.check();
        CHECK(threads == 1 || same(out.data, first.data), "%d threads change the bits", threads);
        first.data = out.data;
        for (i64 k = 0; k < e.b; ++k) {
            for (i64 c = 0; c < e.columns; ++c) {
                real sum = 0;
                for (i64 r = 0; r < e.rows; ++r)
                    sum += y_gt(k, r, c);
                test::close(static_cast<double>(bias_gt[at(k * e.columns + c)]), sum, std::fabs(sum) + static_cast<real>(e.rows), eps,
                            "bias", c);
            }
            for (i64 r = 0; r < e.rows && center; ++r) { // layer norm: x_gt has no mean in any row
                real sum = 0, terms = 1;
                for (i64 c = 0; c < e.columns; ++c) {
                    sum += out(k, r, c);
                    terms += std::fabs(out(k, r, c));
                }
                test::close(static_cast<double>(sum), 0, terms, 4 * eps, "mean of x_gt", r);
            }
        }
    }
}

template <class T> void check_softmax(Extent e, i64 pad) {
    const Extent one{1, e.rows, e.columns};
    const double eps = std::numeric_limits<T>::epsilon();
    Room<T> z(one, pad, true), p(one, pad, false), g(one, pad, false), u(e, pad, true), out(e, pad, false);
    std::vector<i64> target(at(e.rows), e.columns - 1);
    std::vector<T> weight(at(e.rows), 2);
    weight[0] = 0;
    target[0] = -100; // not read
    CHECK(cpu::softmax_gradient<T>(one, z.read(), {target.data(), weight.data(), 0.1}, p.view(), g.view(), 2).ok(), "-");
    CHECK(cpu::softmax_product<T>(e, p.read(), weight.data(), u.read(), out.view(), 2).ok(), "-");
    p.check();
    g.check();
    out.check();
    for (i64 r = 0; r < e.rows; ++r) {
        real S = 0;
        for (i64 c = 0; c < e.columns; ++c)
            S += std::exp(static_cast<real>(z(0, r, c)));
        for (i64 c = 0; c < e.columns; ++c) {
            const real want = r == 0 ? 0 : std::exp(static_cast<real>(z(0, r, c))) / S;
            const real slope = r == 0 ? 0 : 2 * (want - (c == e.columns - 1 ? 0.9L : 0.0L) - 0.1L / static_cast<real>(e.columns));
            test::close(p(0, r, c), want, r == 0 ? 0 : 1, eps, "p", c);
            test::close(g(0, r, c), slope, r == 0 ? 0 : 2, eps + 1e-15, "g", c);
        }
        for (i64 k = 0; k < e.b; ++k) {
            real along = 0;
            for (i64 c = 0; c < e.columns; ++c)
                along += static_cast<real>(p(0, r, c)) * u(k, r, c);
            for (i64 c = 0; c < e.columns; ++c)
                test::close(out(k, r, c), r == 0 ? 0 : 2 * p(0, r, c) * (u(k, r, c) - along), r == 0 ? 0 : 4, eps, "product", c);
        }
    }
}

template <class T> void all_sizes() {
    for (const Extent e : {Extent{1, 1, 1}, Extent{2, 3, 7}, Extent{3, 5, 33}, Extent{1, 2, 8300}, Extent{2, 300, 70}}) {
        for (const i64 pad : {0, 3}) {
            check_activation<T>(e, pad);
            check_norm<T>(e, pad, true);
            check_norm<T>(e, pad, false);
            check_softmax<T>(e, pad);
        }
    }
}

} // namespace

int main() {
    test::for_each_level([] {
        all_sizes<float>();
        all_sizes<double>();
    });
}
