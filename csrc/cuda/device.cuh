// The GPU's own names, for kernels: index, barrier, shuffle, intrinsic, launch. Nothing else in csrc/cuda uses <<<>>>,
// inline PTX or __shared__.
//
// nvcc's options (setup.py): -fmad=false turns floating-point contraction off, so a multiplication and an addition are
// fused only where fused_multiply_add() is called. --expt-relaxed-constexpr lets kernels call constexpr functions that
// are not marked __device__, such as those of common/.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "common/numeric.h"
#include "cuda/device_properties.h"
#include "cuda/launch_plan.h"
#include "cuda/runtime.h"

#define MASKED_SOFTMAX_DEVICE __device__ __forceinline__
#define MASKED_SOFTMAX_DEVICE_LAMBDA __attribute__((always_inline))
#define MASKED_SOFTMAX_KERNEL(max_threads_per_block, min_blocks_per_sm) \
  __global__ void __launch_bounds__(max_threads_per_block, min_blocks_per_sm)
#define MASKED_SOFTMAX_KERNEL_ARGUMENT const __grid_constant__
#define MASKED_SOFTMAX_SHARED(T, name, count) __shared__ T name[count]
#define MASKED_SOFTMAX_UNROLL _Pragma("unroll")
#define MASKED_SOFTMAX_NO_UNROLL _Pragma("unroll 1")
// Thread block clusters and distributed shared memory: compute capability 9.0 and later.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define MASKED_SOFTMAX_HAS_CLUSTERS 1
#else
#define MASKED_SOFTMAX_HAS_CLUSTERS 0
#endif

namespace masked_softmax::cuda {

MASKED_SOFTMAX_DEVICE unsigned thread_index() { return threadIdx.x; }
MASKED_SOFTMAX_DEVICE unsigned block_threads() { return blockDim.x; }
MASKED_SOFTMAX_DEVICE unsigned block_index() { return blockIdx.x; }
MASKED_SOFTMAX_DEVICE unsigned grid_blocks() { return gridDim.x; }

MASKED_SOFTMAX_DEVICE void sync_block() { __syncthreads(); }
// A barrier too. Returns whether `predicate` is true for any of the block's threads.
MASKED_SOFTMAX_DEVICE bool any_in_block(bool predicate) { return __syncthreads_or(predicate) != 0; }

// Precondition: every lane of the warp calls.
template <class T>
MASKED_SOFTMAX_DEVICE T shuffle_xor(T value, unsigned lane_mask) {
  return __shfl_xor_sync(0xffffffffu, value, lane_mask);
}
template <class T>
MASKED_SOFTMAX_DEVICE T shuffle_up(T value, unsigned distance) {
  return __shfl_up_sync(0xffffffffu, value, distance);
}

// Tells the compiler that p points to global memory, so that accesses need no test for shared memory.
template <class T>
MASKED_SOFTMAX_DEVICE T* in_device_memory(T* p) {
  __builtin_assume(__isGlobal(p));
  return p;
}

// An access of 8 or 16 bytes, at a multiple of its size, if `condition` holds. Predicated: a compiler may branch around
// a load that is conditional in C++, and then a thread's loads would wait for each other. Loads do not take the
// read-only cache, because the output may overwrite the input.
template <class V>
MASKED_SOFTMAX_DEVICE V load_vector_if(bool condition, const void* p, V otherwise) {
  static_assert(sizeof(V) == 8 || sizeof(V) == 16, "one access");
  uint32_t words[sizeof(V) / 4];
  memcpy(words, &otherwise, sizeof(V));
  const auto predicate = static_cast<unsigned>(condition);
  const size_t address = __cvta_generic_to_global(p);
  if constexpr (sizeof(V) == 16) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.u32 p, %5, 0;\n@p ld.global.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
        : "+r"(words[0]), "+r"(words[1]), "+r"(words[2]), "+r"(words[3])
        : "l"(address), "r"(predicate));
  } else {
    asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %3, 0;\n@p ld.global.v2.u32 {%0, %1}, [%2];\n}"
                 : "+r"(words[0]), "+r"(words[1])
                 : "l"(address), "r"(predicate));
  }
  memcpy(&otherwise, words, sizeof(V));
  return otherwise;
}
template <class V>
MASKED_SOFTMAX_DEVICE void store_vector_if(bool condition, void* p, const V& vector) {
  static_assert(sizeof(V) == 8 || sizeof(V) == 16, "one access");
  uint32_t words[sizeof(V) / 4];
  memcpy(words, &vector, sizeof(V));
  const auto predicate = static_cast<unsigned>(condition);
  const size_t address = __cvta_generic_to_global(p);
  if constexpr (sizeof(V) == 16) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %5, 0;\n@p st.global.v4.u32 [%4], {%0, %1, %2, %3};\n}" ::"r"(
                     words[0]),
                 "r"(words[1]), "r"(words[2]), "r"(words[3]), "l"(address), "r"(predicate)
                 : "memory");
  } else {
    asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %3, 0;\n@p st.global.v2.u32 [%2], {%0, %1};\n}" ::"r"(words[0]),
                 "r"(words[1]), "l"(address), "r"(predicate)
                 : "memory");
  }
}

