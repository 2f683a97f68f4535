// Arguments shared by the dual kernels: matrices (rows, columns) of the primal pass, tangents (b, rows, columns) of b vectors at once.
#pragma once
#include "fastsharp/status.hpp"
#include "fastsharp/types.hpp"

namespace fastsharp {

struct Extent {
    i64 b, rows, columns;
};

// Element (k, r, c) is data[k * vector + r * row + c]; a null pointer: not there. A matrix of the primal pass has vector = 0.
template <class T> struct Rows {
    T* data = nullptr;
    i64 vector = 0, row = 0;
};

// Element (k, c) is data[k * vector + c].
template <class T> struct Columns {
    T* data = nullptr;
    i64 vector = 0;
};

namespace cuda {

// Threads and blocks of the dual kernels. The default is a function of rows and columns alone, so that results do not depend on the GPU.
struct RowLaunch {
    i64 grid;                  // blocks, at most: they loop over what is left
    int row_block;             // threads that share a row, a multiple of 32
    int strip_block;           // threads of what goes by strips of columns, a multiple of 32
    i64 shares;                // that rows are cut into where something is summed over them
    i64 each(i64 rows) const { // rows of a share
        return ceil_div(rows, shares);
    }

    static RowLaunch of(Extent e);
};

} // namespace cuda

} // namespace fastsharp
