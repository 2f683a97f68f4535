// fastsharp._cpu: a table of contents. Addresses were checked by fastsharp/ops/_border.py.
#include <string>

#include "check.hpp"
#include "fastsharp/krylov.hpp"
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

template <class T> void krylov(pybind11::module_& m, const std::string& t) {
    m.def(("alpha_" + t).c_str(),
          [](Address v, Address w, i64 n, Address out, Address work, int threads) {
              check(k::alpha(at<const T>(v), at<const T>(w), n, at<double>(out), at<double>(work), threads));
          },
          Release());
    m.def(("dots_" + t).c_str(),
          [](Address V, i64 ldv, Address w, Address ab, i64 j, i64 n, Address out, Address work, int threads) {
              check(k::dots(at<const T>(V), ldv, at<T>(w), at<const double>(ab), j, n, at<double>(out), at<double>(work), threads));
          },
          Release());
    m.def(("update_" + t).c_str(),
          [](Address V, i64 ldv, Address w, Address c, i64 j, i64 n, Address out, Address work, int threads) {
              check(k::update(at<const T>(V), ldv, at<T>(w), at<const double>(c), j, n, at<double>(out), at<double>(work), threads));
          },
          Release());
    m.def(("read_stream_" + t).c_str(),
          [](Address x, i64 n, Address out, Address work, int threads) {
              check(k::read_stream(at<const T>(x), n, at<double>(out), at<double>(work), threads));
          },
          Release());
}

} // namespace

PYBIND11_MODULE(_cpu, m) {
    krylov<float>(m, "f32");
    krylov<double>(m, "f64");
    m.def("workspace_size", &k::workspace_size);
    m.def("simd", [] { return fs::name(fs::simd()); });
    m.def("simd_supported", [] { return fs::name(fs::simd_supported()); });
    m.def("set_simd", [](const char* level) { return fs::set_simd(level); });
    m.def("cuda_status", [] { return FASTSHARP_CUDA_STATUS; });
    m.def("openmp", [] { return fs::openmp().path; });
}
