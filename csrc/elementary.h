// Elementary functions as polynomials without branches or calls: loops over them vectorise on the
// CPU, and the GPU has no slow path. Errors are a few ulps, near the zeros of the logarithms too.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "host_device.h"

namespace nivmf {

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

// Taylor polynomials by template recursion: an inner loop would keep callers' loops scalar.
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

// -a where `flag` is 2, a where it is 0.
template <typename T>
NIVMF_HD T negate_if(T a, typename Bits<T>::Int flag) {
  typename Bits<T>::Int bits;
  std::memcpy(&bits, &a, sizeof(T));
  bits ^= flag << (8 * sizeof(T) - 2);
  std::memcpy(&a, &bits, sizeof(T));
  return a;
}

}  // namespace detail

// log u = e log 2 + 2 artanh((f - 1) / (f + 1)) with u = 2^e f, f in [sqrt(1/2), sqrt(2)).
template <typename T>
NIVMF_HD T fast_log(T u) {
  using Int = typename detail::Bits<T>::Int;
  Int bits;
  std::memcpy(&bits, &u, sizeof(T));
  const Int e = (bits - detail::Bits<T>::kRootHalf) >> detail::Bits<T>::kMantissa;
  bits -= e << detail::Bits<T>::kMantissa;
  T f;
  std::memcpy(&f, &bits, sizeof(T));
  const T x = detail::quotient(f - 1, f + 1), z = x * x, twice = 2 * x;
  return T(e) * T(0.693147180559945309417) + (twice + twice * (z * detail::artanh_series<1>(z)));
}

// (cos, sin) of 2 pi u: an exact reduction to [-1/8, 1/8] turns.
template <typename T>
NIVMF_HD NormalPair<T> fast_cos_sin(T u) {
  using Int = typename detail::Bits<T>::Int;
  const Int q = Int(4 * u + T(0.5));
  const T x = (4 * u - T(q)) * T(1.57079632679489661923), z = x * x;
  const T sine = x + x * (z * detail::sin_cos_series<3>(z));
  const T cosine = 1 + z * detail::sin_cos_series<2>(z);
  const bool odd = q & 1;
  return {detail::negate_if(odd ? sine : cosine, (q + 1) & 2),
          detail::negate_if(odd ? cosine : sine, q & 2)};
}

// 2^x, 0 below the range; NaN stays NaN.
template <typename T>
NIVMF_HD T exp2_of(T x) {
  using Int = typename detail::Bits<T>::Int;
  constexpr bool kFloat = sizeof(T) == 4;
  constexpr T kLeast = kFloat ? -126 : -1022,
              kShift = T(3) * (Int(1) << (detail::Bits<T>::kMantissa - 1));
  const T bounded = x < kLeast ? kLeast : x;
  const T shifted = bounded + kShift, whole = shifted - kShift;  // to the nearest integer
  const T f = (bounded - whole) * T(0.693147180559945309417);
  T series = 1;
  NIVMF_UNROLL
  for (int i = kFloat ? 6 : 12; i > 0; --i) series = 1 + series * f * T(1.0 / i);
  Int bits;
  std::memcpy(&bits, &shifted, sizeof(T));
  bits = (bits + (kFloat ? 127 : 1023)) << detail::Bits<T>::kMantissa;
  T power;
  std::memcpy(&power, &bits, sizeof(T));
  return x < kLeast ? T(0) : series * power;
}

// log(1 + x) with relative accuracy near 0; NaN from -1 down.
template <typename T>
NIVMF_HD T log1p_of(T x) {
  using Int = typename detail::Bits<T>::Int;
  const T u = 1 + x;
  Int bits;
  std::memcpy(&bits, &u, sizeof(T));
  const Int e = (bits - detail::Bits<T>::kRootHalf) >> detail::Bits<T>::kMantissa;
  bits = (Int(sizeof(T) == 4 ? 127 : 1023) - e) << detail::Bits<T>::kMantissa;
  T scale;  // 2^-e
  std::memcpy(&scale, &bits, sizeof(T));
  const T f = x * scale + (scale - 1);  // (1 + x) 2^-e - 1, without the rounding of 1 + x
  const T s = f / (2 + f), z = s * s;
  T series = 0;
  NIVMF_UNROLL
  for (int i = detail::Bits<T>::kLogTerms - 1; i > 0; --i)
    series = (series + T(1) / T(2 * i + 1)) * z;
  const T value = T(e) * T(0.693147180559945309417) + (2 * s + 2 * s * series);
  return u > 0 ? value : std::numeric_limits<T>::quiet_NaN();
}

// Two normals by Box and Muller (1958) from uniforms in (0, 1].
template <typename T>
NIVMF_HD NormalPair<T> box_muller(T u0, T u1) {
  const T r = detail::square_root(-2 * fast_log(u0));
  const NormalPair<T> unit = fast_cos_sin(u1);
  return {r * unit.first, r * unit.second};
}

}  // namespace nivmf
