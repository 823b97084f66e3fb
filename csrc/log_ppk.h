// Entry points of the log-PPK kernels for the CPU: raw pointers to contiguous memory, T is float or
// double. The gradients are those of MATH in nivmf_fast/reference.py; the arrays are named and
// shaped as the ops in nivmf_fast/_ops.py.
#pragma once

#include <cstdint>

namespace nivmf {

template <typename T>
struct LogPpk {
  const T* samples;        // [n, batch, dim]
  const T* loc;            // [proxies, dim]
  const T* concentration;  // [proxies, dim]
  int64_t n, batch, proxies, dim;
  double temperature;
  bool exact, projection;
  int64_t workspace;  // bytes
};

template <typename T>
struct LogPpkGradients {
  T* samples;
  T* loc;
  T* concentration;
  T* temperature;
};

// `saved` of the proxy-NCA ops is [panels, columns]: per panel of `width` proxies each image's
// largest score and, if `scores`, of every row (image, sample) the two products that make its
// scores, [2, batch * n, width].
struct SavedLayout {
  int64_t width, panels, columns;
  bool scores;
};
template <typename T>
SavedLayout proxy_nca_saved_layout(const LogPpk<T>& op);

template <typename T>
void proxy_nca_cpu(const LogPpk<T>& op, const int64_t* labels, T* losses, double* partial,
                   T* saved);
template <typename T>
void proxy_nca_backward_cpu(const LogPpk<T>& op, const T* grad, const int64_t* labels,
                            const double* partial, const T* saved, const LogPpkGradients<T>& out);

// saved [2, batch, proxies]: largest score over the samples, log of the sum that is left.
template <typename T>
void log_ppk_cpu(const LogPpk<T>& op, T* values, T* saved, double* common);
template <typename T>
void log_ppk_backward_cpu(const LogPpk<T>& op, const T* grad, const T* saved,
                          const LogPpkGradients<T>& out);

}  // namespace nivmf
