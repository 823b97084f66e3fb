// Entry points of the normaliser's and the sampler's kernels: raw pointers to contiguous memory and
// no torch types, so that the .cu files compile without torch. T is float or double. Every device
// has the same entry points, with its name as suffix. CUDA's enqueue on `stream` (a cudaStream_t),
// never synchronise, and return a cudaError_t; the CPU's ignore `stream` and return 0.
#pragma once

#include <cstdint>

namespace nivmf {

// vmf_log_normalizer: out[i] is the order-th derivative (0, 1, 2) of g(k) = log C_D(k) - log C_D(0)
// at concentration[i].
//
// vmf_rsample: loc [batch, dim], concentration [batch], seed a pointer to one int64 ->
// samples [n, batch, dim], one_minus_w [n, batch].
//
// vmf_rsample_backward: grad, samples [n, batch, dim], one_minus_w [n, batch] ->
// grad_loc [batch, dim], grad_concentration [batch].
#define NIVMF_VMF_ENTRY_POINTS(device)                                                             \
  template <typename T>                                                                            \
  int vmf_log_normalizer_##device(const T* concentration, int64_t size, int64_t dim, int order,    \
                                  T* out, void* stream);                                           \
  template <typename T>                                                                            \
  int vmf_rsample_##device(const T* loc, const T* concentration, const int64_t* seed,              \
                           int64_t image_offset, int64_t n, int64_t batch, int64_t dim,            \
                           T* samples, T* one_minus_w, void* stream);                              \
  template <typename T>                                                                            \
  int vmf_rsample_backward_##device(                                                               \
      const T* grad, const T* samples, const T* one_minus_w, const T* loc, const T* concentration, \
      int64_t n, int64_t batch, int64_t dim, T* grad_loc, T* grad_concentration, void* stream);

NIVMF_VMF_ENTRY_POINTS(cpu)
NIVMF_VMF_ENTRY_POINTS(cuda)
#undef NIVMF_VMF_ENTRY_POINTS

}  // namespace nivmf
