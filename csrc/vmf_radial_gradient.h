// dw/dk at a fixed quantile, T = float or double, one source for host and device.
//
// Computes phi = (dw/dk) / (1 - w^2), which is smooth up to both poles. With the sample x and
// G = dL/dx the gradient is dL/dk = phi (G.mu - w G.x), without a division by sqrt(1 - w^2).
// For larger D phi is expanded in 1 / (D - 1): with x0 = (1 - b) / (1 + b), beta = 1 - x0^2,
// rho = beta / (D - 1) and i = 1 / (1 + x0 w) it is a polynomial in i whose coefficients depend on
// the image alone, exact at k -> 0 and k -> inf. For small D the expansion does not converge, and
// -(dF/dk) / f is integrated by Gauss-Legendre quadrature in the angle over the tail that the
// sample cuts off, as far as a parabola under its log density falls by kRange. The true log
// density falls less, by as little as 0.4 of that, so kRange is generous: 18 would leave errors of
// 3e-4 at D = 3.
#pragma once

#include <cmath>
#include <cstdint>

#include "elementary.h"
#include "vmf_normalizer.h"
#include "vmf_radial.h"

namespace nivmf {

template <typename T>
struct GradientAccuracy;
template <>
struct GradientAccuracy<float> {
  static constexpr int kOrder = 3, kSmallestDim = 16, kNodes = 16;
  static constexpr float kRange = 40, kEdge = 1.2e-7f, kTiny = 1e-30f;
};
template <>
struct GradientAccuracy<double> {
  static constexpr int kOrder = 4, kSmallestDim = 512, kNodes = 48;
  static constexpr double kRange = 72, kEdge = 2.3e-16, kTiny = 1e-200;
};

template <typename T>
struct RadialGradientPlan {
  int64_t dim;
  bool series;
  T node[GradientAccuracy<T>::kNodes], weight[GradientAccuracy<T>::kNodes];  // on [0, 1]
  LogNormalizerPlan<T> normalizer;
};

template <typename T>
RadialGradientPlan<T> make_radial_gradient_plan(int64_t dim) {
  constexpr int n = GradientAccuracy<T>::kNodes;
  RadialGradientPlan<T> plan;
  plan.dim = dim;
  plan.series = dim >= GradientAccuracy<T>::kSmallestDim;
  plan.normalizer = make_log_normalizer_plan<T>(dim);
  for (int i = 0; i < n; ++i) {  // Newton on the Legendre polynomial
    double x = std::cos(3.14159265358979323846 * (i + 0.75) / (n + 0.5)), slope = 1;
    for (int step = 0; step < 8; ++step) {
      double p0 = 1, p1 = x;
      for (int j = 2; j <= n; ++j) {
        const double p2 = ((2 * j - 1) * x * p1 - (j - 1) * p0) / j;
        p0 = p1;
        p1 = p2;
      }
      slope = n * (x * p1 - p0) / (x * x - 1);
      x -= p1 / slope;
    }
    plan.node[i] = T((1 - x) / 2);
    plan.weight[i] = T(1 / ((1 - x * x) * slope * slope));
  }
  return plan;
}

// Values that an image's samples share.
template <typename T>
struct RadialGradient {
  static constexpr int kDegree = 2 * GradientAccuracy<T>::kOrder + 1;
  T k, dim_minus_2, one_minus_mean;  // quadrature
  T x0, one_minus_x0, coefficient[kDegree + 1];
};

template <typename T>
NIVMF_HD RadialGradient<T> make_radial_gradient(T k, const RadialGradientPlan<T>& plan) {
  constexpr int kDegree = RadialGradient<T>::kDegree;
  RadialGradient<T> out;
  out.k = k;
  out.dim_minus_2 = T(plan.dim - 2);
  if (!plan.series) {
    out.one_minus_mean = log_normalizer(k, plan.normalizer).b;
    return out;
  }
  const RadialLaw<T> law = make_radial_law(k, plan.dim);
  const T x0 = law.one_minus_b / (1 + law.b), beta = 4 * law.b / ((1 + law.b) * (1 + law.b));
  const T i0 = 1 / (1 + x0 * x0), rho = beta / law.m;
  out.x0 = x0;
  out.one_minus_x0 = 2 * law.b / (1 + law.b);
  // phi_n = sum_j c_j i^j gives phi_(n+1) = rho i0 sum_a i^(a+2) sum_(j >= a) j c_j e_(j-a),
  // e_0 = -beta, e_1 = 2 - beta i0, e_m = i0^m beta x0^2.
  T c[kDegree + 1] = {};
  c[1] = rho;
  for (int j = 0; j <= kDegree; ++j) out.coefficient[j] = c[j];
  NIVMF_UNROLL
  for (int n = 1; n <= GradientAccuracy<T>::kOrder; ++n) {
    T next[kDegree + 1] = {};
    NIVMF_UNROLL
    for (int a = 0; a <= 2 * n - 1; ++a) {
      T sum = 0, e = i0 * i0 * beta * x0 * x0;
      NIVMF_UNROLL
      for (int j = a; j <= 2 * n - 1; ++j) {
        const int m = j - a;
        sum += j * c[j] * (m == 0 ? -beta : m == 1 ? 2 - beta * i0 : e);
        if (m >= 2) e *= i0;
      }
      next[a + 2] = rho * i0 * sum;
    }
    NIVMF_UNROLL
    for (int j = 0; j <= 2 * n + 1; ++j) {
      c[j] = next[j];
      out.coefficient[j] += next[j];
    }
  }
  return out;
}

// The quadrature of one sample, except for the node.
template <typename T>
struct AngularQuadrature {
  T k, dim_minus_2, w, s, side, cot, turns, gap, scale;
};

template <typename T>
NIVMF_HD AngularQuadrature<T> make_angular_quadrature(T one_minus_w,
                                                      const RadialGradient<T>& image) {
  using Accuracy = GradientAccuracy<T>;
  const T low = Accuracy::kTiny, high = 2 - Accuracy::kEdge;
  const T p = one_minus_w < low ? low : one_minus_w > high ? high : one_minus_w;
  AngularQuadrature<T> out;
  out.k = image.k;
  out.dim_minus_2 = image.dim_minus_2;
  out.w = 1 - p;
  out.s = std::sqrt(p * (2 - p));
  out.gap = image.one_minus_mean - p;
  out.side = out.gap >= 0 ? T(-1) : T(1);  // -1: the tail towards theta = 0
  out.cot = out.w / out.s;
  const T slope = out.side * (image.k * out.s - image.dim_minus_2 * out.cot);
  const T bend = image.k * out.w + image.dim_minus_2 / (out.s * out.s);
  const T curvature = bend > T(0.05) ? bend : T(0.05);
  const T root = std::sqrt(slope * slope + 2 * curvature * Accuracy::kRange);
  const T reach = slope >= 0 ? 2 * Accuracy::kRange / (slope + root) : (root - slope) / curvature;
  const T whole = std::atan2(out.s, out.gap >= 0 ? out.w : -out.w);
  const T length = reach < whole ? reach : whole;
  out.turns = length * T(0.159154943091895335769);
  out.scale = length / out.s;
  return out;
}

template <typename T>
NIVMF_HD T angular_term(T node, T weight, const AngularQuadrature<T>& q) {
  const T turns = q.turns * node;  // at most half a turn
  const T half = fast_cos_sin(turns / 2).second, v = 2 * half * half;
  const T turn = q.side * fast_cos_sin(turns).second;
  const T dc = -q.w * v - q.s * turn;
  const T log_argument = q.cot * turn - v, floor = T(-1) + T(1e-7);
  return weight * std::fabs(q.gap + dc) *
         std::exp(q.k * dc +
                  q.dim_minus_2 * std::log1p(log_argument > floor ? log_argument : floor));
}

template <typename T>
NIVMF_HD T radial_gradient_series(T one_minus_w, const RadialGradient<T>& image) {
  const T i = 1 / (image.one_minus_x0 + image.x0 * (2 - one_minus_w));
  T sum = 0;
  NIVMF_UNROLL
  for (int j = RadialGradient<T>::kDegree; j >= 1; --j) sum = (sum + image.coefficient[j]) * i;
  return sum;
}

// phi = (dw/dk) / (1 - w^2).
template <typename T>
NIVMF_HD T radial_gradient(T one_minus_w, const RadialGradient<T>& image,
                           const RadialGradientPlan<T>& plan) {
  if (plan.series) return radial_gradient_series(one_minus_w, image);
  const AngularQuadrature<T> q = make_angular_quadrature(one_minus_w, image);
  T sum = 0;
  for (int i = 0; i < GradientAccuracy<T>::kNodes; ++i) {
    sum += angular_term(plan.node[i], plan.weight[i], q);
  }
  return q.scale * sum;
}

}  // namespace nivmf
