// The seven ops of nivmf_fast/_schemas.py around the entry points of one compiled backend.
//
// A Backend has a name, a Guard and a stream for a tensor's device, a check of an entry point's
// return code, a check of the sizes it supports, and the entry points for T as Kernels<T>.
#pragma once

#include <string>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "checks.h"
#include "log_ppk.h"
#include "vmf_kernels.h"

namespace nivmf {

template <class Backend>
struct Ops {
  using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

  // Calls f(zero of the tensor's type, the entry points for it, stream); checks the code it
  // returns.
  template <class F>
  static void run(const char* op, const Tensor& like, const F& f) {
    const typename Backend::Guard guard(like);
    with_floating_type(like, [&](auto zero) {
      typename Backend::template Kernels<decltype(zero)> kernels;
      Backend::check(op, f(zero, kernels, Backend::stream(like)));
    });
  }

  // ---- the normaliser and the sampler -----------------------------------------------------------

  static Tensor vmf_log_normalizer(const Tensor& concentration, int64_t dim, int64_t order) {
    check_log_normalizer(concentration, dim, order);
    Tensor out = torch::stable::empty_like(concentration);
    run("vmf_log_normalizer", concentration, [&](auto zero, auto kernels, void* stream) {
      using T = decltype(zero);
      return kernels.vmf_log_normalizer(concentration.const_data_ptr<T>(), concentration.numel(),
                                        dim, static_cast<int>(order), out.mutable_data_ptr<T>(),
                                        stream);
    });
    return out;
  }

  static std::tuple<Tensor, Tensor> vmf_rsample(const Tensor& loc, const Tensor& concentration,
                                                int64_t n, const Tensor& seed,
                                                int64_t image_offset) {
    const SampleSizes sizes = check_rsample(loc, concentration, n, seed, image_offset);
    Tensor samples = torch::stable::new_empty(loc, {sizes.n, sizes.batch, sizes.dim});
    Tensor one_minus_w = torch::stable::new_empty(loc, {sizes.n, sizes.batch});
    run("vmf_rsample", loc, [&](auto zero, auto kernels, void* stream) {
      using T = decltype(zero);
      return kernels.vmf_rsample(loc.const_data_ptr<T>(), concentration.const_data_ptr<T>(),
                                 seed.const_data_ptr<int64_t>(), image_offset, sizes.n, sizes.batch,
                                 sizes.dim, samples.mutable_data_ptr<T>(),
                                 one_minus_w.mutable_data_ptr<T>(), stream);
    });
    return {samples, one_minus_w};
  }

  static std::tuple<Tensor, Tensor> vmf_rsample_backward(const Tensor& grad, const Tensor& samples,
                                                         const Tensor& one_minus_w,
                                                         const Tensor& loc,
                                                         const Tensor& concentration) {
    const SampleSizes sizes =
        check_rsample_backward(grad, samples, one_minus_w, loc, concentration);
    Tensor grad_loc = torch::stable::empty_like(loc);
    Tensor grad_concentration = torch::stable::empty_like(concentration);
    run("vmf_rsample_backward", grad, [&](auto zero, auto kernels, void* stream) {
      using T = decltype(zero);
      return kernels.vmf_rsample_backward(grad.const_data_ptr<T>(), samples.const_data_ptr<T>(),
                                          one_minus_w.const_data_ptr<T>(), loc.const_data_ptr<T>(),
                                          concentration.const_data_ptr<T>(), sizes.n, sizes.batch,
                                          sizes.dim, grad_loc.mutable_data_ptr<T>(),
                                          grad_concentration.mutable_data_ptr<T>(), stream);
    });
    return {grad_loc, grad_concentration};
  }

  // ---- log-PPK ----------------------------------------------------------------------------------

  // The arguments that all four ops share, checked.
  struct Call {
    const Tensor &samples, &loc, &concentration, &temperature;
    LogPpkSizes sizes;

