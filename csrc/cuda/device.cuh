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
// The block's dynamic shared memory, of LaunchPlan::shared_bytes, at a multiple of 128 bytes.
#define MASKED_SOFTMAX_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#define MASKED_SOFTMAX_UNROLL _Pragma("unroll")
#define MASKED_SOFTMAX_NO_UNROLL _Pragma("unroll 1")
// Thread block clusters and distributed shared memory: compute capability 9.0 and later.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define MASKED_SOFTMAX_HAS_CLUSTERS 1
#else
#define MASKED_SOFTMAX_HAS_CLUSTERS 0
#endif
// Bulk copies and the transaction counts of mbarriers: the same.
#define MASKED_SOFTMAX_HAS_BULK_COPIES MASKED_SOFTMAX_HAS_CLUSTERS

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

// The largest value of a warp's lanes, in a register that all lanes share: branches that depend on it alone need no
// reconvergence. Precondition: every lane calls.
MASKED_SOFTMAX_DEVICE int warp_max(int value) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  return __reduce_max_sync(0xffffffffu, value);
#else
  MASKED_SOFTMAX_UNROLL
  for (unsigned distance = 1; distance < kWarpThreads; distance *= 2) {
    const int other = shuffle_xor(value, distance);
    value = other > value ? other : value;
  }
  return value;
#endif
}
// The same for a condition: whether it holds in any lane.
MASKED_SOFTMAX_DEVICE bool any_in_warp(bool condition) { return __any_sync(0xffffffffu, condition) != 0; }

// Tells the compiler that p points to global memory, so that accesses need no test for shared memory.
template <class T>
MASKED_SOFTMAX_DEVICE T* in_device_memory(T* p) {
  __builtin_assume(__isGlobal(p));
  return p;
}

// Keeps p in a register: the compiler would compute it again where few threads use it.
template <class T>
MASKED_SOFTMAX_DEVICE T* computed_once(T* p) {
  asm("" : "+l"(p));
  return p;
}

// The address of shared memory within its state space, as PTX takes it.
MASKED_SOFTMAX_DEVICE unsigned shared_address(const void* p) {
  return static_cast<unsigned>(__cvta_generic_to_shared(p));
}

// Hides a value from the optimizer, which would otherwise keep the results of earlier comparisons in registers rather
// than compare again.
MASKED_SOFTMAX_DEVICE int optimization_barrier(int value) {
  asm volatile("" : "+r"(value));
  return value;
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
    asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %5, 0;\n@p ld.global.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
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
// The same from shared memory.
template <class V>
MASKED_SOFTMAX_DEVICE V load_shared_vector_if(bool condition, const void* p, V otherwise) {
  static_assert(sizeof(V) == 8 || sizeof(V) == 16, "one access");
  uint32_t words[sizeof(V) / 4];
  memcpy(words, &otherwise, sizeof(V));
  const auto predicate = static_cast<unsigned>(condition);
  if constexpr (sizeof(V) == 16) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %5, 0;\n@p ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
                 : "+r"(words[0]), "+r"(words[1]), "+r"(words[2]), "+r"(words[3])
                 : "r"(shared_address(p)), "r"(predicate)
                 : "memory");
  } else {
    asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %3, 0;\n@p ld.shared.v2.u32 {%0, %1}, [%2];\n}"
                 : "+r"(words[0]), "+r"(words[1])
                 : "r"(shared_address(p)), "r"(predicate)
                 : "memory");
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
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.u32 p, %5, 0;\n@p st.global.v4.u32 [%4], {%0, %1, %2, %3};\n}" ::"r"(words[0]),
        "r"(words[1]), "r"(words[2]), "r"(words[3]), "l"(address), "r"(predicate)
        : "memory");
  } else {
    asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %3, 0;\n@p st.global.v2.u32 [%2], {%0, %1};\n}" ::"r"(words[0]),
                 "r"(words[1]), "l"(address), "r"(predicate)
                 : "memory");
  }
}