// The 64 bits high:low shifted right by `bits` (0 to 31); the lower 32 of the result.
MASKED_SOFTMAX_DEVICE uint32_t funnel_shift_right(uint32_t low, uint32_t high, unsigned bits) {
  return __funnelshift_r(low, high, bits);
}
MASKED_SOFTMAX_DEVICE uint64_t multiply_high(uint64_t a, uint64_t b) { return __umul64hi(a, b); }
MASKED_SOFTMAX_DEVICE uint32_t multiply_high(uint32_t a, uint32_t b) { return __umulhi(a, b); }

MASKED_SOFTMAX_DEVICE float fused_multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
MASKED_SOFTMAX_DEVICE double fused_multiply_add(double a, double b, double c) { return __fma_rn(a, b, c); }
// As IEEE 754's maxNum: if one operand is NaN, the other.
MASKED_SOFTMAX_DEVICE float larger(float a, float b) { return fmaxf(a, b); }
MASKED_SOFTMAX_DEVICE double larger(double a, double b) { return fmax(a, b); }
MASKED_SOFTMAX_DEVICE float log_one_plus(float a) { return log1pf(a); }
MASKED_SOFTMAX_DEVICE double log_one_plus(double a) { return log1p(a); }
// `condition ? a : b`, with both computed: a compiler may branch around the computation of one.
MASKED_SOFTMAX_DEVICE float select(bool condition, float a, float b) {
  float result;
  asm("{\n.reg .pred p;\nsetp.ne.u32 p, %3, 0;\nselp.f32 %0, %1, %2, p;\n}"
      : "=f"(result)
      : "f"(a), "f"(b), "r"(static_cast<unsigned>(condition)));
  return result;
}
MASKED_SOFTMAX_DEVICE double select(bool condition, double a, double b) {
  double result;
  asm("{\n.reg .pred p;\nsetp.ne.u32 p, %3, 0;\nselp.f64 %0, %1, %2, p;\n}"
      : "=d"(result)
      : "d"(a), "d"(b), "r"(static_cast<unsigned>(condition)));
  return result;
}
// 2^a within 2 units in the last place, in one instruction; results below the smallest normal number are 0.
MASKED_SOFTMAX_DEVICE float exp2_approximate(float a) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(a));
  return result;
}
MASKED_SOFTMAX_DEVICE uint32_t float_bits(float a) { return __float_as_uint(a); }
MASKED_SOFTMAX_DEVICE float bits_float(uint32_t a) { return __uint_as_float(a); }
MASKED_SOFTMAX_DEVICE uint64_t float_bits(double a) { return static_cast<uint64_t>(__double_as_longlong(a)); }
MASKED_SOFTMAX_DEVICE double bits_float(uint64_t a) { return __longlong_as_double(static_cast<long long>(a)); }

template <class T>
MASKED_SOFTMAX_DEVICE T widen(T value) {
  return value;
}
MASKED_SOFTMAX_DEVICE float widen(bfloat16_t value) { return __uint_as_float(uint32_t{value.bits} << 16); }
MASKED_SOFTMAX_DEVICE float widen(float16_t value) { return __half2float(__ushort_as_half(value.bits)); }
MASKED_SOFTMAX_DEVICE float widen(bool8_t value) { return value.byte != 0 ? 1.0f : 0.0f; }

// To nearest, ties to even.
template <class T>
MASKED_SOFTMAX_DEVICE T narrow(float value) {
  if constexpr (std::is_same_v<T, bfloat16_t>) {
    return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
  } else if constexpr (std::is_same_v<T, float16_t>) {
    return {__half_as_ushort(__float2half_rn(value))};
  } else {
    return static_cast<T>(value);
  }
}
// A double goes to 16 bits by way of a float rounded to odd: see round_to_odd() in common/numeric.h.
template <class T>
MASKED_SOFTMAX_DEVICE T narrow(double value) {
  if constexpr (sizeof(T) == 2) {
    const float toward_zero = __double2float_rz(value);
    const bool exact = static_cast<double>(toward_zero) == value || !(fabs(value) <= 3.4028234663852886e38);
    return narrow<T>(exact ? static_cast<float>(value) : __uint_as_float(__float_as_uint(toward_zero) | 1u));
  } else {
    return static_cast<T>(value);
  }
}

