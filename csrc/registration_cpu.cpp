// Plugs the CPU kernels into the ops; the schemas are in nivmf_fast/_ops.py.
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "checks.h"
#include "vmf_kernels.h"

namespace nivmf {
namespace {

Tensor vmf_log_normalizer(const Tensor& concentration, int64_t dim, int64_t order) {
  check_log_normalizer(concentration, dim, order);
  Tensor out = torch::stable::empty_like(concentration);
  with_floating_type(concentration, [&](auto zero) {
    using T = decltype(zero);
    vmf_log_normalizer_cpu(concentration.const_data_ptr<T>(), concentration.numel(), dim,
                           static_cast<int>(order), out.mutable_data_ptr<T>());
  });
  return out;
}

std::tuple<Tensor, Tensor> vmf_rsample(const Tensor& loc, const Tensor& concentration, int64_t n,
                                       const Tensor& seed, int64_t image_offset) {
  const SampleSizes sizes = check_rsample(loc, concentration, n, seed, image_offset);
  Tensor samples = torch::stable::new_empty(loc, {sizes.n, sizes.batch, sizes.dim});
  Tensor one_minus_w = torch::stable::new_empty(loc, {sizes.n, sizes.batch});
  with_floating_type(loc, [&](auto zero) {
    using T = decltype(zero);
    vmf_rsample_cpu(loc.const_data_ptr<T>(), concentration.const_data_ptr<T>(),
                    seed.const_data_ptr<int64_t>(), image_offset, sizes.n, sizes.batch, sizes.dim,
                    samples.mutable_data_ptr<T>(), one_minus_w.mutable_data_ptr<T>());
  });
  return {samples, one_minus_w};
}

std::tuple<Tensor, Tensor> vmf_rsample_backward(const Tensor& grad, const Tensor& samples,
                                                const Tensor& one_minus_w, const Tensor& loc,
                                                const Tensor& concentration) {
  const SampleSizes sizes = check_rsample_backward(grad, samples, one_minus_w, loc, concentration);
  Tensor grad_loc = torch::stable::empty_like(loc);
  Tensor grad_concentration = torch::stable::empty_like(concentration);
  with_floating_type(grad, [&](auto zero) {
    using T = decltype(zero);
    vmf_rsample_backward_cpu(
        grad.const_data_ptr<T>(), samples.const_data_ptr<T>(), one_minus_w.const_data_ptr<T>(),
        loc.const_data_ptr<T>(), concentration.const_data_ptr<T>(), sizes.n, sizes.batch, sizes.dim,
        grad_loc.mutable_data_ptr<T>(), grad_concentration.mutable_data_ptr<T>());
  });
  return {grad_loc, grad_concentration};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nivmf_kernels, CPU, m) {
  m.impl("vmf_log_normalizer", TORCH_BOX(&vmf_log_normalizer));
  m.impl("vmf_rsample", TORCH_BOX(&vmf_rsample));
  m.impl("vmf_rsample_backward", TORCH_BOX(&vmf_rsample_backward));
}

}  // namespace nivmf
