// The CUDA kernels, executed by host_shim.hpp: against long double sums, in several launch shapes, twice with the same bits. The bits of
// a member or a vector are those of a call with it alone, at another alignment and another row stride.
#include "check.hpp"
#include "check_probes.hpp"
#include "host_shim.hpp"

using namespace fastsharp;
using cuda::LaunchConfig;
using test::poisoned;
using test::poisoned_as;

namespace {

// A copy of a vector, `shift` elements behind an address that is a multiple of 16 bytes; it ends where the vector ends.
template <class T> class Placed {
public:
    Placed(const std::vector<T>& from, i64 shift) : size_(from.size()), memory_(new T[from.size() + static_cast<std::size_t>(shift)]) {
        data = memory_.get() + shift;
        std::copy(from.begin(), from.end(), data);
    }
    [[nodiscard]] std::vector<T> copy() const { return std::vector<T>(data, data + size_); }
    T* data;

private:
    std::size_t size_;
    std::unique_ptr<T[]> memory_;
};

template <class S, class T> struct Results {
    std::vector<double> alpha, dots, update;
    std::vector<T> after_dots, after_update;
    std::vector<S> row;

    bool operator==(const Results& o) const { // by bytes: gaps hold NaN
        return same(alpha, o.alpha) && same(dots, o.dots) && same(update, o.update) && same(after_dots, o.after_dots) &&
               same(after_update, o.after_update) && same(row, o.row);
    }
    template <class U> static bool same(const std::vector<U>& a, const std::vector<U>& b) {
        return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(U)) == 0);
    }
};

template <class S, class T> Results<S, T> run(const test::Case<S, T>& p, i64 shift, LaunchConfig config) {
    const Placed<S> V(p.V, shift);
    const Placed<T> w(p.w, shift), u(p.w, shift), last(p.last, shift), before(p.before, shift);
    const Placed<S> row(poisoned_as<S>(p.b == 1 ? p.E * p.n : 0), shift);
    Results<S, T> r{poisoned(p.E), poisoned(p.E * p.b * (p.j + 1)), poisoned(p.E * p.b), {}, {}, {}};
    auto small = poisoned(cuda::workspace_size(config, p.E, p.b, 0));
    auto large = poisoned(cuda::workspace_size(config, p.E, p.b, p.j));
    CHECK(cuda::alpha<T>(p.E, p.n, {last.data, p.n}, {w.data, p.w_member}, {r.alpha.data(), 1}, small.data(), config, 0, nullptr).ok(),
          "-");
    const Problem<S, T> on_w{p.E, p.b, p.j, p.n, V.data, p.V_member, p.V_row, w.data, p.w_member, p.w_row};
    Removed<T> removed = p.removed();
    removed.last.data = last.data;
    removed.before.data = p.j >= 2 ? before.data : nullptr;
    CHECK(cuda::dots(on_w, p.b == 1 ? removed : Removed<T>{}, p.results(r.dots, p.j + 1), large.data(), config, 1, nullptr).ok(), "dots");
    const Problem<S, T> on_u{p.E, p.b, p.j, p.n, V.data, p.V_member, p.V_row, u.data, p.w_member, p.w_row};
    const NextRow<S> next = p.b == 1 ? NextRow<S>{row.data, p.n, p.factor.data(), 1} : NextRow<S>{};
    CHECK(cuda::update(on_u, p.coefficients(), next, p.results(r.update, 1), small.data(), config, 0, nullptr).ok(), "update");
    CHECK(shim::device == 0, "the caller's device was not restored");
    r.after_dots = w.copy();
    r.after_update = u.copy();
    r.row = row.copy();
    return r;
}

template <class S, class T> Results<S, T> check(const test::Case<S, T>& p, i64 shift, LaunchConfig config) {
    const Results<S, T> r = run(p, shift, config);
    p.check_alpha(r.alpha);
    p.check_dots(r.after_dots, p.b == 1, r.dots);
    p.check_update(r.after_update, r.update, r.row);
    CHECK(run(p, shift, config) == r, "a second run gives other bits");
    return r;
}

template <class S, class T> void check(i64 E, i64 b, i64 j, i64 n, i64 pad, i64 shift, LaunchConfig config) {
    check(test::Case<S, T>(E, b, j, n, pad), shift, config);
}

