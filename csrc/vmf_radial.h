// The law of w = mu.x, T = float or double, one source for host and device.
//
// Ulrich's rejection (1984) as corrected by Wood (1994), written so that nothing cancels for any k:
// the proposal is a uniform point of the sphere mapped by tan(theta/2) -> sqrt(b) tan(theta/2), and
// the acceptance ratio is ((1 - y) e^y)^m, m = D - 1, in which k does not appear. It accepts with
// probability > 0.658 for every D and k, so 64 attempts all fail with probability 1e-30.
#pragma once

#include <cmath>
#include <cstdint>

#include "elementary.h"
#include "philox.h"
#include "vmf_normalizer.h"

namespace nivmf {

constexpr int kAttempts = 64, kGammaRounds = 64;

// Whether a mean direction of this length before normalisation and this concentration are valid.
template <typename T>
NIVMF_HD bool is_distribution(T length, T concentration) {
  return length > 0 && length - length == 0 && concentration >= 0 &&
         concentration <= T(kMaxConcentration);
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

// The proposal from a normal g and an independent chi-square with m degrees of freedom; `accepted`
// is the decision by the uniform u.
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

// 2 Gamma(m/2), a chi-square with m degrees of freedom, by Marsaglia and Tsang (2000); `boost` is a
// uniform that only m = 1 needs.
template <typename T>
NIVMF_HD T draw_chi2(T m, T boost, const SampleStream& stream, uint32_t attempt) {
  const T alpha = m / 2 + (m < 2 ? 1 : 0), d = alpha - T(1) / 3, c = 1 / std::sqrt(9 * d);
  T v = 1;
  for (uint32_t round = 1; round <= kGammaRounds; ++round) {
    const PhiloxWords words = stream.words(round, attempt);
    const T z = box_muller(uniform<T>(words.w0), uniform<T>(words.w1)).first;
    const T root = 1 + c * z;
    v = root * root * root;
    // For large d, which would magnify a rounding, v is near 1, and 1 - v is exact there.
    if (v > 0 && std::log(uniform<T>(words.w2)) <= z * z / 2 + d * ((1 - v) + std::log(v))) break;
  }
  return 2 * d * v * (m < 2 ? boost * boost : T(1));
}

// w for one sample. The first proposal is free: g = n.mu and chi2 = |n - g mu|^2 of the sample's
// own normals n, whose tangent direction is independent of both and kept after a rejection.
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

}  // namespace nivmf
