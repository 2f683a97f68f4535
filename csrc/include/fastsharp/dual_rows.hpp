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

} // namespace fastsharp
