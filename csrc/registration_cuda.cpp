// Plugs the CUDA kernels into the ops; the schemas are in nivmf_fast/_ops.py.
#include <string>
#include <tuple>
#include <type_traits>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/shim_utils.h>

#include "checks.h"
#include "log_ppk_kernels.h"
#include "vmf_kernels.h"

namespace nivmf {
namespace {

using torch::stable::accelerator::DeviceGuard;

// torch's current stream on the tensor's device.
void* current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
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

// ---- log-PPK

// The arguments that all four ops share, checked.
struct LogPpkCall {
  const Tensor &samples, &loc, &concentration, &temperature;
  LogPpkSizes sizes;

  LogPpkCall(const Tensor& x, const Tensor& m, const Tensor& k, const Tensor& t, bool exact,
             bool projection, bool fast, int64_t workspace)
      : samples(x), loc(m), concentration(k), temperature(t) {
    const int64_t batch = check_log_ppk(x, m, k, t);
    sizes = {x.size(0), batch, m.size(0), m.size(1), exact, projection, fast, workspace};
    if (workspace < 0) fail("workspace is ", workspace, " bytes, expected at least 0");
    if (sizes.samples >= int64_t(1) << 31 || batch >= int64_t(1) << 31) {
      fail("samples is [", sizes.samples, ", ", batch, ", ..], expected sizes below 2^31");
    }
  }
  template <typename T>
  LogPpkInputs<T> inputs(const Tensor* labels) const {
    return {samples.const_data_ptr<T>(), loc.const_data_ptr<T>(), concentration.const_data_ptr<T>(),
            temperature.const_data_ptr<T>(), labels ? labels->const_data_ptr<int64_t>() : nullptr};
  }
  Tensor bytes(int64_t size) const {
    return torch::stable::new_empty(samples, {size}, ScalarType::Byte);
  }
};

template <typename T>
int64_t saved_size(const LogPpkSizes& sizes) {
  return proxy_nca_saved_bytes<T>(sizes) / int64_t(sizeof(T));
}

// How many elements the `saved` of proxy_nca has, for its fake kernel.
int64_t proxy_nca_saved_on_cuda(int64_t n, int64_t batch, int64_t proxies, int64_t dim,
                                bool float64, int64_t workspace) {
  const LogPpkSizes sizes = {n, batch, proxies, dim, true, true, false, workspace};
  return float64 ? saved_size<double>(sizes) : saved_size<float>(sizes);
}

std::tuple<Tensor, Tensor, Tensor> proxy_nca(const Tensor& samples, const Tensor& loc,
                                             const Tensor& concentration, const Tensor& labels,
                                             const Tensor& temperature, bool exact, bool projection,
                                             bool fast, int64_t workspace) {
  const LogPpkCall call(samples, loc, concentration, temperature, exact, projection, fast,
                        workspace);
  const int64_t batch = call.sizes.images;
  check_tensor("labels", labels, samples, ScalarType::Long, {batch});
  const DeviceGuard guard(samples.get_device_index());
  Tensor losses = torch::stable::new_empty(samples, {batch});
  Tensor partial = torch::stable::new_empty(samples, {4, batch}, ScalarType::Double);
  Tensor saved;
  with_floating_type(samples, [&](auto zero) {
    using T = decltype(zero);
    saved = torch::stable::new_empty(samples, {saved_size<T>(call.sizes)});
    Tensor scratch = call.bytes(log_ppk_forward_scratch_bytes<T>(call.sizes));
    check_launch("proxy_nca",
                 proxy_nca_cuda(call.sizes, call.inputs<T>(&labels), losses.mutable_data_ptr<T>(),
                                partial.mutable_data_ptr<double>(), saved.mutable_data_ptr(),
                                scratch.mutable_data_ptr(), current_stream(samples)));
  });
  return {losses, partial, saved};
}

// Calls `run` with the gradients' pointers and scratch; without images nothing is launched and all
// gradients are 0.
template <class F>
std::tuple<Tensor, Tensor, Tensor, Tensor> log_ppk_gradients(const char* op, const LogPpkCall& call,
                                                             const F& run) {
  const auto allocate = [&](const Tensor& like) {
    Tensor out = torch::stable::empty_like(like);
    if (call.sizes.images == 0) torch::stable::zero_(out);
    return out;
  };
  Tensor x = allocate(call.samples), m = allocate(call.loc), k = allocate(call.concentration);
  Tensor t = allocate(call.temperature);
  with_floating_type(call.samples, [&](auto zero) {
    using T = decltype(zero);
    const LogPpkGradients<T> out = {x.mutable_data_ptr<T>(), m.mutable_data_ptr<T>(),
                                    k.mutable_data_ptr<T>(), t.mutable_data_ptr<T>()};
    Tensor scratch = call.bytes(log_ppk_backward_scratch_bytes<T>(call.sizes));
    check_launch(op, run(out, scratch.mutable_data_ptr(), current_stream(call.samples)));
  });
  return {x, m, k, t};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> proxy_nca_backward(
    const Tensor& grad, const Tensor& samples, const Tensor& loc, const Tensor& concentration,
    const Tensor& labels, const Tensor& temperature, const Tensor& partial, const Tensor& saved,
    bool exact, bool projection, bool fast, int64_t workspace) {
  const LogPpkCall call(samples, loc, concentration, temperature, exact, projection, fast,
                        workspace);
  const int64_t batch = call.sizes.images;
  check_tensor("grad", grad, samples, samples.scalar_type(), {batch});
  check_tensor("labels", labels, samples, ScalarType::Long, {batch});
  check_tensor("partial", partial, samples, ScalarType::Double, {4, batch});
  const DeviceGuard guard(samples.get_device_index());
  const auto run = [&](const auto& out, void* scratch, void* stream) {
    using T = std::remove_reference_t<decltype(*out.samples)>;
    check_tensor("saved", saved, samples, samples.scalar_type(), {saved_size<T>(call.sizes)});
    return proxy_nca_backward_cuda(call.sizes, call.inputs<T>(&labels), grad.const_data_ptr<T>(),
                                   partial.const_data_ptr<double>(), saved.const_data_ptr(),
                                   scratch, out, stream);
  };
  return log_ppk_gradients("proxy_nca_backward", call, run);
}

std::tuple<Tensor, Tensor, Tensor> log_ppk(const Tensor& samples, const Tensor& loc,
                                           const Tensor& concentration, const Tensor& temperature,
                                           bool exact, bool projection, bool fast,
                                           int64_t workspace) {
  const LogPpkCall call(samples, loc, concentration, temperature, exact, projection, fast,
                        workspace);
  const int64_t batch = call.sizes.images, proxies = call.sizes.proxies;
  const DeviceGuard guard(samples.get_device_index());
  Tensor values = torch::stable::new_empty(samples, {batch, proxies});
  Tensor saved = torch::stable::new_empty(samples, {2, batch, proxies});
  Tensor common = torch::stable::new_empty(samples, {}, ScalarType::Double);
  if (batch == 0) torch::stable::zero_(common);
  with_floating_type(samples, [&](auto zero) {
    using T = decltype(zero);
    Tensor scratch = call.bytes(log_ppk_forward_scratch_bytes<T>(call.sizes));
    check_launch("log_ppk",
                 log_ppk_cuda(call.sizes, call.inputs<T>(nullptr), values.mutable_data_ptr<T>(),
                              saved.mutable_data_ptr<T>(), common.mutable_data_ptr<double>(),
                              scratch.mutable_data_ptr(), current_stream(samples)));
  });
  return {values, saved, common};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> log_ppk_backward(
    const Tensor& grad, const Tensor& samples, const Tensor& loc, const Tensor& concentration,
    const Tensor& temperature, const Tensor& saved, bool exact, bool projection, bool fast,
    int64_t workspace) {
  const LogPpkCall call(samples, loc, concentration, temperature, exact, projection, fast,
                        workspace);
  const int64_t batch = call.sizes.images, proxies = call.sizes.proxies;
  check_tensor("grad", grad, samples, samples.scalar_type(), {batch, proxies});
  check_tensor("saved", saved, samples, samples.scalar_type(), {2, batch, proxies});
  const DeviceGuard guard(samples.get_device_index());
  const auto run = [&](const auto& out, void* scratch, void* stream) {
    using T = std::remove_reference_t<decltype(*out.samples)>;
    return log_ppk_backward_cuda(call.sizes, call.inputs<T>(nullptr), grad.const_data_ptr<T>(),
                                 saved.const_data_ptr<T>(), scratch, out, stream);
  };
  return log_ppk_gradients("log_ppk_backward", call, run);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(nivmf_kernels, m) {
  m.def(
      "proxy_nca_saved_on_cuda(int n, int batch, int proxies, int dim, bool float64, int workspace)"
      " -> int");
}

STABLE_TORCH_LIBRARY_IMPL(nivmf_kernels, CompositeExplicitAutograd, m) {
  m.impl("proxy_nca_saved_on_cuda", TORCH_BOX(&proxy_nca_saved_on_cuda));
}

STABLE_TORCH_LIBRARY_IMPL(nivmf_kernels, CUDA, m) {
  m.impl("vmf_log_normalizer", TORCH_BOX(&vmf_log_normalizer));
  m.impl("vmf_rsample", TORCH_BOX(&vmf_rsample));
  m.impl("vmf_rsample_backward", TORCH_BOX(&vmf_rsample_backward));
  m.impl("log_ppk", TORCH_BOX(&log_ppk));
  m.impl("log_ppk_backward", TORCH_BOX(&log_ppk_backward));
  m.impl("proxy_nca", TORCH_BOX(&proxy_nca));
  m.impl("proxy_nca_backward", TORCH_BOX(&proxy_nca_backward));
}

}  // namespace nivmf
