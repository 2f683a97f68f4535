// Loads and stores of a register of doubles or of fewer elements at the end of a row. Included inside the namespace of the level, behind
// registers.inl.

// The first `count` elements of a register, which are fewer than it holds.
#if FASTSHARP_X86 && FS_BYTES == 64
#define FS_MASK(count) static_cast<__mmask8>((1U << (count)) - 1U)
FS_INLINE Wide take_some(const float* p, i64 count) { return FS_TO_DOUBLE(_mm256_maskz_loadu_ps(FS_MASK(count), p)); }
FS_INLINE Wide take_some(const double* p, i64 count) { return _mm512_maskz_loadu_pd(FS_MASK(count), p); }
FS_INLINE void put_some(float* p, i64 count, Wide x) { _mm256_mask_storeu_ps(p, FS_MASK(count), FS_TO_FLOAT(x)); }
FS_INLINE void put_some(double* p, i64 count, Wide x) { _mm512_mask_storeu_pd(p, FS_MASK(count), x); }
FS_INLINE Wide keep(Wide x, i64 count, double other) { return _mm512_mask_blend_pd(FS_MASK(count), Wide{} + other, x); }
#undef FS_MASK
#else
template <class T> FS_INLINE Wide take_some(const T* p, i64 count) {
    Wide x{};
    for (i64 k = 0; k < count; ++k)
        x[k] = one(p[k]);
    return x;
}
template <class T> FS_INLINE void put_some(T* p, i64 count, Wide x) {
    for (i64 k = 0; k < count; ++k)
        store_one(p + k, x[k]);
}
FS_INLINE Wide keep(Wide x, i64 count, double other) {
    for (i64 k = count; k < kWide; ++k)
        x[k] = other;
    return x;
}
#endif

// Elements [i, n) of a row, as many as a register holds; zeros beyond the row. A null p is zero throughout.
template <class T> FS_INLINE Wide take(const T* p, i64 i, i64 n) {
    if (p == nullptr)
        return Wide{};
    return n - i >= kWide ? widen(p + i) : take_some(p + i, n - i);
}

template <class T> FS_INLINE void put(T* p, i64 i, i64 n, Wide x) {
    if (n - i >= kWide)
        store(p + i, x);
    else
        put_some(p + i, n - i, x);
}

// In lanes beyond the row x becomes `other`.
FS_INLINE Wide only(Wide x, i64 left, double other) { return left >= kWide ? x : keep(x, left, other); }