    Call(const Tensor& x, const Tensor& m, const Tensor& k, const Tensor& t,
         const LogPpkOptions& options)
        : samples(x), loc(m), concentration(k), temperature(t) {
      check_log_ppk(x, m, k, t, options);
      sizes = {x.size(0), x.size(1), m.size(0), m.size(1), options};
      Backend::check_sizes(sizes);
    }
    template <typename T>
    LogPpkInputs<T> inputs(const Tensor* labels = nullptr) const {
      return {samples.const_data_ptr<T>(), loc.const_data_ptr<T>(),
              concentration.const_data_ptr<T>(), temperature.const_data_ptr<T>(),
              labels ? labels->const_data_ptr<int64_t>() : nullptr};
    }
    Tensor bytes(int64_t size) const {
      return torch::stable::new_empty(samples, {size}, ScalarType::Byte);
    }
  };

  // Calls f(zero, kernels, the gradients' pointers, scratch, stream). Without images the entry
  // points launch nothing, so the gradients are zeroed here.
  template <class F>
  static Gradients gradients(const char* op, const Call& call, const F& f) {
    const auto allocate = [&](const Tensor& like) {
      Tensor out = torch::stable::empty_like(like);
      if (call.sizes.B == 0) torch::stable::zero_(out);
      return out;
    };
    Tensor x = allocate(call.samples), m = allocate(call.loc), k = allocate(call.concentration);
    Tensor t = allocate(call.temperature);
    run(op, call.samples, [&](auto zero, auto kernels, void* stream) {
      using T = decltype(zero);
      const LogPpkGradients<T> out = {x.mutable_data_ptr<T>(), m.mutable_data_ptr<T>(),
                                      k.mutable_data_ptr<T>(), t.mutable_data_ptr<T>()};
      Tensor scratch = call.bytes(kernels.log_ppk_backward_scratch_bytes(call.sizes));
      return f(zero, kernels, out, scratch.mutable_data_ptr(), stream);
    });
    return {x, m, k, t};
  }

  // The ops whose last arguments are the options, of the types Option... in LogPpkOptions.
  template <class... Option>
  struct LogPpk {
    // The shape of the `saved` of proxy_nca, for its fake kernel.
    static std::vector<int64_t> proxy_nca_saved(int64_t n, int64_t batch, int64_t proxies,
                                                int64_t dim, bool float64, Option... option) {
      const LogPpkOptions options = {option...};
      check_options(options);
      const LogPpkSizes sizes = {n, batch, proxies, dim, options};
      Backend::check_sizes(sizes);
      const SavedShape shape = float64 ? Backend::template Kernels<double>::proxy_nca_saved(sizes)
                                       : Backend::template Kernels<float>::proxy_nca_saved(sizes);
      return {shape.rows, shape.columns};
    }

    static std::tuple<Tensor, Tensor, Tensor> proxy_nca(const Tensor& samples, const Tensor& loc,
                                                        const Tensor& concentration,
                                                        const Tensor& labels,
                                                        const Tensor& temperature,
                                                        Option... option) {
      const Call call(samples, loc, concentration, temperature, {option...});
      const int64_t batch = call.sizes.B;
      check_tensor("labels", labels, samples, ScalarType::Long, {batch});
      Tensor losses = torch::stable::new_empty(samples, {batch});
      Tensor partial = torch::stable::new_empty(samples, {4, batch}, ScalarType::Double);
      Tensor saved;
      run("proxy_nca", samples, [&](auto zero, auto kernels, void* stream) {
        using T = decltype(zero);
        const SavedShape shape = kernels.proxy_nca_saved(call.sizes);
        saved = torch::stable::new_empty(samples, {shape.rows, shape.columns});
        Tensor scratch = call.bytes(kernels.log_ppk_forward_scratch_bytes(call.sizes));
        return kernels.proxy_nca(call.sizes, call.template inputs<T>(&labels),
                                 losses.mutable_data_ptr<T>(), partial.mutable_data_ptr<double>(),
                                 saved.mutable_data_ptr(), scratch.mutable_data_ptr(), stream);
      });
      return {losses, partial, saved};
    }

