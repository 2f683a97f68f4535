// The CUDA kernels of alpha, dots and update, executed by host_shim.hpp: against long double sums, with and without vector loads,
// in several launch shapes, twice with the same bits.
#include "check.hpp"
#include "krylov.cu"

using namespace fastsharp;
using test::poisoned;

namespace {

template <class T>
struct Aligned { // a copy of a vector at an address that is a multiple of 16 bytes, or is not, and ends where the vector ends
    std::unique_ptr<T[]> memory;
    T* data;

    Aligned(const std::vector<T>& from, bool aligned)
        : memory(new T[from.size() + (aligned ? 0 : 1)]), data(memory.get() + (aligned ? 0 : 1)) {
        for (std::size_t i = 0; i < from.size(); ++i)
            data[i] = from[i];
    }
    std::vector<T> copy(i64 n) const { return std::vector<T>(data, data + n); }
};

template <class T> void check(i64 j, i64 n, i64 ldv, bool aligned, cuda::LaunchConfig config) {
    const test::Problem<T> p(j, n, ldv);
    const Aligned<T> V(p.V, aligned);
    std::vector<double> before;
    for (int repeat = 0; repeat < 2; ++repeat) {
        const Aligned<T> w(p.w, aligned);
        auto out = poisoned(1);
        auto sums = poisoned(j + 1);
        auto work = poisoned(cuda::workspace_size(config, 0));
        auto work_j = poisoned(cuda::workspace_size(config, j));
        CHECK(cuda::alpha(V.data, w.data, n, out.data(), work.data(), config, 0, nullptr).ok(), "alpha");
        p.check_alpha(out);
        CHECK(cuda::dots(V.data, ldv, w.data, p.ab.data(), j, n, sums.data(), work_j.data(), config, 0, nullptr).ok(), "dots");
        p.check_dots(w.copy(n), p.ab, sums);
        const Aligned<T> u(p.w, aligned);
        CHECK(cuda::update(V.data, ldv, u.data, p.c.data(), j, n, out.data(), work.data(), config, 1, nullptr).ok(), "update");
        p.check_update(u.copy(n), out);
        sums.push_back(out[0]);
        CHECK(repeat == 0 || sums == before, "a second run gives other bits");
        before = sums;
    }
    CHECK(shim::device == 0, "the caller's device was not restored");
}

void failures_name_the_kernel_and_the_error() {
    const test::Problem<float> p(1, 1, 1);
    auto out = poisoned(1);
    auto work = poisoned(cuda::workspace_size({1, 32}, 0));
    shim::next_error = 700;
    const Status s = cuda::alpha(p.V.data(), p.w.data(), 1, out.data(), work.data(), {1, 32}, 0, nullptr);
    CHECK(message(s) == "alpha: emulated failure", "got '%s'", message(s).c_str());
    const Status d = cuda::alpha(p.V.data(), p.w.data(), 1, out.data(), work.data(), {1, 32}, 7, nullptr);
    CHECK(message(d) == "alpha: invalid device ordinal", "got '%s'", message(d).c_str());
    shim::device = 0;
}

void launch_covers_n() {
    CHECK(cuda::LaunchConfig::of(1).grid == 1 && cuda::LaunchConfig::of(1).block == 256, "one element");
    CHECK(cuda::LaunchConfig::of(2049).grid == 2, "one chunk beyond a block");
    CHECK(cuda::LaunchConfig::of(i64{3} << 40).grid == 2048, "sizes are 64-bit");
}

} // namespace

int main() {
    launch_covers_n();
    failures_name_the_kernel_and_the_error();
    for (const cuda::LaunchConfig config : {cuda::LaunchConfig{1, 32}, cuda::LaunchConfig{2, 64}}) {
        for (const i64 n : {1, 255, 257, 1031}) {
            check<float>(5, n, n + 4 - n % 4, true, config);
            check<float>(2, n, n + 1, false, config);
            check<double>(1, n, n + n % 2, true, config);
        }
    }
    check<float>(35, 600, 600, true, {6, 64}); // more than one group of 32 rows
    check<double>(3, 511, 513, false, {3, 64});
    check<float>(258, 300, 304, true, {1, 32}); // more than one launch of rows
    std::printf("ok\n");
}
