#include "plan.cuh"

#include "chunk.cuh"

namespace fastsharp::cuda {

namespace {

constexpr i64 kMaxGrid = 2048; // about 8 waves of blocks on the largest GPU: the last wave costs little, the partial sums stay few

} // namespace

LaunchConfig LaunchConfig::of(i64 n) {
    const i64 blocks = ceil_div(n, kChunk * (kBlock / kWarp));
    return {static_cast<int>(blocks < kMaxGrid ? blocks : kMaxGrid), kBlock};
}

i64 workspace_size(LaunchConfig config, i64 E, i64 b, i64 j) {
    i64 sums = 0; // of the largest launch
    for (int vectors = 1; vectors <= kLargestGroup && vectors <= b; vectors *= 2) {
        const i64 rows = j < rows_of_a_launch(vectors) ? j : rows_of_a_launch(vectors);
        sums = vectors * (rows + 1) > sums ? vectors * (rows + 1) : sums;
    }
    return (E < config.members ? E : config.members) * sums * config.grid;
}

} // namespace fastsharp::cuda
