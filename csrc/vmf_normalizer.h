// log C_D(k) and its derivatives, T = float or double, one source for host and device. Values that
// depend on the dimension alone are prepared on the host, in double, once per call: device code
// needs neither lgamma nor tables.
//
// With nu = D/2 - 1, S = sqrt(nu^2 + k^2) and t = nu/S, Debye's uniform expansion (DLMF 10.41.3) in
// log form reads
//     log I_nu(k) = S + nu log(k / (nu + S)) - log(2 pi S) / 2 + R,    R = sum_j P_j(t^2) / S^j.
// Its error is about nu^-J, so small orders are lifted to nu + N, where it is accurate, and brought
// back by N steps of the recurrence I_{d/2-1} / I_{d/2} = d/k + I_{d/2+1} / I_{d/2}, which is
// stable in this direction. For large k, where 1/S itself is small, the expansion holds at the true
// order; near 0 a Taylor polynomial keeps the *relative* accuracy of g.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace nivmf {

constexpr double kMaxConcentration = 1e18;  // k * k overflows float not much further out

template <typename T>
struct NormalizerAccuracy;  // terms J, the smallest order they serve, the other branches' ranges
template <>
struct NormalizerAccuracy<float> {
  static constexpr int kTerms = 4, kSmallestOrder = 12;
  static constexpr float kLargeConcentration = 24, kTaylorLimit = 4e-3f;
  static int terms(int64_t dim) { return dim >= 512 ? 1 : dim >= 128 ? 2 : dim >= 48 ? 3 : kTerms; }
};
template <>
struct NormalizerAccuracy<double> {
  static constexpr int kTerms = 13, kSmallestOrder = 16;
  static constexpr double kLargeConcentration = 40, kTaylorLimit = 1e-4;
  static int terms(int64_t dim) {
    return dim >= 512 ? 5 : dim >= 128 ? 8 : dim >= 64 ? 10 : kTerms;
  }
};

// R at one order as a polynomial in scale / S: R = sum_d coefficient[d-1] (scale/S)^d, d <= 3J,
// because t^2 / S^j at a fixed order are powers of 1/S. `scale` = max(order, 1) keeps the powers in
// range.
template <typename T>
struct DebyeSeries {
  T order, scale;
  int degree;
  T coefficient[3 * NormalizerAccuracy<T>::kTerms];
};

template <typename T>
struct LogNormalizerPlan {
  T dim;
  int lifts;                     // N
  T offset;                      // R at k = 0, by the same truncated series, so that g(0) = 0
  T large_offset;                // log Gamma(nu + 1) + nu log 2 - log(2 pi) / 2
  DebyeSeries<T> lifted, plain;  // at nu + N and at nu
  T c2, c3, c4;                  // of the Taylor form
};

// The P_j come from R' = dR/dt. With U = e^R, Debye's recurrence for U (DLMF 10.41.9) becomes
//     nu R' = ((v R')' + v R'^2) / 2 + (1 - 5 t^2) / 8,    v = t^2 (1 - t^2),
// solved here order by order in 1/nu for R' = sum_j nu^-j t^(j-1) sum_i r[j][i] t^(2i), so that
// P_j = sum_i r[j][i] / (j + 2i) t^(2i). All terms of one r[j][i] have the sign (-1)^i: nothing
// cancels, and double gives the coefficients to a few ulps.
template <typename T>
DebyeSeries<T> make_debye_series(double order, int terms) {
  constexpr int kTerms = NormalizerAccuracy<T>::kTerms;
  double r[kTerms + 1][kTerms + 2] = {};
  r[1][0] = 1.0 / 8;
  r[1][1] = -5.0 / 8;
  for (int j = 1; j < terms; ++j) {
    for (int i = 0; i <= j + 1; ++i) {
      double sum = (j + 1 + 2 * i) * (r[j][i] - (i > 0 ? r[j][i - 1] : 0));
      for (int a = 1; a < j; ++a) {
        for (int l = 0; l <= i; ++l) {
          sum += r[a][l] * (r[j - a][i - l] - (i > l ? r[j - a][i - l - 1] : 0));
        }
      }
      r[j + 1][i] = sum / 2;
    }
  }
  DebyeSeries<T> series = {T(order), T(order > 1 ? order : 1), 3 * terms, {}};
  const double ratio = order > 1 ? 1 : order;  // order / scale
  double sums[3 * kTerms] = {};
  for (int j = 1; j <= terms; ++j) {
    for (int i = 0; i <= j; ++i) {
      sums[j + 2 * i - 1] +=
          r[j][i] / (j + 2 * i) * std::pow(ratio, 2 * i) * std::pow(double(series.scale), -j);
    }
  }
  for (int d = 0; d < series.degree; ++d) series.coefficient[d] = T(sums[d]);
  return series;
}

