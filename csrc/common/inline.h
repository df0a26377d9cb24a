// Inlining that kernels rely on, and functions that run on the GPU too, for g++, clang and nvcc.
#pragma once

#if defined(__CUDACC__)
#define MASKED_SOFTMAX_INLINE __host__ __device__ __forceinline__
#define MASKED_SOFTMAX_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define MASKED_SOFTMAX_INLINE inline __attribute__((always_inline))
#define MASKED_SOFTMAX_HOST_DEVICE inline
#endif

#define MASKED_SOFTMAX_NOINLINE __attribute__((noinline))