// Member e and vector k of `all`, tightly packed, as a problem of its own.
template <class S, class T> test::Case<S, T> alone(const test::Case<S, T>& all, i64 e, i64 k) {
    test::Case<S, T> one(1, 1, all.j, all.n, 0);
    for (i64 i = 0; i < all.n; ++i) {
        for (i64 r = 0; r < all.j; ++r)
            one.V[one.V_at(0, r, i)] = all.V[all.V_at(e, r, i)];
        one.w[one.w_at(0, 0, i)] = all.w[all.w_at(e, k, i)];
        one.last[one.at(i)] = all.last[all.at(e * all.n + i)];
        one.before[one.at(i)] = all.before[all.at(e * all.n + i)];
    }
    one.ab = {all.ab[all.at(2 * e)], all.ab[all.at(2 * e + 1)]};
    if (all.b > 1)
        one.ab = {0, 0}; // several vectors have nothing removed
    one.factor = {all.factor[all.at(e)]};
    for (i64 r = 0; r < all.j; ++r)
        one.c[one.at(r)] = all.c[all.at((e * all.b + k) * all.j + r)];
    return one;
}

// Calls for all at once, and for each alone at another alignment.
template <class S, class T> void check_bits(i64 E, i64 b, i64 j, i64 n, LaunchConfig config) {
    const i64 pack = 16 / sizeof(S);
    const test::Case<S, T> all(E, b, j, n, pack - n % pack);
    const Results<S, T> together = check(all, 0, config);
    for (i64 e = 0; e < E; ++e) {
        for (i64 k = 0; k < b; ++k) {
            const Results<S, T> single = run(alone(all, e, k), 1, config);
            CHECK(k > 0 || single.alpha[0] == together.alpha[all.at(e)], "alpha of member %d", static_cast<int>(e));
            for (i64 r = 0; r <= j; ++r)
                CHECK(single.dots[all.at(r)] == together.dots[all.at((e * b + k) * (j + 1) + r)], "dots %d of member %d, vector %d",
                      static_cast<int>(r), static_cast<int>(e), static_cast<int>(k));
            CHECK(single.update[0] == together.update[all.at(e * b + k)], "update of member %d, vector %d", static_cast<int>(e),
                  static_cast<int>(k));
            for (i64 i = 0; i < n; ++i) {
                CHECK(single.after_dots[all.at(i)] == together.after_dots[all.w_at(e, k, i)], "w after dots");
                CHECK(single.after_update[all.at(i)] == together.after_update[all.w_at(e, k, i)], "w after update");
                CHECK(b > 1 || test::value(single.row[all.at(i)]) == test::value(together.row[all.at(e * n + i)]), "row");
            }
        }
    }
}

template <class S, class T> void check_combine(i64 k, i64 j, i64 n, i64 pad, i64 shift, LaunchConfig config) {
    const test::Case<S, T> p(1, 1, j, n, pad);
    const Placed<S> V(p.V, shift);
    test::Sequence next;
    auto C = poisoned((k - 1) * (j + 1) + j); // rows one further apart than they must be
    std::vector<double> tight;
    for (i64 i = 0; i < k * j; ++i)
        tight.push_back(C[p.at(i / j * (j + 1) + i % j)] = next());
    const i64 ldx = n + pad;
    const Placed<T> X(poisoned_as<T>((k - 1) * ldx + n), shift);
    CHECK(cuda::combine(C.data(), j + 1, k, V.data, p.V_row, j, n, X.data, ldx, config, 0, nullptr).ok(), "combine");
    std::vector<T> rows;
    const std::vector<T> all = X.copy();
    for (i64 i = 0; i < static_cast<i64>(all.size()); ++i) {
        if (i % ldx < n) {
            rows.push_back(all[p.at(i)]);
        } else {
            CHECK(std::isnan(all[p.at(i)]), "a gap of X was written");
        }
    }
    p.check_combine(tight, k, rows);
}

template <class T> void check_probes(Kind kind, std::uint64_t seed, i64 first, i64 b, i64 n, i64 ldo, i64 shift, LaunchConfig config) {
    const Placed<T> out(poisoned_as<T>((b - 1) * ldo + n), shift);
    CHECK(cuda::probes(kind, seed, first, out.data, ldo, b, n, config, 0, nullptr).ok(), "probes");
    test::check_probes(kind, seed, first, out.copy(), ldo, b, n);
}

// An infinite v_j under a zero coefficient must not reach w as 0 * inf; nor may a v_{j-1} that is not there be read.
void zero_coefficient_skips_its_term() {
    const float inf = std::numeric_limits<float>::infinity();
    const std::vector<float> V{1, 1, 1, inf, inf, inf};
    const std::vector<double> ab{0, 2};
    for (const bool before : {true, false}) {
        std::vector<float> w{1, 2, 3};
        auto out = poisoned(3);
        auto work = poisoned(cuda::workspace_size({1, 32}, 1, 1, 2));
        const Problem<float, float> p{1, 1, 2, 3, V.data(), 6, 3, w.data(), 3, 3};
        const Removed<float> removed{ab.data(), 2, {V.data() + 3, 3}, {before ? V.data() : nullptr, 3}};
        CHECK(cuda::dots(p, removed, {out.data(), 3, 3}, work.data(), {1, 32}, 0, nullptr).ok(), "dots");
        CHECK((w == (before ? std::vector<float>{-1, 0, 1} : std::vector<float>{1, 2, 3})), "w is %g %g %g", static_cast<double>(w[0]),
              static_cast<double>(w[1]), static_cast<double>(w[2]));
        CHECK(out[2] == (before ? 2 : 14), "w'w is %g", out[2]);
    }
}

