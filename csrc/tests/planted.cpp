// Kernels with a planted fault. Each must be caught; run.sh checks that it is, and by whom. argv[1] picks the fault.
#include <string>

#include "launch.cuh"

namespace {

__global__ void sound(const double* x, double* out) {
    FS_SHARED(double, s, 64);
    s[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = s[63 - threadIdx.x];
}

__global__ void missing_barrier(const double* x, double* out) {
    FS_SHARED(double, s, 64);
    s[threadIdx.x] = x[threadIdx.x];
    out[threadIdx.x] = s[63 - threadIdx.x];
}

// A shuffle orders no memory: what is missing here is a barrier, too.
__global__ void shuffle_for_a_barrier(const double* x, double* out) {
    FS_SHARED(double, s, 64);
    s[threadIdx.x] = x[threadIdx.x];
    const double keep = __shfl_xor_sync(0xffffffffU, x[threadIdx.x], 1);
    out[threadIdx.x] = s[threadIdx.x ^ 1U] + keep;
}

__global__ void beyond_shared(const double* x, double* out) {
    FS_SHARED(double, s, 63);
    s[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = s[threadIdx.x];
}

__global__ void beyond_global(const double* x, double* out) { out[threadIdx.x] = x[threadIdx.x + 1]; }

__global__ void blocks_share_an_output(const double* x, double* out) { out[(threadIdx.x + blockIdx.x) % 64] = x[threadIdx.x]; }

__global__ void blocks_share_thread_zero(const double* x, double* out) {
    if (threadIdx.x == 0)
        out[0] = x[0];
}

__global__ void too_much_shared(const double* x, double* out) {
    FS_SHARED(double, s, 6145);
    s[threadIdx.x] = x[threadIdx.x];
    out[threadIdx.x] = s[threadIdx.x];
}

__global__ void two_barriers(const double* x, double* out) {
    if (threadIdx.x % 2 == 0) {
        __syncthreads();
    } else {
        __syncthreads();
    }
    out[threadIdx.x] = x[threadIdx.x];
}

__global__ void lane_outside_mask(const double* x, double* out) { out[threadIdx.x] = __shfl_xor_sync(0xffffU, x[threadIdx.x], 1); }

__global__ void lane_has_returned(const double* x, double* out) {
    if (threadIdx.x == 5)
        return;
    out[threadIdx.x] = __shfl_down_sync(0xffffffffU, x[threadIdx.x], 1);
}

// A thread that returned leaves the barrier: this one is allowed, and must not hang.
__global__ void early_return(const double* x, double* out) {
    out[threadIdx.x] = x[threadIdx.x];
    if (threadIdx.x % 2 == 1)
        return;
    __syncthreads();
}

__global__ void uninitialised(const double*, double* out) {
    FS_SHARED(double, s, 64);
    out[threadIdx.x] = s[threadIdx.x];
}

} // namespace

int main(int argc, char** argv) {
    const std::string fault = argc > 1 ? argv[1] : "";
    std::vector<double> x(64, 1.0), out(64, 0.0);
    using Kernel = void (*)(const double*, double*);
    const std::pair<const char*, Kernel> all[] = {{"sound", sound},
                                                  {"missing_barrier", missing_barrier},
                                                  {"shuffle_for_a_barrier", shuffle_for_a_barrier},
                                                  {"beyond_shared", beyond_shared},
                                                  {"beyond_global", beyond_global},
                                                  {"blocks_share_an_output", blocks_share_an_output},
                                                  {"blocks_share_thread_zero", blocks_share_thread_zero},
                                                  {"too_much_shared", too_much_shared},
                                                  {"two_barriers", two_barriers},
                                                  {"lane_outside_mask", lane_outside_mask},
                                                  {"lane_has_returned", lane_has_returned},
                                                  {"early_return", early_return},
                                                  {"uninitialised", uninitialised}};
    for (const auto& [name, kernel] : all) {
        if (fault != name)
            continue;
        const bool across = fault.rfind("blocks", 0) == 0; // all blocks of these kernels write the same output
        const bool ordered = fault == "sound" || fault == "early_return";
        for (int launch = 0; launch < (ordered ? 1 : 20); ++launch) // a race is seen where two accesses come close, not in every launch
            FS_LAUNCH(kernel, across ? 3 : 1, 1, 64, 0, nullptr, x.data(), out.data());
        if (out[0] != out[0])
            std::fprintf(stderr, "planted: a NaN from shared memory\n");
        return out[0] == 1.0 ? 0 : 4;
    }
    std::fprintf(stderr, "planted: no fault named '%s'\n", fault.c_str());
    return 5;
}
