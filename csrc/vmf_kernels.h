// Entry points of the kernels: raw pointers to contiguous memory, no torch types, so that the .cu
// files compile without torch. T is float or double. The CUDA ones enqueue on `stream` (a
// cudaStream_t), never synchronise, and return a cudaError_t.
#pragma once

#include <cstdint>

namespace nivmf {

// out[i] = the order-th derivative (0, 1, 2) of g(k) = log C_D(k) - log C_D(0) at concentration[i].
template <typename T>
void vmf_log_normalizer_cpu(const T* concentration, int64_t size, int64_t dim, int order, T* out);
template <typename T>
int vmf_log_normalizer_cuda(const T* concentration, int64_t size, int64_t dim, int order, T* out,
                            void* stream);

// loc [batch, dim], concentration [batch], seed a pointer to one int64 -> samples [n, batch, dim],
// one_minus_w [n, batch].
template <typename T>
void vmf_rsample_cpu(const T* loc, const T* concentration, const int64_t* seed,
                     int64_t image_offset, int64_t n, int64_t batch, int64_t dim, T* samples,
                     T* one_minus_w);
template <typename T>
int vmf_rsample_cuda(const T* loc, const T* concentration, const int64_t* seed,
                     int64_t image_offset, int64_t n, int64_t batch, int64_t dim, T* samples,
                     T* one_minus_w, void* stream);

// grad, samples [n, batch, dim], one_minus_w [n, batch] -> grad_loc [batch, dim],
// grad_concentration [batch].
template <typename T>
void vmf_rsample_backward_cpu(const T* grad, const T* samples, const T* one_minus_w, const T* loc,
                              const T* concentration, int64_t n, int64_t batch, int64_t dim,
                              T* grad_loc, T* grad_concentration);
template <typename T>
int vmf_rsample_backward_cuda(const T* grad, const T* samples, const T* one_minus_w, const T* loc,
                              const T* concentration, int64_t n, int64_t batch, int64_t dim,
                              T* grad_loc, T* grad_concentration, void* stream);

}  // namespace nivmf
