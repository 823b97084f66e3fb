// The normaliser: g(k) = log C_D(k) - log C_D(0) or a derivative of it, for each concentration k.
// In: concentration, the dimension, the order of the derivative (0, 1, 2). Out: an array of the
// same size. One thread per element; the plan (series coefficients for this dimension) is a kernel
// argument, so that the Horner loops read it from the constant bank. Called by
// registration_cuda.cpp through vmf_kernels.h. Derivation: docs/math.md, "The normaliser".
#include <algorithm>

#include "vmf_kernels.h"
#include "vmf_normalizer.h"

namespace nivmf {
namespace {

constexpr int kThreads = 128;

template <typename T>
__global__ void __launch_bounds__(kThreads)
    log_normalizer_kernel(const T* __restrict__ concentration, int64_t size, int order,
                          const __grid_constant__ LogNormalizerPlan<T> plan, T* __restrict__ out) {
  const int64_t stride = int64_t(gridDim.x) * kThreads;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < size; i += stride) {
    out[i] = log_normalizer_derivative(concentration[i], order, plan);
  }
}

}  // namespace

template <typename T>
int vmf_log_normalizer_cuda(const T* concentration, int64_t size, int64_t dim, int order, T* out,
                            void* stream) {
  if (size == 0) return cudaSuccess;
  const int blocks = int(std::min<int64_t>((size + kThreads - 1) / kThreads, 1 << 16));
  log_normalizer_kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      concentration, size, order, make_log_normalizer_plan<T>(dim), out);
  return cudaGetLastError();
}

template int vmf_log_normalizer_cuda(const float*, int64_t, int64_t, int, float*, void*);
template int vmf_log_normalizer_cuda(const double*, int64_t, int64_t, int, double*, void*);

}  // namespace nivmf