// The same for one element of 2 or 4 bytes, in the low bits of a word.
template <class T>
MASKED_SOFTMAX_DEVICE uint32_t load_elem_if(bool condition, const T* p, uint32_t otherwise) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4, "one access");
  const auto predicate = static_cast<unsigned>(condition);
  const size_t address = __cvta_generic_to_global(p);
  if constexpr (sizeof(T) == 2) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %2, 0;\n@p ld.global.u16 %0, [%1];\n}"
                 : "+r"(otherwise)
                 : "l"(address), "r"(predicate));
  } else {
    asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %2, 0;\n@p ld.global.u32 %0, [%1];\n}"
                 : "+r"(otherwise)
                 : "l"(address), "r"(predicate));
  }
  return otherwise;
}
template <class T>
MASKED_SOFTMAX_DEVICE void store_elem_if(bool condition, T* p, T elem) {
  if (condition) {
    *in_device_memory(p) = elem;
  }
}
// The address `count` strides behind p.
template <class T>
MASKED_SOFTMAX_DEVICE T* add_strides(T* p, int stride_bytes, int count) {
  T* result;
  asm("mad.wide.s32 %0, %1, %2, %3;" : "=l"(result) : "r"(stride_bytes), "r"(count), "l"(p));
  return result;
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
// In a branch that few threads take: the compiler does not turn it into selections that all threads execute.
MASKED_SOFTMAX_DEVICE void keep_branch() { asm volatile(""); }
// 2^a within 2 units in the last place, in one instruction; results below the smallest normal number are 0.
MASKED_SOFTMAX_DEVICE float exp2_approximate(float a) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(a));
  return result;
}
// Within 1 unit in the last place for normal numbers. NaN gives NaN; what 0 and infinity give is not specified.
MASKED_SOFTMAX_DEVICE float reciprocal(float a) {
  float approximate;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(approximate) : "f"(a));
  return __fmaf_rn(approximate, __fmaf_rn(-a, approximate, 1.0f), approximate);  // one step of Newton's method
}
MASKED_SOFTMAX_DEVICE double reciprocal(double a) { return 1 / a; }
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
// The float of element `half` of a word with two 16-bit elements, or of a word that is a float.
template <class T>
MASKED_SOFTMAX_DEVICE float unpack(uint32_t word, int half) {
  if constexpr (std::is_same_v<T, bfloat16_t>) {
    return __uint_as_float(half == 0 ? word << 16 : word & 0xffff0000u);
  } else if constexpr (std::is_same_v<T, float16_t>) {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(half == 0 ? word : word >> 16)));
  } else {
    static_assert(std::is_same_v<T, float>, "a word has one float or two 16-bit elements");
    return __uint_as_float(word);
  }
}
// A word with two 16-bit elements, rounded as by narrow().
template <class T>
MASKED_SOFTMAX_DEVICE uint32_t pack(float low, float high) {
  uint32_t word;
  if constexpr (std::is_same_v<T, bfloat16_t>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    memcpy(&word, &pair, 4);
  } else {
    static_assert(std::is_same_v<T, float16_t>, "a 16-bit type");
    const __half2 pair = __floats2half2_rn(low, high);
    memcpy(&word, &pair, 4);
  }
  return word;
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
// The cluster-wide barrier in two steps. Every thread arrives, does other work, and waits for all others to arrive.
// After the wait, writes that any thread of the cluster made before its arrive with release semantics are visible. A
// relaxed arrive orders no writes: it says that the thread has no more use for the other blocks' shared memory.
MASKED_SOFTMAX_DEVICE void cluster_arrive_release() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
MASKED_SOFTMAX_DEVICE void cluster_arrive_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
MASKED_SOFTMAX_DEVICE void cluster_wait_acquire() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
MASKED_SOFTMAX_DEVICE void sync_cluster() {
  cluster_arrive_release();
  cluster_wait_acquire();
}
// The value of a shared variable in the cluster's block `rank`.
template <class T>
MASKED_SOFTMAX_DEVICE T load_from_block(const T* shared, unsigned rank) {
  static_assert(std::is_floating_point_v<T>, "loads an f32 or an f64");
  unsigned address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(shared)), "r"(rank));
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
MASKED_SOFTMAX_DEVICE void cluster_arrive_relaxed() {}
MASKED_SOFTMAX_DEVICE void cluster_wait_acquire() {}
template <class T>
MASKED_SOFTMAX_DEVICE T load_from_block(const T* shared, unsigned /*rank*/) {
  return *shared;
}
#endif

