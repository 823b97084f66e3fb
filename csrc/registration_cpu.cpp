// The CPU kernels as ops; the schemas are in nivmf_fast/_schemas.py.
#include "registration.h"

namespace nivmf {
namespace {

struct Cpu {
  static constexpr const char* kName = "cpu";

  struct Guard {
    explicit Guard(const Tensor&) {}
  };
  static void* stream(const Tensor&) { return nullptr; }
  static void check(const char*, int) {}
  static void check_sizes(const LogPpkSizes&) {}

  template <typename T>
  struct Kernels {
    static constexpr auto vmf_log_normalizer = &vmf_log_normalizer_cpu<T>;
    static constexpr auto vmf_rsample = &vmf_rsample_cpu<T>;
    static constexpr auto vmf_rsample_backward = &vmf_rsample_backward_cpu<T>;
    static constexpr auto proxy_nca_saved = &proxy_nca_saved_cpu<T>;
    static constexpr auto log_ppk_forward_scratch_bytes = &log_ppk_forward_scratch_bytes_cpu<T>;
    static constexpr auto log_ppk_backward_scratch_bytes = &log_ppk_backward_scratch_bytes_cpu<T>;
    static constexpr auto proxy_nca = &proxy_nca_cpu<T>;
    static constexpr auto proxy_nca_backward = &proxy_nca_backward_cpu<T>;
    static constexpr auto log_ppk = &log_ppk_cpu<T>;
    static constexpr auto log_ppk_backward = &log_ppk_backward_cpu<T>;
  };
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nivmf_kernels, CompositeExplicitAutograd, m) {
  Ops<Cpu>::implement_saved(m);
}
STABLE_TORCH_LIBRARY_IMPL(nivmf_kernels, CPU, m) { Ops<Cpu>::implement(m); }

}  // namespace nivmf