    static Gradients proxy_nca_backward(const Tensor& grad, const Tensor& samples,
                                        const Tensor& loc, const Tensor& concentration,
                                        const Tensor& labels, const Tensor& temperature,
                                        const Tensor& partial, const Tensor& saved,
                                        Option... option) {
      const Call call(samples, loc, concentration, temperature, {option...});
      const int64_t batch = call.sizes.B;
      check_tensor("grad", grad, samples, samples.scalar_type(), {batch});
      check_tensor("labels", labels, samples, ScalarType::Long, {batch});
      check_tensor("partial", partial, samples, ScalarType::Double, {4, batch});
      const auto f = [&](auto zero, auto kernels, const auto& out, void* scratch, void* stream) {
        using T = decltype(zero);
        const SavedShape shape = kernels.proxy_nca_saved(call.sizes);
        check_tensor("saved", saved, samples, samples.scalar_type(), {shape.rows, shape.columns});
        return kernels.proxy_nca_backward(
            call.sizes, call.template inputs<T>(&labels), grad.const_data_ptr<T>(),
            partial.const_data_ptr<double>(), saved.const_data_ptr(), scratch, out, stream);
      };
      return gradients("proxy_nca_backward", call, f);
    }

    static std::tuple<Tensor, Tensor, Tensor> log_ppk(const Tensor& samples, const Tensor& loc,
                                                      const Tensor& concentration,
                                                      const Tensor& temperature, Option... option) {
      const Call call(samples, loc, concentration, temperature, {option...});
      const int64_t batch = call.sizes.B, proxies = call.sizes.P;
      Tensor values = torch::stable::new_empty(samples, {batch, proxies});
      Tensor saved = torch::stable::new_empty(samples, {2, batch, proxies});
      Tensor common = torch::stable::new_empty(samples, {}, ScalarType::Double);
      if (batch == 0) torch::stable::zero_(common);
      run("log_ppk", samples, [&](auto zero, auto kernels, void* stream) {
        using T = decltype(zero);
        Tensor scratch = call.bytes(kernels.log_ppk_forward_scratch_bytes(call.sizes));
        return kernels.log_ppk(call.sizes, call.template inputs<T>(), values.mutable_data_ptr<T>(),
                               saved.mutable_data_ptr<T>(), common.mutable_data_ptr<double>(),
                               scratch.mutable_data_ptr(), stream);
      });
      return {values, saved, common};
    }

    static Gradients log_ppk_backward(const Tensor& grad, const Tensor& samples, const Tensor& loc,
                                      const Tensor& concentration, const Tensor& temperature,
                                      const Tensor& saved, Option... option) {
      const Call call(samples, loc, concentration, temperature, {option...});
      const int64_t batch = call.sizes.B, proxies = call.sizes.P;
      check_tensor("grad", grad, samples, samples.scalar_type(), {batch, proxies});
      check_tensor("saved", saved, samples, samples.scalar_type(), {2, batch, proxies});
      const auto f = [&](auto zero, auto kernels, const auto& out, void* scratch, void* stream) {
        using T = decltype(zero);
        return kernels.log_ppk_backward(call.sizes, call.template inputs<T>(),
                                        grad.const_data_ptr<T>(), saved.const_data_ptr<T>(),
                                        scratch, out, stream);
      };
      return gradients("log_ppk_backward", call, f);
    }
  };
  using LogPpkOps = LogPpk<bool, bool, int64_t, int64_t, bool>;

  // ---- into the dispatcher ----------------------------------------------------------------------

  template <class Library>
  static void implement_saved(Library& m) {
    const std::string name = std::string("proxy_nca_saved_") + Backend::kName;
    m.impl(name.c_str(), TORCH_BOX(&LogPpkOps::proxy_nca_saved));
  }

  template <class Library>
  static void implement(Library& m) {
    m.impl("vmf_log_normalizer", TORCH_BOX(&Ops::vmf_log_normalizer));
    m.impl("vmf_rsample", TORCH_BOX(&Ops::vmf_rsample));
    m.impl("vmf_rsample_backward", TORCH_BOX(&Ops::vmf_rsample_backward));
    m.impl("log_ppk", TORCH_BOX(&LogPpkOps::log_ppk));
    m.impl("log_ppk_backward", TORCH_BOX(&LogPpkOps::log_ppk_backward));
    m.impl("proxy_nca", TORCH_BOX(&LogPpkOps::proxy_nca));
    m.impl("proxy_nca_backward", TORCH_BOX(&LogPpkOps::proxy_nca_backward));
  }
};

}  // namespace nivmf