// Asynchronous copies of 16 bytes to shared memory: cp.async, compute capability 8.0 and later. Both addresses are
// multiples of 16. A thread commits its copies in groups, and waits until at most the latest kPending groups are under
// way; then it sees what its copies wrote, and other threads do after a barrier.
MASKED_SOFTMAX_DEVICE void cp_async_16(void* to_shared, const void* from_global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to_shared)), "l"(from_global)
               : "memory");
}
MASKED_SOFTMAX_DEVICE void cp_async_commit_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <unsigned kPending>
MASKED_SOFTMAX_DEVICE void cp_async_wait_group() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

#if MASKED_SOFTMAX_HAS_BULK_COPIES
// An mbarrier object, 8 bytes in shared memory. Its phases are numbered from 0. A phase completes when `arrivals`
// threads have arrived, and as many bytes have been copied as they expected.
//
// Precondition for every use by another thread: a barrier after the initialization. For bulk copies, also
// fence_proxy_async() between the two.
MASKED_SOFTMAX_DEVICE void mbarrier_init(uint64_t* barrier, unsigned arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// Expects the bytes in the current phase, and then arrives at it.
MASKED_SOFTMAX_DEVICE void mbarrier_arrive_expect_tx(uint64_t* barrier, unsigned size_bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(size_bytes)
               : "memory");
}
// Waits while the current phase's number has this parity. Then the copies of the phase before the current one are
// visible. Preconditions: no thread begins the next phase but one before all have waited, since the parity would be the
// same again; and every phase that is waited for gets its arrivals and bytes, since the wait has no other end.
MASKED_SOFTMAX_DEVICE void mbarrier_wait_parity(uint64_t* barrier, unsigned parity) {
  unsigned is_complete;
  do {
    asm volatile(
        "{\n"
        ".reg .pred is_complete;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 is_complete, [%1], %2;\n"
        "selp.u32 %0, 1, 0, is_complete;\n"
        "}"
        : "=r"(is_complete)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  } while (is_complete == 0);
}

// Bulk copies access memory through the asynchronous proxy. Orders what this thread stored in shared memory before the
// bulk copies that it, or another thread after a barrier, issues later.
MASKED_SOFTMAX_DEVICE void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Asynchronous bulk copies. Addresses and size are multiples of 16, the size is not 0. A copy to shared memory counts
// in the current phase of the mbarrier.
MASKED_SOFTMAX_DEVICE void cp_async_bulk_to_shared(void* to_shared, const void* from_global, unsigned size_bytes,
                                                   uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to_shared)),
               "l"(from_global), "r"(size_bytes), "r"(shared_address(barrier))
               : "memory");
}
// A thread commits its copies to global memory in groups, and waits until at most the latest kPending groups are under
// way; with _read, until the others have read shared memory, which may then be changed.
MASKED_SOFTMAX_DEVICE void cp_async_bulk_to_global(void* to_global, const void* from_shared, unsigned size_bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to_global),
               "r"(shared_address(from_shared)), "r"(size_bytes)
               : "memory");
}
MASKED_SOFTMAX_DEVICE void cp_async_bulk_commit_group() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
template <unsigned kPending>
MASKED_SOFTMAX_DEVICE void cp_async_bulk_wait_group() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}
template <unsigned kPending>
MASKED_SOFTMAX_DEVICE void cp_async_bulk_wait_group_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
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
    config_.dynamicSmemBytes = plan.shared_bytes;
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

// Lets the kernel have the plan's shared memory, which may be more than the runtime allows by itself.
template <class Argument>
Status allow_shared_memory(void (*kernel)(Argument), const LaunchPlan& plan) {
  return plan.shared_bytes == 0 ? kSuccess
                                : cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                       static_cast<int>(plan.shared_bytes));
}

template <class Argument>
Status launch(void (*kernel)(Argument), const LaunchPlan& plan, Stream stream, const Argument& argument) {
  const Status status = allow_shared_memory(kernel, plan);
  if (status != kSuccess) {
    return status;
  }
  const LaunchConfig config(plan, stream);
  return cudaLaunchKernelEx(config.get(), kernel, argument);
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
      (allow_shared_memory(kernel, plan) != kSuccess ||
       cudaOccupancyMaxActiveClusters(&support.max_active_clusters, kernel, config.get()) != kSuccess)) {
    support.max_active_clusters = 0;
    cudaGetLastError();  // or the caller's next check would report this error
  }
  return kSuccess;
}

}  // namespace masked_softmax::cuda
