// log C_D(k) and its derivatives on the CPU: a plain parallel loop, as an element costs only a few
// dozen flops.
#include "parallel.h"
#include "vmf_kernels.h"
#include "vmf_normalizer.h"

namespace nivmf {

template <typename T>
int vmf_log_normalizer_cpu(const T* concentration, int64_t size, int64_t dim, int order, T* out,
                           void*) {
  const LogNormalizerPlan<T> plan = make_log_normalizer_plan<T>(dim);
  parallel_for(0, size, 2048, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      out[i] = log_normalizer_derivative(concentration[i], order, plan);
    }
  });
  return 0;
}

template int vmf_log_normalizer_cpu(const float*, int64_t, int64_t, int, float*, void*);
template int vmf_log_normalizer_cpu(const double*, int64_t, int64_t, int, double*, void*);

}  // namespace nivmf
