// The vMF sampler on the CPU: x = w mu + sqrt(1 - w^2) t, w by rejection from vmf_radial.h, t the
// direction of normals across mu; backward: dw/dk from vmf_radial_gradient.h.
// Inputs and outputs: vmf_kernels.h. Called by registration_cpu.cpp. Loops over dimensions run over
// whole groups of kGroup on zero-padded copies, so that a sum has a fixed order and a sample the
// same bits in any batch, split and number of threads. Design: docs/design/sampler.md.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "parallel.h"
#include "simd.h"
#include "vmf_kernels.h"
#include "vmf_radial_gradient.h"

#if defined(__GNUC__) && !defined(__clang__) && !defined(__NO_MATH_ERRNO__)
#warning "compile with -fno-math-errno: otherwise sqrt keeps the loop over normals from vectorising"
#endif

namespace nivmf {
namespace {

constexpr int kBlocks = 16, kGroup = 4 * kBlocks;

int64_t padded(int64_t dim) { return round_up(dim, kGroup); }

template <typename T>
NIVMF_INLINE void draw_normals(const SampleStream& stream, uint32_t first_block,
                               T* __restrict__ out) {
  for (int l = 0; l < kBlocks; ++l) {
    const PhiloxWords words = stream.words(first_block + l, 0);
    const NormalPair<T> low = box_muller(uniform<T>(words.w0), uniform<T>(words.w1));
    const NormalPair<T> high = box_muller(uniform<T>(words.w2), uniform<T>(words.w3));
    out[4 * l] = low.first;
    out[4 * l + 1] = low.second;
    out[4 * l + 2] = high.first;
    out[4 * l + 3] = high.second;
  }
}

template <typename T>
NIVMF_INLINE T sum_lanes(T* lanes) {
  for (int width = kGroup / 2; width > 0; width /= 2) {
    for (int l = 0; l < width; ++l) lanes[l] += lanes[l + width];
  }
  return lanes[0];
}

template <typename T>
NIVMF_INLINE T dot(const T* __restrict__ a, const T* __restrict__ b, int64_t size) {
  T lanes[kGroup] = {};
  for (int64_t d = 0; d < size; d += kGroup) {
    for (int l = 0; l < kGroup; ++l) lanes[l] += a[d + l] * b[d + l];
  }
  return sum_lanes(lanes);
}

// mu = loc / |loc|, zero-padded; returns |loc|, or NaN if loc or the concentration is invalid.
template <typename T>
NIVMF_INLINE T load_image(const T* loc, T concentration, int64_t dim, T* mu) {
  const int64_t size = padded(dim);
  std::copy_n(loc, dim, mu);
  std::fill(mu + dim, mu + size, T(0));
  const T length = std::sqrt(dot(mu, mu, size));
  if (!is_distribution(length, concentration)) return T(NAN);
  for (int64_t d = 0; d < size; ++d) mu[d] /= length;
  return length;
}

template <typename T>
struct Forward {
  const T* loc;
  const T* concentration;
  int64_t seed, image_offset, n, batch, dim;
  T* samples;
  T* one_minus_w;
};

// Rows [begin, end) of the samples in image-major order.
template <typename T>
NIVMF_INLINE void forward_rows(const Forward<T>& op, int64_t begin, int64_t end) {
  const int64_t dim = op.dim, size = padded(dim);
  std::vector<T> buffer(2 * size);
  T *const mu = buffer.data(), *const v = mu + size;
  RadialLaw<T> law = {};
  bool valid = false;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t image = row / op.n, sample = row % op.n;
    if (row == begin || sample == 0) {
      valid = load_image(op.loc + image * dim, op.concentration[image], dim, mu) > 0;
      law = make_radial_law(op.concentration[image], dim);
    }
    T* const out = op.samples + row_offset(sample, image, op.batch, dim);
    T& one_minus_w = op.one_minus_w[row_offset(sample, image, op.batch, 1)];
    if (!valid) {
      std::fill_n(out, dim, T(NAN));
      one_minus_w = T(NAN);
      continue;
    }
    const SampleStream stream(op.seed, sample, image + op.image_offset);
    for (int64_t d = 0; d < size; d += kGroup) draw_normals(stream, uint32_t(d / 4), v + d);
    std::fill(v + dim, v + size, T(0));

    const T g = dot(v, mu, size);
    T lanes[kGroup] = {};
    for (int64_t d = 0; d < size; d += kGroup) {
      for (int l = 0; l < kGroup; ++l) {
        v[d + l] -= g * mu[d + l];
        lanes[l] += v[d + l] * mu[d + l];
      }
    }
    const T rest = sum_lanes(lanes);  // again: at small D the first pass's rounding matters
    std::fill_n(lanes, kGroup, T(0));
    for (int64_t d = 0; d < size; d += kGroup) {
      for (int l = 0; l < kGroup; ++l) {
        v[d + l] -= rest * mu[d + l];
        lanes[l] += v[d + l] * v[d + l];
      }
    }
    const T chi2 = std::max(sum_lanes(lanes), T(1e-30));
    const Radial<T> radial = draw_radial(g, chi2, law, stream);
    const T scale = radial.s / std::sqrt(chi2);
    for (int64_t d = 0; d < size; d += kGroup) {
      for (int l = 0; l < kGroup; ++l) v[d + l] = radial.w * mu[d + l] + scale * v[d + l];
    }
    std::copy_n(v, dim, out);
    one_minus_w = radial.one_minus_w;
  }
}

template <typename T>
struct Backward {
  const T* grad;
  const T* samples;
  const T* one_minus_w;
  const T* loc;
  const T* concentration;
  int64_t n, batch, dim;
  T* grad_loc;
  T* grad_concentration;
};

// kGroup elements from d on, zero beyond dim: in place, or at the end of a row as a copy.
template <typename T>
NIVMF_INLINE const T* lanes_at(const T* row, int64_t d, int64_t dim, T* copy) {
  if (d + kGroup <= dim) return row + d;
  std::fill_n(copy, kGroup, T(0));
  std::copy_n(row + d, dim - d, copy);
  return copy;
}

template <typename T>
NIVMF_INLINE void backward_images(const Backward<T>& op, const RadialGradientPlan<T>& plan,
                                  int64_t begin, int64_t end) {
  const int64_t dim = op.dim, size = padded(dim);
  std::vector<T> buffer(2 * size);
  T *const mu = buffer.data(), *const step = mu + size;
  T grad_copy[kGroup], sample_copy[kGroup];
  for (int64_t image = begin; image < end; ++image) {
    const T k = op.concentration[image];
    const T length = load_image(op.loc + image * dim, k, dim, mu);
    T* const grad_loc = op.grad_loc + image * dim;
    if (!(length > 0)) {
      std::fill_n(grad_loc, dim, T(NAN));
      op.grad_concentration[image] = T(NAN);
      continue;
    }
    const RadialGradient<T> radial = make_radial_gradient(k, plan);
    std::fill_n(step, size, T(0));
    T grad_k = 0;
    for (int64_t sample = 0; sample < op.n; ++sample) {
      const int64_t offset = row_offset(sample, image, op.batch, dim);
      const T one_minus_w = op.one_minus_w[row_offset(sample, image, op.batch, 1)];
      const T w = 1 - one_minus_w;
      T along_lanes[kGroup] = {}, apart_lanes[kGroup] = {};
      for (int64_t d = 0; d < size; d += kGroup) {
        const T* g = lanes_at(op.grad + offset, d, dim, grad_copy);
        const T* x = lanes_at(op.samples + offset, d, dim, sample_copy);
        for (int l = 0; l < kGroup; ++l) {
          along_lanes[l] += g[l] * mu[d + l];
          apart_lanes[l] += g[l] * (mu[d + l] - x[l]);
        }
      }
      const T along = sum_lanes(along_lanes), apart = sum_lanes(apart_lanes);
      for (int64_t d = 0; d < size; d += kGroup) {
        const T* g = lanes_at(op.grad + offset, d, dim, grad_copy);
        const T* x = lanes_at(op.samples + offset, d, dim, sample_copy);
        for (int l = 0; l < kGroup; ++l) step[d + l] += w * g[l] - along * x[l];
      }
      grad_k += radial_gradient(one_minus_w, radial, plan) * (one_minus_w * along + w * apart);
    }
    const T normal = dot(step, mu, size);
    for (int64_t d = 0; d < size; ++d) step[d] = (step[d] - normal * mu[d]) / length;
    std::copy_n(step, dim, grad_loc);
    op.grad_concentration[image] = grad_k;
  }
}

NIVMF_CLONES void run_forward(const Forward<float>& op, int64_t begin, int64_t end) {
  forward_rows(op, begin, end);
}
NIVMF_CLONES void run_forward(const Forward<double>& op, int64_t begin, int64_t end) {
  forward_rows(op, begin, end);
}
NIVMF_CLONES void run_backward(const Backward<float>& op, const RadialGradientPlan<float>& plan,
                               int64_t begin, int64_t end) {
  backward_images(op, plan, begin, end);
}
NIVMF_CLONES void run_backward(const Backward<double>& op, const RadialGradientPlan<double>& plan,
                               int64_t begin, int64_t end) {
  backward_images(op, plan, begin, end);
}

constexpr int64_t kGrain = 1 << 14;  // elements that justify waking a thread

}  // namespace

