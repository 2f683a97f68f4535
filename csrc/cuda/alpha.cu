// alpha[e] = v_e'w_e on a GPU: two streams read once, products and sums in double.
//
// v1  a BLAS dot in the vectors' type: one launch more for the conversion, and float sums.
// v2  the chunks of dots, 16-byte loads of both streams, one warp sum at the very end.      <- this file
#include "chunk.cuh"
#include "plan.cuh"

namespace fastsharp::cuda {

namespace {

template <class T, bool Packed> __global__ void __launch_bounds__(kBlock)
    alpha_kernel(Vectors<const T> v, Vectors<const T> w, i64 n, double* partial) {
    const Place at;
    const T* x0 = v.data + blockIdx.y * v.member;
    const T* y0 = w.data + blockIdx.y * w.member;
    double s[1] = {0};
    at.for_each_chunk<T, Packed>(n, [&](i64 start, i64 left, auto part) {
        T x[kPerLane];
        T y[kPerLane];
        part.load(x0 + start, left, at.lane, x);
        part.load(y0 + start, left, at.lane, y);
        for (int k = 0; k < kPerLane; ++k)
            s[0] += static_cast<double>(x[k]) * static_cast<double>(y[k]);
    });
    block_sums(s, partial + static_cast<i64>(blockIdx.y) * gridDim.x);
}

} // namespace

template <class T> Status alpha(i64 E, i64 n, Vectors<const T> v, Vectors<const T> w, Vectors<double> out, double* work,
                                LaunchConfig config, int device, void* stream) {
    const DeviceGuard guard(device);
    if (guard.error() != cudaSuccess)
        return status_of("alpha", guard.error());
    auto kernel = aligned(v.data, E, v.member) && aligned(w.data, E, w.member) ? alpha_kernel<T, true> : alpha_kernel<T, false>;
    for_each_group<1>(E, 1, config, [&](Group g, auto) {
        const Vectors<const T> x{v.data + g.e * v.member, v.member};
        const Vectors<const T> y{w.data + g.e * w.member, w.member};
        FS_LAUNCH(kernel, config.grid, g.E, config.block, 0, stream, x, y, n, work);
        second_stage(work, config, g.E, 1, 1, {out.data + g.e * out.member, out.member, 0}, stream);
    });
    return status_of("alpha", cudaGetLastError());
}

#define FS_INSTANTIATE(T)                                                                                                                  \
    template Status alpha<T>(i64, i64, Vectors<const T>, Vectors<const T>, Vectors<double>, double*, LaunchConfig, int, void*);
FS_INSTANTIATE(float)
FS_INSTANTIATE(double)
#undef FS_INSTANTIATE

} // namespace fastsharp::cuda
