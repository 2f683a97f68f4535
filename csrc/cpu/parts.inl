// Loads and stores of a register of doubles or of fewer elements at the end of a row. Included inside the namespace of the level, behind
// registers.inl.

// Beyond `left` the register holds zeros; a null p is zero throughout.
template <class T> FS_INLINE Wide take(const T* p, i64 i, i64 n) {
    if (p == nullptr)
        return Wide{};
    if (n - i >= kWide)
        return widen(p + i);
    Wide x{};
    for (i64 k = 0; k < n - i; ++k)
        x[k] = one(p[i + k]);
    return x;
}

template <class T> FS_INLINE void put(T* p, i64 i, i64 n, Wide x) {
    if (n - i >= kWide) {
        store(p + i, x);
    } else {
        for (i64 k = 0; k < n - i; ++k)
            store_one(p + i + k, x[k]);
    }
}

FS_INLINE Wide all(double x) { return x - Wide{}; }

// In lanes at or beyond `left` of a register, x becomes `other`.
FS_INLINE Wide only(Wide x, i64 left, double other) {
    for (i64 k = left < 0 ? 0 : left; k < kWide; ++k)
        x[k] = other;
    return x;
}
