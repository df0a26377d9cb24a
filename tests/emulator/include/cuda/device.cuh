// The emulator's csrc/cuda/device.cuh: the same names for a GPU that simt.h emulates. Found first on the include path.
//
// Arithmetic has the GPU's bits, except for log_one_plus(), exp2_approximate() and reciprocal().
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/numeric.h"
#include "cuda/device_properties.h"
#include "cuda/launch_plan.h"
#include "cuda/runtime.h"
#include "simt.h"

#define MASKED_SOFTMAX_DEVICE inline
#define MASKED_SOFTMAX_DEVICE_LAMBDA
#define MASKED_SOFTMAX_KERNEL(max_threads_per_block, min_blocks_per_sm) void
#define MASKED_SOFTMAX_KERNEL_ARGUMENT const
// The lambda's type identifies the array: one for each instantiation of the function that declares it.
#define MASKED_SOFTMAX_SHARED(T, name, count) \
  T(&name)[count] = *static_cast<T(*)[count]>(simt::shared_array([] {}, sizeof(T) * (count), alignof(T)))
#define MASKED_SOFTMAX_DYNAMIC_SHARED(name) \
  unsigned char* const name = static_cast<unsigned char*>(simt::dynamic_shared_memory())
#define MASKED_SOFTMAX_UNROLL
#define MASKED_SOFTMAX_NO_UNROLL
#define MASKED_SOFTMAX_HAS_CLUSTERS 1
#define MASKED_SOFTMAX_HAS_BULK_COPIES 1

namespace masked_softmax::cuda {

inline unsigned thread_index() { return simt::this_thread().thread; }
inline unsigned block_threads() { return simt::this_thread().block_threads; }
inline unsigned block_index() { return simt::this_thread().block; }
inline unsigned grid_blocks() { return simt::this_thread().grid_blocks; }

inline void sync_block(simt::Location location = simt::Location::current()) { simt::sync_block(location); }
inline bool any_in_block(bool predicate, simt::Location location = simt::Location::current()) {
  MASKED_SOFTMAX_SHARED(bool, predicates, kMaxBlockThreads);
  predicates[thread_index()] = predicate;
  simt::sync_block(location);
  bool is_any = false;
  for (unsigned thread = 0; thread < block_threads(); ++thread) {
    is_any = is_any || predicates[thread];
  }
  simt::sync_block(location);
  return is_any;
}

template <class T>
T shuffle_xor(T value, unsigned lane_mask, simt::Location location = simt::Location::current()) {
  return simt::shuffle_xor(0xffffffffu, value, lane_mask, 32, location);
}
template <class T>
T shuffle_up(T value, unsigned distance, simt::Location location = simt::Location::current()) {
  return simt::shuffle_up(0xffffffffu, value, distance, 32, location);
}

inline int warp_max(int value) {
  for (unsigned distance = 1; distance < kWarpThreads; distance *= 2) {
    value = std::max(value, shuffle_xor(value, distance));
  }
  return value;
}
inline bool any_in_warp(bool condition) { return warp_max(condition ? 1 : 0) != 0; }

template <class T>
T* in_device_memory(T* p) {
  return p;
}

template <class T>
T* computed_once(T* p) {
  return p;
}

inline int optimization_barrier(int value) { return value; }

template <class V>
V load_vector_if(bool condition, const void* p, V otherwise) {
  if (condition) {
    simt::check_load(p, sizeof(V));
    std::memcpy(&otherwise, p, sizeof(V));
  }
  return otherwise;
}
template <class V>
V load_shared_vector_if(bool condition, const void* p, V otherwise) {
  return load_vector_if(condition, p, otherwise);
}
template <class V>
void store_vector_if(bool condition, void* p, const V& vector) {
  if (condition) {
    simt::check_store(p, sizeof(V));
    std::memcpy(p, &vector, sizeof(V));
  }
}

template <class T>
uint32_t load_elem_if(bool condition, const T* p, uint32_t otherwise) {
  if (condition) {
    simt::check_load(p, sizeof(T));
    otherwise = 0;
    std::memcpy(&otherwise, p, sizeof(T));
  }
  return otherwise;
}
template <class T>
void store_elem_if(bool condition, T* p, T elem) {
  store_vector_if(condition, p, elem);
}

template <class T>
T* add_strides(T* p, int stride_bytes, int count) {
  return reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(p) + static_cast<intptr_t>(stride_bytes) * count);
}

inline uint32_t funnel_shift_right(uint32_t low, uint32_t high, unsigned bits) {
  return static_cast<uint32_t>((uint64_t{high} << 32 | low) >> (bits & 31));
}
inline uint64_t multiply_high(uint64_t a, uint64_t b) {
  return static_cast<uint64_t>(static_cast<unsigned __int128>(a) * b >> 64);
}

inline uint32_t multiply_high(uint32_t a, uint32_t b) { return static_cast<uint32_t>(uint64_t{a} * b >> 32); }

