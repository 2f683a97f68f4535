// Runs the kernels of csrc/cuda on the CPU: one OS thread per CUDA thread of a block, so that ASan, UBSan and ThreadSanitizer
// see what the kernel does. Each OS thread walks through the blocks in order on its own; nothing orders one block against
// another, as on a GPU, so an unordered access across blocks is a reported race as well.
//
//   __syncthreads        a barrier of the threads that have not returned; reached from two source lines it is an error
//   shuffles             every lane of the mask must exist, be alive and come from the same line; the source must be in the mask.
//                        They order no memory (CUDA promises none), so ThreadSanitizer is not told of them: relaxed atomics.
//   shared memory        filled with 0xFF (a NaN) for each block; under ASan a step beyond an array is caught
// Not emulated: divergent masks in one warp at the same time, atomics, communication between blocks, streams (all run at once).
#pragma once
#include <sched.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

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

[[noreturn]] inline void fail(const char* what, int line) {
    std::fprintf(stderr, "host_shim: %s (line %d)\n", what, line);
    std::fflush(stderr);
    std::_Exit(3);
}

constexpr std::chrono::seconds kPatience{60};
constexpr int kLanes = 32;

// A lock that orders nothing in the eyes of ThreadSanitizer; what it guards is itself atomic.
class QuietLock {
public:
    void lock() {
        while (flag_.test_and_set(std::memory_order_relaxed))
            sched_yield();
    }
    void unlock() { flag_.clear(std::memory_order_relaxed); }

private:
    std::atomic_flag flag_ = ATOMIC_FLAG_INIT;
};

template <class T> class Quiet { // an atomic with relaxed access and the syntax of a variable
public:
    Quiet(T x = T()) : x_(x) {} // NOLINT: implicit on purpose
    operator T() const { return x_.load(std::memory_order_relaxed); }
    Quiet& operator=(T x) {
        x_.store(x, std::memory_order_relaxed);
        return *this;
    }

private:
    std::atomic<T> x_;
};

class Barrier {
public:
    explicit Barrier(int threads) : alive_(threads) {}

    void wait(int line) {
        std::unique_lock<std::mutex> hold(mutex_);
        if (waiting_ == 0)
            line_ = line;
        else if (line_ != line)
            fail("__syncthreads reached from two source lines", line);
        ++waiting_;
        const auto mine = generation_;
        if (waiting_ == alive_)
            release();
        else if (!open_.wait_for(hold, kPatience, [&] { return generation_ != mine; }))
            fail("__syncthreads never completed", line);
    }
    void leave() {
        const std::lock_guard<std::mutex> hold(mutex_);
        --alive_;
        if (waiting_ > 0 && waiting_ == alive_)
            release();
    }

private:
    void release() {
        waiting_ = 0;
        ++generation_;
        open_.notify_all();
    }
    std::mutex mutex_;
    std::condition_variable open_;
    int alive_, waiting_ = 0, line_ = 0;
    unsigned long generation_ = 0;
};

class Warp {
public:
    void set_lanes(unsigned lanes) { alive_ = lanes; }
    void leave(int lane) {
        const std::lock_guard<QuietLock> hold(lock_);
        alive_ = alive_ & ~(1U << lane);
    }

    // Hands in this lane's bits, waits for the whole mask, and gives back the bits of lane `source`.
    std::uint64_t exchange(unsigned mask, int lane, int source, std::uint64_t bits, int line) {
        if ((mask >> lane & 1U) == 0)
            fail("shuffle: the calling lane is not in its own mask", line);
        if ((mask >> source & 1U) == 0)
            fail("shuffle: the source lane is not in the mask", line);
        unsigned turn = 0;
        {
            const std::lock_guard<QuietLock> hold(lock_);
            turn = turn_;
            if (arrived_ == 0U) {
                mask_ = mask;
                line_ = line;
            }
            if (mask_ != mask)
                fail("shuffle: lanes of one warp name different masks", line);
            if (line_ != line)
                fail("shuffle reached from two source lines", line);
            bits_[turn % 2][lane] = bits; // the other half is read until everyone has arrived here
            arrived_ = arrived_ | 1U << lane;
            if (arrived_ == mask) {
                arrived_ = 0U;
                turn_ = turn + 1;
            }
        }
        const auto start = std::chrono::steady_clock::now();
        while (turn_ == turn) {
            if ((mask & ~alive_) != 0)
                fail("shuffle: a lane of the mask has returned or does not exist", line);
            if (std::chrono::steady_clock::now() - start > kPatience)
                fail("shuffle never completed", line);
            sched_yield();
        }
        return bits_[turn % 2][source];
    }

private:
    QuietLock lock_;
    Quiet<unsigned> alive_, arrived_, mask_, turn_;
    Quiet<int> line_;
    Quiet<std::uint64_t> bits_[2][kLanes];
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
        const std::size_t end = (offset + bytes + 63) / 64 * 64 + 64;
        if (count_ == kArrays || end > kBytes)
            fail("more shared memory than a block has", line);
        ASAN_UNPOISON_MEMORY_REGION(memory_ + offset, bytes);
        file_[count_] = file;
        line_[count_] = line;
        offset_[count_] = offset;
        count_ = count_ + 1;
        used_ = end;
        return memory_ + offset;
    }

private:
    static constexpr std::size_t kBytes = 64 * 1024;
    static constexpr int kArrays = 16;
    unsigned char* memory_;
    QuietLock lock_;
    Quiet<int> count_, line_[kArrays];
    Quiet<const char*> file_[kArrays];
    Quiet<std::size_t> offset_[kArrays], used_;
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
#define FS_LAUNCH(kernel, grid, block, shared, stream, ...)                                                                                \
    (static_cast<void>(stream),                                                                                                            \
     fastsharp::shim::launch(kernel, static_cast<int>(grid), static_cast<int>(block), static_cast<std::size_t>(shared), __VA_ARGS__))

// The few runtime calls that launchers make; a test sets shim::next_error to see a failure pass through.
using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;

namespace fastsharp::shim {

inline int device = 0;
inline cudaError_t next_error = cudaSuccess;

template <class Kernel, class... Args> void launch(Kernel kernel, int grid, int threads, std::size_t dynamic, Args... args) {
    std::vector<std::unique_ptr<Block>> blocks;
    for (int b = 0; b < grid; ++b)
        blocks.push_back(std::make_unique<Block>(threads, dynamic));
    std::vector<std::thread> pool;
    for (int t = 0; t < threads; ++t) {
        pool.emplace_back([&, t] {
            thread = t;
            threadIdx.x = static_cast<unsigned>(t);
            blockDim = {static_cast<unsigned>(threads), 1, 1};
            gridDim = {static_cast<unsigned>(grid), 1, 1};
            for (int b = 0; b < grid; ++b) {
                blockIdx.x = static_cast<unsigned>(b);
                block = blocks[static_cast<std::size_t>(b)].get();
                kernel(args...);
                block->warps[static_cast<std::size_t>(t / kLanes)].leave(t % kLanes);
                block->barrier.leave();
            }
        });
    }
    for (std::thread& t : pool)
        t.join();
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
