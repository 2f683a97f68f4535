// fastsharp._cpu: a table of contents. Addresses were checked by fastsharp/ops/_border.py.
#include <string>

#include "check.hpp"
#include "dual.hpp"
#include "fastsharp/krylov.hpp"
#include "fastsharp/mlp.hpp"
#include "fastsharp/parallel.hpp"
#include "fastsharp/simd.hpp"

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

fs::MlpShape shape(i64 layers, Address widths, Address weights, Address biases, bool curved, int loss, i64 samples, i64 n) {
    return {layers, at<const i64>(widths), at<const i64>(weights), at<const i64>(biases), curved, static_cast<fs::MlpLoss>(loss), samples,
            n};
}

template <class T> void mlp(pybind11::module_& m, const std::string& t) {
    m.def(("mlp_tile_size_" + t).c_str(),
          [](i64 layers, Address widths, Address weights, Address biases, bool curved, int loss, i64 samples, i64 n) {
              return k::mlp_tile_size<T>(shape(layers, widths, weights, biases, curved, loss, samples, n));
          });
    m.def(("mlp_workspace_size_" + t).c_str(), [](i64 layers, Address widths, Address weights, Address biases, bool curved, int loss,
                                                  i64 samples, i64 n, i64 rows, int threads) {
        return k::mlp_workspace_size<T>(shape(layers, widths, weights, biases, curved, loss, samples, n), rows, threads);
    });
    m.def(("mlp_product_" + t).c_str(),
          [](i64 layers, Address widths, Address weights, Address biases, bool curved, int loss, i64 samples, i64 n, bool gauss,
             Address cache, Address theta, Address units, Address counts, i64 rows, Address member, Address V, i64 V_row, Address out,
             i64 out_row, double scale, double divisor, Address work, int threads) {
              const fs::MlpProduct<T> p{shape(layers, widths, weights, biases, curved, loss, samples, n),
                                        gauss,
                                        at<const T>(cache),
                                        at<const T>(theta),
                                        at<const i64>(units),
                                        at<const i64>(counts),
                                        rows,
                                        at<const i64>(member),
                                        at<const T>(V),
                                        V_row,
                                        at<T>(out),
                                        out_row,
                                        static_cast<T>(scale),
                                        static_cast<T>(divisor)};
              check(k::mlp_product(p, at<T>(work), threads));
          },
          Release());
}

template <class T> void duals(pybind11::module_& m, const std::string& t) {
    namespace f = fs::bindings;
    m.def(("activation_prepare_" + t).c_str(),
          [](f::CurveOf curve, f::Sizes e, f::Matrix x, Address bias, f::Matrix d1, f::Matrix d2, int threads) {
              check(k::activation_prepare<T>(f::curve(curve), f::extent(e), f::rows<const T>(x), at<const T>(bias), f::rows<T>(d1),
                                             f::rows<T>(d2), threads));
          },
          Release());
    m.def(("activation_tangent_" + t).c_str(),
          [](f::Sizes e, f::Matrix d1, f::Stack x_t, f::Vectors bias_t, f::Stack out, int threads) {
              check(k::activation_tangent<T>(f::extent(e), f::rows<const T>(d1), f::stack<const T>(x_t), f::columns<const T>(bias_t),
                                             f::stack<T>(out), threads));
          },
          Release());
    m.def(("activation_adjoint_" + t).c_str(),
          [](f::Sizes e, f::Matrix d1, f::Stack y_gt, f::Matrix q, f::Stack a_t, f::Stack out, f::Vectors bias_gt, Address work,
             int threads) {
              check(k::activation_adjoint<T>(f::extent(e), f::rows<const T>(d1), f::stack<const T>(y_gt), f::rows<const T>(q),
                                             f::stack<const T>(a_t), f::stack<T>(out), f::columns<T>(bias_gt), at<double>(work), threads));
          },
          Release());
    m.def(("norm_prepare_" + t).c_str(),
          [](f::Sizes e, f::Matrix x, double eps, bool center, Address stats, int threads) {
              check(k::norm_prepare<T>(f::extent(e), f::rows<const T>(x), eps, center, at<double>(stats), threads));
          },
          Release());
    m.def(("norm_tangent_" + t).c_str(),
          [](f::Sizes e, f::NormOf norm, f::Stack x_t, f::Vectors w_t, f::Vectors bias_t, f::Stack out, Address sums, int threads) {
              check(k::norm_tangent<T>(f::extent(e), f::norm<T>(norm), f::stack<const T>(x_t), f::columns<const T>(w_t),
                                       f::columns<const T>(bias_t), f::stack<T>(out), at<double>(sums), threads));
          },
          Release());
    m.def(("norm_adjoint_" + t).c_str(),
          [](f::Sizes e, f::NormOf norm, f::Stack y_gt, f::SecondOf second, f::Stack out, Address sums, f::Vectors w_gt, f::Vectors bias_gt,
             Address work, int threads) {
              check(k::norm_adjoint<T>(f::extent(e), f::norm<T>(norm), f::stack<const T>(y_gt), f::second<T>(second), f::stack<T>(out),
                                       at<double>(sums), {f::columns<T>(w_gt), f::columns<T>(bias_gt)}, at<double>(work), threads));
          },
          Release());
    m.def(("softmax_gradient_" + t).c_str(),
          [](f::Sizes e, f::Matrix z, Address target, Address weight, double smoothing, f::Matrix p, f::Matrix g, int threads) {
              check(k::softmax_gradient<T>(f::extent(e), f::rows<const T>(z), {at<const i64>(target), at<const T>(weight), smoothing},
                                           f::rows<T>(p), f::rows<T>(g), threads));
          },
          Release());
    m.def(("softmax_product_" + t).c_str(),
          [](f::Sizes e, f::Matrix p, Address weight, f::Stack u, f::Stack out, int threads) {
              check(k::softmax_product<T>(f::extent(e), f::rows<const T>(p), at<const T>(weight), f::stack<const T>(u), f::stack<T>(out),
                                          threads));
          },
          Release());
}

} // namespace

PYBIND11_MODULE(_cpu, m) {
    vectors<float>(m, "f32");
    vectors<double>(m, "f64");
    duals<float>(m, "f32");
    duals<double>(m, "f64");
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
}