inline float fused_multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
inline double fused_multiply_add(double a, double b, double c) { return std::fma(a, b, c); }
inline float larger(float a, float b) { return std::fmax(a, b); }
inline double larger(double a, double b) { return std::fmax(a, b); }
inline float log_one_plus(float a) { return std::log1p(a); }
inline double log_one_plus(double a) { return std::log1p(a); }
inline float select(bool condition, float a, float b) { return condition ? a : b; }
inline double select(bool condition, double a, double b) { return condition ? a : b; }
inline void keep_branch() {}
inline float exp2_approximate(float a) {
  const float power = std::exp2(a);
  return power < std::numeric_limits<float>::min() ? 0.0f : power;
}
// 0 and infinity, for which no result is specified, give NaN, as on the GPU. Results that are not normal are 0.
inline float reciprocal(float a) {
  const float result = 1 / a;
  return !(std::fabs(result) > 0 && std::isfinite(result)) ? std::numeric_limits<float>::quiet_NaN()
         : std::isnormal(result)                           ? result
                                                           : 0.0f;
}
inline double reciprocal(double a) { return 1 / a; }
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
float unpack(uint32_t word, int half) {
  if constexpr (sizeof(T) == 2) {
    return widen(T{static_cast<uint16_t>(half == 0 ? word : word >> 16)});
  } else {
    return bit_cast<float>(word);
  }
}
template <class T>
uint32_t pack(float low, float high) {
  return from_acc<T>(low).bits | uint32_t{from_acc<T>(high).bits} << 16;
}

// Inlined, and the result is a variable: -fsanitize=thread does not announce a store of a call's own result.
template <class T, class acc_t>
__attribute__((always_inline)) inline T narrow(acc_t value) {
  T narrowed = from_acc<T>(value);
  return narrowed;
}

inline unsigned cluster_rank() { return simt::this_thread().cluster_rank; }
inline unsigned cluster_size() { return simt::this_thread().cluster_size; }
inline void cluster_arrive_release(simt::Location location = simt::Location::current()) {
  simt::arrive_at_cluster(simt::Arrive::kRelease, location);
}
inline void cluster_arrive_relaxed(simt::Location location = simt::Location::current()) {
  simt::arrive_at_cluster(simt::Arrive::kRelaxed, location);
}
inline void cluster_wait_acquire(simt::Location location = simt::Location::current()) {
  simt::wait_for_cluster(location);
}
inline void sync_cluster(simt::Location location = simt::Location::current()) { simt::sync_cluster(location); }
template <class T>
T load_from_block(const T* shared, unsigned rank) {
  return *static_cast<const T*>(simt::shared_of_block(shared, rank));
}

inline void cp_async_16(void* to, const void* from, simt::Location location = simt::Location::current()) {
  simt::copy_16_bytes(to, from, location);
}
inline void cp_async_commit_group() { simt::commit_copies(simt::CopyGroups::k16Bytes); }
template <unsigned kPending>
void cp_async_wait_group() {
  simt::wait_for_copies(simt::CopyGroups::k16Bytes, kPending, simt::CopyStage::kWritten);
}

inline void mbarrier_init(uint64_t* barrier, unsigned arrivals, simt::Location location = simt::Location::current()) {
  simt::mbarrier_init(barrier, arrivals, location);
}
inline void mbarrier_arrive_expect_tx(uint64_t* barrier, unsigned size_bytes,
                                      simt::Location location = simt::Location::current()) {
  simt::mbarrier_arrive_expect_tx(barrier, size_bytes, location);
}
inline void mbarrier_wait_parity(uint64_t* barrier, unsigned parity,
                                 simt::Location location = simt::Location::current()) {
  simt::mbarrier_wait_parity(barrier, parity, location);
}
inline void fence_proxy_async() { simt::fence_proxy_async(); }
inline void cp_async_bulk_to_shared(void* to, const void* from, unsigned size_bytes, uint64_t* barrier,
                                    simt::Location location = simt::Location::current()) {
  simt::bulk_copy_to_shared(to, from, size_bytes, barrier, location);
}
inline void cp_async_bulk_to_global(void* to, const void* from, unsigned size_bytes,
                                    simt::Location location = simt::Location::current()) {
  simt::bulk_copy_to_global(to, from, size_bytes, location);
}
inline void cp_async_bulk_commit_group() { simt::commit_copies(simt::CopyGroups::kBulk); }
template <unsigned kPending>
void cp_async_bulk_wait_group() {
  simt::wait_for_copies(simt::CopyGroups::kBulk, kPending, simt::CopyStage::kWritten);
}
template <unsigned kPending>
void cp_async_bulk_wait_group_read() {
  simt::wait_for_copies(simt::CopyGroups::kBulk, kPending, simt::CopyStage::kRead);
}

template <class Argument>
Status launch(void (*kernel)(Argument), const LaunchPlan& plan, Stream /*stream*/, const Argument& argument) {
  return simt::launch({plan.blocks, plan.threads_per_block, plan.cluster_size, plan.shared_bytes},
                      [&] { kernel(argument); });
}

// What query_cluster_kernel() reports, and how often it was asked. Tests change it.
struct EmulatedClusters {
  ClusterSupport support;      // but for max_active_clusters
  unsigned active_blocks = 0;  // of a cluster kernel, at a time
  Status status = kSuccess;
  int queries = 0;
};
inline EmulatedClusters emulated_clusters;

template <class Argument>
Status query_cluster_kernel(void (* /*kernel*/)(Argument), const LaunchPlan& plan, ClusterSupport& support) {
  ++emulated_clusters.queries;
  support = emulated_clusters.support;
  support.max_active_clusters = static_cast<int>(emulated_clusters.active_blocks / plan.cluster_size);
  return emulated_clusters.status;
}

}  // namespace masked_softmax::cuda
