// Products of fully connected nets on a GPU; formulas and cache in mlp.hpp.
//
// v1  batched matrix products of torch: some ten launches a layer, and every tangent of every sample through memory, for each row.
// v2  one launch: a block takes a row and a slab of samples through all layers, tile after tile.      <- this file
// A tile is 64 samples (32 in double). Its tangents lie in the workspace and stay in L2; a matrix product of a tile stages 16 of its
// depth at a time in shared memory, in which either operand may be turned, and a thread holds 4 x 4 of the sums (4 x 2 in double).
// Rows x slabs blocks: an ensemble, or a block of vectors, fills a GPU; one vector of a small batch does not. Layers wider than some
// hundred are better served by the library's matrix products (`backend="rop"`).
//
// Note on numerical properties: sums over a layer's width and over the samples of a tile are taken in T in registers, in order; sums
// over tiles of a slab and over slabs in T, in order. Samples are cut by their number alone. No atomics: the same bits in every run, for
// every launch, and whatever other rows there are.
#include "mlp_gemm.cuh"

namespace fastsharp::cuda {

namespace {

constexpr i64 kMostSlabs = 32;
constexpr i64 kWidest = i64{1} << 30;
constexpr int kGroups = 4; // into which the classes of a sample are cut for its sum

struct Layer { // l = 1..L
    i64 in, out;
    i64 weight, bias; // in a flat vector
    i64 a, f, c, y;   // in a tile of the cache: a_{l-1}; phi'(z_l), c_l (l < L), y_l
    i64 z_t, a_t;     // in the buffers: z'_l, a'_l (l < L)
};

struct Plan {
    Layer layer[kMostLayers];
    int layers;
    bool curved, cross_entropy;
    i64 p, w, tile_size;                // of a tile of the cache
    i64 y_t, other, buffer_size;        // of the buffers: y'_l and y'_{l-1}, in turn
    i64 n, samples, tiles, slabs, slab; // slab: its tiles
};

template <class T> Plan plan_of(const MlpShape& s) {
    Plan q{};
    q.layers = static_cast<int>(s.layers);
    q.curved = s.curved;
    q.cross_entropy = s.loss == MlpLoss::cross_entropy;
    i64 widest = 0;
    const auto take = [](i64& at, i64 width) {
        const i64 start = at;
        at += width * kSamples<T>;
        return start;
    };
    for (i64 l = 0; l < s.layers; ++l) {
        Layer& layer = q.layer[l];
        layer.in = s.widths[l];
        layer.out = s.widths[l + 1];
        layer.weight = s.weights[l];
        layer.bias = s.biases[l];
        layer.a = take(q.tile_size, layer.in);
        widest = layer.out > widest ? layer.out : widest;
    }
    for (i64 l = 0; l + 1 < s.layers; ++l)
        q.layer[l].f = take(q.tile_size, q.layer[l].out);
    for (i64 l = 0; s.curved && l + 1 < s.layers; ++l)
        q.layer[l].c = take(q.tile_size, q.layer[l].out);
    for (i64 l = 0; l < s.layers; ++l)
        q.layer[l].y = take(q.tile_size, q.layer[l].out);
    if (q.cross_entropy)
        q.p = take(q.tile_size, s.widths[s.layers]);
    q.w = take(q.tile_size, 1);
    q.y_t = take(q.buffer_size, widest);
    q.other = take(q.buffer_size, widest);
    for (i64 l = 0; l + 1 < s.layers; ++l) {
        q.layer[l].a_t = take(q.buffer_size, q.layer[l].out);
        if (s.curved)
            q.layer[l].z_t = take(q.buffer_size, q.layer[l].out);
    }
    q.n = s.n;
    q.samples = s.samples;
    q.tiles = ceil_div(s.samples, kSamples<T>);
    q.slab = ceil_div(q.tiles, kMostSlabs);
    q.slabs = ceil_div(q.tiles, q.slab);
    return q;
}

// Rows of one launch: their buffers, and the partial results of their slabs, fit into `work`.
i64 rows_together(const Plan& q, i64 rows, MlpLaunch config) {
    const i64 of_a_row = q.slabs * (q.buffer_size + (q.slabs > 1 ? q.n : 0));
    i64 together = config.work / of_a_row;
    together = together < 1 ? 1 : together > 65535 ? 65535 : together;
    return together < rows ? together : rows;
}

// u <- w H_loss u for the samples of a tile. A sum over the classes is taken in kGroups parts, added in order.
template <class T> __device__ inline void loss_hessian(const Plan& q, const T* tile, T* u, T* parts) {
    constexpr int S = kTile<T>;
    const i64 classes = q.layer[q.layers - 1].out;
    const T* p = tile + q.p;
    const T* w = tile + q.w;
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); q.cross_entropy && i < S * kGroups; i += static_cast<int>(blockDim.x)) {
        T sum = 0;
        for (i64 k = i / S; k < classes; k += kGroups)
            sum += p[k * S + i % S] * u[k * S + i % S];
        parts[i] = sum;
    }
    __syncthreads();
    for (i64 i = threadIdx.x; i < classes * S; i += blockDim.x) {
        T value = u[i];
        if (q.cross_entropy) {
            T mean = 0;
            for (int g = 0; g < kGroups; ++g)
                mean += parts[g * S + i % S];
            value = p[i] * (value - mean);
        }
        u[i] = w[i % S] * value;
    }
}

