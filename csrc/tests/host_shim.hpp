// Runs the kernels of csrc/cuda on the CPU: one OS thread per CUDA thread of a block, so that ASan, UBSan and ThreadSanitizer
// see what the kernel does. The blocks of a launch (up to 16 at a time) have threads of their own and nothing orders one against
// another, as on a GPU: an unordered access across blocks is a reported race as well.
//
//   __syncthreads        a barrier of the threads that have not returned; reached from two source lines it is an error
//   shuffles             every lane of the mask must exist, be alive and come from the same line; the source must be in the mask.
//                        They order no memory (CUDA promises none), so ThreadSanitizer is not told of them: relaxed atomics.
//   shared memory        filled with 0xFF (a NaN) for each block; under ASan a step beyond an array is caught; at most 48 KiB
//   half, bfloat16       by the arithmetic of rounding.hpp
//   launches             grid.y goes up to 65535; an empty grid and a block that is no multiple of 32 are errors
// Not emulated: divergent masks in one warp at the same time, atomics, communication between blocks, streams (all run at once).
#pragma once
#include <cmath>
#include <cstddef>
#include <cstring>
#include <memory>
#include <new>

#include "rounding.hpp"
#include "shim_threads.hpp"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(p, n) ((void)(p), (void)(n))
#define ASAN_UNPOISON_MEMORY_REGION(p, n) ((void)(p), (void)(n))
#endif

namespace fastsharp::shim {

struct Dim {
    unsigned x = 0, y = 0, z = 0;
};

// The shared memory of a block: arrays are cut from one arena, with poisoned gaps between them.
class Arena {
public:
    Arena() : memory_(static_cast<unsigned char*>(::operator new(kBytes, std::align_val_t(64)))) {
        std::memset(memory_, 0xFF, kBytes);
        ASAN_POISON_MEMORY_REGION(memory_, kBytes);
    }
    ~Arena() {
        ASAN_UNPOISON_MEMORY_REGION(memory_, kBytes);
        ::operator delete(memory_, std::align_val_t(64));
    }
    Arena(const Arena&) = delete;
    Arena& operator=(const Arena&) = delete;

