// Products of fully connected nets on the CPU; formulas and cache in mlp.hpp.
//
// Note on numerical properties. Sums over a layer's width and over the samples of a tile (64 in float, 32 in double) are taken in T in
// registers, sums over tiles of a slab and over slabs in T, in order: blocks, whose error grows like that of a blocked matrix product.
//
// Determinism: samples are cut into tiles and slabs by their number alone. An item is a row with a slab; items are computed
// independently of each other and the slabs of a row are added in order.
#include "fastsharp/mlp.hpp"

#include <limits>

#include "fastsharp/parallel.hpp"
#include "fastsharp/simd.hpp"

namespace fastsharp::cpu {

namespace {

constexpr i64 kSlabTiles = 4; // at least, of a slab: more partial results cost more than the cores they employ
constexpr i64 kMostSlabs = 16;
constexpr i64 kPiece = 4096; // entries of a product that a thread adds up at a time

template <class T> struct Sum { // X1 Y1 + X2 Y2: entry (m, k) of X at rows[m] row + columns[k] column, (k, j) of Y at k Y_row + j
    const T *X1 = nullptr, *Y1 = nullptr, *X2 = nullptr, *Y2 = nullptr; // no X2: one term
    const i64* rows = nullptr;                                          // none: 0, 1, 2, ...
    i64 row = 0;
    const i64* columns = nullptr;
    i64 column = 0, depth = 0, Y_row = 0;
};

template <class T> struct Target { // entry (m, j) at rows[m] row + columns[j]; without tables 0, 1, 2, ...
    T* C = nullptr;
    const i64* rows = nullptr;
    i64 row = 0;
    const i64* columns = nullptr;
    bool add = false;
};

template <class T> struct Tile { // views of the cache, by layer
    const T *a[kMostLayers + 1] = {}, *transposed[kMostLayers + 1] = {}, *f[kMostLayers + 1] = {}, *c[kMostLayers + 1] = {},
                             *y[kMostLayers + 1] = {};
    const i64* units[kMostLayers + 1] = {};
    i64 used[kMostLayers + 1] = {}; // units that take part
    const T *p = nullptr, *w = nullptr;
    i64 count = 0, lanes = 0; // samples, and those rounded up to whole registers
};

template <class T> struct Buffers { // tangents of one tile, by layer
    T *z[kMostLayers + 1] = {}, *a[kMostLayers + 1] = {}, *transposed[kMostLayers + 1] = {};
    T *y = nullptr, *other = nullptr;
};

template <class T> using TileProduct = void (*)(const MlpShape&, bool, const Tile<T>&, const Buffers<T>&, const T*, const T*, T*);

} // namespace

} // namespace fastsharp::cpu

#define FS_KERNELS "mlp_kernels.inl"
#include "levels.inl"
#undef FS_KERNELS

