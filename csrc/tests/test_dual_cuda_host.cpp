// The CUDA kernels of the dual ops, executed by host_shim.hpp: against the CPU kernels, in several launch shapes, with NaN in every output
// and every gap. A second run gives the same bits, and so does a vector alone, at another alignment, in another grid.
#include "check_dual.hpp"
#include "fastsharp/dual_activation.hpp"
#include "fastsharp/dual_norm.hpp"
#include "fastsharp/dual_softmax_ce.hpp"
#include "host_shim.hpp"

using namespace fastsharp;
using cuda::RowLaunch;
using test::at;
using test::poisoned;
using test::Room;

namespace {

constexpr int kKinds = 8;

Curve curve(int kind) { return {static_cast<Activation>(kind), kind == 0 ? 0.1 : 1.1, kind == 6 ? 0.8 : 1.2, 0.9}; }

template <class T> struct Inputs {
    Extent e;
    i64 pad, shift;
    Room<T> x, y_g, q, w;                 // of the primal pass; w is one row
    Room<T> x_t, y_gt, bias_t, w_t, w_gt; // of the vectors
    std::vector<i64> target;
    std::vector<T> weight;

    Inputs(Extent sizes, i64 gap)
        : e(sizes), pad(gap), shift(0), x(primal(), gap, true), y_g(primal(), gap, true), q(primal(), gap, true), w(row(1), 0, true),
          x_t(e, gap, true), y_gt(e, gap, true), bias_t(row(e.b), gap, true), w_t(row(e.b), gap, true), w_gt(row(e.b), gap, true) {
        for (i64 r = 0; r < e.rows; ++r) {
            target.push_back(r * 5 % e.columns);
            weight.push_back(static_cast<T>(r % 3 == 2 ? 0 : 0.5 + static_cast<double>(r)));
            if (weight.back() == 0) { // a row that nobody may read
                target.back() = -100;
                for (i64 c = 0; c < e.columns; ++c)
                    q.data[q.place(0, r, c)] = std::numeric_limits<T>::infinity();
            }
        }
    }
    // Vector k alone, packed and at another address.
    Inputs(const Inputs& all, i64 k)
        : e{1, all.e.rows, all.e.columns}, pad(2), shift(1), x(all.x, 0, 2, 1), y_g(all.y_g, 0, 2, 1), q(all.q, 0, 2, 1), w(all.w, 0, 0, 1),
          x_t(all.x_t, k, 2, 1), y_gt(all.y_gt, k, 2, 1), bias_t(all.bias_t, k, 2, 1), w_t(all.w_t, k, 2, 1), w_gt(all.w_gt, k, 2, 1),
          target(all.target), weight(all.weight) {}
    [[nodiscard]] Extent primal() const { return {1, e.rows, e.columns}; }
    [[nodiscard]] Extent row(i64 b) const { return {b, 1, e.columns}; }
    [[nodiscard]] Room<T> out() const { return Room<T>(e, pad, false, shift); }
    [[nodiscard]] Room<T> primal_out() const { return Room<T>(primal(), pad, false, shift); }
};

template <class T> struct Results {
    std::vector<Room<T>> rooms;
    std::vector<std::vector<double>> pairs; // (b, rows, 2), or (rows, 2) of the primal pass

    void check() const {
        for (const Room<T>& room : rooms)
            room.check();
        for (const auto& pair : pairs) {
            for (const double x : pair)
                CHECK(std::isfinite(x), "a sum was not written");
        }
    }
};

// launch null: the CPU's kernels.
#define FS_RUN(op, ...) CHECK((launch == nullptr ? cpu::op<T>(__VA_ARGS__, 1) : cuda::op<T>(__VA_ARGS__, *launch, 1, nullptr)).ok(), #op)

template <class T> Results<T> activations(const Inputs<T>& in, const RowLaunch* launch) {
    Results<T> all;
    const Extent one = in.primal();
    for (int kind = 0; kind < kKinds; ++kind) {
        Room<T> d1 = in.primal_out(), d2 = in.primal_out(), alone = in.primal_out();
        FS_RUN(activation_prepare, curve(kind), one, in.x.read(), in.w.read().data, d1.view(), d2.view());
        FS_RUN(activation_prepare, curve(kind), one, in.x.read(), nullptr, alone.view(), {});
        for (const auto& room : {d1, d2, alone})
            all.rooms.push_back(room);
    }
    auto work = poisoned(launch == nullptr ? cpu::activation_workspace(in.e) : cuda::activation_workspace(in.e, *launch));
    Room<T> with_bias = in.out(), without = in.out(), both = in.out(), first = in.out(), place = in.y_gt, other = in.x_t, bias = in.w_gt;
    FS_RUN(activation_tangent, in.e, in.x.read(), in.x_t.read(), in.bias_t.columns_read(), with_bias.view());
    FS_RUN(activation_tangent, in.e, in.x.read(), in.x_t.read(), {}, without.view());
    FS_RUN(activation_adjoint, in.e, in.x.read(), in.y_gt.read(), in.y_g.read(), in.x_t.read(), both.view(), bias.columns_view(),
           work.data());
    FS_RUN(activation_adjoint, in.e, in.x.read(), in.y_gt.read(), {}, {}, first.view(), {}, nullptr);
    FS_RUN(activation_adjoint, in.e, in.x.read(), place.read(), {}, {}, place.view(), {}, nullptr);
    FS_RUN(activation_adjoint, in.e, in.x.read(), in.y_gt.read(), in.y_g.read(), other.read(), other.view(), {}, nullptr);
    for (const auto& room : {with_bias, without, both, bias, first, place, other})
        all.rooms.push_back(room);
    return all;
}

template <class T> Results<T> norms(const Inputs<T>& in, bool center, const RowLaunch* launch) {
    Results<T> all;
    const Extent e = in.e, one = in.primal();
    auto stats = poisoned(2 * e.rows), x_sums = poisoned(2 * e.b * e.rows), alone_sums = x_sums, out_sums = x_sums;
    auto g_sums = poisoned(2 * e.rows);
    auto work = poisoned(launch == nullptr ? cpu::norm_workspace(e) : cuda::norm_workspace(e, *launch));
    FS_RUN(norm_prepare, one, in.x.read(), 0.1, center, stats.data());
    const Norm<T> f{in.x.read(), in.w.read().data, stats.data(), center}, bare{in.x.read(), nullptr, stats.data(), center};
    Room<T> y_t = in.out(), plain = in.out(), x_g = in.primal_out(), x_gt = in.out(), w_only = in.out(), place = in.y_gt, other = in.x_t;
    Room<T> w_gt = in.w_gt, bias_gt = in.bias_t, w_alone = in.w_gt, bias_alone = in.bias_t;
    FS_RUN(norm_tangent, e, f, in.x_t.read(), in.w_t.columns_read(), in.bias_t.columns_read(), y_t.view(), x_sums.data());
    FS_RUN(norm_tangent, e, bare, in.x_t.read(), {}, {}, plain.view(), alone_sums.data());
    FS_RUN(norm_tangent, e, bare, in.x_t.read(), {}, {}, {}, alone_sums.data());
    FS_RUN(norm_adjoint, one, f, in.y_g.read(), {}, x_g.view(), g_sums.data(), {}, nullptr);
    const auto second = [&](const Room<T>* x_t, const Room<T>* w_t) {
        return NormSecond<T>{in.y_g.read(), g_sums.data(), x_t == nullptr ? Rows<const T>{} : x_t->read(), x_sums.data(),
                             w_t == nullptr ? Columns<const T>{} : w_t->columns_read()};
    };
    FS_RUN(norm_adjoint, e, f, in.y_gt.read(), second(&in.x_t, &in.w_t), x_gt.view(), out_sums.data(),
           {w_gt.columns_view(), bias_gt.columns_view()}, work.data());
    FS_RUN(norm_adjoint, e, f, {}, second(nullptr, &in.w_t), w_only.view(), nullptr, {w_alone.columns_view(), {}}, work.data());
    FS_RUN(norm_adjoint, e, f, place.read(), second(&in.x_t, nullptr), place.view(), nullptr, {{}, bias_alone.columns_view()}, work.data());
    FS_RUN(norm_adjoint, e, bare, in.y_gt.read(), second(&other, nullptr), other.view(), nullptr, {}, nullptr);
    for (const auto& room : {y_t, plain, x_g, x_gt, w_only, place, other, w_gt, bias_gt, w_alone, bias_alone})
        all.rooms.push_back(room);
    all.pairs = {stats, x_sums, alone_sums, g_sums, out_sums};
    return all;
}

// The logits are q, whose rows of weight zero hold infinities.
template <class T> Results<T> softmax(const Inputs<T>& in, const RowLaunch* launch) {
    Results<T> all;
    const Extent one = in.primal();
    const CrossEntropy<T> loss{in.target.data(), in.weight.data(), 0.1};
    Room<T> p = in.primal_out(), g = in.primal_out(), p_alone = in.primal_out(), place = in.x, out = in.out(), plain = in.x_t;
    FS_RUN(softmax_gradient, one, in.q.read(), loss, p.view(), g.view());
    FS_RUN(softmax_gradient, one, in.x.read(), CrossEntropy<T>{}, p_alone.view(), {});
    FS_RUN(softmax_gradient, one, place.read(), CrossEntropy<T>{}, place.view(), {});
    FS_RUN(softmax_product, in.e, p.read(), in.weight.data(), in.x_t.read(), out.view());
    FS_RUN(softmax_product, in.e, p_alone.read(), nullptr, plain.read(), plain.view());
    for (const auto& room : {p, g, p_alone, place, out, plain})
        all.rooms.push_back(room);
    return all;
}
#undef FS_RUN

template <class T> Results<T> everything(const Inputs<T>& in, const RowLaunch* launch) {
    Results<T> all;
    for (const auto& part : {activations(in, launch), norms(in, true, launch), norms(in, false, launch), softmax(in, launch)}) {
        all.rooms.insert(all.rooms.end(), part.rooms.begin(), part.rooms.end());
        all.pairs.insert(all.pairs.end(), part.pairs.begin(), part.pairs.end());
    }
    all.check();
    CHECK(shim::device == 0, "the caller's device was not restored");
    return all;
}

// Both sides compute in double and round once (activations in T, two roundings or three); entries are of order one.
template <class T> void close(const Results<T>& got, const Results<T>& want) {
    CHECK(got.rooms.size() == want.rooms.size() && got.pairs.size() == want.pairs.size(), "-");
    for (std::size_t i = 0; i < got.rooms.size(); ++i) {
        const Room<T>& room = want.rooms[i];
        double scale = 1;
        for (const T x : room.data)
            scale = std::fabs(static_cast<double>(x)) > scale ? std::fabs(static_cast<double>(x)) : scale;
        for (i64 k = 0; k < room.b * room.rows * room.columns; ++k) {
            const i64 r = k / room.columns;
            test::close(got.rooms[i](r / room.rows, r % room.rows, k % room.columns), room(r / room.rows, r % room.rows, k % room.columns),
                        scale, 2 * std::numeric_limits<T>::epsilon() + 1e-14, "room", static_cast<i64>(i));
        }
    }
    for (std::size_t i = 0; i < got.pairs.size(); ++i) {
        for (std::size_t k = 0; k < got.pairs[i].size(); ++k)
            test::close(got.pairs[i][k], want.pairs[i][k], 1 + std::fabs(want.pairs[i][k]), 1e-14, "pairs", static_cast<i64>(i));
    }
}

template <class T> bool same(const Results<T>& a, const Results<T>& b) {
    for (std::size_t i = 0; i < a.rooms.size(); ++i) {
        if (!test::same(a.rooms[i].data, b.rooms[i].data))
            return false;
    }
    return a.pairs == b.pairs;
}

template <class T> void check(Extent e, i64 pad, RowLaunch launch) {
    const Inputs<T> in(e, pad);
    const Results<T> got = everything(in, &launch);
    close(got, everything<T>(in, nullptr));
    CHECK(same(everything(in, &launch), got), "a second run gives other bits");
    RowLaunch other = launch;
    other.grid = launch.grid + 3;
    CHECK(same(everything(in, &other), got), "another grid gives other bits");
    const Results<T> last = everything(Inputs<T>(in, e.b - 1), &launch);
    for (std::size_t i = 0; i < got.rooms.size(); ++i) {
        const Room<T>& room = got.rooms[i];
        const Room<T> alone(last.rooms[i], 0, 0, 0), part(room, room.b - 1, 0, 0);
        CHECK(test::same(alone.data, part.data), "result %d of a vector alone has other bits", static_cast<int>(i));
    }
}

// -inf is a probability of zero, also for a whole lane and before the first finite logit; NaN and +inf take their row.
template <class T> void logits_that_are_not_finite() {
    const double inf = std::numeric_limits<double>::infinity(), nan = test::kNaN;
    const i64 n = 300;
    for (const double bad : {-inf, inf, nan}) {
        Room<T> z({1, 2, n}, 0, true), p({1, 2, n}, 0, false);
        for (i64 c = 0; c < (bad < 0 ? 290 : 1); ++c)
            z.data[at(c)] = static_cast<T>(bad);
        CHECK(cuda::softmax_gradient<T>({1, 2, n}, z.read(), {}, p.view(), {}, {1, 64, 64, 1}, 0, nullptr).ok(), "-");
        test::real S = 0;
        for (i64 c = 290; c < n; ++c)
            S += std::exp(static_cast<test::real>(z(0, 0, c)));
        for (i64 c = 0; c < n; ++c) {
            const test::real want = c < 290 ? 0 : std::exp(static_cast<test::real>(z(0, 0, c))) / S;
            if (bad < 0)
                test::close(p(0, 0, c), want, want, std::numeric_limits<T>::epsilon(), "p", c);
            else
                CHECK(std::isnan(p(0, 0, c)), "p[%d] is %g", static_cast<int>(c), p(0, 0, c));
            CHECK(std::isfinite(p(0, 1, c)), "the next row is touched");
        }
    }
}

void failures_name_the_kernel_and_the_error() {
    float x = 1, y = 1;
    double stats[2] = {0, 1}, sums[2];
    const RowLaunch launch{1, 32, 32, 1};
    const Extent e{1, 1, 1};
    const Rows<const float> in{&x, 1, 1};
    const Rows<float> out{&y, 1, 1};
    const Norm<float> f{in, nullptr, stats, true};
    const auto call = [&](int op, int device) {
        switch (op) {
        case 0:
            return cuda::activation_prepare<float>(curve(0), e, in, nullptr, out, {}, launch, device, nullptr);
        case 1:
            return cuda::activation_tangent<float>(e, in, in, {}, out, launch, device, nullptr);
        case 2:
            return cuda::activation_adjoint<float>(e, in, in, {}, {}, out, {}, nullptr, launch, device, nullptr);
        case 3:
            return cuda::norm_prepare<float>(e, in, 1, true, sums, launch, device, nullptr);
        case 4:
            return cuda::norm_tangent<float>(e, f, in, {}, {}, out, sums, launch, device, nullptr);
        case 5:
            return cuda::norm_adjoint<float>(e, f, in, {}, out, nullptr, {}, nullptr, launch, device, nullptr);
        case 6:
            return cuda::softmax_gradient<float>(e, in, {}, out, {}, launch, device, nullptr);
        default:
            return cuda::softmax_product<float>(e, in, nullptr, in, out, launch, device, nullptr);
        }
    };
    const char* names[] = {"activation_prepare", "activation_tangent", "activation_adjoint", "norm_prepare",
                           "norm_tangent",       "norm_adjoint",       "softmax_gradient",   "softmax_product"};
    for (int op = 0; op < 8; ++op) {
        shim::next_error = 700;
        CHECK(message(call(op, 0)) == std::string(names[op]) + ": emulated failure", "op %d", op);
        CHECK(message(call(op, 7)) == std::string(names[op]) + ": invalid device ordinal", "op %d", op);
        shim::device = 0;
    }
}

void launch_fits_the_sizes() {
    const RowLaunch small = RowLaunch::of({8, 1000, 10}), wide = RowLaunch::of({1, 64, 50257});
    CHECK(small.row_block == 32 && small.shares == 63 && small.each(1000) == 16, "%d threads, %d shares", small.row_block,
          static_cast<int>(small.shares));
    CHECK(wide.row_block == 256 && wide.shares == 4, "%d threads, %d shares", wide.row_block, static_cast<int>(wide.shares));
    CHECK(RowLaunch::of({1, 1, 1}).shares == 1 && RowLaunch::of({1, i64{3} << 40, 100}).shares == 512, "sizes are 64-bit");
    CHECK(cuda::norm_workspace({i64{1} << 20, 1 << 20, 1 << 20}, RowLaunch::of({1, 1 << 20, 1 << 20})) == i64{1} << 41, "64-bit");
}

template <class T> void all_sizes() {
    check<T>({1, 1, 1}, 0, {1, 32, 32, 1});
    check<T>({2, 3, 7}, 3, {2, 32, 32, 2});
    check<T>({3, 5, 36}, 4, {3, 32, 64, 4});  // packs; the last share has no row
    check<T>({2, 4, 290}, 2, {2, 64, 32, 2}); // a chunk to a warp
    check<T>({1, 3, 780}, 4, {2, 64, 64, 3}); // several chunks to a warp: read twice
    logits_that_are_not_finite<T>();
}

} // namespace

// FS_FLOAT_ALONE: for run.sh, which builds it with mutants of the kernels.
int main() {
    all_sizes<float>();
    failures_name_the_kernel_and_the_error();
    launch_fits_the_sizes();
#ifndef FS_FLOAT_ALONE
    all_sizes<double>();
#endif
    std::printf("ok\n");
}
