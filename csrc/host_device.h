// Macros for code shared by host and device, and the offset of a row of samples.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define NIVMF_HD __host__ __device__ __forceinline__
#define NIVMF_UNROLL _Pragma("unroll")
#elif defined(__GNUC__)
#define NIVMF_HD inline __attribute__((always_inline))  // into callers built for a newer CPU
#define NIVMF_UNROLL _Pragma("GCC unroll 64")
#else
#define NIVMF_HD inline
#define NIVMF_UNROLL
#endif

namespace nivmf {

// The offset of the row of (sample, image) in a contiguous [n, batch, dim].
NIVMF_HD int64_t row_offset(int64_t sample, int64_t image, int64_t batch, int64_t dim) {
  return (sample * batch + image) * dim;
}

}  // namespace nivmf
