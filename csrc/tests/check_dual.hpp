// Matrices and stacks of the dual ops' tests: gaps between rows hold NaN, and the memory ends with the last row.
#pragma once
#include <cstring>

#include "check.hpp"
#include "fastsharp/dual_rows.hpp"

namespace fastsharp::test {

inline std::size_t at(i64 i) { return static_cast<std::size_t>(i); }

// (b, rows, columns) with `pad` elements between rows, `shift` elements behind an address that is a multiple of 16 bytes.
template <class T> struct Room {
    i64 b, rows, columns, pad, shift;
    std::vector<T> data;

    Room(Extent e, i64 gap, bool filled, i64 before = 0) : b(e.b), rows(e.rows), columns(e.columns), pad(gap), shift(before) {
        static Sequence next;
        data = poisoned_as<T>(shift + b * rows * (columns + pad) - pad);
        for (i64 k = 0; filled && k < b * rows; ++k) {
            for (i64 c = 0; c < columns; ++c)
                data[at(shift + k * (columns + pad) + c)] = static_cast<T>(next());
        }
    }
    // Vector k of `all` by itself, with other gaps and at another address.
    Room(const Room& all, i64 k, i64 gap, i64 before) : Room({1, all.rows, all.columns}, gap, false, before) {
        for (i64 r = 0; r < rows; ++r) {
            for (i64 c = 0; c < columns; ++c)
                data[place(0, r, c)] = all.data[all.place(k, r, c)];
        }
    }
    [[nodiscard]] std::size_t place(i64 k, i64 r, i64 c) const { return at(shift + (k * rows + r) * (columns + pad) + c); }
    [[nodiscard]] Rows<T> view() { return {data.data() + shift, rows * (columns + pad), columns + pad}; }
    [[nodiscard]] Rows<const T> read() const { return {data.data() + shift, rows * (columns + pad), columns + pad}; }
    // The stack as what belongs to columns: one row to a vector.
    [[nodiscard]] Columns<T> columns_view() { return {data.data() + shift, columns + pad}; }
    [[nodiscard]] Columns<const T> columns_read() const { return {data.data() + shift, columns + pad}; }
    [[nodiscard]] double operator()(i64 k, i64 r, i64 c) const { return static_cast<double>(data[place(k, r, c)]); }
    void check() const {
        for (i64 i = 0; i < static_cast<i64>(data.size()); ++i) {
            const bool gap = i < shift || (i - shift) % (columns + pad) >= columns;
            CHECK(std::isnan(static_cast<double>(data[at(i)])) == gap, "entry %d", static_cast<int>(i));
        }
    }
};

// By bytes: gaps hold NaN.
template <class T> bool same(const std::vector<T>& x, const std::vector<T>& y) {
    return x.size() == y.size() && std::memcmp(x.data(), y.data(), x.size() * sizeof(T)) == 0;
}

} // namespace fastsharp::test
