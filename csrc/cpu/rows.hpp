// How the dual kernels cut (rows, columns) into tasks, by size alone, and the ordered second stage of their sums over rows.
#pragma once
#include "fastsharp/dual_rows.hpp"
#include "fastsharp/parallel.hpp"
#include "fastsharp/simd.hpp"

namespace fastsharp::cpu {

constexpr i64 kTask = 8192;      // elements of one matrix, at least
constexpr i64 kRowTasks = 128;   // at most: their partial sums stay few
constexpr i64 kSerial = 1 << 14; // elements below which waking other threads costs more than it gains

struct RowTasks {
    i64 each, count; // rows of a task, tasks

    explicit RowTasks(Extent e) : each(ceil_div(kTask, e.columns)) {
        if (each < ceil_div(e.rows, kRowTasks))
            each = ceil_div(e.rows, kRowTasks);
        count = ceil_div(e.rows, each);
    }
};

inline int threads_for(Extent e, int threads) { return e.b * e.rows * e.columns < kSerial ? 1 : threads; }

template <class T> T* at(Rows<T> m, i64 k, i64 r) { return m.data == nullptr ? nullptr : m.data + k * m.vector + r * m.row; }
template <class T> T* at(Columns<T> v, i64 k) { return v.data == nullptr ? nullptr : v.data + k * v.vector; }

// f(task, row) for every row, the rows of a task in order.
template <class F> void for_each_row(Extent e, int threads, F f) {
    const RowTasks tasks(e);
    parallel_for(tasks.count, threads_for(e, threads), [=](i64 task) noexcept {
        const i64 end = (task + 1) * tasks.each < e.rows ? (task + 1) * tasks.each : e.rows;
        for (i64 r = task * tasks.each; r < end; ++r)
            f(task, r);
    });
}

// out_k += the sum over tasks of partial (tasks, b, width), of which entries [first, first + columns) are meant.
template <class T> void add_partials(Extent e, const double* partial, i64 width, i64 first, Columns<T> out, int threads) {
    if (out.data == nullptr)
        return;
    const i64 count = RowTasks(e).count;
    parallel_for(e.b, threads_for(e, threads), [=](i64 k) noexcept {
        T* to = at(out, k);
        for (i64 c = 0; c < e.columns; ++c) {
            double sum = 0;
            for (i64 task = 0; task < count; ++task)
                sum += partial[(task * e.b + k) * width + first + c];
            to[c] = static_cast<T>(static_cast<double>(to[c]) + sum);
        }
    });
}

} // namespace fastsharp::cpu