#if MASKED_SOFTMAX_HAS_CLUSTERS
MASKED_SOFTMAX_DEVICE unsigned cluster_rank() {
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
MASKED_SOFTMAX_DEVICE unsigned cluster_size() {
  unsigned size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}
// Cluster-wide barrier with release and acquire ordering: writes made before it by any thread of the cluster are
// visible to all of them after it.
MASKED_SOFTMAX_DEVICE void sync_cluster() {
  asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}
// The same barrier in two parts and without ordering, so that wait_for_cluster() does not wait for stores.
MASKED_SOFTMAX_DEVICE void arrive_at_cluster() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
MASKED_SOFTMAX_DEVICE void wait_for_cluster() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }
// The value of a shared variable in the cluster's block `rank`.
template <class T>
MASKED_SOFTMAX_DEVICE T load_from_block(const T* shared, unsigned rank) {
  static_assert(std::is_floating_point_v<T>, "loads an f32 or an f64");
  const auto own = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  unsigned address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(own), "r"(rank));
  if constexpr (sizeof(T) == 4) {
    float value;
    asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
    return static_cast<T>(value);
  } else {
    double value;
    asm volatile("ld.shared::cluster.f64 %0, [%1];" : "=d"(value) : "r"(address) : "memory");
    return static_cast<T>(value);
  }
}
#else
MASKED_SOFTMAX_DEVICE unsigned cluster_rank() { return 0; }
MASKED_SOFTMAX_DEVICE unsigned cluster_size() { return 1; }
MASKED_SOFTMAX_DEVICE void sync_cluster() {}
MASKED_SOFTMAX_DEVICE void arrive_at_cluster() {}
MASKED_SOFTMAX_DEVICE void wait_for_cluster() {}
template <class T>
MASKED_SOFTMAX_DEVICE T load_from_block(const T* shared, unsigned /*rank*/) {
  return *shared;
}
#endif

// A launch as the runtime takes it.
class LaunchConfig {
 public:
  LaunchConfig(const LaunchPlan& plan, Stream stream) {
    cluster_.id = cudaLaunchAttributeClusterDimension;
    cluster_.val.clusterDim.x = plan.cluster_size;
    cluster_.val.clusterDim.y = 1;
    cluster_.val.clusterDim.z = 1;
    config_.gridDim = dim3(plan.blocks);
    config_.blockDim = dim3(plan.threads_per_block);
    config_.stream = stream;
    config_.attrs = &cluster_;
    config_.numAttrs = plan.cluster_size > 1 ? 1 : 0;
  }
  LaunchConfig(const LaunchConfig&) = delete;  // config_ points to cluster_
  LaunchConfig& operator=(const LaunchConfig&) = delete;

  const cudaLaunchConfig_t* get() const { return &config_; }

 private:
  cudaLaunchAttribute cluster_ = {};
  cudaLaunchConfig_t config_ = {};
};

template <class Argument>
Status launch(void (*kernel)(Argument), const LaunchPlan& plan, Stream stream, const Argument& argument) {
  const LaunchConfig config(plan, stream);
  return cudaLaunchKernelEx(config.get(), kernel, argument);
}

inline Status current_device(int& device) { return cudaGetDevice(&device); }

// Sets the number of SMs of the current device.
inline Status count_sms(int& count) {
  int device = 0;
  const Status status = current_device(device);
  return status == kSuccess ? cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) : status;
}

// Sets `support`, for clusters of that plan, on the current device. Where the runtime cannot tell how many run at a
// time, none do.
template <class Argument>
Status query_cluster_kernel(void (*kernel)(Argument), const LaunchPlan& plan, ClusterSupport& support) {
  int device = 0;
  int device_has_clusters = 0;
  cudaFuncAttributes attributes;
  Status status = current_device(device);
  if (status == kSuccess) {
    status = cudaDeviceGetAttribute(&device_has_clusters, cudaDevAttrClusterLaunch, device);
  }
  if (status == kSuccess) {
    status = cudaFuncGetAttributes(&attributes, kernel);
  }
  if (status != kSuccess) {
    return status;
  }
  support.device_has_clusters = device_has_clusters != 0;
  support.binary_version = attributes.binaryVersion;
  support.ptx_version = attributes.ptxVersion;
  const LaunchConfig config(plan, /*stream=*/nullptr);
  if (support.device_has_clusters &&
      cudaOccupancyMaxActiveClusters(&support.max_active_clusters, kernel, config.get()) != cudaSuccess) {
    support.max_active_clusters = 0;
    cudaGetLastError();  // or the caller's next check would report this error
  }
  return kSuccess;
}

}  // namespace masked_softmax::cuda
