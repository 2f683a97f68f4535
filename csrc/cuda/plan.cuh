// How a problem is cut into launches: members by the limit of gridDim.y, right-hand sides into groups that fit the registers, rows
// by shared memory. No sum crosses a launch, so the cut does not show in the bits.
#pragma once
#include <cstdint>
#include <type_traits>

#include "reduce.cuh"

namespace fastsharp::cuda {

constexpr i64 kSumsPerWarp = 512; // row sums that a warp of dots keeps in shared memory: 32 KiB for the 8 warps of a block

constexpr int kLargestGroup = 8; // of vectors that share one pass over V

constexpr i64 rows_of_a_launch(int vectors) { return kSumsPerWarp / vectors; }

// Blocks that a multiprocessor is to hold at once: with several vectors the registers allow one, its loads in flight suffice.
template <class T, int B> constexpr int kResident = sizeof(T) * B <= 8 ? 2 : 1;

struct Group {
    i64 e, E; // first member, members
    i64 i;    // first vector; how many is a constant of the kernel
};

template <int Most, class F> void for_each_vector_group(Group group, i64 b, F f) {
    for (; b - group.i >= Most; group.i += Most)
        f(group, std::integral_constant<int, Most>{});
    if constexpr (Most > 1)
        for_each_vector_group<Most / 2>(group, b, f);
}

// f(Group, integral_constant<int, vectors>) for all members and vectors: Most at a time, then halves of it. Most is 1, 2, 4 or 8.
template <int Most, class F> void for_each_group(i64 E, i64 b, LaunchConfig config, F f) {
    static_assert(Most <= kLargestGroup, "workspace_size counts on it");
    for (i64 e = 0; e < E; e += config.members)
        for_each_vector_group<Most>(Group{e, E - e < config.members ? E - e : config.members, 0}, b, f);
}

// True when every row begins at a multiple of 16 bytes; strides of a dimension of one are not looked at. A null p has no rows.
template <class U> bool aligned(const U* p, i64 E, i64 member, i64 rows = 1, i64 row = 0) {
    constexpr i64 pack = 16 / sizeof(U);
    return reinterpret_cast<std::uintptr_t>(p) % 16 == 0 &&
           (p == nullptr || ((E == 1 || member % pack == 0) && (rows == 1 || row % pack == 0)));
}

template <class S, class T> bool aligned(const Problem<S, T>& p) {
    return aligned(p.V, p.E, p.V_member, p.j, p.V_row) && aligned(p.w, p.E, p.w_member, p.b, p.w_row);
}

} // namespace fastsharp::cuda
