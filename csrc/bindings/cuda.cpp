// fastsharp._cuda: a table of contents. Addresses were checked by fastsharp/ops/_border.py; `stream` is a cudaStream_t.
#include <string>

#include "check.hpp"
#include "fastsharp/krylov.hpp"

namespace fs = fastsharp;
namespace k = fastsharp::cuda;
using fs::i64;
using fs::bindings::Address;
using fs::bindings::at;
using fs::bindings::check;
using fs::bindings::Release;
using k::LaunchConfig;

namespace {

template <class T> void krylov(pybind11::module_& m, const std::string& t) {
    m.def(("alpha_" + t).c_str(),
          [](Address v, Address w, i64 n, Address out, Address work, int device, Address stream) {
              check(k::alpha(at<const T>(v), at<const T>(w), n, at<double>(out), at<double>(work), LaunchConfig::of(n), device,
                             at<void>(stream)));
          },
          Release());
    m.def(("dots_" + t).c_str(),
          [](Address V, i64 ldv, Address w, Address ab, i64 j, i64 n, Address out, Address work, int device, Address stream) {
              check(k::dots(at<const T>(V), ldv, at<T>(w), at<const double>(ab), j, n, at<double>(out), at<double>(work),
                            LaunchConfig::of(n), device, at<void>(stream)));
          },
          Release());
    m.def(("update_" + t).c_str(),
          [](Address V, i64 ldv, Address w, Address c, i64 j, i64 n, Address out, Address work, int device, Address stream) {
              check(k::update(at<const T>(V), ldv, at<T>(w), at<const double>(c), j, n, at<double>(out), at<double>(work),
                              LaunchConfig::of(n), device, at<void>(stream)));
          },
          Release());
}

} // namespace

PYBIND11_MODULE(_cuda, m) {
    krylov<float>(m, "f32");
    krylov<double>(m, "f64");
    m.def("workspace_size", [](i64 n, i64 j) { return k::workspace_size(LaunchConfig::of(n), j); });
}
