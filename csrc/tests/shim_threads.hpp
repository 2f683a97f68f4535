// What the emulation of a block is made of: barriers, warps and the pool of OS threads. See host_shim.hpp.
#pragma once
#include <sched.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace fastsharp::shim {

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

// OS threads that outlive a launch. run() starts a job on the first `count` of them and waits for all. As two launches on one stream,
// jobs are ordered. Within a job nothing is: all threads are awake before the first one begins, so that the lock under
// which they wake puts the end of none before the start of another.
class Pool {
public:
    ~Pool() {
        for (auto& worker : workers_)
            send(*worker, nullptr);
        for (auto& worker : workers_)
            worker->thread.join();
    }

    void run(int count, const std::function<void(int)>& job) {
        while (static_cast<int>(workers_.size()) < count) {
            workers_.push_back(std::make_unique<Worker>());
            workers_.back()->thread =
                std::thread([this, me = static_cast<int>(workers_.size()) - 1, w = workers_.back().get()] { work(me, *w); });
        }
        awake_ = 0;
        count_ = count;
        running_ = count;
        for (int k = 0; k < count; ++k)
            send(*workers_[static_cast<std::size_t>(k)], &job);
        std::unique_lock<std::mutex> hold(mutex_);
        done_.wait(hold, [this] { return running_ == 0; });
    }

private:
    using Job = const std::function<void(int)>*;
    struct Worker {
        std::mutex mutex;
        std::condition_variable start;
        bool sent = false;
        Job job = nullptr; // nullptr: return
        std::thread thread;
    };

    static void send(Worker& w, Job job) {
        const std::lock_guard<std::mutex> hold(w.mutex);
        w.job = job;
        w.sent = true;
        w.start.notify_one();
    }

    void work(int me, Worker& w) {
        while (true) {
            {
                std::unique_lock<std::mutex> hold(w.mutex);
                w.start.wait(hold, [&] { return w.sent; });
                w.sent = false;
            }
            if (w.job == nullptr)
                return;
            awake_.fetch_add(1, std::memory_order_relaxed);
            while (awake_.load(std::memory_order_relaxed) < count_.load(std::memory_order_relaxed))
                sched_yield();
            (*w.job)(me);
            const std::lock_guard<std::mutex> hold(mutex_);
            if (--running_ == 0)
                done_.notify_one();
        }
    }

    std::mutex mutex_;
    std::condition_variable done_;
    std::vector<std::unique_ptr<Worker>> workers_;
    std::atomic<int> awake_{0}, count_{0};
    int running_ = 0;
};

} // namespace fastsharp::shim
