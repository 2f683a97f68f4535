// w <- w - a v_j - b v_{j-1}, then V w and w'w on a GPU. Limited by reading V once; the work is to keep enough loads in flight.
//
// The ladder (bytes are counted per element of V; rates are to be measured by bench/gpu.sh):
//   v1  one block per row, as a BLAS dot: w is read again for every row, 2x the bytes of V.
//   v2  a block keeps a tile of w in shared memory and loops over the rows: V once, but two __syncthreads per row and tile
//       to reduce across the block, so warps wait for the slowest of eight between any two loads.
//   v3  a warp keeps 256 elements of w in registers, 8 per lane, and loops over the rows by itself: no barrier in the loop. The
//       chunk of 256 is also the length over which float products may be added in float.
//   v4  v3 with four rows of 16-byte loads at a time (eight in half precision): 128 bytes in flight per lane, enough at half
//       occupancy to cover the latency.
//   v5  v4 for b vectors: each loaded row meets all of them, V is read b times less. The sums of a step, rows x vectors, are
//       reduced together (warp_sums): 6 shuffles in place of 20 for four rows, 31 in place of 160 for 4 x 8.      <- this file
// A chunk's sums are added in double to one slot of shared memory per warp, row and vector, so the block needs a single barrier at
// its end. Rows come in launches of at most kSumsPerWarp sums, which bounds the shared memory for any j.
//
// Note on numerical properties: products of float in float within a chunk (8 in a lane, then a butterfly), chunks in double; w'w in
// double throughout; what is removed is subtracted in double and w rounded once. No atomics: chunks are dealt to warps by
// LaunchConfig, a function of n alone, and the bits depend on neither E, b, j nor alignment.
#include "chunk.cuh"
#include "plan.cuh"