void failures_name_the_kernel_and_the_error() {
    const float x = 1;
    float y = 1;
    auto out = poisoned(2);
    auto work = poisoned(cuda::workspace_size({1, 32}, 1, 1, 1));
    const Problem<float, float> p{1, 1, 1, 1, &x, 1, 1, &y, 1, 1};
    const double c = 1;
    const auto call = [&](int op, int device) {
        switch (op) {
        case 0:
            return cuda::alpha<float>(1, 1, {&x, 1}, {&y, 1}, {out.data(), 1}, work.data(), {1, 32}, device, nullptr);
        case 1:
            return cuda::dots(p, {}, {out.data(), 2, 2}, work.data(), {1, 32}, device, nullptr);
        case 2:
            return cuda::update(p, {&c, 1, 1}, {}, {out.data(), 1, 1}, work.data(), {1, 32}, device, nullptr);
        case 3:
            return cuda::combine(&c, 1, 1, &x, 1, 1, 1, &y, 1, {1, 32}, device, nullptr);
        default:
            return cuda::probes(Kind::normal, 0, 0, &y, 1, 1, 1, {1, 32}, device, nullptr);
        }
    };
    const char* names[] = {"alpha", "dots", "update", "combine", "probes"};
    for (int op = 0; op < 5; ++op) {
        shim::next_error = 700;
        CHECK(message(call(op, 0)) == std::string(names[op]) + ": emulated failure", "op %d", op);
        CHECK(message(call(op, 7)) == std::string(names[op]) + ": invalid device ordinal", "op %d", op);
        shim::device = 0;
    }
}

void launch_covers_n() {
    CHECK(LaunchConfig::of(1).grid == 1 && LaunchConfig::of(1).block == 256, "one element");
    CHECK(LaunchConfig::of(2049).grid == 2, "one chunk beyond a block");
    CHECK(LaunchConfig::of(i64{3} << 40).grid == 2048, "sizes are 64-bit");
    CHECK(cuda::workspace_size({2048, 256}, i64{1} << 40, 1, 1) == i64{65535} * 2 * 2048, "members of one launch share the workspace");
}

template <class S, class T> void all_sizes() {
    const i64 pack = 16 / sizeof(S);
    for (const i64 n : {1, 7, 255, 257})
        check<S, T>(1, 1, 2, n, pack - n % pack, 0, {1, 32});
    check<S, T>(1, 1, 1, 1031, 1, 1, {2, 64}); // no v_{j-1}; no vector loads
    check<S, T>(1, 1, 9, 1031, pack - 1031 % pack, 0, {3, 64});
    check<S, T>(3, 1, 3, 300, 3, 0, {2, 32, 2}); // two launches of members
    check_bits<S, T>(2, 1, 5, 290, {2, 32});
    check_bits<S, T>(1, 15, 3, 261, {1, 64}); // 8 + 4 + 2 + 1 vectors
    check_combine<S, T>(1, 1, 1, 0, 0, {1, 32});
    check_combine<S, T>(5, 3, 515, 5, 0, {2, 64});
    check_combine<S, T>(9, 4, 512, 0, 1, {1, 64});
    check_combine<S, T>(4, 7, 1024, 0, 0, {6, 64});
}

} // namespace

// FS_FLOAT_ALONE: for run.sh, which builds it with mutants of the kernels.
int main() {
    all_sizes<float, float>();
    zero_coefficient_skips_its_term();
    failures_name_the_kernel_and_the_error();
    launch_covers_n();
#ifndef FS_FLOAT_ALONE
    all_sizes<double, double>();
    all_sizes<Half, float>();
    all_sizes<BFloat16, float>();
    check_bits<float, float>(2, 2, 258, 20, {1, 32}); // more rows of two vectors than one launch takes
    for (const i64 j : {512, 513})
        check<float, float>(1, 1, j, 20, 0, 0, {1, 32});     // as many as one launch takes, and one more
    check_combine<float, float>(62, 100, 70, 2, 0, {1, 32}); // C does not fit into shared memory
    for (const Kind kind : {Kind::rademacher, Kind::normal}) {
        check_probes<float>(kind, 0x0123456789abcdefU, 5, 3, 1037, 1040, 0, {2, 32, 2});
        check_probes<float>(kind, ~std::uint64_t{0}, i64{1} << 33, 2, 131, 132, 1, {1, 64});
        check_probes<double>(kind, 1, 0, 1, 130, 130, 0, {1, 64});
    }
#endif
    std::printf("ok\n");
}
