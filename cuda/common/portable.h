// Marks functions that the CPU and the CUDA backend share.
#pragma once

#if defined(__CUDACC__)
#define PH_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define PH_HOST_DEVICE inline
#endif