// out[r] = the sum of row r of y over the samples, or += it: a warp for each row.
template <class T> __device__ inline void row_sums(const T* y, i64 rows, T* out, bool add) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    __syncthreads();
    for (i64 r = threadIdx.x / kWarp; r < rows; r += blockDim.x / kWarp) {
        T sum = 0;
        for (int i = lane; i < kTile<T>; i += kWarp)
            sum += y[r * kTile<T> + i];
        sum = warp_sum(sum);
        if (lane == 0)
            out[r] = add ? out[r] + sum : sum;
    }
}

template <class T> struct Place {
    const T* tile; // of the cache
    T* b;          // buffers
    const T* W;
    const T* V;
    T* out;
    i64 count; // samples
    bool add;
};

template <class T> __device__ inline void product_of_tile(const Plan& q, bool gauss, Place<T> at, Staged<T> stage, T* parts) {
    constexpr i64 S = kSamples<T>;
    const Term<T> none{};
    for (int l = 0; l < q.layers; ++l) {
        const Layer& layer = q.layer[l];
        const bool last = l + 1 == q.layers;
        const Term<T> direct{at.V + layer.weight, layer.in, 1, at.tile + layer.a, S, 1, layer.in};
        const Term<T> chained = l == 0 ? none : Term<T>{at.W + layer.weight, layer.in, 1, at.b + q.layer[l - 1].a_t, S, 1, layer.in};
        gemm(direct, chained, layer.out, S, stage, [&](i64 r, i64 c, T sum) {
            const i64 k = r * S + c;
            const T z = layer.bias < 0 ? sum : sum + at.V[layer.bias + r];
            if (last) {
                at.b[q.y_t + k] = z;
            } else {
                if (q.curved)
                    at.b[layer.z_t + k] = z;
                at.b[layer.a_t + k] = at.tile[layer.f + k] * z;
            }
        });
    }
    T* y = at.b + q.y_t;
    T* next = at.b + q.other;
    loss_hessian(q, at.tile, y, parts);
    for (int l = q.layers - 1; l >= 0; --l) {
        const Layer& layer = q.layer[l];
        const bool both = l > 0 && !gauss;
        const Term<T> direct{y, S, 1, at.tile + layer.a, 1, S, at.count};
        const Term<T> chained = both ? Term<T>{at.tile + layer.y, S, 1, at.b + q.layer[l - 1].a_t, 1, S, at.count} : none;
        T* gradient = at.out + layer.weight;
        gemm(direct, chained, layer.out, layer.in, stage, [&](i64 r, i64 c, T sum) {
            T& to = gradient[r * layer.in + c];
            to = at.add ? to + sum : sum;
        });
        if (layer.bias >= 0)
            row_sums(y, layer.out, at.out + layer.bias, at.add);
        if (l == 0)
            break;
        const Layer& below = q.layer[l - 1];
        const bool curved = q.curved && !gauss;
        const Term<T> back{at.W + layer.weight, 1, layer.in, y, S, 1, layer.out};
        const Term<T> turned = gauss ? none : Term<T>{at.V + layer.weight, 1, layer.in, at.tile + layer.y, S, 1, layer.out};
        gemm(back, turned, layer.in, S, stage, [&](i64 r, i64 c, T sum) {
            const i64 k = r * S + c;
            T value = at.tile[below.f + k] * sum;
            if (curved)
                value += at.tile[below.c + k] * at.b[below.z_t + k];
            next[k] = value;
        });
        T* used = y;
        y = next;
        next = used;
    }
    __syncthreads(); // before the next tile writes the buffers again
}

template <class T> struct Rows { // of one launch
    const T *cache, *theta;
    const i64* member;
    const T* V;
    i64 V_row;
    T* out; // of slab blockIdx.x of row blockIdx.y
    i64 out_row, out_slab;
    T* buffers;
};

