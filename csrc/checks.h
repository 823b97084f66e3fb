// Argument checks of the kernel ops, for calls that bypass nivmf_fast.functional and its fuller
// messages. Nothing here reads tensor values.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "log_ppk.h"

namespace nivmf {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct SampleSizes {
  int64_t n, batch, dim;
};

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

template <typename Sizes>
std::string to_text(ScalarType dtype, const Sizes& sizes) {
  std::ostringstream text;
  text << torch::headeronly::toString(dtype) << " [";
  const char* separator = "";
  for (const int64_t size : sizes) {
    text << separator << size;
    separator = ", ";
  }
  text << "]";
  return text.str();
}

// Checks for a contiguous tensor of this dtype and shape on the device of `anchor`.
inline void check_tensor(const char* name, const Tensor& tensor, const Tensor& anchor,
                         ScalarType dtype, std::initializer_list<int64_t> sizes) {
  const auto actual = tensor.sizes();
  bool same = tensor.scalar_type() == dtype && actual.size() == sizes.size();
  for (size_t i = 0; same && i < sizes.size(); ++i) same = actual[i] == sizes.begin()[i];
  if (!same) {
    fail(name, " is ", to_text(tensor.scalar_type(), actual), ", expected ", to_text(dtype, sizes));
  }
  if (tensor.is_cuda() != anchor.is_cuda() ||
      tensor.get_device_index() != anchor.get_device_index()) {
    fail(name, " is on another device than the first argument; move all arguments to one device");
  }
  if (!tensor.is_contiguous()) fail(name, " is not contiguous; pass ", name, ".contiguous()");
}

inline ScalarType floating_dtype(const char* name, const Tensor& tensor) {
  const ScalarType dtype = tensor.scalar_type();
  if (dtype != ScalarType::Float && dtype != ScalarType::Double) {
    fail(name, " is ", torch::headeronly::toString(dtype), ", expected Float or Double");
  }
  return dtype;
}

// Calls f with a zero of the tensor's type, float or double, which floating_dtype has checked.
template <class F>
void with_floating_type(const Tensor& tensor, const F& f) {
  tensor.scalar_type() == ScalarType::Float ? f(float{}) : f(double{});
}

inline void check_dim(int64_t dim) {
  if (dim < 2) fail("dim is ", dim, ", expected at least 2");
}

inline void check_log_normalizer(const Tensor& concentration, int64_t dim, int64_t order) {
  floating_dtype("concentration", concentration);
  if (!concentration.is_contiguous()) {
    fail("concentration is not contiguous; pass concentration.contiguous()");
  }
  check_dim(dim);
  if (order < 0 || order > 2) fail("order is ", order, ", expected 0, 1 or 2");
}

inline SampleSizes check_rsample(const Tensor& loc, const Tensor& concentration, int64_t n,
                                 const Tensor& seed, int64_t image_offset) {
  if (loc.dim() != 2) fail("loc has ", loc.dim(), " dimensions, expected [batch, dim]");
  const int64_t batch = loc.size(0), dim = loc.size(1);
  const ScalarType dtype = floating_dtype("loc", loc);
  check_dim(dim);
  check_tensor("loc", loc, loc, dtype, {batch, dim});
  check_tensor("concentration", concentration, loc, dtype, {batch});
  check_tensor("seed", seed, loc, ScalarType::Long, {});
  if (n < 0) fail("n is ", n, ", expected at least 0");
  if (image_offset < 0) fail("image_offset is ", image_offset, ", expected at least 0");
  return {n, batch, dim};
}

inline SampleSizes check_rsample_backward(const Tensor& grad, const Tensor& samples,
                                          const Tensor& one_minus_w, const Tensor& loc,
                                          const Tensor& concentration) {
  if (grad.dim() != 3) fail("grad has ", grad.dim(), " dimensions, expected [n, batch, dim]");
  const int64_t n = grad.size(0), batch = grad.size(1), dim = grad.size(2);
  const ScalarType dtype = floating_dtype("grad", grad);
  check_dim(dim);
  check_tensor("grad", grad, grad, dtype, {n, batch, dim});
  check_tensor("samples", samples, grad, dtype, {n, batch, dim});
  check_tensor("one_minus_w", one_minus_w, grad, dtype, {n, batch});
  check_tensor("loc", loc, grad, dtype, {batch, dim});
  check_tensor("concentration", concentration, grad, dtype, {batch});
  return {n, batch, dim};
}

inline void check_options(const LogPpkOptions& options) {
  if (options.precision < 0 || options.precision >= kPrecisions) {
    fail("precision is ", options.precision, ", expected 0 to ", kPrecisions - 1,
         ", an index into PRECISIONS of nivmf_fast/_schemas.py");
  }
  if (options.workspace < 0) {
    fail("workspace is ", options.workspace, " bytes, expected at least 0");
  }
}

// Checks the arguments that all four log-PPK ops share.
inline void check_log_ppk(const Tensor& samples, const Tensor& loc, const Tensor& concentration,
                          const Tensor& temperature, const LogPpkOptions& options) {
  check_options(options);
  if (samples.dim() != 3) {
    fail("samples has ", samples.dim(), " dimensions, expected [n, batch, dim]");
  }
  if (loc.dim() != 2) fail("loc has ", loc.dim(), " dimensions, expected [proxies, dim]");
  const int64_t n = samples.size(0), batch = samples.size(1), dim = samples.size(2);
  const int64_t proxies = loc.size(0);
  const ScalarType dtype = floating_dtype("samples", samples);
  check_dim(dim);
  if (n < 1) fail("samples has n = 0, expected at least 1 sample of each image");
  if (proxies < 1) fail("loc has no rows, expected at least 1 proxy");
  check_tensor("samples", samples, samples, dtype, {n, batch, dim});
  check_tensor("loc", loc, samples, dtype, {proxies, dim});
  check_tensor("concentration", concentration, samples, dtype, {proxies, dim});
  check_tensor("temperature", temperature, samples, dtype, {});
}

}  // namespace nivmf