    // The array declared at file:line, the same for every thread of the block.
    unsigned char* array(const char* file, int line, std::size_t bytes) {
        const std::lock_guard<QuietLock> hold(lock_);
        for (int k = 0; k < count_; ++k) {
            if (file_[k] == file && line_[k] == line)
                return memory_ + offset_[k];
        }
        const std::size_t offset = used_;
        asked_ = asked_ + bytes;
        if (count_ == kArrays || asked_ > kLimit)
            fail("more shared memory than a block has", line);
        ASAN_UNPOISON_MEMORY_REGION(memory_ + offset, bytes);
        file_[count_] = file;
        line_[count_] = line;
        offset_[count_] = offset;
        count_ = count_ + 1;
        used_ = (offset + bytes + 63) / 64 * 64 + 64;
        return memory_ + offset;
    }

private:
    static constexpr std::size_t kLimit = 48 * 1024;
    static constexpr int kArrays = 16;
    static constexpr std::size_t kBytes = kLimit + kArrays * 128; // with the gaps
    unsigned char* memory_;
    QuietLock lock_;
    Quiet<int> count_, line_[kArrays];
    Quiet<const char*> file_[kArrays];
    Quiet<std::size_t> offset_[kArrays], used_, asked_;
};

struct Block {
    Block(int threads, std::size_t dynamic) : barrier(threads), warps(static_cast<std::size_t>((threads + kLanes - 1) / kLanes)) {
        for (int t = 0; t < threads; t += kLanes) {
            const int lanes = threads - t < kLanes ? threads - t : kLanes;
            warps[static_cast<std::size_t>(t / kLanes)].set_lanes(lanes == kLanes ? ~0U : (1U << lanes) - 1U);
        }
        if (dynamic > 0)
            dynamic_shared = arena.array("dynamic", 0, dynamic);
    }
    Arena arena;
    Barrier barrier;
    std::vector<Warp> warps;
    unsigned char* dynamic_shared = nullptr;
};

inline thread_local Block* block = nullptr;
inline thread_local int thread = 0;

template <class T> T shuffle(unsigned mask, T x, int source, int line) {
    static_assert(sizeof(T) <= sizeof(std::uint64_t));
    std::uint64_t bits = 0;
    std::memcpy(&bits, &x, sizeof x);
    const int lane = thread % kLanes;
    if (source < 0 || source >= kLanes)
        source = lane; // as CUDA: beyond the warp a lane keeps its own
    bits = block->warps[static_cast<std::size_t>(thread / kLanes)].exchange(mask, lane, source, bits, line);
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

} // namespace fastsharp::shim

inline thread_local fastsharp::shim::Dim threadIdx, blockIdx, blockDim, gridDim;

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __syncthreads() fastsharp::shim::block->barrier.wait(__LINE__)
#define __shfl_sync(mask, x, source) fastsharp::shim::shuffle(mask, x, source, __LINE__)
#define __shfl_xor_sync(mask, x, bits) fastsharp::shim::shuffle(mask, x, (fastsharp::shim::thread % 32) ^ (bits), __LINE__)
#define __shfl_down_sync(mask, x, delta)                                                                                                   \
    fastsharp::shim::shuffle(mask, x, (fastsharp::shim::thread % 32) + static_cast<int>(delta), __LINE__)
#define __shfl_up_sync(mask, x, delta) fastsharp::shim::shuffle(mask, x, (fastsharp::shim::thread % 32) - static_cast<int>(delta), __LINE__)

#define FS_SHARED(type, name, count)                                                                                                       \
    type* const name = reinterpret_cast<type*>(fastsharp::shim::block->arena.array(__FILE__, __LINE__, sizeof(type) * (count)))
#define FS_DYNAMIC_SHARED(type, name) type* const name = reinterpret_cast<type*>(fastsharp::shim::block->dynamic_shared)
#define FS_LAUNCH(kernel, grid_x, grid_y, block, shared, stream, ...)                                                                      \
    (static_cast<void>(stream), fastsharp::shim::launch(kernel, static_cast<fastsharp::i64>(grid_x), static_cast<fastsharp::i64>(grid_y),  \
                                                        static_cast<int>(block), static_cast<std::size_t>(shared), __VA_ARGS__))

// Intrinsics of cuda_fp16.h, cuda_bf16.h and CUDA's maths.
inline fastsharp::Half __ushort_as_half(std::uint16_t bits) { return {bits}; }
inline std::uint16_t __half_as_ushort(fastsharp::Half x) { return x.bits; }
inline float __half2float(fastsharp::Half x) { return static_cast<float>(fastsharp::test::value(x)); }
inline fastsharp::Half __double2half(double x) { return fastsharp::test::rounded<fastsharp::Half>(x); }
inline fastsharp::BFloat16 __ushort_as_bfloat16(std::uint16_t bits) { return {bits}; }
inline std::uint16_t __bfloat16_as_ushort(fastsharp::BFloat16 x) { return x.bits; }
inline float __bfloat162float(fastsharp::BFloat16 x) { return static_cast<float>(fastsharp::test::value(x)); }
inline fastsharp::BFloat16 __double2bfloat16(double x) { return fastsharp::test::rounded<fastsharp::BFloat16>(x); }
inline void sincospi(double x, double* sine, double* cosine) {
    *sine = std::sin(M_PI * x);
    *cosine = std::cos(M_PI * x);
}

// The few runtime calls that launchers make; a test sets shim::next_error to see a failure pass through.
using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;

namespace fastsharp::shim {

inline int device = 0;
inline cudaError_t next_error = cudaSuccess;
inline Pool pool;
constexpr i64 kBlocks = 16; // at a time

template <class Kernel, class... Args> void launch(Kernel kernel, i64 grid_x, i64 grid_y, int threads, std::size_t dynamic, Args... args) {
    if (grid_x < 1 || grid_x > std::numeric_limits<int>::max() || grid_y < 1 || grid_y > 65535 || threads < kLanes || threads > 1024 ||
        threads % kLanes != 0)
        fail("the launch has an impossible shape", 0);
    const i64 grid = grid_x * grid_y;
    for (i64 wave = 0; wave < grid; wave += kBlocks) {
        std::vector<std::unique_ptr<Block>> blocks;
        for (i64 b = wave; b < grid && b < wave + kBlocks; ++b)
            blocks.push_back(std::make_unique<Block>(threads, dynamic));
        pool.run(static_cast<int>(blocks.size()) * threads, [&](int worker) {
            const i64 index = wave + worker / threads;
            thread = worker % threads;
            threadIdx.x = static_cast<unsigned>(thread);
            blockIdx = {static_cast<unsigned>(index % grid_x), static_cast<unsigned>(index / grid_x), 0};
            blockDim = {static_cast<unsigned>(threads), 1, 1};
            gridDim = {static_cast<unsigned>(grid_x), static_cast<unsigned>(grid_y), 1};
            block = blocks[static_cast<std::size_t>(worker / threads)].get();
            kernel(args...);
            block->warps[static_cast<std::size_t>(thread / kLanes)].leave(thread % kLanes);
            block->barrier.leave();
        });
    }
}

} // namespace fastsharp::shim

inline cudaError_t cudaGetDevice(int* d) {
    *d = fastsharp::shim::device;
    return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int d) {
    fastsharp::shim::device = d;
    return d < 2 ? cudaSuccess : 101;
}
inline cudaError_t cudaGetLastError() {
    const cudaError_t e = fastsharp::shim::next_error;
    fastsharp::shim::next_error = cudaSuccess;
    return e;
}
inline const char* cudaGetErrorString(cudaError_t e) {
    return e == cudaSuccess ? "no error" : e == 101 ? "invalid device ordinal" : "emulated failure";
}
