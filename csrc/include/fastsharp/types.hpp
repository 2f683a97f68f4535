// Words shared by every kernel header. Sizes and strides are int64 counts of elements, never of bytes.
#pragma once
#include <cstdint>

namespace fastsharp {

using i64 = std::int64_t;

constexpr i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }

// Storage types without arithmetic: the bits of an IEEE half and of a bfloat16. Kernels convert them by themselves.
struct Half {
    std::uint16_t bits;
};
struct BFloat16 {
    std::uint16_t bits;
};

} // namespace fastsharp
