// How a kernel is launched: <<<>>> under nvcc, the emulation of csrc/tests/host_shim.hpp under a C++ compiler, so that every
// kernel is executed, under sanitizers, on machines without a GPU. A .cu file uses these macros and nothing else for it:
//
//   FS_LAUNCH(kernel, grid_x, grid_y, block, shared_bytes, stream, args...)
//   FS_SHARED(type, name, count);         a __shared__ array of constant size
//   FS_DYNAMIC_SHARED(type, name);        the dynamic shared memory of the launch
//
// No communication between blocks, no cooperative launch, no inline PTX: the emulation has no counterpart for them.
#pragma once

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define FS_LAUNCH(kernel, grid_x, grid_y, block, shared, stream, ...)                                                                      \
    do {                                                                                                                                   \
        auto fs_kernel = kernel;                                                                                                           \
        fs_kernel<<<dim3(static_cast<unsigned>(grid_x), static_cast<unsigned>(grid_y)), static_cast<unsigned>(block),                      \
                    static_cast<std::size_t>(shared), static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__);                                   \
    } while (false)
#define FS_SHARED(type, name, count) __shared__ type name[count]
#define FS_DYNAMIC_SHARED(type, name)                                                                                                      \
    extern __shared__ unsigned char fs_dynamic_shared[];                                                                                   \
    type* const name = reinterpret_cast<type*>(fs_dynamic_shared)

#else
#include "host_shim.hpp"
#endif

#include "fastsharp/status.hpp"

namespace fastsharp::cuda {

// Makes `device` current and gives the caller's back at the end: torch keeps its own idea of the current device in the driver.
class DeviceGuard {
public:
    explicit DeviceGuard(int device) : error_(cudaGetDevice(&before_)) {
        if (error_ == cudaSuccess && before_ != device) {
            error_ = cudaSetDevice(device);
            restore_ = error_ == cudaSuccess;
        }
    }
    ~DeviceGuard() {
        if (restore_)
            cudaSetDevice(before_);
    }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

    [[nodiscard]] cudaError_t error() const { return error_; }

private:
    int before_ = 0;
    bool restore_ = false;
    cudaError_t error_;
};

inline Status status_of(const char* kernel, cudaError_t e) {
    return e == cudaSuccess ? Status{kernel} : Status{kernel, cudaGetErrorString(e)};
}

} // namespace fastsharp::cuda