namespace fastsharp::cpu {

namespace {

template <class T> TileProduct<T> kernel(i64& lanes) {
#if FASTSHARP_X86
    if (simd() == Simd::avx512) {
        lanes = avx512::kRegister<T>;
        return avx512::kTileProduct<T>;
    }
    if (simd() == Simd::avx2) {
        lanes = avx2::kRegister<T>;
        return avx2::kTileProduct<T>;
    }
#endif
    lanes = scalar::kRegister<T>;
    return scalar::kTileProduct<T>;
}

// Hands out consecutive parts of one array.
template <class P> class Walk {
public:
    explicit Walk(P* start) : at_(start), start_(start) {}
    P* take(i64 size) {
        P* part = at_;
        at_ = at_ == nullptr ? nullptr : at_ + size;
        taken_ += size;
        return part;
    }
    [[nodiscard]] i64 taken() const { return taken_; }

private:
    P* at_;
    P* start_;
    i64 taken_ = 0;
};

template <class T> i64 tile_of(const MlpShape& s, const T* cache, Tile<T>& t) {
    constexpr i64 S = kSamples<T>;
    Walk<const T> walk(cache);
    for (i64 l = 0; l < s.layers; ++l) {
        t.a[l] = walk.take(s.widths[l] * S);
        t.transposed[l] = walk.take(S * padded<T>(s.widths[l]));
    }
    for (i64 l = 1; l < s.layers; ++l)
        t.f[l] = walk.take(s.widths[l] * S);
    for (i64 l = 1; s.curved && l < s.layers; ++l)
        t.c[l] = walk.take(s.widths[l] * S);
    for (i64 l = 1; l <= s.layers; ++l)
        t.y[l] = walk.take(s.widths[l] * S);
    if (s.loss == MlpLoss::cross_entropy)
        t.p = walk.take(s.widths[s.layers] * S);
    t.w = walk.take(S);
    return walk.taken();
}

template <class T> i64 buffers_of(const MlpShape& s, T* work, Buffers<T>& b) {
    constexpr i64 S = kSamples<T>;
    Walk<T> walk(work);
    i64 widest = 0;
    for (i64 l = 1; l <= s.layers; ++l)
        widest = s.widths[l] > widest ? s.widths[l] : widest;
    b.y = walk.take(widest * S);
    b.other = walk.take(widest * S);
    for (i64 l = 1; l < s.layers; ++l) {
        b.a[l] = walk.take(s.widths[l] * S);
        b.transposed[l] = walk.take(S * padded<T>(s.widths[l]));
        if (s.curved)
            b.z[l] = walk.take(s.widths[l] * S);
    }
    return walk.taken();
}

template <class T> i64 tile_count(const MlpShape& s) { return ceil_div(s.samples, kSamples<T>); }
template <class T> i64 slab_tiles(const MlpShape& s) {
    const i64 even = ceil_div(tile_count<T>(s), kMostSlabs);
    return even > kSlabTiles ? even : kSlabTiles;
}
template <class T> i64 slab_count(const MlpShape& s) { return ceil_div(tile_count<T>(s), slab_tiles<T>(s)); }

template <class T> void units_of(const MlpShape& s, const i64* units, const i64* counts, Tile<T>& t) {
    for (i64 l = 0; l <= s.layers; ++l) {
        t.units[l] = units;
        t.used[l] = counts[l];
        units += s.widths[l];
    }
}

i64 all_units(const MlpShape& s) {
    i64 sum = 0;
    for (i64 l = 0; l <= s.layers; ++l)
        sum += s.widths[l];
    return sum;
}

template <class T> bool finite(const T* x, i64 n) {
    constexpr i64 kSums = 16;
    T none[kSums] = {}; // NaN once x has an Inf or a NaN
    i64 i = 0;
    for (; i + kSums <= n; i += kSums) {
        for (i64 k = 0; k < kSums; ++k)
            none[k] += x[i + k] * T{0};
    }
    for (; i < n; ++i)
        none[0] += x[i] * T{0};
    bool all = true;
    for (const T each : none)
        all = all && each == T{0};
    return all;
}

template <class T> i64 buffer_size(const MlpShape& s) {
    Buffers<T> b;
    return buffers_of<T>(s, nullptr, b);
}

} // namespace

template <class T> i64 mlp_tile_size(const MlpShape& shape) {
    Tile<T> t;
    return tile_of<T>(shape, nullptr, t);
}

template <class T> i64 mlp_workspace_size(const MlpShape& s, i64 rows, int threads) {
    const i64 slabs = slab_count<T>(s);
    const i64 items = rows * slabs;
    return (threads < items ? threads : items) * buffer_size<T>(s) + (slabs > 1 ? items * s.n : 0);
}

template <class T> Status mlp_product(const MlpProduct<T>& p, T* work, int threads) {
    const MlpShape& s = p.shape;
    if (s.layers < 1 || s.layers > kMostLayers)
        return {"mlp_product", "a net has 1 to 32 layers"};
    i64 width = 0;
    const TileProduct<T> of_tile = kernel<T>(width);
    const i64 tiles = tile_count<T>(s), slabs = slab_count<T>(s), items = p.rows * slabs;
    const i64 size = mlp_tile_size<T>(s), buffer = buffer_size<T>(s), all = all_units(s);
    const i64 workers = threads < items ? threads : items;
    T* partial = work + workers * buffer; // (rows, slabs, n)
    parallel_for(workers, threads, [&, width](i64 worker) noexcept {
        Buffers<T> b;
        buffers_of<T>(s, work + worker * buffer, b);
        for (i64 item = items * worker / workers; item < items * (worker + 1) / workers; ++item) {
            const i64 r = item / slabs, e = p.member[r];
            const T* V = p.V + r * p.V_row;
            T* out = slabs == 1 ? p.out + r * p.out_row : partial + item * s.n;
            const bool usable = finite(V, s.n); // units that take no part would hide what is not
            for (i64 i = 0; i < s.n; ++i)
                out[i] = usable ? T{0} : std::numeric_limits<T>::quiet_NaN();
            for (i64 i = item % slabs; usable && i < tiles; i += slabs) { // neighbours cost alike, so that strides share the work evenly
                Tile<T> t;
                tile_of<T>(s, p.cache + (e * tiles + i) * size, t);
                units_of<T>(s, p.units + (e * tiles + i) * all, p.counts + (e * tiles + i) * (s.layers + 1), t);
                const i64 left = s.samples - i * kSamples<T>;
                t.count = left < kSamples<T> ? left : kSamples<T>;
                t.lanes = ceil_div(t.count, width) * width;
                of_tile(s, p.gauss, t, b, p.theta + e * s.n, V, out);
            }
        }
    });
    if (slabs > 1 || p.scale != T{1} || p.divisor != T{1}) {
        const i64 pieces = ceil_div(s.n, kPiece);
        parallel_for(p.rows * pieces, threads, [&](i64 task) noexcept {
            const i64 r = task / pieces, start = (task % pieces) * kPiece, end = s.n - start < kPiece ? s.n : start + kPiece;
            T* out = p.out + r * p.out_row;
            for (i64 k = 0; slabs > 1 && k < slabs; ++k) {
                const T* part = partial + (r * slabs + k) * s.n;
                for (i64 i = start; i < end; ++i)
                    out[i] = k == 0 ? part[i] : out[i] + part[i];
            }
            for (i64 i = start; i < end; ++i)
                out[i] = p.scale * out[i] / p.divisor;
        });
    }
    return {"mlp_product"};
}

#define FS_INSTANTIATE(T)                                                                                                                  \
    template i64 mlp_tile_size<T>(const MlpShape&);                                                                                        \
    template i64 mlp_workspace_size<T>(const MlpShape&, i64, int);                                                                         \
    template Status mlp_product<T>(const MlpProduct<T>&, T*, int);
FS_INSTANTIATE(float)
FS_INSTANTIATE(double)
#undef FS_INSTANTIATE

} // namespace fastsharp::cpu
