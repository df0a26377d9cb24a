// The one file that names both worlds: the GPU, as nvcc compiles for it, and the emulator of tests/emulator, which runs
// the same kernels on a CPU. Kernels use these names only: no <<<>>>, no inline PTX, no __shared__ elsewhere.
//
// Floating-point contraction is off in both worlds: a multiply-add is fused where fma() says so and nowhere else, and a
// kernel's arithmetic has the same bits in the emulator and on the GPU (but for log1p and exp2_approximate, which are
// the device's own).
#pragma once

#include <cstdint>

#include "common/numeric.h"
#include "cuda/launch.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define MASKED_SOFTMAX_DEVICE __device__ __forceinline__
#define MASKED_SOFTMAX_DEVICE_LAMBDA __attribute__((always_inline))
// most_threads: of a block; least_blocks: that a multiprocessor holds at once, which bounds the registers.
#define MASKED_SOFTMAX_KERNEL(most_threads, least_blocks) __global__ void __launch_bounds__(most_threads, least_blocks)
#define MASKED_SOFTMAX_KERNEL_ARGUMENT const __grid_constant__
#define MASKED_SOFTMAX_SHARED(T, name, count) __shared__ T name[count]
#define MASKED_SOFTMAX_UNROLL _Pragma("unroll")
// Thread-block clusters and distributed shared memory: compute capability 9.0 and later.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define MASKED_SOFTMAX_HAS_CLUSTERS 1
#else
#define MASKED_SOFTMAX_HAS_CLUSTERS 0
#endif
#else
#include "simt.h"

#define MASKED_SOFTMAX_DEVICE inline
#define MASKED_SOFTMAX_DEVICE_LAMBDA
#define MASKED_SOFTMAX_KERNEL(most_threads, least_blocks) void
#define MASKED_SOFTMAX_KERNEL_ARGUMENT const
// Every kernel instantiation has its own arrays: the lambda's type tells them apart.
#define MASKED_SOFTMAX_SHARED(T, name, count) \
  T(&name)[count] = *static_cast<T(*)[count]>(simt::shared_array([] {}, sizeof(T) * (count), alignof(T)))
#define MASKED_SOFTMAX_UNROLL
#define MASKED_SOFTMAX_HAS_CLUSTERS 1
#endif

