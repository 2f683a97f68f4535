// w_i <- w_i - V'c_i, w_i'w_i and the next row of the basis on a GPU, in one pass over V.
//
// v1  w - V'c by a BLAS gemv in float, then a dot for w'w, then a copy into the basis: w is read and written three times.
// v2  all in one pass, the sum over rows in double, for up to four vectors at once.      <- this file
// As dots, a warp keeps 8 elements of each vector per lane and loops over the rows by itself, four rows of 16-byte loads at a time;
// there is nothing to reduce in the loop. The sum over rows is kept in double: one conversion per element of V and one
// FMA per element and vector, below the bandwidth of a data-centre GPU up to b = 4. Where the double rate is 1/64, it
// is the limit already for b = 1.
//
// Note on numerical properties: w is rounded once, after all rows; w'w is that of the rounded w. The next row is factor[e] w in
// double, rounded once to the storage type. The bits depend on neither E, b nor alignment.
#include "chunk.cuh"
#include "plan.cuh"

namespace fastsharp::cuda {

namespace {

// loaded at a time; element by element they take more addresses, hence more registers
constexpr int kRows = 4;
constexpr int kMostVectors = 4; // sharing a pass over V: the sums of 8, in double, would spill

template <class S, class T, int B, bool Packed> __global__ void __launch_bounds__(kBlock, Packed ? kResident<T, B> : 1)
    update_kernel(Problem<S, T> p, Scalars<const double> c, NextRow<S> next, double* partial) {
    const Place at;
    const i64 e = blockIdx.y;
    const S* const V = p.V + e * p.V_member;
    T* const w = p.w + e * p.w_member;
    const double* const coefficients = c.data + e * c.member;
    S* const row = next.data == nullptr ? nullptr : next.data + e * next.member;
    const double factor = row == nullptr ? 0 : next.factor[e * next.factor_member];
    double ww[B] = {};
    at.for_each_chunk<S, Packed>(p.n, [&](i64 start, i64 left, auto part) {
        double exact[B][kPerLane];
        for (int i = 0; i < B; ++i) {
            T x[kPerLane];
            part.load(w + i * p.w_row + start, left, at.lane, x);
            for (int k = 0; k < kPerLane; ++k)
                exact[i][k] = static_cast<double>(x[k]);
        }
        for (i64 r = 0; r < p.j; r += kRows) {
            T y[kRows][kPerLane];
            for (int u = 0; u < kRows; ++u)
                part.load(V + (r + u < p.j ? r + u : p.j - 1) * p.V_row + start, left, at.lane, y[u]);
            for (int u = 0; u < kRows; ++u) {
                if (r + u < p.j) {
                    for (int i = 0; i < B; ++i)
                        subtract(coefficients[i * c.row + r + u], y[u], exact[i]);
                }
            }
        }
        for (int i = 0; i < B; ++i) {
            T x[kPerLane];
            for (int k = 0; k < kPerLane; ++k)
                x[k] = static_cast<T>(exact[i][k]);
            part.store(w + i * p.w_row + start, left, at.lane, x);
            ww[i] = square(x, ww[i]); // beyond n all of x is zero
            if (B == 1 && row != nullptr) {
                for (int k = 0; k < kPerLane; ++k)
                    exact[i][k] = factor * static_cast<double>(x[k]);
                part.store(row + start, left, at.lane, exact[i]);
            }
        }
    });
    block_sums(ww, partial + e * B * gridDim.x);
}

} // namespace

template <class S, class T> Status update(const Problem<S, T>& p, Scalars<const double> c, const NextRow<S>& row, Scalars<double> out,
                                          double* work, LaunchConfig config, int device, void* stream) {
    const DeviceGuard guard(device);
    if (guard.error() != cudaSuccess)
        return status_of("update", guard.error());
    const bool packed = aligned(p) && aligned(row.data, p.E, row.member);
    for_each_group<kMostVectors>(p.E, p.b, config, [&](Group g, auto vectors) {
        constexpr int B = decltype(vectors)::value;
        auto kernel = packed ? update_kernel<S, T, B, true> : update_kernel<S, T, B, false>;
        const Problem<S, T> q{
            g.E, B, p.j, p.n, p.V + g.e * p.V_member, p.V_member, p.V_row, p.w + g.e * p.w_member + g.i * p.w_row, p.w_member, p.w_row};
        const Scalars<const double> coefficients{c.data + g.e * c.member + g.i * c.row, c.member, c.row};
        NextRow<S> next = row;
        if (row.data != nullptr) {
            next.data += g.e * row.member;
            next.factor += g.e * row.factor_member;
        }
        FS_LAUNCH(kernel, config.grid, g.E, config.block, 0, stream, q, coefficients, next, work);
        second_stage(work, config, g.E, B, 1, {out.data + g.e * out.member + g.i * out.row, out.member, out.row}, stream);
    });
    return status_of("update", cudaGetLastError());
}

#define FS_INSTANTIATE(S, T)                                                                                                               \
    template Status update<S, T>(const Problem<S, T>&, Scalars<const double>, const NextRow<S>&, Scalars<double>, double*, LaunchConfig,   \
                                 int, void*);
FS_INSTANTIATE(float, float)
FS_INSTANTIATE(double, double)
FS_INSTANTIATE(Half, float)
FS_INSTANTIATE(BFloat16, float)
#undef FS_INSTANTIATE

} // namespace fastsharp::cuda
