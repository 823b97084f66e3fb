// Entry points of the CUDA log-PPK kernels: raw pointers to contiguous memory, no torch. T is float
// or double. All enqueue on `stream` (a cudaStream_t), never synchronise, read labels and
// temperature on the device alone, and return a cudaError_t: they may be captured into a CUDA
// graph. Results are the same bits every time.
#pragma once

#include <cstdint>

namespace nivmf {

struct LogPpkSizes {
  int64_t samples, images, proxies, dim;  // N, B, P, D
  bool exact, projection, fast;
  int64_t workspace;  // bytes: half bounds what is saved, half the scratch of one call
};

// The bytes that the caller allocates, aligned to 256, for what the backward needs and for scratch.
// A call's scratch also holds O(P) scalars when proxies are prepared at once, and up to 16 slabs of
// the samples' size for the ordered sum of d_samples.
template <typename T>
int64_t proxy_nca_saved_bytes(const LogPpkSizes& sizes);
template <typename T>
int64_t log_ppk_forward_scratch_bytes(const LogPpkSizes& sizes);
template <typename T>
int64_t log_ppk_backward_scratch_bytes(const LogPpkSizes& sizes);

template <typename T>
struct LogPpkInputs {
  const T *samples, *loc, *concentration, *temperature;  // [N, B, D], [P, D], [P, D], []
  const int64_t* labels;                                 // [B]; null for log_ppk
};

template <typename T>
struct LogPpkGradients {
  T *samples, *loc, *concentration, *temperature;
};

// -> losses [B]; partial [4, B]: top and log Z over these proxies, then over the own proxy alone.
template <typename T>
int proxy_nca_cuda(const LogPpkSizes& sizes, const LogPpkInputs<T>& in, T* losses, double* partial,
                   void* saved, void* scratch, void* stream);

// grad [B]; partial as returned, or combined over the ranges of proxies that separate calls have
// covered.
template <typename T>
int proxy_nca_backward_cuda(const LogPpkSizes& sizes, const LogPpkInputs<T>& in, const T* grad,
                            const double* partial, const void* saved, void* scratch,
                            const LogPpkGradients<T>& out, void* stream);

// -> s [B, P]; rest [2, B, P]: the samples' maximum in raw units, and the log-sum-exp relative to
// it; common [].
template <typename T>
int log_ppk_cuda(const LogPpkSizes& sizes, const LogPpkInputs<T>& in, T* s, T* rest, double* common,
                 void* scratch, void* stream);

// grad [B, P].
template <typename T>
int log_ppk_backward_cuda(const LogPpkSizes& sizes, const LogPpkInputs<T>& in, const T* grad,
                          const T* rest, void* scratch, const LogPpkGradients<T>& out,
                          void* stream);

}  // namespace nivmf
