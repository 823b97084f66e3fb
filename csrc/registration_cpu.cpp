// Plugs the CPU kernels into the ops; the schemas are in nivmf_fast/_ops.py.
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "checks.h"
#include "log_ppk.h"
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

template <typename T>
LogPpk<T> make_log_ppk(const Tensor& samples, const Tensor& loc, const Tensor& concentration,
                       const Tensor& temperature, bool exact, bool projection, int64_t workspace) {
  return {samples.const_data_ptr<T>(),
          loc.const_data_ptr<T>(),
          concentration.const_data_ptr<T>(),
          samples.size(0),
          samples.size(1),
          loc.size(0),
          loc.size(1),
          static_cast<double>(*temperature.const_data_ptr<T>()),
          exact,
          projection,
          workspace};
}

struct GradientTensors {
  Tensor samples, loc, concentration, temperature;

  GradientTensors(const Tensor& x, const Tensor& m, const Tensor& k, const Tensor& t)
      : samples(torch::stable::empty_like(x)),
        loc(torch::stable::empty_like(m)),
        concentration(torch::stable::empty_like(k)),
        temperature(torch::stable::empty_like(t)) {}

  template <typename T>
  LogPpkGradients<T> pointers() {
    return {samples.mutable_data_ptr<T>(), loc.mutable_data_ptr<T>(),
            concentration.mutable_data_ptr<T>(), temperature.mutable_data_ptr<T>()};
  }
  std::tuple<Tensor, Tensor, Tensor, Tensor> tuple() {
    return {samples, loc, concentration, temperature};
  }
};

std::tuple<Tensor, Tensor, Tensor> log_ppk(const Tensor& samples, const Tensor& loc,
                                           const Tensor& concentration, const Tensor& temperature,
                                           bool exact, bool projection, bool, int64_t workspace) {
  const int64_t batch = check_log_ppk(samples, loc, concentration, temperature);
  const int64_t proxies = loc.size(0);
  Tensor values = torch::stable::new_empty(samples, {batch, proxies});
  Tensor saved = torch::stable::new_empty(samples, {2, batch, proxies});
  Tensor common = torch::stable::new_empty(samples, {}, ScalarType::Double);
  with_floating_type(samples, [&](auto zero) {
    using T = decltype(zero);
    log_ppk_cpu(
        make_log_ppk<T>(samples, loc, concentration, temperature, exact, projection, workspace),
        values.mutable_data_ptr<T>(), saved.mutable_data_ptr<T>(),
        common.mutable_data_ptr<double>());
  });
  return {values, saved, common};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> log_ppk_backward(
    const Tensor& grad, const Tensor& samples, const Tensor& loc, const Tensor& concentration,
    const Tensor& temperature, const Tensor& saved, bool exact, bool projection, bool,
    int64_t workspace) {
  const int64_t batch = check_log_ppk(samples, loc, concentration, temperature);
  check_tensor("grad", grad, samples, samples.scalar_type(), {batch, loc.size(0)});
  check_tensor("saved", saved, samples, samples.scalar_type(), {2, batch, loc.size(0)});
  GradientTensors out(samples, loc, concentration, temperature);
  with_floating_type(samples, [&](auto zero) {
    using T = decltype(zero);
    log_ppk_backward_cpu(
        make_log_ppk<T>(samples, loc, concentration, temperature, exact, projection, workspace),
        grad.const_data_ptr<T>(), saved.const_data_ptr<T>(), out.pointers<T>());
  });
  return out.tuple();
}

std::tuple<Tensor, Tensor, Tensor> proxy_nca(const Tensor& samples, const Tensor& loc,
                                             const Tensor& concentration, const Tensor& labels,
                                             const Tensor& temperature, bool exact, bool projection,
                                             bool, int64_t workspace) {
  const int64_t batch = check_log_ppk(samples, loc, concentration, temperature);
  check_tensor("labels", labels, samples, ScalarType::Long, {batch});
  Tensor losses = torch::stable::new_empty(samples, {batch});
  Tensor partial = torch::stable::new_empty(samples, {4, batch}, ScalarType::Double);
  Tensor saved;
  with_floating_type(samples, [&](auto zero) {
    using T = decltype(zero);
    const LogPpk<T> op =
        make_log_ppk<T>(samples, loc, concentration, temperature, exact, projection, workspace);
    const SavedLayout layout = proxy_nca_saved_layout(op);
    saved = torch::stable::new_empty(samples, {layout.panels, layout.columns});
    proxy_nca_cpu(op, labels.const_data_ptr<int64_t>(), losses.mutable_data_ptr<T>(),
                  partial.mutable_data_ptr<double>(), saved.mutable_data_ptr<T>());
  });
  return {losses, partial, saved};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> proxy_nca_backward(
    const Tensor& grad, const Tensor& samples, const Tensor& loc, const Tensor& concentration,
    const Tensor& labels, const Tensor& temperature, const Tensor& partial, const Tensor& saved,
    bool exact, bool projection, bool, int64_t workspace) {
  const int64_t batch = check_log_ppk(samples, loc, concentration, temperature);
  check_tensor("grad", grad, samples, samples.scalar_type(), {batch});
  check_tensor("labels", labels, samples, ScalarType::Long, {batch});
  check_tensor("partial", partial, samples, ScalarType::Double, {4, batch});
  GradientTensors out(samples, loc, concentration, temperature);
  with_floating_type(samples, [&](auto zero) {
    using T = decltype(zero);
    const LogPpk<T> op =
        make_log_ppk<T>(samples, loc, concentration, temperature, exact, projection, workspace);
    const SavedLayout layout = proxy_nca_saved_layout(op);
    check_tensor("saved", saved, samples, samples.scalar_type(), {layout.panels, layout.columns});
    proxy_nca_backward_cpu(op, grad.const_data_ptr<T>(), labels.const_data_ptr<int64_t>(),
                           partial.const_data_ptr<double>(), saved.const_data_ptr<T>(),
                           out.pointers<T>());
  });
  return out.tuple();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nivmf_kernels, CPU, m) {
  m.impl("vmf_log_normalizer", TORCH_BOX(&vmf_log_normalizer));
  m.impl("vmf_rsample", TORCH_BOX(&vmf_rsample));
  m.impl("vmf_rsample_backward", TORCH_BOX(&vmf_rsample_backward));
  m.impl("log_ppk", TORCH_BOX(&log_ppk));
  m.impl("log_ppk_backward", TORCH_BOX(&log_ppk_backward));
  m.impl("proxy_nca", TORCH_BOX(&proxy_nca));
  m.impl("proxy_nca_backward", TORCH_BOX(&proxy_nca_backward));
}

}  // namespace nivmf
