// Layer and RMS norm on a GPU: tangent and tangent of the adjoint for b vectors. Limited by memory: 1 + 2b matrices forward, 2 + 3b back.
//
// The ladder (bytes are counted per element of x and vector; rates are to be measured by bench/gpu.sh):
//   v1  torch's kernels one by one: about 12 passes forward and 20 back, each reading and writing a tangent.
//   v2  a block to a row with a barrier per sum, the row read twice: the second sweep finds it in L2, at best.
//   v3  the sums of a row reduced together behind one barrier; rows of at most 256 columns a warp stay in registers between the two
//       sweeps; loads of 16 bytes; the vectors of a row side by side, so that x, y_g and the weight come from L1.    <- this file
// Gradients of weight and bias go by strips of columns in a launch of their own: it reads x_t and y_gt again, 2 + 2b matrices more, and
// needs no sum over a row, since those of x_t are kept from the tangent. Sharing one launch would take shared memory by columns for the
// sums.
//
// Note on numerical properties: everything is double between loads and stores, results are rounded once. No atomics: the bits depend on
// neither b, alignment nor the GPU.
#include "fastsharp/dual_norm.hpp"

#include "norm_row.cuh"
#include "rows.cuh"

namespace fastsharp::cuda {

namespace {

constexpr i64 kMaxGrid = 1 << 16;
constexpr i64 kRowsOfShare = 16; // at least: partial sums are then an eighth of what is read, or less
constexpr i64 kMaxShares = 512;
constexpr i64 kStripTasks = 4096; // warps that fill the largest GPU

// Once for all products: without the variant for whole packs.
template <class T> __global__ void __launch_bounds__(kBlock, 1)
    prepare_kernel(Extent e, Rows<const T> x, double eps, bool center, double* stats) {
    const Place place = in_row();
    const double n = static_cast<double>(e.columns);
    for_each_row(e, [&](i64, i64 r) {
        const T* row = at(x, 0, r);
        T v[kPerLane];
        double s[1] = {0};
        place.for_each_chunk<T, false>(e.columns, [&](i64 start, i64 left, auto part) {
            part.load(row + start, left, place.lane, v);
            for (int i = 0; i < kPerLane; ++i)
                s[0] += static_cast<double>(v[i]);
        });
        row_sums(s, place);
        const double mean = center ? s[0] / n : 0;
        s[0] = 0;
        place.for_each_chunk<T, false>(e.columns, [&](i64 start, i64 left, auto part) {
            part.load(row + start, left, place.lane, v);
            for (int i = 0; i < kPerLane; ++i) {
                const double d = part.has(left, place.lane, i) ? static_cast<double>(v[i]) - mean : 0;
                s[0] += d * d;
            }
        });
        row_sums(s, place);
        if (threadIdx.x == 0) {
            stats[2 * r] = mean;
            stats[2 * r + 1] = 1 / sqrt(s[0] / n + eps);
        }
    });
}

template <class T, bool Packed, bool Held> __global__ void __launch_bounds__(kBlock, 1)
    tangent_kernel(Extent e, Norm<T> f, Rows<const T> x_t, Columns<const T> w_t, Columns<const T> bias_t, Rows<T> out, double* sums) {
    const Place place = in_row();
    for_each_row(e, [&](i64 k, i64 r) {
        const RowStats row(f, e, r);
        T x[kPerLane];
        T t[kPerLane];
        double s[2] = {0, 0};
        const auto read = [&](i64 start, i64 left, auto part) {
            part.load(at(f.x, 0, r) + start, left, place.lane, x);
            load(part, at(x_t, k, r), start, left, place.lane, T(0), t);
        };
        place.for_each_chunk<T, Packed>(e.columns, [&](i64 start, i64 left, auto part) {
            read(start, left, part);
            for (int i = 0; i < kPerLane; ++i) { // beyond the row t is zero
                s[0] += static_cast<double>(t[i]);
                s[1] += row.normalised(x[i]) * static_cast<double>(t[i]);
            }
        });
        row_sums(s, place);
        const Pair of_x(f.center ? s[0] / row.n : 0, s[1] / row.n);
        if (threadIdx.x == 0) {
            sums[2 * (k * e.rows + r)] = of_x.mean;
            sums[2 * (k * e.rows + r) + 1] = of_x.along;
        }
        if (out.data == nullptr)
            return;
        place.for_each_chunk<T, Packed>(e.columns, [&](i64 start, i64 left, auto part) {
            if (!Held)
                read(start, left, part);
            T w[kPerLane];
            T slope[kPerLane];
            T shift[kPerLane];
            load(part, f.w, start, left, place.lane, T(1), w);
            load(part, at(w_t, k), start, left, place.lane, T(0), slope);
            load(part, at(bias_t, k), start, left, place.lane, T(0), shift);
            double y[kPerLane];
            for (int i = 0; i < kPerLane; ++i) {
                const double h = row.normalised(x[i]);
                const double h_t = row.tangent(h, t[i], of_x);
                y[i] = h_t * static_cast<double>(w[i]) + static_cast<double>(slope[i]) * h + static_cast<double>(shift[i]);
            }
            part.store(at(out, k, r) + start, left, place.lane, y);
        });
    });
}

// Second: y_g is there.
template <class T, bool Packed, bool Held, bool Second> __global__ void __launch_bounds__(kBlock, 1)
    adjoint_kernel(Extent e, Norm<T> f, Rows<const T> y_gt, NormSecond<T> second, Rows<T> out, double* sums) {
    const Place place = in_row();
    for_each_row(e, [&](i64 k, i64 r) {
        const RowStats row(f, e, r);
        const i64 pair = 2 * (k * e.rows + r);
        T x[kPerLane];
        T y_t[kPerLane];
        T y_g[kPerLane] = {};
        T t[kPerLane] = {};
        const auto read = [&](i64 start, i64 left, auto part) {
            part.load(at(f.x, 0, r) + start, left, place.lane, x);
            load(part, at(y_gt, k, r), start, left, place.lane, T(0), y_t);
            if constexpr (Second) {
                part.load(at(second.y_g, 0, r) + start, left, place.lane, y_g);
                load(part, at(second.x_t, k, r), start, left, place.lane, T(0), t);
            }
        };
        T w[kPerLane];
        T w_t[kPerLane] = {};
        const auto read_weights = [&](i64 start, i64 left, auto part) {
            load(part, f.w, start, left, place.lane, T(1), w);
            if constexpr (Second)
                load(part, at(second.w_t, k), start, left, place.lane, T(0), w_t);
        };
        const auto g_t = [&](int i) {
            double g = static_cast<double>(w[i]) * static_cast<double>(y_t[i]);
            if constexpr (Second)
                g += static_cast<double>(w_t[i]) * static_cast<double>(y_g[i]);
            return g;
        };
        const Pair of_x(Second ? second.x_sums + pair : nullptr);
        const Pair of_g(Second ? second.g_sums + 2 * r : nullptr);
        double s[Second ? 3 : 2] = {};
        place.for_each_chunk<T, Packed>(e.columns, [&](i64 start, i64 left, auto part) {
            read(start, left, part);
            read_weights(start, left, part);
            for (int i = 0; i < kPerLane; ++i) { // beyond the row y_t and y_g are zero
                const double h = row.normalised(x[i]);
                const double g = g_t(i);
                s[0] += g;
                s[1] += h * g;
                if constexpr (Second)
                    s[2] += static_cast<double>(w[i]) * static_cast<double>(y_g[i]) * row.tangent(h, t[i], of_x);
            }
        });
        row_sums(s, place);
        const double mean = f.center ? s[0] / row.n : 0;
        const double along = s[1] / row.n;
        if (sums != nullptr && threadIdx.x == 0) {
            sums[pair] = mean;
            sums[pair + 1] = along;
        }
        if (out.data == nullptr)
            return;
        place.for_each_chunk<T, Packed>(e.columns, [&](i64 start, i64 left, auto part) {
            if (!Held)
                read(start, left, part);
            read_weights(start, left, part);
            double x_gt[kPerLane];
            for (int i = 0; i < kPerLane; ++i) {
                const double h = row.normalised(x[i]);
                double g = g_t(i) - mean - h * along;
                if constexpr (Second) {
                    const double projected = static_cast<double>(w[i]) * static_cast<double>(y_g[i]) - of_g.mean - h * of_g.along;
                    g -= h * (s[2] / row.n) + row.tangent(h, t[i], of_x) * of_g.along + projected * (row.rstd * of_x.along);
                }
                x_gt[i] = g * row.rstd;
            }
            part.store(at(out, k, r) + start, left, place.lane, x_gt);
        });
    });
}

// partial (shares, b, 2, columns): the sums over the rows of a share of y_gt h + y_g h_t, and of y_gt.
template <class T, bool Packed, bool Second> __global__ void __launch_bounds__(kBlock, 1)
    gradient_kernel(Extent e, Norm<T> f, Rows<const T> y_gt, NormSecond<T> second, bool w_too, bool bias_too, i64 shares, i64 each,
                    double* partial) {
    for_each_strip<T, Packed>(e, shares, [&](i64 k, i64 share, i64 start, i64 left, auto part, int lane) {
        double w_sum[kPerLane] = {};
        double bias_sum[kPerLane] = {};
        const i64 end = (share + 1) * each < e.rows ? (share + 1) * each : e.rows;
        for (i64 r = share * each; r < end; ++r) {
            T y_t[kPerLane];
            load(part, at(y_gt, k, r), start, left, lane, T(0), y_t);
            for (int i = 0; i < kPerLane; ++i)
                bias_sum[i] += static_cast<double>(y_t[i]);
            if (!w_too)
                continue;
            const RowStats row(f, e, r);
            T x[kPerLane];
            part.load(at(f.x, 0, r) + start, left, lane, x);
            for (int i = 0; i < kPerLane; ++i)
                w_sum[i] += static_cast<double>(y_t[i]) * row.normalised(x[i]);
            if constexpr (Second) {
                const Pair of_x(second.x_sums + 2 * (k * e.rows + r));
                T y_g[kPerLane];
                T t[kPerLane];
                part.load(at(second.y_g, 0, r) + start, left, lane, y_g);
                load(part, at(second.x_t, k, r), start, left, lane, T(0), t);
                for (int i = 0; i < kPerLane; ++i)
                    w_sum[i] += static_cast<double>(y_g[i]) * row.tangent(row.normalised(x[i]), t[i], of_x);
            }
        }
        double* to = partial + (share * e.b + k) * 2 * e.columns;
        if (w_too)
            store(part, to, start, left, lane, w_sum);
        if (bias_too)
            store(part, to + e.columns, start, left, lane, bias_sum);
    });
}

template <class T> bool packs(Extent e, const Norm<T>& f) { return aligned(e, f.x) && aligned(f.w, 1, 0); }

} // namespace

RowLaunch RowLaunch::of(Extent e) {
    const i64 strips = ceil_div(e.columns, kChunk);
    const int warps = static_cast<int>(strips < kBlock / kWarp ? strips : kBlock / kWarp);
    i64 shares = ceil_div(e.rows, kRowsOfShare);
    for (const i64 most : {kMaxShares, ceil_div(kStripTasks, strips)})
        shares = most < shares ? most : shares;
    return {kMaxGrid, warps * kWarp, kBlock, shares};
}

i64 norm_workspace(Extent e, RowLaunch launch) { return launch.shares * e.b * 2 * e.columns; }

template <class T>
Status norm_prepare(Extent e, Rows<const T> x, double eps, bool center, double* stats, RowLaunch launch, int device, void* stream) {
    const DeviceGuard guard(device);
    if (guard.error() != cudaSuccess)
        return status_of("norm_prepare", guard.error());
    FS_LAUNCH(prepare_kernel<T>, row_blocks(e, launch), 1, launch.row_block, 0, stream, e, x, eps, center, stats);
    return status_of("norm_prepare", cudaGetLastError());
}

template <class T> Status norm_tangent(Extent e, const Norm<T>& f, Rows<const T> x_t, Columns<const T> w_t, Columns<const T> bias_t,
                                       Rows<T> out, double* sums, RowLaunch launch, int device, void* stream) {
    const DeviceGuard guard(device);
    if (guard.error() != cudaSuccess)
        return status_of("norm_tangent", guard.error());
    const bool whole = packs(e, f) && aligned(e, x_t) && aligned(e, w_t) && aligned(e, bias_t) && aligned(e, out);
    with(whole, [&](auto packed) {
        with(held(e, launch), [&](auto once) {
            auto kernel = tangent_kernel<T, decltype(packed)::value, decltype(once)::value>;
            FS_LAUNCH(kernel, row_blocks(e, launch), 1, launch.row_block, 0, stream, e, f, x_t, w_t, bias_t, out, sums);
        });
    });
    return status_of("norm_tangent", cudaGetLastError());
}

template <class T> Status norm_adjoint(Extent e, const Norm<T>& f, Rows<const T> y_gt, const NormSecond<T>& second, Rows<T> out,
                                       double* sums, NormGradients<T> gradients, double* work, RowLaunch launch, int device, void* stream) {
    const DeviceGuard guard(device);
    if (guard.error() != cudaSuccess)
        return status_of("norm_adjoint", guard.error());
    const bool w_too = gradients.w.data != nullptr;
    const bool bias_too = gradients.bias.data != nullptr;
    const bool whole =
        packs(e, f) && aligned(e, y_gt) && aligned(e, second.y_g) && aligned(e, second.x_t) && aligned(e, second.w_t) && aligned(e, out);
    with(whole, [&](auto packed) {
        with(second.y_g.data != nullptr, [&](auto two) {
            constexpr bool P = decltype(packed)::value;
            constexpr bool S = decltype(two)::value;
            if (w_too || bias_too) { // first: out may take the place of y_gt or x_t
                auto kernel = gradient_kernel<T, P, S>;
                FS_LAUNCH(kernel, strip_blocks(e, launch.shares, launch), 1, launch.strip_block, 0, stream, e, f, y_gt, second, w_too,
                          bias_too, launch.shares, launch.each(e.rows), work);
            }
            if (out.data == nullptr && sums == nullptr)
                return;
            with(held(e, launch), [&](auto once) {
                auto kernel = adjoint_kernel<T, P, decltype(once)::value, S>;
                FS_LAUNCH(kernel, row_blocks(e, launch), 1, launch.row_block, 0, stream, e, f, y_gt, second, out, sums);
            });
        });
    });
    add_partials(e, work, 2 * e.columns, 0, gradients.w, launch, stream);
    add_partials(e, work, 2 * e.columns, e.columns, gradients.bias, launch, stream);
    return status_of("norm_adjoint", cudaGetLastError());
}

#define FS_INSTANTIATE(T)                                                                                                                  \
    template Status norm_prepare<T>(Extent, Rows<const T>, double, bool, double*, RowLaunch, int, void*);                                  \
    template Status norm_tangent<T>(Extent, const Norm<T>&, Rows<const T>, Columns<const T>, Columns<const T>, Rows<T>, double*,           \
                                    RowLaunch, int, void*);                                                                                \
    template Status norm_adjoint<T>(Extent, const Norm<T>&, Rows<const T>, const NormSecond<T>&, Rows<T>, double*, NormGradients<T>,       \
                                    double*, RowLaunch, int, void*);
FS_INSTANTIATE(float)
FS_INSTANTIATE(double)
#undef FS_INSTANTIATE

} // namespace fastsharp::cuda
