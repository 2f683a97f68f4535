// fastsharp._cpu: a table of contents. Addresses were checked by fastsharp/ops/_border.py.
#include <string>

#include "check.hpp"
#include "dual.hpp"
#include "fastsharp/krylov.hpp"
#include "fastsharp/parallel.hpp"
#include "fastsharp/simd.hpp"
#include "mlp.hpp"

#ifndef FASTSHARP_CUDA_STATUS // set by setup.py: what became of _cuda in the same build
#define FASTSHARP_CUDA_STATUS "no record of the build"
#endif

namespace fs = fastsharp;
namespace k = fastsharp::cpu;
using fs::i64;
using fs::bindings::Address;
using fs::bindings::at;
using fs::bindings::check;
using fs::bindings::Release;

namespace {

template <class T> void vectors(pybind11::module_& m, const std::string& t) {
    m.def(("alpha_" + t).c_str(),
          [](i64 E, i64 n, Address v, i64 v_member, Address w, i64 w_member, Address out, i64 out_member, Address work, int threads) {
              check(k::alpha<T>(E, n, {at<const T>(v), v_member}, {at<const T>(w), w_member}, {at<double>(out), out_member},
                                at<double>(work), threads));
          },
          Release());
    m.def(("probes_" + t).c_str(),
          [](int kind, std::uint64_t seed, i64 first, Address out, i64 ldo, i64 b, i64 n, int threads) {
              check(k::probes(static_cast<fs::Kind>(kind), seed, first, at<T>(out), ldo, b, n, threads));
          },
          Release());
    m.def(("read_stream_" + t).c_str(),
          [](Address x, i64 n, Address out, Address work, int threads) {
              check(k::read_stream(at<const T>(x), n, at<double>(out), at<double>(work), threads));
          },
          Release());
}

template <class S, class T> void basis(pybind11::module_& m, const std::string& s) {
    m.def(("dots_" + s).c_str(),
          [](i64 E, i64 b, i64 j, i64 n, Address V, i64 V_member, i64 V_row, Address w, i64 w_member, i64 w_row, Address ab, i64 ab_member,
             Address last, i64 last_member, Address before, i64 before_member, Address out, i64 out_member, i64 out_row, Address work,
             int threads) {
              const fs::Problem<S, T> p{E, b, j, n, at<const S>(V), V_member, V_row, at<T>(w), w_member, w_row};
              const fs::Removed<T> removed{
                  at<const double>(ab), ab_member, {at<const T>(last), last_member}, {at<const T>(before), before_member}};
              check(k::dots(p, removed, {at<double>(out), out_member, out_row}, at<double>(work), threads));
          },
          Release());
    m.def(("update_" + s).c_str(),
          [](i64 E, i64 b, i64 j, i64 n, Address V, i64 V_member, i64 V_row, Address w, i64 w_member, i64 w_row, Address c, i64 c_member,
             i64 c_row, Address row, i64 row_member, Address factor, i64 factor_member, Address out, i64 out_member, i64 out_row,
             Address work, int threads) {
              const fs::Problem<S, T> p{E, b, j, n, at<const S>(V), V_member, V_row, at<T>(w), w_member, w_row};
              const fs::NextRow<S> next{at<S>(row), row_member, at<const double>(factor), factor_member};
              check(k::update(p, {at<const double>(c), c_member, c_row}, next, {at<double>(out), out_member, out_row}, at<double>(work),
                              threads));
          },
          Release());
    m.def(("combine_" + s).c_str(),
          [](Address C, i64 ldc, i64 rows, Address V, i64 ldv, i64 j, i64 n, Address X, i64 ldx, int threads) {
              check(k::combine(at<const double>(C), ldc, rows, at<const S>(V), ldv, j, n, at<T>(X), ldx, threads));
          },
          Release());
}

template <class T> void mlp(pybind11::module_& m, const std::string& t) {
    namespace f = fs::bindings;
    m.def(("mlp_tile_size_" + t).c_str(), [](f::NetOf net) { return k::mlp_tile_size<T>(f::shape(net)); });
    m.def(("mlp_workspace_size_" + t).c_str(),
          [](f::NetOf net, i64 rows, int threads) { return k::mlp_workspace_size<T>(f::shape(net), rows, threads); });
    m.def(("mlp_product_" + t).c_str(),
          [](f::NetOf net, bool gauss, f::Prepared prepared, f::MemberRows rows, Address work, int threads) {
              check(k::mlp_product(f::product<T>(net, gauss, prepared, rows), at<T>(work), threads));
          },
          Release());
}

template <class T> struct Duals {
    static constexpr auto activation_prepare = k::activation_prepare<T>;
    static constexpr auto activation_tangent = k::activation_tangent<T>;
    static constexpr auto activation_adjoint = k::activation_adjoint<T>;
    static constexpr auto norm_prepare = k::norm_prepare<T>;
    static constexpr auto norm_tangent = k::norm_tangent<T>;
    static constexpr auto norm_adjoint = k::norm_adjoint<T>;
    static constexpr auto softmax_gradient = k::softmax_gradient<T>;
    static constexpr auto softmax_product = k::softmax_product<T>;

    template <class Kernel, class... Args> static fs::Status run(fs::Extent, int threads, Kernel kernel, Args... args) {
        return kernel(args..., threads);
    }
};

} // namespace

PYBIND11_MODULE(_cpu, m) {
    vectors<float>(m, "f32");
    vectors<double>(m, "f64");
    fs::bindings::duals<float, Duals<float>, int>(m, "f32");
    fs::bindings::duals<double, Duals<double>, int>(m, "f64");
    basis<float, float>(m, "f32");
    basis<double, double>(m, "f64");
    basis<fs::Half, float>(m, "f16");
    basis<fs::BFloat16, float>(m, "bf16");
    mlp<float>(m, "f32");
    mlp<double>(m, "f64");
    m.def("workspace_size", &k::workspace_size);
    m.def("activation_workspace", [](fs::bindings::Sizes e) { return k::activation_workspace(fs::bindings::extent(e)); });
    m.def("norm_workspace", [](fs::bindings::Sizes e) { return k::norm_workspace(fs::bindings::extent(e)); });
    m.def("simd", [] { return fs::name(fs::simd()); });
    m.def("simd_supported", [] { return fs::name(fs::simd_supported()); });
    m.def("set_simd", [](const char* level) { return fs::set_simd(level); });
    m.def("cuda_status", [] { return FASTSHARP_CUDA_STATUS; });
    m.def("openmp", [] { return fs::openmp().path; });
    m.def("stub", [] { return FASTSHARP_STUB; });
}
