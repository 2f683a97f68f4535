// Softmax, its cross-entropy's gradient and Hessian products on a GPU, for any number of classes. Limited by memory: 1 + 2b matrices.
//
// v1  torch's kernels one by one: p u, a sum, p (p'u), a difference, the weight; five passes that read and write b matrices.
// v2  a block to a row, three sweeps for the gradient: maximum, sum, result.
// v3  maximum and sum in one sweep: every lane rescales its own sum where its maximum rises, and lanes meet once, at the end of the row;
//     for products rows of at most 256 columns a warp stay in registers between the sweeps; loads of 16 bytes; the vectors of a row side
//     by side, so that p comes from L1.      <- this file
// A longer row (a vocabulary) is read again: from L2 while the rows in flight fit there, else 2 + 3b matrices in place of 1 + 2b. Fewer
// rows times vectors than multiprocessors leave some of these idle.
//
// Note on numerical properties: sums, exponentials and what is subtracted are double, results are rounded once. The maximum is taken off
// before the exponential; -inf is a probability of zero, +inf or NaN gives NaN. No atomics: the bits depend on neither b, alignment nor
// the GPU.
#include "fastsharp/dual_softmax_ce.hpp"

#include "rows.cuh"

namespace fastsharp::cuda {

namespace {

__device__ inline double lowest() { return -HUGE_VAL; }

// e^(x - m); zero for x = -inf whatever m is, since m is -inf where nothing larger was seen.
__device__ inline double share_of(double x, double m) { return x == lowest() ? 0 : exp(x - m); }

// The largest of m over the block; lanes see no NaN.
__device__ inline double row_max(double m, const Place& at) {
    FS_SHARED(double, s, kBlock / kWarp);
    for (int step = kWarp / 2; step > 0; step /= 2) {
        const double other = __shfl_xor_sync(kAllLanes, m, step);
        m = other > m ? other : m;
    }
    if (at.warps == 1)
        return m;
    if (at.lane == 0)
        s[at.warp] = m;
    __syncthreads();
    for (int warp = 0; warp < at.warps; ++warp)
        m = s[warp] > m ? s[warp] : m;
    __syncthreads(); // before the maximum of the next row is written
    return m;
}

template <class T, bool Packed> __device__ inline void clear(T* row, i64 n, const Place& place) {
    if (row == nullptr)
        return;
    const T zero[kPerLane] = {};
    place.for_each_chunk<T, Packed>(n, [&](i64 start, i64 left, auto part) { part.store(row + start, left, place.lane, zero); });
}

// Once for all products: without the variant for whole packs.
template <class T> __global__ void __launch_bounds__(kBlock, 1)
    gradient_kernel(Extent e, Rows<const T> z, CrossEntropy<T> loss, Rows<T> p, Rows<T> g) {
    const Place place = in_row();
    const double n = static_cast<double>(e.columns);
    for_each_row(e, [&](i64, i64 r) {
        const double weight = loss.weight == nullptr ? 1 : static_cast<double>(loss.weight[r]);
        T* const to_p = at(p, 0, r);
        T* const to_g = at(g, 0, r);
        if (weight == 0) {
            clear<T, false>(to_p, e.columns, place);
            clear<T, false>(to_g, e.columns, place);
            return;
        }
        const T* row = at(z, 0, r);
        T x[kPerLane];
        double m = lowest();
        double s[1] = {0};
        place.for_each_chunk<T, false>(e.columns, [&](i64 start, i64 left, auto part) {
            part.load(row + start, left, place.lane, x);
            double top = m;
            for (int i = 0; i < kPerLane; ++i) {
                const double v = static_cast<double>(x[i]);
                top = part.has(left, place.lane, i) && v > top ? v : top;
            }
            if (top > m) {
                s[0] *= share_of(m, top);
                m = top;
            }
            for (int i = 0; i < kPerLane; ++i)
                s[0] += part.has(left, place.lane, i) ? share_of(static_cast<double>(x[i]), m) : 0;
        });
        const double top = row_max(m, place);
        s[0] *= share_of(m, top);
        row_sums(s, place);
        const i64 target = to_g == nullptr ? -1 : loss.target[r];
        const double even = loss.smoothing / n;
        place.for_each_chunk<T, false>(e.columns, [&](i64 start, i64 left, auto part) {
            part.load(row + start, left, place.lane, x);
            double y[kPerLane];
            for (int i = 0; i < kPerLane; ++i)
                y[i] = share_of(static_cast<double>(x[i]), top) / s[0];
            if (to_p != nullptr)
                part.store(to_p + start, left, place.lane, y);
            if (to_g == nullptr)
                return;
            for (int i = 0; i < kPerLane; ++i) {
                const double hit = start + part.place(place.lane, i) == target ? 1 - loss.smoothing : 0;
                y[i] = weight * (y[i] - even - hit);
            }
            part.store(to_g + start, left, place.lane, y);
        });
    });
}

template <class T, bool Packed, bool Held> __global__ void __launch_bounds__(kBlock, 1)
    product_kernel(Extent e, Rows<const T> p, const T* weight, Rows<const T> u, Rows<T> out) {
    const Place place = in_row();
    for_each_row(e, [&](i64 k, i64 r) {
        const double w = weight == nullptr ? 1 : static_cast<double>(weight[r]);
        if (w == 0) {
            clear<T, Packed>(at(out, k, r), e.columns, place);
            return;
        }
        T x[kPerLane];
        T v[kPerLane];
        const auto read = [&](i64 start, i64 left, auto part) {
            part.load(at(p, 0, r) + start, left, place.lane, x);
            part.load(at(u, k, r) + start, left, place.lane, v);
        };
        double along[1] = {0};
        place.for_each_chunk<T, Packed>(e.columns, [&](i64 start, i64 left, auto part) {
            read(start, left, part);
            for (int i = 0; i < kPerLane; ++i)
                along[0] += static_cast<double>(x[i]) * static_cast<double>(v[i]);
        });
        row_sums(along, place);
        place.for_each_chunk<T, Packed>(e.columns, [&](i64 start, i64 left, auto part) {
            if (!Held)
                read(start, left, part);
            double y[kPerLane];
            for (int i = 0; i < kPerLane; ++i)
                y[i] = w * static_cast<double>(x[i]) * (static_cast<double>(v[i]) - along[0]);
            part.store(at(out, k, r) + start, left, place.lane, y);
        });
    });
}

} // namespace

template <class T> Status softmax_gradient(Extent e, Rows<const T> z, const CrossEntropy<T>& loss, Rows<T> p, Rows<T> g, RowLaunch launch,
                                           int device, void* stream) {
    const DeviceGuard guard(device);
    if (guard.error() != cudaSuccess)
        return status_of("softmax_gradient", guard.error());
    FS_LAUNCH(gradient_kernel<T>, row_blocks(e, launch), 1, launch.row_block, 0, stream, e, z, loss, p, g);
    return status_of("softmax_gradient", cudaGetLastError());
}

template <class T> Status softmax_product(Extent e, Rows<const T> p, const T* weight, Rows<const T> u, Rows<T> out, RowLaunch launch,
                                          int device, void* stream) {
    const DeviceGuard guard(device);
    if (guard.error() != cudaSuccess)
        return status_of("softmax_product", guard.error());
    with(aligned(e, p) && aligned(e, u) && aligned(e, out), [&](auto packed) {
        with(held(e, launch), [&](auto once) {
            auto kernel = product_kernel<T, decltype(packed)::value, decltype(once)::value>;
            FS_LAUNCH(kernel, row_blocks(e, launch), 1, launch.row_block, 0, stream, e, p, weight, u, out);
        });
    });
    return status_of("softmax_product", cudaGetLastError());
}

#define FS_INSTANTIATE(T)                                                                                                                  \
    template Status softmax_gradient<T>(Extent, Rows<const T>, const CrossEntropy<T>&, Rows<T>, Rows<T>, RowLaunch, int, void*);           \
    template Status softmax_product<T>(Extent, Rows<const T>, const T*, Rows<const T>, Rows<T>, RowLaunch, int, void*);
FS_INSTANTIATE(float)
FS_INSTANTIATE(double)
#undef FS_INSTANTIATE

} // namespace fastsharp::cuda