template <typename T>
int vmf_rsample_cpu(const T* loc, const T* concentration, const int64_t* seed, int64_t image_offset,
                    int64_t n, int64_t batch, int64_t dim, T* samples, T* one_minus_w, void*) {
  const Forward<T> op = {loc,   concentration, *seed,   image_offset, n,
                         batch, dim,           samples, one_minus_w};
  parallel_for(0, n * batch, std::max<int64_t>(1, kGrain / padded(dim)),
               [&](int64_t begin, int64_t end) { run_forward(op, begin, end); });
  return 0;
}

template <typename T>
int vmf_rsample_backward_cpu(const T* grad, const T* samples, const T* one_minus_w, const T* loc,
                             const T* concentration, int64_t n, int64_t batch, int64_t dim,
                             T* grad_loc, T* grad_concentration, void*) {
  const RadialGradientPlan<T> plan = make_radial_gradient_plan<T>(dim);
  const Backward<T> op = {grad, samples, one_minus_w, loc,      concentration,
                          n,    batch,   dim,         grad_loc, grad_concentration};
  parallel_for(0, batch, std::max<int64_t>(1, kGrain / padded(dim) / std::max<int64_t>(n, 1)),
               [&](int64_t begin, int64_t end) { run_backward(op, plan, begin, end); });
  return 0;
}

template int vmf_rsample_cpu(const float*, const float*, const int64_t*, int64_t, int64_t, int64_t,
                             int64_t, float*, float*, void*);
template int vmf_rsample_cpu(const double*, const double*, const int64_t*, int64_t, int64_t,
                             int64_t, int64_t, double*, double*, void*);
template int vmf_rsample_backward_cpu(const float*, const float*, const float*, const float*,
                                      const float*, int64_t, int64_t, int64_t, float*, float*,
                                      void*);
template int vmf_rsample_backward_cpu(const double*, const double*, const double*, const double*,
                                      const double*, int64_t, int64_t, int64_t, double*, double*,
                                      void*);

}  // namespace nivmf
