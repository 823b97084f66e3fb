// Plugs the CUDA kernels into the ops; the schemas are in nivmf_fast/_ops.py.
#include <string>
#include <tuple>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "checks.h"
#include "vmf_kernels.h"

namespace nivmf {
namespace {

using torch::stable::accelerator::DeviceGuard;

// torch's current stream on the tensor's device.
void* current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return stream;
}

// Raises torch's own message for a cudaError_t.
void check_launch(const char* op, int code) {
  char* message = nullptr;
  torch_c10_cuda_check_msg(code, __FILE__, op, 0, false, &message);
  if (message == nullptr) return;
  const std::string text = message;
  torch_c10_cuda_free_error_msg(message);
  fail(op, ": ", text);
}

Tensor vmf_log_normalizer(const Tensor& concentration, int64_t dim, int64_t order) {
  check_log_normalizer(concentration, dim, order);
  const DeviceGuard guard(concentration.get_device_index());
  Tensor out = torch::stable::empty_like(concentration);
  with_floating_type(concentration, [&](auto zero) {
    using T = decltype(zero);
    check_launch("vmf_log_normalizer",
                 vmf_log_normalizer_cuda(concentration.const_data_ptr<T>(), concentration.numel(),
                                         dim, static_cast<int>(order), out.mutable_data_ptr<T>(),
                                         current_stream(concentration)));
  });
  return out;
}

std::tuple<Tensor, Tensor> vmf_rsample(const Tensor& loc, const Tensor& concentration, int64_t n,
                                       const Tensor& seed, int64_t image_offset) {
  const SampleSizes sizes = check_rsample(loc, concentration, n, seed, image_offset);
  const DeviceGuard guard(loc.get_device_index());
  Tensor samples = torch::stable::new_empty(loc, {sizes.n, sizes.batch, sizes.dim});
  Tensor one_minus_w = torch::stable::new_empty(loc, {sizes.n, sizes.batch});
  with_floating_type(loc, [&](auto zero) {
    using T = decltype(zero);
    check_launch("vmf_rsample",
                 vmf_rsample_cuda(loc.const_data_ptr<T>(), concentration.const_data_ptr<T>(),
                                  seed.const_data_ptr<int64_t>(), image_offset, sizes.n,
                                  sizes.batch, sizes.dim, samples.mutable_data_ptr<T>(),
                                  one_minus_w.mutable_data_ptr<T>(), current_stream(loc)));
  });
  return {samples, one_minus_w};
}

std::tuple<Tensor, Tensor> vmf_rsample_backward(const Tensor& grad, const Tensor& samples,
                                                const Tensor& one_minus_w, const Tensor& loc,
                                                const Tensor& concentration) {
  const SampleSizes sizes = check_rsample_backward(grad, samples, one_minus_w, loc, concentration);
  const DeviceGuard guard(grad.get_device_index());
  Tensor grad_loc = torch::stable::empty_like(loc);
  Tensor grad_concentration = torch::stable::empty_like(concentration);
  with_floating_type(grad, [&](auto zero) {
    using T = decltype(zero);
    check_launch(
        "vmf_rsample_backward",
        vmf_rsample_backward_cuda(grad.const_data_ptr<T>(), samples.const_data_ptr<T>(),
                                  one_minus_w.const_data_ptr<T>(), loc.const_data_ptr<T>(),
                                  concentration.const_data_ptr<T>(), sizes.n, sizes.batch,
                                  sizes.dim, grad_loc.mutable_data_ptr<T>(),
                                  grad_concentration.mutable_data_ptr<T>(), current_stream(grad)));
  });
  return {grad_loc, grad_concentration};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nivmf_kernels, CUDA, m) {
  m.impl("vmf_log_normalizer", TORCH_BOX(&vmf_log_normalizer));
  m.impl("vmf_rsample", TORCH_BOX(&vmf_rsample));
  m.impl("vmf_rsample_backward", TORCH_BOX(&vmf_rsample_backward));
}

}  // namespace nivmf
