// Results that are written and not read again soon. Included inside the namespace of the level, behind registers.inl.

// to <- from, n elements. Past the caches a line is written without being read first, which is half the traffic. Whoever asks for it
// calls FS_STREAMED() before other threads may read.
template <class T> FS_TARGET void put_row(T* to, const T* from, i64 n, bool past) {
    constexpr i64 W = kWidth<T>;
    i64 i = 0;
    if (past) {
        for (; i < n && reinterpret_cast<std::uintptr_t>(to + i) % FS_BYTES != 0; ++i)
            to[i] = from[i];
        for (; i + W <= n; i += W) {
            const auto x = load<Vec<T>>(from + i);
            FS_STREAM(to + i, x);
        }
    }
    for (; i < n; ++i)
        to[i] = from[i];
}
