// The CUDA kernels as ops; the schemas are in nivmf_fast/_schemas.py.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/shim_utils.h>

#include "registration.h"

namespace nivmf {
namespace {

struct Cuda {
  static constexpr const char* kName = "cuda";

  struct Guard : torch::stable::accelerator::DeviceGuard {
    explicit Guard(const Tensor& tensor) : DeviceGuard(tensor.get_device_index()) {}
  };

  // torch's current stream on the tensor's device.
  static void* stream(const Tensor& tensor) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    return stream;
  }

  // Raises torch's own message for a cudaError_t.
  static void check(const char* op, int code) {
    char* message = nullptr;
    torch_c10_cuda_check_msg(code, __FILE__, op, 0, false, &message);
    if (message == nullptr) return;
    const std::string text = message;
    torch_c10_cuda_free_error_msg(message);
    fail(op, ": ", text);
  }

  // The kernels count samples, images and blocks in int.
  static void check_sizes(const LogPpkSizes& sizes) {
    if (sizes.N >= int64_t(1) << 31 || sizes.B >= int64_t(1) << 31) {
      fail("samples is [", sizes.N, ", ", sizes.B, ", ..], expected sizes below 2^31");
    }
  }

  template <typename T>
  struct Kernels {
    static constexpr auto vmf_log_normalizer = &vmf_log_normalizer_cuda<T>;
    static constexpr auto vmf_rsample = &vmf_rsample_cuda<T>;
    static constexpr auto vmf_rsample_backward = &vmf_rsample_backward_cuda<T>;
    static constexpr auto proxy_nca_saved = &proxy_nca_saved_cuda<T>;
    static constexpr auto log_ppk_forward_scratch_bytes = &log_ppk_forward_scratch_bytes_cuda<T>;
    static constexpr auto log_ppk_backward_scratch_bytes = &log_ppk_backward_scratch_bytes_cuda<T>;
    static constexpr auto proxy_nca = &proxy_nca_cuda<T>;
    static constexpr auto proxy_nca_backward = &proxy_nca_backward_cuda<T>;
    static constexpr auto log_ppk = &log_ppk_cuda<T>;
    static constexpr auto log_ppk_backward = &log_ppk_backward_cuda<T>;
  };
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nivmf_kernels, CompositeExplicitAutograd, m) {
  Ops<Cuda>::implement_saved(m);
}
STABLE_TORCH_LIBRARY_IMPL(nivmf_kernels, CUDA, m) { Ops<Cuda>::implement(m); }

}  // namespace nivmf
