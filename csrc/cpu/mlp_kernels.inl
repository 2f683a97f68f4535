// The tangent passes over one tile of samples, for one instruction set; see levels.inl.

namespace fastsharp::cpu::FS_LEVEL {

namespace {

#include "registers.inl"

#include "mlp_gemm.inl"

// to (columns, ldt) <- from (rows, kSamples)', the first `columns` of each row.
template <class T> FS_TARGET void transpose(const T* from, i64 rows, i64 columns, T* to, i64 ldt) {
    constexpr i64 kBlock = 16;
    for (i64 r = 0; r < rows; r += kBlock) {
        const i64 end = rows - r < kBlock ? rows : r + kBlock;
        for (i64 c = 0; c < columns; ++c) {
            for (i64 i = r; i < end; ++i)
                to[c * ldt + i] = from[i * kSamples<T> + c];
        }
    }
}

// y <- f y + c z over rows of `lanes` numbers; no c: y <- f y.
template <class T> FS_TARGET void scaled(const T* f, const T* c, const T* z, T* y, i64 rows, i64 lanes) {
    for (i64 r = 0; r < rows; ++r) {
        for (i64 i = 0; i < lanes; i += kWidth<T>) {
            const i64 k = r * kSamples<T> + i;
            Vec<T> value = load<Vec<T>>(f + k) * load<Vec<T>>(y + k);
            if (c != nullptr)
                value += load<Vec<T>>(c + k) * load<Vec<T>>(z + k);
            __builtin_memcpy(y + k, &value, sizeof value);
        }
    }
}

// u <- w H_loss u for the samples of a tile. For the cross-entropy p (u - <p, u>), where a constant added to u changes nothing: with u
// zero at the largest p nothing cancels where a sample is classified for certain, and what is left is of the size of 1 - p.
template <class T> FS_TARGET void loss_hessian(const Tile<T>& t, MlpLoss loss, T* u, i64 classes) {
    for (i64 i = 0; i < t.lanes; i += kWidth<T>) {
        const auto w = load<Vec<T>>(t.w + i);
        Vec<T> mean{}, shift{};
        if (loss == MlpLoss::cross_entropy) {
            auto top = load<Vec<T>>(t.p + i);
            shift = load<Vec<T>>(u + i);
            for (i64 k = i + kSamples<T>; k < classes * kSamples<T>; k += kSamples<T>) {
                const auto p = load<Vec<T>>(t.p + k);
                const auto larger = p > top;
                top = larger ? p : top;
                shift = larger ? load<Vec<T>>(u + k) : shift;
            }
            for (i64 k = i; k < classes * kSamples<T>; k += kSamples<T>)
                mean += load<Vec<T>>(t.p + k) * (load<Vec<T>>(u + k) - shift);
        }
        for (i64 k = i; k < classes * kSamples<T>; k += kSamples<T>) {
            Vec<T> value = w * ((load<Vec<T>>(u + k) - shift) - mean);
            if (loss == MlpLoss::cross_entropy)
                value *= load<Vec<T>>(t.p + k);
            __builtin_memcpy(u + k, &value, sizeof value);
        }
    }
}

// out[units[r]] += the sum of row r.
template <class T> FS_TARGET void row_sums(const T* y, i64 rows, i64 lanes, const i64* units, T* out) {
    for (i64 r = 0; r < rows; ++r) {
        Vec<T> sums{};
        for (i64 i = 0; i < lanes; i += kWidth<T>)
            sums += load<Vec<T>>(y + r * kSamples<T> + i);
        T total = 0;
        for (i64 k = 0; k < kWidth<T>; ++k)
            total += sums[k];
        out[units[r]] += total;
    }
}

// out += the product of one tile.
template <class T>
FS_TARGET void product_of_tile(const MlpShape& s, bool gauss, const Tile<T>& t, const Buffers<T>& b, const T* W, const T* V, T* out) {
    constexpr i64 S = kSamples<T>;
    i64 samples[S];
    for (i64 i = 0; i < S; ++i)
        samples[i] = i;
    T *y = b.y, *next = b.other;
    for (i64 l = 1; l <= s.layers; ++l) {
        const i64 in = s.widths[l - 1], used = t.used[l], at = s.weights[l - 1];
        const T* v = s.biases[l - 1] < 0 ? nullptr : V + s.biases[l - 1];
        T* z = l == s.layers ? y : s.curved ? b.z[l] : b.a[l];
        const bool both = l > 1;
        gemm<T>({V + at, t.a[l - 1], both ? W + at : nullptr, b.a[l - 1], t.units[l], in, t.units[l - 1], 1, t.used[l - 1], S}, v,
                {z, nullptr, S, nullptr, false}, used, t.lanes);
        if (l == s.layers)
            break;
        if (s.curved)
            __builtin_memcpy(b.a[l], z, static_cast<std::size_t>(used * S) * sizeof(T));
        scaled<T>(t.f[l], nullptr, nullptr, b.a[l], used, t.lanes);
        if (!gauss)
            transpose(b.a[l], used, t.count, b.transposed[l], padded<T>(s.widths[l]));
    }
    loss_hessian(t, s.loss, y, s.widths[s.layers]);
    for (i64 l = s.layers; l >= 1; --l) {
        const i64 in = s.widths[l - 1], used = t.used[l], from = t.used[l - 1], at = s.weights[l - 1];
        const bool both = l > 1 && !gauss;
        gemm<T>({y, t.transposed[l - 1], both ? t.y[l] : nullptr, b.transposed[l - 1], nullptr, S, samples, 1, t.count, padded<T>(in)},
                nullptr, {out + at, t.units[l], in, from == in ? nullptr : t.units[l - 1], true}, used, from);
        if (s.biases[l - 1] >= 0)
            row_sums(y, used, t.lanes, t.units[l], out + s.biases[l - 1]);
        if (l == 1)
            break;
        gemm<T>({W + at, y, gauss ? nullptr : V + at, t.y[l], t.units[l - 1], 1, t.units[l], in, used, S}, nullptr,
                {next, nullptr, S, nullptr, false}, from, t.lanes);
        const bool curved = s.curved && !gauss;
        scaled<T>(t.f[l - 1], curved ? t.c[l - 1] : nullptr, curved ? b.z[l - 1] : nullptr, next, from, t.lanes);
        T* used_up = y;
        y = next;
        next = used_up;
    }
}

} // namespace

template <class T> inline constexpr TileProduct<T> kTileProduct = product_of_tile<T>;
template <class T> inline constexpr i64 kRegister = kWidth<T>;

} // namespace fastsharp::cpu::FS_LEVEL