template <typename T>
LogNormalizerPlan<T> make_log_normalizer_plan(int64_t dim) {
  using Accuracy = NormalizerAccuracy<T>;
  const double d = double(dim), nu = d / 2 - 1;
  const int lifts =
      nu < Accuracy::kSmallestOrder ? int(std::ceil(Accuracy::kSmallestOrder - nu)) : 0;
  LogNormalizerPlan<T> plan;
  plan.dim = T(d);
  plan.lifts = lifts;
  plan.lifted = make_debye_series<T>(nu + lifts, Accuracy::terms(dim));
  plan.plain = make_debye_series<T>(nu, Accuracy::terms(dim));
  double offset = 0;
  for (int i = 0; i < plan.lifted.degree; ++i) offset += double(plan.lifted.coefficient[i]);
  plan.offset = T(offset);
  plan.large_offset = T(std::lgamma(nu + 1) + nu * 0.69314718055994530942 - 0.91893853320467274178);
  plan.c2 = T(2 * (d + 2) / (d + 4));
  plan.c3 = T((5 * d + 12) * (d + 2) / ((d + 4) * (d + 6)));
  plan.c4 = T((14 * d + 48) * (d + 2) * (d + 2) / ((d + 4) * (d + 6) * (d + 8)));
  return plan;
}

template <typename T>
struct LogNormalizer {
  T g;      // log C_D(k) - log C_D(0) <= 0
  T h;      // g + k
  T a;      // A_D(k) = -g'
  T b;      // 1 - A_D(k)
  T slope;  // A_D'(k)
};

namespace detail {

// S and R at one order, and A, 1 - A and A' there.
template <typename T>
struct DebyeValue {
  T s, r, a, b, slope;
};

template <typename T>
NIVMF_HD DebyeValue<T> debye(T k, const DebyeSeries<T>& series) {
  const T nu = series.order;
  const T s = std::sqrt(nu * nu + k * k);
  const T inverse = 1 / s, t = nu * inverse, y = series.scale * inverse;
  T r = 0, dr = 0, ddr = 0;  // Horner for R(y), R'(y), R''(y) / 2
  for (int d = series.degree - 1; d >= 0; --d) {
    ddr = ddr * y + dr;
    dr = dr * y + r;
    r = r * y + series.coefficient[d];
  }
  // The loop gives R/y: R = y p, y R' = y (p + y p'), y^2 R'' = y^2 (2 p' + y p'').
  const T q = y * (r + y * dr);
  const T w = 3 * q + 2 * y * y * (dr + y * ddr);
  const T u = inverse * inverse, edge = T(0.5) + q;
  DebyeValue<T> value;
  value.s = s;
  value.r = y * r;
  value.a = k * (1 / (nu + s) - u * edge);
  value.b = (nu + nu * (nu / (s + k))) / (nu + s) + k * inverse * inverse * edge;
  value.slope = t / (nu + s) + u * ((1 - t) * (1 + t) * (1 + w) - edge);
  return value;
}

}  // namespace detail

// All five values at k; NaN unless 0 <= k <= kMaxConcentration. The compiler drops unused ones.
template <typename T>
NIVMF_HD LogNormalizer<T> log_normalizer(T k, const LogNormalizerPlan<T>& plan) {
  using Accuracy = NormalizerAccuracy<T>;
  LogNormalizer<T> out;
  if (!(k >= 0 && k <= T(kMaxConcentration))) {
    out.g = out.h = out.a = out.b = out.slope = T(NAN);
    return out;
  }
  const T d = plan.dim, x = k / d, y = x * (k / (d + 2));
  if (y < Accuracy::kTaylorLimit) {
    const T c2 = plan.c2, c3 = plan.c3, c4 = plan.c4;
    out.g = -(k * x / 2) * (1 - y * (T(0.5) - y * (c2 / 3 - y * (c3 / 4 - y * (c4 / 5)))));
    out.h = out.g + k;
    out.a = x * (1 - y * (1 - y * (c2 - y * (c3 - y * c4))));
    out.b = 1 - out.a;
    out.slope = (1 - y * (3 - y * (5 * c2 - y * (7 * c3 - y * (9 * c4))))) / d;
    return out;
  }
  if (plan.lifts > 0 && k > Accuracy::kLargeConcentration) {
    const detail::DebyeValue<T> v = detail::debye(k, plan.plain);
    const T nu = plan.plain.order;
    out.h = nu * std::log(nu + v.s) + std::log(v.s) / 2 - plan.large_offset -
            nu * (nu / (v.s + k)) - v.r;
    out.g = out.h - k;
    out.a = v.a;
    out.b = v.b;
    out.slope = v.slope;
    return out;
  }
  const detail::DebyeValue<T> v = detail::debye(k, plan.lifted);
  const T nu = plan.lifted.order;
  const T q = (k / nu) * (k / (nu + v.s));  // S / nu - 1
  const T half_log = nu * std::log1p(q / 2), rest = v.r - plan.offset - std::log1p(q) / 2;
  T p = 0;
  T a = v.a, b = v.b, slope = v.slope;
  for (int j = plan.lifts; j > 0; --j) {
    const T order = d + T(2 * j - 2), e = k * a / order, r = 1 / (order + k * a);
    p = p + e + p * e;  // at most M_D(K1) < e^K1: no overflow
    b = (order - k * b) * r;
    slope = (order - k * k * slope) * r * r;
    a = k * r;
  }
  const T lift = std::log1p(p);
  out.g = -(nu * q - half_log + rest + lift);
  out.h = nu * ((k + (v.s - nu)) / (v.s + k)) + half_log - rest - lift;
  out.a = a;
  out.b = b;
  out.slope = slope;
  return out;
}

// The order-th derivative of g: g, -A, -A'.
template <typename T>
NIVMF_HD T log_normalizer_derivative(T k, int order, const LogNormalizerPlan<T>& plan) {
  const LogNormalizer<T> value = log_normalizer(k, plan);
  return order == 0 ? value.g : order == 1 ? -value.a : -value.slope;
}

}  // namespace nivmf
