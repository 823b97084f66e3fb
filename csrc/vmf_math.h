// The scalar mathematics of the von Mises-Fisher distribution: one source for host and device,
// T = float or double, no torch. Whatever depends on the dimension alone is prepared on the host,
// in double, once per call (the make_..._plan functions): device code sees no lgamma and no tables.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "philox.h"

namespace nivmf {

// ---- log C_D(k) and its derivatives -------------------------------------------------------------
//
// With nu = D/2 - 1, S = sqrt(nu^2 + k^2) and t = nu/S, Debye's uniform expansion (DLMF 10.41.3) in
// log form reads
//     log I_nu(k) = S + nu log(k / (nu + S)) - log(2 pi S) / 2 + R,    R = sum_j P_j(t^2) / S^j.
// Its error is about nu^-J, so small orders are lifted to nu + N, where it is accurate, and brought
// back by N steps of the recurrence I_{d/2-1} / I_{d/2} = d/k + I_{d/2+1} / I_{d/2}, which is
// stable in this direction. Far out, where 1/S itself is small, the expansion holds at the true
// order; near 0 a Taylor polynomial keeps the *relative* accuracy of g.

template <typename T>
struct NormalizerAccuracy;  // terms J, the smallest order they serve, where other branches take
                            // over
template <>
struct NormalizerAccuracy<float> {
  static constexpr int kTerms = 4, kSmallestOrder = 12;
  static constexpr float kLargeConcentration = 24, kTaylorLimit = 4e-3f, kHuge = 1e18f;
  static int terms(int64_t dim) { return dim >= 512 ? 1 : dim >= 128 ? 2 : dim >= 48 ? 3 : kTerms; }
};
template <>
struct NormalizerAccuracy<double> {
  static constexpr int kTerms = 13, kSmallestOrder = 16;
  static constexpr double kLargeConcentration = 40, kTaylorLimit = 1e-4, kHuge = 1e150;
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
// P_j = sum_i r[j][i] / (j + 2i) t^(2i). All that is added to one r[j][i] has the sign of (-1)^i:
// nothing cancels, and double gives the coefficients to a few ulps.
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

// S, R and the ratio's values at one order.
template <typename T>
struct DebyeValue {
  T s, r, a, b, slope;
};

template <typename T>
NIVMF_HD DebyeValue<T> debye(T k, const DebyeSeries<T>& series) {
  const T nu = series.order;
  const T s = k > NormalizerAccuracy<T>::kHuge ? k : std::sqrt(nu * nu + k * k);
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

// All five values at k; NaN unless 0 <= k < inf. What the caller leaves unused the compiler drops.
template <typename T>
NIVMF_HD LogNormalizer<T> log_normalizer(T k, const LogNormalizerPlan<T>& plan) {
  using Accuracy = NormalizerAccuracy<T>;
  LogNormalizer<T> out;
  if (!(k >= 0 && k - k == 0)) {
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

// ---- The law of w = mu.x ------------------------------------------------------------------------
//
// Ulrich's rejection (1984) as corrected by Wood (1994), written so that nothing cancels for any k:
// the proposal is a uniform point of the sphere pushed through tan(theta/2) -> sqrt(b)
// tan(theta/2), and the acceptance ratio is ((1 - y) e^y)^m, m = D - 1, in which k does not appear.
// It accepts with probability > 0.658 for every D and k, so 64 attempts fail with probability
// 1e-30.

constexpr int kAttempts = 64, kGammaRounds = 64;

// A mean direction of this length before normalisation and this concentration make a distribution.
template <typename T>
NIVMF_HD bool is_distribution(T length, T concentration) {
  return length > 0 && length - length == 0 && concentration >= 0 && concentration <= T(1e18);
}

// Where the row of (sample, image) starts in a contiguous [n, batch, dim].
NIVMF_HD int64_t row_offset(int64_t sample, int64_t image, int64_t batch, int64_t dim) {
  return (sample * batch + image) * dim;
}

template <typename T>
struct RadialLaw {
  T m, b, root_b, one_minus_b;
};

template <typename T>
NIVMF_HD RadialLaw<T> make_radial_law(T k, int64_t dim) {
  const T m = T(dim - 1), k2 = 2 * k, c = std::sqrt(k2 * k2 + m * m);
  const T inverse = 1 / (k2 + c), b = m * inverse;
  return {m, b, std::sqrt(b), (k2 + k2 * (k2 / (c + m))) * inverse};
}

template <typename T>
struct Radial {
  T w, one_minus_w, s;  // s = sqrt(1 - w^2)
};

// What a normal g and an independent chi-square with m degrees of freedom propose; `accepted` tells
// what the uniform u decides.
template <typename T>
NIVMF_HD Radial<T> propose_radial(T g, T chi2, T u, const RadialLaw<T>& law, bool& accepted) {
  const T bounded = chi2 > T(1e-30) ? chi2 : T(1e-30);
  const T chi = std::sqrt(bounded), r = std::sqrt(g * g + bounded);
  const T q = (g >= 0 ? r + g : chi) / (g >= 0 ? chi : r - g);  // exp(asinh(g / chi))
  const T o = law.b * q * q, inverse = 1 / (1 + o);
  const T y = T(0.5) * law.one_minus_b * (1 - q * q) * inverse;
  T log_ratio = 0;  // y + log(1 - y)
  if (std::fabs(y) < T(1) / 16) {
    NIVMF_UNROLL
    for (int j = 7; j >= 2; --j) log_ratio = log_ratio * y - T(1) / T(j);
    log_ratio *= y * y;
  } else {
    log_ratio = y + std::log1p(-y);
  }
  accepted = std::log(u) <= law.m * log_ratio;
  return {(1 - o) * inverse, 2 * o * inverse, 2 * law.root_b * q * inverse};
}

// Normals by Box and Muller from uniforms in (0, 1]: polynomials without branches or calls, so that
// loops over them vectorise on the CPU and no slow path waits on the GPU. Errors are a few ulps, in
// log also relative to its zero at u = 1.
template <typename T>
struct NormalPair {
  T first, second;
};

namespace detail {

template <typename T>
struct Bits;
template <>
struct Bits<float> {
  using Int = int32_t;
  static constexpr int kMantissa = 23, kLogTerms = 4, kLastPower = 9;
  static constexpr Int kRootHalf = 0x3f3504f3;
};
template <>
struct Bits<double> {
  using Int = int64_t;
  static constexpr int kMantissa = 52, kLogTerms = 10, kLastPower = 19;
  static constexpr Int kRootHalf = 0x3fe6a09e667f3bcd;
};

// Taylor polynomials by recursion, so that callers' loops hold no loop and vectorise:
// artanh x = x + x z artanh_series<1>(z), sin x = x + x z sin_cos_series<3>(z) and
// cos x = 1 + z sin_cos_series<2>(z) with z = x^2.
NIVMF_HD constexpr double signed_inverse_factorial(int n) {
  return n < 2 ? 1 : -signed_inverse_factorial(n - 2) / (n * (n - 1.0));
}

template <int i, typename T>
NIVMF_HD T artanh_series(T z) {
  constexpr T c = T(1.0 / (2 * i + 1));
  if constexpr (i == Bits<T>::kLogTerms) {
    return c;
  } else {
    return c + z * artanh_series<i + 1>(z);
  }
}

template <int n, typename T>
NIVMF_HD T sin_cos_series(T z) {
  constexpr T c = T(signed_inverse_factorial(n));
  if constexpr (n >= Bits<T>::kLastPower - 1) {
    return c;
  } else {
    return c + z * sin_cos_series<n + 2>(z);
  }
}

#ifdef __CUDA_ARCH__  // 1 or 2 ulps, no slow path; arguments here are 0 or far from it
NIVMF_HD float quotient(float a, float b) {
  asm("rcp.approx.ftz.f32 %0, %0;" : "+f"(b));
  return a * b;
}
NIVMF_HD float square_root(float a) {
  asm("sqrt.approx.ftz.f32 %0, %0;" : "+f"(a));
  return a;
}
#else
NIVMF_HD float quotient(float a, float b) { return a / b; }
NIVMF_HD float square_root(float a) { return std::sqrt(a); }
#endif
NIVMF_HD double quotient(double a, double b) { return a / b; }
NIVMF_HD double square_root(double a) { return std::sqrt(a); }

// log u = e log 2 + 2 artanh((f - 1) / (f + 1)) with u = 2^e f, f in [sqrt(1/2), sqrt(2)).
template <typename T>
NIVMF_HD T fast_log(T u) {
  using Int = typename Bits<T>::Int;
  Int bits;
  std::memcpy(&bits, &u, sizeof(T));
  const Int e = (bits - Bits<T>::kRootHalf) >> Bits<T>::kMantissa;
  bits -= e << Bits<T>::kMantissa;
  T f;
  std::memcpy(&f, &bits, sizeof(T));
  const T x = quotient(f - 1, f + 1), z = x * x, twice = 2 * x;
  return T(e) * T(0.693147180559945309417) + (twice + twice * (z * artanh_series<1>(z)));
}

// -a where `flag` is 2, a where it is 0.
template <typename T>
NIVMF_HD T negate_if(T a, typename Bits<T>::Int flag) {
  typename Bits<T>::Int bits;
  std::memcpy(&bits, &a, sizeof(T));
  bits ^= flag << (8 * sizeof(T) - 2);
  std::memcpy(&a, &bits, sizeof(T));
  return a;
}

// (cos, sin) of 2 pi u: an exact reduction to [-1/8, 1/8] turns.
template <typename T>
NIVMF_HD NormalPair<T> fast_cos_sin(T u) {
  using Int = typename Bits<T>::Int;
  const Int q = Int(4 * u + T(0.5));
  const T x = (4 * u - T(q)) * T(1.57079632679489661923), z = x * x;
  const T sine = x + x * (z * sin_cos_series<3>(z)), cosine = 1 + z * sin_cos_series<2>(z);
  const bool odd = q & 1;
  return {negate_if(odd ? sine : cosine, (q + 1) & 2), negate_if(odd ? cosine : sine, q & 2)};
}

}  // namespace detail

template <typename T>
NIVMF_HD NormalPair<T> box_muller(T u0, T u1) {
  const T r = detail::square_root(-2 * detail::fast_log(u0));
  const NormalPair<T> unit = detail::fast_cos_sin(u1);
  return {r * unit.first, r * unit.second};
}

// 2 Gamma(m/2) = chi-square with m degrees of freedom, by Marsaglia and Tsang (2000); `boost` is a
// uniform for m = 1.
template <typename T>
NIVMF_HD T draw_chi2(T m, T boost, const SampleStream& stream, uint32_t attempt) {
  const T alpha = m / 2 + (m < 2 ? 1 : 0), d = alpha - T(1) / 3, c = 1 / std::sqrt(9 * d);
  T v = 1;
  for (uint32_t round = 1; round <= kGammaRounds; ++round) {
    const PhiloxWords words = stream.words(round, attempt);
    const T z = box_muller(uniform<T>(words.w0), uniform<T>(words.w1)).first;
    const T root = 1 + c * z;
    v = root * root * root;
    // 1 - v is exact near 1, where v lies when d is large and would magnify a rounding.
    if (v > 0 && std::log(uniform<T>(words.w2)) <= z * z / 2 + d * ((1 - v) + std::log(v))) break;
  }
  return 2 * d * v * (m < 2 ? boost * boost : T(1));
}

// w for one sample. The first proposal is free: g = n.mu and chi2 = |n - g mu|^2 of the sample's
// own normals n, whose direction is independent of both and is kept whatever is rejected.
template <typename T>
NIVMF_HD Radial<T> draw_radial(T g, T chi2, const RadialLaw<T>& law, const SampleStream& stream) {
  Radial<T> radial;
  for (uint32_t attempt = 1;; ++attempt) {
    const PhiloxWords words = stream.words(0, attempt);
    if (attempt > 1) {
      g = box_muller(uniform<T>(words.w1), uniform<T>(words.w2)).first;
      chi2 = draw_chi2(law.m, uniform<T>(words.w3), stream, attempt);
    }
    bool accepted;
    radial = propose_radial(g, chi2, uniform<T>(words.w0), law, accepted);
    if (accepted || attempt == kAttempts) return radial;
  }
}

// ---- dw/dk at a fixed quantile ------------------------------------------------------------------
//
// phi = (dw/dk) / (1 - w^2) is smooth up to both poles, so that is what is computed, and with x the
// sample and G = dL/dx the gradient is dL/dk = phi (G.mu - w G.x): no sqrt(1 - w^2) divides it.
// For larger D phi is expanded in 1 / (D - 1): with x0 = (1 - b) / (1 + b), beta = 1 - x0^2,
// rho = beta / (D - 1) and i = 1 / (1 + x0 w) it is a polynomial in i whose coefficients depend on
// the image alone, exact at k -> 0 and k -> inf. For small D the expansion does not converge, and
// -(dF/dk) / f is integrated by Gauss-Legendre quadrature in the angle over the tail that the
// sample cuts off, as far as a parabola under its log density falls by kRange. The true density
// falls less, down to 0.4 of that, so kRange is generous: 18 would leave errors of 3e-4 at D = 3.

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

// What the image's samples share.
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

// One angle of the quadrature: everything but the node.
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
  const T half = detail::fast_cos_sin(turns / 2).second, v = 2 * half * half;
  const T turn = q.side * detail::fast_cos_sin(turns).second;
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