namespace masked_softmax {
namespace cuda {

constexpr unsigned kWarpThreads = 32;
constexpr unsigned kWholeWarp = 0xffffffffu;

// The unit of fast access to device memory.
struct alignas(16) Vector16 {
  uint32_t words[4];
};

struct LaunchShape {
  unsigned blocks;
  unsigned threads;       // of a block
  unsigned cluster_size;  // blocks; 1 for none
};

#if defined(__CUDACC__)

MASKED_SOFTMAX_DEVICE unsigned thread_index() { return threadIdx.x; }
MASKED_SOFTMAX_DEVICE unsigned block_threads() { return blockDim.x; }
MASKED_SOFTMAX_DEVICE unsigned block_index() { return blockIdx.x; }
MASKED_SOFTMAX_DEVICE unsigned grid_blocks() { return gridDim.x; }

MASKED_SOFTMAX_DEVICE void sync_block() { __syncthreads(); }

// Every lane of the warp calls; lanes form groups of `width` that see their own lanes only.
template <class T>
MASKED_SOFTMAX_DEVICE T shuffle_xor(T value, unsigned lane_mask, unsigned width) {
  return __shfl_xor_sync(kWholeWarp, value, lane_mask, width);
}
template <class T>
MASKED_SOFTMAX_DEVICE T shuffle_up(T value, unsigned distance, unsigned width) {
  return __shfl_up_sync(kWholeWarp, value, distance, width);
}

// Tells the compiler, which would otherwise ask at every access whether memory is shared.
template <class T>
MASKED_SOFTMAX_DEVICE T* in_device_memory(T* p) {
  __builtin_assume(__isGlobal(p));
  return p;
}

// A plain load, not one through the read-only path: input and output may be the same memory.
MASKED_SOFTMAX_DEVICE Vector16 load16(const void* p) {
  const uint4 loaded = *static_cast<const uint4*>(p);
  return {{loaded.x, loaded.y, loaded.z, loaded.w}};
}
// To an address of which the compiler knows nothing: where another branch stores some of the same elements, it would
// make one sequence of predicated 4-byte stores of both.
MASKED_SOFTMAX_DEVICE void store16(void* p, const Vector16& v) {
  asm("" : "+l"(p));
  *static_cast<uint4*>(in_device_memory(p)) = make_uint4(v.words[0], v.words[1], v.words[2], v.words[3]);
}

// The 64 bits high:low shifted right by `bits` (0 to 31); the lower 32 of the result.
MASKED_SOFTMAX_DEVICE uint32_t funnel_shift_right(uint32_t low, uint32_t high, unsigned bits) {
  return __funnelshift_r(low, high, bits);
}
MASKED_SOFTMAX_DEVICE uint64_t multiply_high(uint64_t a, uint64_t b) { return __umul64hi(a, b); }

MASKED_SOFTMAX_DEVICE float fused_multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
MASKED_SOFTMAX_DEVICE double fused_multiply_add(double a, double b, double c) { return __fma_rn(a, b, c); }
// As IEEE 754 has it: the other operand where one is NaN.
MASKED_SOFTMAX_DEVICE float larger(float a, float b) { return fmaxf(a, b); }
MASKED_SOFTMAX_DEVICE double larger(double a, double b) { return fmax(a, b); }
MASKED_SOFTMAX_DEVICE float log_one_plus(float a) { return log1pf(a); }
MASKED_SOFTMAX_DEVICE double log_one_plus(double a) { return log1p(a); }
// 2^a within 2 units in the last place, in one instruction.
MASKED_SOFTMAX_DEVICE float exp2_approximate(float a) {
  float result;
  asm("ex2.approx.f32 %0, %1;" : "=f"(result) : "f"(a));
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
// A double goes to 16 bits through float, rounded to odd there: see round_to_odd() in common/numeric.h.
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
// What a thread of the cluster wrote before, every thread of it sees behind.
MASKED_SOFTMAX_DEVICE void sync_cluster() {
  asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}
// The value of a shared variable in the cluster's block `rank`.
template <class T>
MASKED_SOFTMAX_DEVICE T load_from_block(const T* shared, unsigned rank) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "distributed shared memory is read in words");
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
#endif

template <class Kernel, class... Arguments>
Status launch(Kernel* kernel, const LaunchShape& shape, Stream stream, const Arguments&... arguments) {
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = shape.cluster_size;
  cluster.val.clusterDim.y = 1;
  cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(shape.blocks);
  config.blockDim = dim3(shape.threads);
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = shape.cluster_size > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

#else  // the emulator

inline unsigned thread_index() { return simt::this_thread().thread; }
inline unsigned block_threads() { return simt::this_thread().block_threads; }
inline unsigned block_index() { return simt::this_thread().block; }
inline unsigned grid_blocks() { return simt::this_thread().grid_blocks; }

inline void sync_block(simt::Place place = simt::Place::here()) { simt::sync_block(place); }

template <class T>
T shuffle_xor(T value, unsigned lane_mask, unsigned width, simt::Place place = simt::Place::here()) {
  return simt::shuffle_xor(kWholeWarp, value, lane_mask, width, place);
}
template <class T>
T shuffle_up(T value, unsigned distance, unsigned width, simt::Place place = simt::Place::here()) {
  return simt::shuffle_up(kWholeWarp, value, distance, width, place);
}

template <class T>
T* in_device_memory(T* p) {
  return p;
}

inline Vector16 load16(const void* p) {
  simt::check_load(p, 16);
  Vector16 v;
  std::memcpy(&v, p, 16);
  return v;
}
inline void store16(void* p, const Vector16& v) {
  simt::check_store(p, 16);
  std::memcpy(p, &v, 16);
}

inline uint32_t funnel_shift_right(uint32_t low, uint32_t high, unsigned bits) {
  return static_cast<uint32_t>((uint64_t{high} << 32 | low) >> (bits & 31));
}
inline uint64_t multiply_high(uint64_t a, uint64_t b) {
  return static_cast<uint64_t>(static_cast<unsigned __int128>(a) * b >> 64);
}

inline float fused_multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
inline double fused_multiply_add(double a, double b, double c) { return std::fma(a, b, c); }
inline float larger(float a, float b) { return std::fmax(a, b); }
inline double larger(double a, double b) { return std::fmax(a, b); }
inline float log_one_plus(float a) { return std::log1p(a); }
inline double log_one_plus(double a) { return std::log1p(a); }
inline float exp2_approximate(float a) { return std::exp2(a); }
inline uint32_t float_bits(float a) { return bit_cast<uint32_t>(a); }
inline float bits_float(uint32_t a) { return bit_cast<float>(a); }
inline uint64_t float_bits(double a) { return bit_cast<uint64_t>(a); }
inline double bits_float(uint64_t a) { return bit_cast<double>(a); }

template <class T>
T widen(T value) {
  return value;
}
inline float widen(bfloat16_t value) { return bfloat16_to_float(value); }
inline float widen(float16_t value) { return float16_to_float(value); }
inline float widen(bool8_t value) { return to_acc<float>(value); }
template <class T>
T narrow(float value) {
  return from_acc<T>(value);
}
template <class T>
T narrow(double value) {
  return from_acc<T>(value);
}

inline unsigned cluster_rank() { return simt::this_thread().cluster_rank; }
inline unsigned cluster_size() { return simt::this_thread().cluster_size; }
inline void sync_cluster(simt::Place place = simt::Place::here()) { simt::sync_cluster(place); }
template <class T>
T load_from_block(const T* shared, unsigned rank) {
  return *static_cast<const T*>(simt::shared_of_block(shared, rank));
}

template <class Kernel, class... Arguments>
Status launch(Kernel* kernel, const LaunchShape& shape, Stream /*stream*/, const Arguments&... arguments) {
  const auto body = [&] { kernel(arguments...); };
  return simt::launch({shape.blocks, shape.threads, shape.cluster_size}, body);
}

#endif

}  // namespace cuda
}  // namespace masked_softmax
