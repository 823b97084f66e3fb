// The hardware primitives of the log-PPK kernels (asynchronous copies, bf16 and its mma, shuffles,
// tickets, launches) and the reductions over a warp and a block that build on them.
// Without nvcc, tests/cuda_on_host.h provides the primitives and the kernels run on the CPU; no
// other kernel file distinguishes the two.
// Included by tiles.cuh, and so by every log-PPK kernel. Design: docs/design/log_ppk_cuda.md.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#ifdef __CUDACC__
#define NIVMF_D __device__ __forceinline__
#else
#define NIVMF_D inline  // after tests/cuda_on_host.h
#endif

namespace nivmf {
namespace ppk {

constexpr int kThreads = 128, kWarps = kThreads / 32;

#ifdef __CUDACC__

// Copies into shared memory; before sm_80 through registers, synchronously.
template <int kBytes>
NIVMF_D void copy_async(void* to, const void* from) {
#if __CUDA_ARCH__ >= 800
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(address), "l"(from), "n"(kBytes)
               : "memory");
#else
  using Word =
      typename std::conditional<kBytes == 16, int4,
                                typename std::conditional<kBytes == 8, int2, int>::type>::type;
  *static_cast<Word*>(to) = *static_cast<const Word*>(from);
#endif
}

NIVMF_D void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// Two floats rounded to bf16: the low half holds x, the high half y.
NIVMF_D uint32_t pack_bf16(float x, float y) {
  uint32_t out = 0;
#if __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(y), "f"(x));
#endif
  return out;
}

NIVMF_D float bits_as_float(uint32_t bits) { return __uint_as_float(bits); }

// c += a b for 16 x 16 times 16 x 8, distributed over a warp in PTX's fragment layout.
NIVMF_D void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

template <typename T>
NIVMF_D T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// Reads data that other blocks wrote in this launch: bypasses the L1, which may hold stale lines.
template <typename T>
NIVMF_D T load_fresh(const T* from) {
  return __ldcg(from);
}

// True for the last of `count` callers, which also resets the counter to 0.
NIVMF_D bool take_ticket(unsigned* counter, unsigned count) {
  __threadfence();  // orders this block's writes before the ticket, its reads of others' after
  const bool last = atomicInc(counter, count - 1) == count - 1;
  __threadfence();
  return last;
}

extern __shared__ __align__(16) unsigned char shared_memory[];

template <typename Args>
int launch(void (*kernel)(Args), int64_t blocks, size_t shared, void* stream, const Args& args) {
  if (shared > 48 << 10) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
    if (error != cudaSuccess) return error;
  }
  void* arguments[] = {const_cast<Args*>(&args)};
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(unsigned(blocks)),
                          dim3(kThreads), arguments, shared, static_cast<cudaStream_t>(stream));
}

// Whether the device has bf16 mma.sync and cp.async. True without a device, as when shapes are
// traced.
inline bool has_tensor_cores() {
  int device = 0, major = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess) {
    cudaGetLastError();
    return true;
  }
  return major >= 8;
}

#endif  // __CUDACC__

template <typename T>
NIVMF_D T warp_sum(T value) {
  for (int mask = 16; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

template <typename T>
NIVMF_D T warp_max(T value) {
  for (int mask = 16; mask > 0; mask /= 2) value = std::fmax(value, shuffle_xor(value, mask));
  return value;
}

// The sum over the block in a fixed order; complete on thread 0. `scratch`: one double per warp.
NIVMF_D double block_sum(double value, double* scratch) {
  value = warp_sum(value);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  double sum = 0;
  for (int warp = 0; warp < kWarps; ++warp) sum += scratch[warp];
  return sum;
}

}  // namespace ppk
}  // namespace nivmf