namespace fastsharp::cuda {

namespace {

// Rows loaded at a time. A last, shorter step loads its last row again, from L1, and drops those sums.
template <class S, int B> constexpr int kRows = sizeof(S) == 2 && B == 1 ? 8 : 4;

template <class T> constexpr int kMostVectors = sizeof(T) == 4 ? 8 : 4; // sharing a pass over V

// w <- w - ab[0] v_j - ab[1] v_{j-1} for the lane's part x of a chunk; a zero coefficient does not read its vector.
template <class P, class T>
__device__ inline void remove(double a, const T* v1, double b, const T* v2, P part, i64 left, int lane, T (&x)[kPerLane]) {
    T y[kPerLane];
    double exact[kPerLane];
    for (int k = 0; k < kPerLane; ++k)
        exact[k] = static_cast<double>(x[k]);
    if (a != 0) {
        part.load(v1, left, lane, y);
        subtract(a, y, exact);
    }
    if (b != 0) {
        part.load(v2, left, lane, y);
        subtract(b, y, exact);
    }
    for (int k = 0; k < kPerLane; ++k)
        x[k] = static_cast<T>(exact[k]);
}

// Adds the products of B parts x with all rows of V to own[i * width + r].
template <class S, int B, class P, class T> __device__ inline void row_products(const S* V, i64 ldv, int rows, int width, P part, i64 left,
                                                                                int lane, const T (&x)[B][kPerLane], double* own) {
    constexpr int U = kRows<S, B>;
    constexpr int lanes = kWarp / (U * B); // that hold the same sum after warp_sums
    for (int r = 0; r < rows; r += U) {
        T y[U][kPerLane];
        for (int u = 0; u < U; ++u)
            part.load(V + static_cast<i64>(r + u < rows ? r + u : rows - 1) * ldv, left, lane, y[u]);
        T s[U * B];
        for (int u = 0; u < U; ++u) {
            for (int i = 0; i < B; ++i) {
                T sum = 0;
                for (int k = 0; k < kPerLane; ++k)
                    sum += y[u][k] * x[i][k];
                s[u * B + i] = sum;
            }
        }
        const T mine = warp_sums<U * B>(s, lane);
        const int row = r + lane / lanes / B;
        if (lane % lanes == 0 && row < rows)
            own[lane / lanes % B * width + row] += static_cast<double>(mine);
    }
}

// All p.j rows against vectors 0 .. B - 1 of every member; with `squares` the removal before and w'w after, as one more row.
// partial is (E, B * width, grid).
template <class S, class T, int B, bool Packed> __global__ void __launch_bounds__(kBlock, kResident<T, B>)
    dots_kernel(Problem<S, T> p, Removed<T> removed, bool squares, double* partial) {
    FS_DYNAMIC_SHARED(double, sums); // (warps, B, width)
    const Place at;
    const i64 e = blockIdx.y;
    const S* const V = p.V + e * p.V_member;
    T* const w = p.w + e * p.w_member;
    const int rows = static_cast<int>(p.j);
    const int width = rows + (squares ? 1 : 0);
    for (int k = static_cast<int>(threadIdx.x); k < at.warps * B * width; k += static_cast<int>(blockDim.x))
        sums[k] = 0;
    __syncthreads(); // from here to the next barrier a slot is touched by one lane alone
    double* const own = sums + at.warp * B * width;

    double a = 0, b = 0;
    const T* v1 = nullptr;
    const T* v2 = nullptr;
    if (B == 1 && squares && removed.ab != nullptr) {
        a = removed.ab[e * removed.ab_member];
        v1 = removed.last.data + e * removed.last.member;
        if (removed.before.data != nullptr) {
            b = removed.ab[e * removed.ab_member + 1];
            v2 = removed.before.data + e * removed.before.member;
        }
    }
    double ww[B] = {};
    at.for_each_chunk<S, Packed>(p.n, [&](i64 start, i64 left, auto part) {
        T x[B][kPerLane];
        for (int i = 0; i < B; ++i)
            part.load(w + i * p.w_row + start, left, at.lane, x[i]);
        if (B == 1 && (a != 0 || b != 0)) {
            remove(a, v1 + start, b, v2 + start, part, left, at.lane, x[0]);
            part.store(w + start, left, at.lane, x[0]);
        }
        if (squares) {
            for (int i = 0; i < B; ++i)
                ww[i] = square(x[i], ww[i]);
        }
        row_products<S, B>(V + start, p.V_row, rows, width, part, left, at.lane, x, own);
    });
    if (squares) {
        for (int i = 0; i < B; ++i) {
            const double total = warp_sum(ww[i]);
            if (at.lane == 0)
                own[i * width + rows] = total;
        }
    }
    __syncthreads();
    for (int k = static_cast<int>(threadIdx.x); k < B * width; k += static_cast<int>(blockDim.x)) {
        double total = 0;
        for (int warp = 0; warp < at.warps; ++warp)
            total += sums[warp * B * width + k];
        partial[(e * B * width + k) * gridDim.x + blockIdx.x] = total;
    }
}

template <class T> Removed<T> from_member(const Removed<T>& r, i64 e) {
    Removed<T> s = r;
    s.ab += r.ab == nullptr ? 0 : e * r.ab_member;
    s.last.data += r.last.data == nullptr ? 0 : e * r.last.member;
    s.before.data += r.before.data == nullptr ? 0 : e * r.before.member;
    return s;
}

constexpr i64 kMaxGrid = 2048; // about 8 waves of blocks on the largest GPU: the last wave costs little, the partial sums stay few

} // namespace

LaunchConfig LaunchConfig::of(i64 n) {
    const i64 blocks = ceil_div(n, kChunk * (kBlock / kWarp));
    return {static_cast<int>(blocks < kMaxGrid ? blocks : kMaxGrid), kBlock};
}

i64 workspace_size(LaunchConfig config, i64 E, i64 b, i64 j) {
    i64 sums = 0; // of the largest launch, which is one of dots; alpha and update are the case j = 0
    for (int vectors = 1; vectors <= kLargestGroup && vectors <= b; vectors *= 2) {
        const i64 rows = j < rows_of_a_launch(vectors) ? j : rows_of_a_launch(vectors);
        sums = vectors * (rows + 1) > sums ? vectors * (rows + 1) : sums;
    }
    return (E < config.members ? E : config.members) * sums * config.grid;
}

template <class S, class T> Status dots(const Problem<S, T>& p, const Removed<T>& removed, Scalars<double> out, double* work,
                                        LaunchConfig config, int device, void* stream) {
    const DeviceGuard guard(device);
    if (guard.error() != cudaSuccess)
        return status_of("dots", guard.error());
    const bool packed =
        aligned(p) && aligned(removed.last.data, p.E, removed.last.member) && aligned(removed.before.data, p.E, removed.before.member);
    for_each_group<kMostVectors<T>>(p.E, p.b, config, [&](Group g, auto vectors) {
        constexpr int B = decltype(vectors)::value;
        constexpr i64 step = rows_of_a_launch(B);
        auto kernel = packed ? dots_kernel<S, T, B, true> : dots_kernel<S, T, B, false>;
        // The last rows go first, with w'w as one more sum, so that the sums of every launch are consecutive in out.
        for (i64 r = (p.j - 1) / step * step; r >= 0; r -= step) {
            const bool squares = r + step >= p.j;
            const i64 rows = squares ? p.j - r : step;
            const i64 width = rows + (squares ? 1 : 0);
            const Problem<S, T> q{g.E,
                                  B,
                                  rows,
                                  p.n,
                                  p.V + g.e * p.V_member + r * p.V_row,
                                  p.V_member,
                                  p.V_row,
                                  p.w + g.e * p.w_member + g.i * p.w_row,
                                  p.w_member,
                                  p.w_row};
            const i64 shared = config.block / kWarp * B * width * static_cast<i64>(sizeof(double));
            FS_LAUNCH(kernel, config.grid, g.E, config.block, shared, stream, q, from_member(removed, g.e), squares, work);
            second_stage(work, config, g.E, B, width, {out.data + g.e * out.member + g.i * out.row + r, out.member, out.row}, stream);
        }
    });
    return status_of("dots", cudaGetLastError());
}

#define FS_INSTANTIATE(S, T)                                                                                                               \
    template Status dots<S, T>(const Problem<S, T>&, const Removed<T>&, Scalars<double>, double*, LaunchConfig, int, void*);
FS_INSTANTIATE(float, float)
FS_INSTANTIATE(double, double)
FS_INSTANTIATE(Half, float)
FS_INSTANTIATE(BFloat16, float)
#undef FS_INSTANTIATE

} // namespace fastsharp::cuda
