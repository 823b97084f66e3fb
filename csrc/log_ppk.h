// The contract of the log-PPK kernels: raw pointers to contiguous memory, no torch. T is float or
// double. Arrays have the names and shapes of the ops in nivmf_fast/_schemas.py; docs/math.md
// derives the gradients.
//
// Every device has the same entry points, with its name as suffix. CUDA's enqueue on `stream` (a
// cudaStream_t), never synchronise, read labels and temperature only on the device and return a
// cudaError_t, so a CUDA graph may capture them. The CPU's need no scratch, ignore `stream` and
// return 0. Results are bitwise reproducible.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace nivmf {

// In the order of PRECISIONS in nivmf_fast/_schemas.py. On the CPU both are the same.
enum Precision : int64_t { kFloat32, kFast, kPrecisions };

// The fields of Options in nivmf_fast/_schemas.py, in its order.
struct LogPpkOptions {
  bool exact, projection;
  int64_t precision;  // a Precision
  int64_t workspace;  // bytes of scratch, and of data saved for the backward
  bool keep;          // whether scores are worth saving; a backward may follow in any case
};

struct LogPpkSizes {
  int64_t N, B, P, D;  // samples per image, images, proxies, dimension
  LogPpkOptions options;
};

// The shape of the array of T that proxy_nca saves for its backward.
struct SavedShape {
  int64_t rows, columns;
};

template <typename T>
struct LogPpkInputs {
  const T *samples, *loc, *concentration, *temperature;  // [N, B, D], [P, D], [P, D], []
  const int64_t* labels;                                 // [B]; null for log_ppk
};

template <typename T>
struct LogPpkGradients {
  T *samples, *loc, *concentration, *temperature;
};

// log2 of the softmax weight below which a tile is dead: an image has N P weights that sum to 1,
// and those below this bound sum to less than half an ulp of 1. The same rule as dead_log2 in
// nivmf_fast/_schemas.py.
template <typename T, typename Samples>
NIVMF_HD T dead_log2(Samples n, int64_t proxies) {
  constexpr T kHalfUlp = sizeof(T) == 4 ? -24 : -53;
  return kHalfUlp - std::log2(T(n) * T(proxies));
}

// proxy_nca_saved, log_ppk_*_scratch_bytes: the buffers the caller allocates, aligned to 256 bytes.
// On CUDA half of the workspace bounds the saved array, half the scratch of one call; the scratch
// also holds O(P) scalars if all proxies are prepared at once, and up to 16 slabs of the samples'
// size for the ordered sum of d_samples.
//
// proxy_nca: partial [4, B] holds the maximum and the log-sum-exp relative to it over these
// proxies, then the same over the own proxy alone. Its backward takes grad [B] and partial as
// returned, or combined over the ranges of proxies covered by separate calls.
//
// log_ppk: values [B, P]; saved [2, B, P], the maximum over the samples in raw units and the
// log-sum-exp relative to it; common [], the bias left out of values. Its backward takes grad
// [B, P].
#define NIVMF_LOG_PPK_ENTRY_POINTS(device)                                                       \
  template <typename T>                                                                          \
  SavedShape proxy_nca_saved_##device(const LogPpkSizes& sizes);                                 \
  template <typename T>                                                                          \
  int64_t log_ppk_forward_scratch_bytes_##device(const LogPpkSizes& sizes);                      \
  template <typename T>                                                                          \
  int64_t log_ppk_backward_scratch_bytes_##device(const LogPpkSizes& sizes);                     \
  template <typename T>                                                                          \
  int proxy_nca_##device(const LogPpkSizes& sizes, const LogPpkInputs<T>& in, T* losses,         \
                         double* partial, void* saved, void* scratch, void* stream);             \
  template <typename T>                                                                          \
  int proxy_nca_backward_##device(const LogPpkSizes& sizes, const LogPpkInputs<T>& in,           \
                                  const T* grad, const double* partial, const void* saved,       \
                                  void* scratch, const LogPpkGradients<T>& out, void* stream);   \
  template <typename T>                                                                          \
  int log_ppk_##device(const LogPpkSizes& sizes, const LogPpkInputs<T>& in, T* values, T* saved, \
                       double* common, void* scratch, void* stream);                             \
  template <typename T>                                                                          \
  int log_ppk_backward_##device(const LogPpkSizes& sizes, const LogPpkInputs<T>& in,             \
                                const T* grad, const T* saved, void* scratch,                    \
                                const LogPpkGradients<T>& out, void* stream);

NIVMF_LOG_PPK_ENTRY_POINTS(cpu)
NIVMF_LOG_PPK_ENTRY_POINTS(cuda)
#undef NIVMF_LOG_PPK_ENTRY_POINTS

}  // namespace nivmf
