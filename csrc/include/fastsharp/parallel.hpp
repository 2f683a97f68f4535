// The only door to threads. Linking OpenMP would load a second runtime beside torch's own (two pools that fight for the
// cores), so the runtime that is already in the process is found at run time; without one, std::thread is used.
//
// Results never depend on the thread count: callers split the work into tasks by size alone, and a task writes its own slot.
#pragma once
#include <dlfcn.h>
#if defined(__linux__)
#include <link.h>
#endif

#include <cstring>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include "fastsharp/types.hpp"

namespace fastsharp {

struct OpenMP {
    using Body = void (*)(void*);
    void (*parallel)(Body, void*, unsigned, unsigned) = nullptr; // GOMP_parallel, also exported by libomp and libiomp5
    int (*thread_num)() = nullptr;
    int (*num_threads)() = nullptr;
    std::string path; // of the runtime found; empty: none

    [[nodiscard]] bool found() const { return parallel != nullptr; }
};

namespace detail {

inline bool is_openmp(const char* path) {
    const char* slash = std::strrchr(path, '/');
    const char* name = slash != nullptr ? slash + 1 : path;
    for (const char* prefix : {"libgomp", "libiomp5", "libomp"}) {
        if (std::strncmp(name, prefix, std::strlen(prefix)) == 0)
            return true;
    }
    return false;
}

inline OpenMP find_openmp() {
    OpenMP omp;
#if defined(__linux__)
    std::vector<std::string> loaded;
    dl_iterate_phdr(
        [](dl_phdr_info* info, std::size_t, void* out) {
            if (info->dlpi_name != nullptr && is_openmp(info->dlpi_name)) {
                // torch's copy first: the pool that runs the operator's products shall run ours too
                auto& list = *static_cast<std::vector<std::string>*>(out);
                const bool torchs = std::strstr(info->dlpi_name, "torch") != nullptr;
                list.insert(torchs ? list.begin() : list.end(), info->dlpi_name);
            }
            return 0;
        },
        &loaded);
    for (const std::string& path : loaded) {
        void* lib = dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
        if (lib == nullptr)
            continue;
        omp.parallel = reinterpret_cast<decltype(omp.parallel)>(dlsym(lib, "GOMP_parallel"));
        omp.thread_num = reinterpret_cast<decltype(omp.thread_num)>(dlsym(lib, "omp_get_thread_num"));
        omp.num_threads = reinterpret_cast<decltype(omp.num_threads)>(dlsym(lib, "omp_get_num_threads"));
        if (omp.parallel != nullptr && omp.thread_num != nullptr && omp.num_threads != nullptr) {
            omp.path = path; // the handle stays open: it keeps the runtime that we call
            return omp;
        }
        dlclose(lib);
        omp = OpenMP{};
    }
#endif
    return omp;
}

} // namespace detail

inline const OpenMP& openmp() {
    static const OpenMP omp = detail::find_openmp(); // on first use, when torch is loaded already
    return omp;
}

// f(task) for every task in [0, tasks), each thread taking one contiguous range: pages stay where they were touched first.
template <class F> void parallel_for(i64 tasks, int threads, F f) {
    static_assert(std::is_nothrow_invocable_v<F, i64>, "an exception cannot leave a parallel region");
    if (threads > tasks)
        threads = static_cast<int>(tasks);
    if (threads <= 1) {
        for (i64 t = 0; t < tasks; ++t)
            f(t);
        return;
    }
    const auto share = [&f, tasks](i64 id, i64 total) noexcept {
        for (i64 t = tasks * id / total; t < tasks * (id + 1) / total; ++t)
            f(t);
    };
    const OpenMP& omp = openmp();
    if (omp.found()) {
        struct Context {
            const decltype(share)* run;
            const OpenMP* omp;
        } context{&share, &omp};
        omp.parallel(
            [](void* p) {
                const auto* c = static_cast<const Context*>(p);
                (*c->run)(c->omp->thread_num(), c->omp->num_threads());
            },
            &context, static_cast<unsigned>(threads), 0);
        return;
    }
    std::vector<std::thread> others;
    for (int id = 1; id < threads; ++id)
        others.emplace_back([&share, id, threads] { share(id, threads); });
    share(0, threads);
    for (std::thread& t : others)
        t.join();
}

} // namespace fastsharp
