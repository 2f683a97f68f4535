// fastsharp._cuda: a table of contents. Addresses were checked by fastsharp/ops/_border.py; `stream` is a cudaStream_t.
#include <string>

#include "check.hpp"
#include "dual.hpp"
#include "fastsharp/krylov.hpp"
#include "mlp.hpp"

namespace fs = fastsharp;
namespace k = fastsharp::cuda;
using fs::i64;
using fs::bindings::Address;
using fs::bindings::at;
using fs::bindings::check;
using fs::bindings::Release;
using k::LaunchConfig;

namespace {

template <class T> void vectors(pybind11::module_& m, const std::string& t) {
    m.def(("alpha_" + t).c_str(),
          [](i64 E, i64 n, Address v, i64 v_member, Address w, i64 w_member, Address out, i64 out_member, Address work, int device,
             Address stream) {
              check(k::alpha<T>(E, n, {at<const T>(v), v_member}, {at<const T>(w), w_member}, {at<double>(out), out_member},
                                at<double>(work), LaunchConfig::of(n), device, at<void>(stream)));
          },
          Release());
    m.def(("probes_" + t).c_str(),
          [](int kind, std::uint64_t seed, i64 first, Address out, i64 ldo, i64 b, i64 n, int device, Address stream) {
              check(k::probes(static_cast<fs::Kind>(kind), seed, first, at<T>(out), ldo, b, n, LaunchConfig::of(n), device,
                              at<void>(stream)));
          },
          Release());
}

template <class S, class T> void basis(pybind11::module_& m, const std::string& s) {
    m.def(("dots_" + s).c_str(),
          [](i64 E, i64 b, i64 j, i64 n, Address V, i64 V_member, i64 V_row, Address w, i64 w_member, i64 w_row, Address ab, i64 ab_member,
             Address last, i64 last_member, Address before, i64 before_member, Address out, i64 out_member, i64 out_row, Address work,
             int device, Address stream) {
              const fs::Problem<S, T> p{E, b, j, n, at<const S>(V), V_member, V_row, at<T>(w), w_member, w_row};
              const fs::Removed<T> removed{
                  at<const double>(ab), ab_member, {at<const T>(last), last_member}, {at<const T>(before), before_member}};
              check(k::dots(p, removed, {at<double>(out), out_member, out_row}, at<double>(work), LaunchConfig::of(n), device,
                            at<void>(stream)));
          },
          Release());
    m.def(("update_" + s).c_str(),
          [](i64 E, i64 b, i64 j, i64 n, Address V, i64 V_member, i64 V_row, Address w, i64 w_member, i64 w_row, Address c, i64 c_member,
             i64 c_row, Address row, i64 row_member, Address factor, i64 factor_member, Address out, i64 out_member, i64 out_row,
             Address work, int device, Address stream) {
              const fs::Problem<S, T> p{E, b, j, n, at<const S>(V), V_member, V_row, at<T>(w), w_member, w_row};
              const fs::NextRow<S> next{at<S>(row), row_member, at<const double>(factor), factor_member};
              check(k::update(p, {at<const double>(c), c_member, c_row}, next, {at<double>(out), out_member, out_row}, at<double>(work),
                              LaunchConfig::of(n), device, at<void>(stream)));
          },
          Release());
    m.def(("combine_" + s).c_str(),
          [](Address C, i64 ldc, i64 rows, Address V, i64 ldv, i64 j, i64 n, Address X, i64 ldx, int device, Address stream) {
              check(k::combine(at<const double>(C), ldc, rows, at<const S>(V), ldv, j, n, at<T>(X), ldx, LaunchConfig::of(n), device,
                               at<void>(stream)));
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

    template <class Kernel, class... Args> static fs::Status run(fs::Extent e, int device, Address stream, Kernel kernel, Args... args) {
        return kernel(args..., k::RowLaunch::of(e), device, at<void>(stream));
    }
};

template <class T> void mlp(pybind11::module_& m, const std::string& t) {
    namespace f = fs::bindings;
    m.def(("mlp_tile_size_" + t).c_str(), [](f::NetOf net) { return k::mlp_tile_size<T>(f::shape(net)); });
    m.def(("mlp_workspace_size_" + t).c_str(),
          [](f::NetOf net, i64 rows, int, Address) { return k::mlp_workspace_size<T>(f::shape(net), rows, {}); });
    m.def(("mlp_product_" + t).c_str(),
          [](f::NetOf net, bool gauss, f::Prepared prepared, f::MemberRows rows, Address work, int device, Address stream) {
              check(k::mlp_product(f::product<T>(net, gauss, prepared, rows), at<T>(work), {}, device, at<void>(stream)));
          },
          Release());
}

} // namespace

PYBIND11_MODULE(_cuda, m) {
    vectors<float>(m, "f32");
    vectors<double>(m, "f64");
    basis<float, float>(m, "f32");
    basis<double, double>(m, "f64");
    basis<fs::Half, float>(m, "f16");
    basis<fs::BFloat16, float>(m, "bf16");
    fs::bindings::duals<float, Duals<float>, int, Address>(m, "f32");
    fs::bindings::duals<double, Duals<double>, int, Address>(m, "f64");
    m.def("activation_workspace", [](fs::bindings::Sizes sizes) {
        const fs::Extent e = fs::bindings::extent(sizes);
        return k::activation_workspace(e, k::RowLaunch::of(e));
    });
    m.def("norm_workspace", [](fs::bindings::Sizes sizes) {
        const fs::Extent e = fs::bindings::extent(sizes);
        return k::norm_workspace(e, k::RowLaunch::of(e));
    });
    mlp<float>(m, "f32");
    mlp<double>(m, "f64");
    m.def("workspace_size", [](i64 E, i64 b, i64 n, i64 j) { return k::workspace_size(LaunchConfig::of(n), E, b, j); });
    m.def("stub", [] { return FASTSHARP_STUB; });
}