template <class T> __global__ void __launch_bounds__(kBlock, 2) product_kernel(const Plan q, bool gauss, Rows<T> rows) {
    FS_SHARED(T, x, kDepth * kX);
    FS_SHARED(T, y, kDepth * kY<T>);
    FS_SHARED(T, parts, kGroups * kTile<T>);
    const i64 slab = blockIdx.x, r = blockIdx.y, e = rows.member[r], first = slab * q.slab;
    for (i64 i = first; i < first + q.slab && i < q.tiles; ++i) {
        const i64 left = q.samples - i * kSamples<T>;
        const Place<T> at{rows.cache + (e * q.tiles + i) * q.tile_size,
                          rows.buffers + (r * q.slabs + slab) * q.buffer_size,
                          rows.theta + e * q.n,
                          rows.V + r * rows.V_row,
                          rows.out + r * rows.out_row + slab * rows.out_slab,
                          left < kSamples<T> ? left : kSamples<T>,
                          i != first};
        product_of_tile(q, gauss, at, {x, y}, parts);
    }
}

// out (rows, n) <- scale (the sum of partial (rows, slabs, n) over slabs, in order) / divisor. One slab may lie in `out` itself.
template <class T> __global__ void add_slabs(const T* partial, i64 partial_row, i64 slabs, i64 n, T scale, T divisor, T* out, i64 out_row) {
    const i64 r = blockIdx.y;
    for (i64 i = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += static_cast<i64>(gridDim.x) * blockDim.x) {
        T total = partial[r * partial_row + i];
        for (i64 k = 1; k < slabs; ++k)
            total += partial[r * partial_row + k * n + i];
        out[r * out_row + i] = scale * total / divisor;
    }
}

} // namespace

template <class T> i64 mlp_tile_size(const MlpShape& shape) { return plan_of<T>(shape).tile_size; }

template <class T> i64 mlp_workspace_size(const MlpShape& shape, i64 rows, MlpLaunch config) {
    const Plan q = plan_of<T>(shape);
    return rows_together(q, rows, config) * q.slabs * (q.buffer_size + (q.slabs > 1 ? q.n : 0));
}

template <class T> Status mlp_product(const MlpProduct<T>& p, T* work, MlpLaunch config, int device, void* stream) {
    if (p.shape.layers < 1 || p.shape.layers > kMostLayers)
        return {"mlp_product", "a net has 1 to 32 layers"};
    for (i64 l = 0; l <= p.shape.layers; ++l) {
        if (p.shape.widths[l] > kWidest)
            return {"mlp_product", "a layer has at most 2^30 units"};
    }
    const DeviceGuard guard(device);
    if (guard.error() != cudaSuccess)
        return status_of("mlp_product", guard.error());
    const Plan q = plan_of<T>(p.shape);
    const i64 together = rows_together(q, p.rows, config);
    T* partial = work + together * q.slabs * q.buffer_size; // (rows, slabs, n)
    for (i64 r = 0; r < p.rows; r += together) {
        const i64 count = p.rows - r < together ? p.rows - r : together;
        Rows<T> rows{p.cache, p.theta, p.member + r, p.V + r * p.V_row, p.V_row, p.out + r * p.out_row, p.out_row, 0, work};
        if (q.slabs > 1) {
            rows.out = partial;
            rows.out_row = q.slabs * q.n;
            rows.out_slab = q.n;
        }
        FS_LAUNCH(product_kernel<T>, q.slabs, count, config.block, 0, stream, q, p.gauss, rows);
        if (q.slabs > 1 || p.scale != T(1) || p.divisor != T(1)) {
            const i64 blocks = ceil_div(q.n, config.block);
            FS_LAUNCH(add_slabs<T>, blocks < 1024 ? blocks : 1024, count, config.block, 0, stream, rows.out, rows.out_row, q.slabs, q.n,
                      p.scale, p.divisor, p.out + r * p.out_row, p.out_row);
        }
    }
    return status_of("mlp_product", cudaGetLastError());
}

#define FS_INSTANTIATE(T)                                                                                                                  \
    template i64 mlp_tile_size<T>(const MlpShape&);                                                                                        \
    template i64 mlp_workspace_size<T>(const MlpShape&, i64, MlpLaunch);                                                                   \
    template Status mlp_product<T>(const MlpProduct<T>&, T*, MlpLaunch, int, void*);
FS_INSTANTIATE(float)
FS_INSTANTIATE(double)
#undef FS_INSTANTIATE

} // namespace fastsharp::cuda
