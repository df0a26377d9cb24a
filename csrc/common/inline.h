// Inlining that kernels rely on, for g++, clang and nvcc.
#pragma once

#if defined(__CUDACC__)
#define MASKED_SOFTMAX_INLINE __host__ __device__ __forceinline__
#else
#define MASKED_SOFTMAX_INLINE inline __attribute__((always_inline))
#endif

#define MASKED_SOFTMAX_NOINLINE __attribute__((noinline))
