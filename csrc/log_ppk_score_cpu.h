// Scores of log-PPK on the CPU: a block of rows against a panel of proxies, and the log-sum-exp of
// a row of scores.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "elementary.h"
#include "log_ppk_panel_cpu.h"
#include "products_cpu.h"

namespace nivmf {
namespace {

constexpr int64_t kBlock = 96;  // rows

// A block of rows, and its products with a panel.
template <typename T>
struct Block {
  Buffer<T> x, xx;       // [kBlock, pitch]: the rows and their squares
  Buffer<T> num, delta;  // [kBlock, kPanel]
  Buffer<T> z;           // of one row

  explicit Block(const Problem<T>& op)
      : x(kBlock * op.pitch),
        xx(op.squares ? kBlock * op.pitch : 0),
        num(kBlock * kPanel),
        delta(kBlock * kPanel),
        z(kPanel) {}
};

// The offset of row q, sample q % N of image q / N, in the samples and in their gradient.
template <typename T>
int64_t row_offset(const Problem<T>& op, int64_t q) {
  return nivmf::row_offset(q % op.N, q / op.N, op.B, op.D);
}

template <typename T>
NIVMF_CLONES void load_row(const T* __restrict__ from, int64_t dim, T* __restrict__ x,
                           T* __restrict__ xx) {
  for (int64_t d = 0; d < dim; ++d) x[d] = from[d];
  if (xx == nullptr) return;
  for (int64_t d = 0; d < dim; ++d) xx[d] = from[d] * from[d];
}

// Packs row i of `count`, and its square, into strips of kLanes columns.
template <typename T>
NIVMF_CLONES void pack_row(const T* __restrict__ from, int64_t i, int64_t count, int64_t dim,
                           T* __restrict__ x, T* __restrict__ xx) {
  for (int64_t begin = 0; begin < dim; begin += kLanes<T>) {
    T* const to = x + begin * count + i * kLanes<T>;
    T* const squared = xx == nullptr ? nullptr : xx + begin * count + i * kLanes<T>;
    if (begin + kLanes<T> <= dim) {
      NIVMF_LANES(T, l) to[l] = from[begin + l];
      if (squared == nullptr) continue;
      NIVMF_LANES(T, l) squared[l] = from[begin + l] * from[begin + l];
    } else {
      for (int64_t l = 0; l < dim - begin; ++l) to[l] = from[begin + l];
      for (int64_t l = 0; squared != nullptr && l < dim - begin; ++l) squared[l] = to[l] * to[l];
    }
  }
}

template <typename T>
void load(const Problem<T>& op, const int64_t* rows, int64_t count, Block<T>& block) {
  for (int64_t r = 0; r < count; ++r) {
    load_row(op.samples + row_offset(op, rows[r]), op.D, block.x.data() + r * op.pitch,
             op.squares ? block.xx.data() + r * op.pitch : nullptr);
  }
}

template <typename T>
void score(const Problem<T>& op, const Panel<T>& panel, int64_t count, Block<T>& block) {
  multiply(count, panel.lanes, op.D, block.x.data(), op.pitch, 1, panel.linear.data(), false,
           block.num.data(), kPanel);
  if (!op.squares) return;
  multiply(count, panel.lanes, op.D, block.xx.data(), op.pitch, 1, panel.spread.data(), false,
           block.delta.data(), kPanel);
}

// The two products of a row and a proxy in double, rounded once.
template <typename T>
NIVMF_CLONES void exact_products(const Problem<T>& op, const T* __restrict__ x,
                                 const T* __restrict__ kappa, const T* __restrict__ mu,
                                 double inverse_kbar, T* __restrict__ num, T* __restrict__ delta) {
  constexpr int kWays = 16;
  double nums[kWays] = {}, deltas[kWays] = {};
  const auto add = [&](int64_t d, int l) __attribute__((always_inline)) {
    const double k = double(kappa[d + l]), at = double(x[d + l]), ratio = k * inverse_kbar;
    nums[l] += (op.projection ? ratio : 1.0) * k * double(mu[d + l]) * at;
    deltas[l] += (ratio * ratio - 1) * at * at;
  };
  const int64_t whole = op.D / kWays * kWays;
  for (int64_t d = 0; d < whole; d += kWays) {
    _Pragma("GCC unroll 1") for (int l = 0; l < kWays; ++l) add(d, l);
  }
  for (int64_t l = 0; l < op.D - whole; ++l) add(whole, int(l));
  for (int l = 1; l < kWays; ++l) {
    nums[0] += nums[l];
    deltas[0] += deltas[l];
  }
  *num = T(nums[0]);
  *delta = T(deltas[0]);
}

// Recomputes the products with each image's own proxy in double: they enter the loss twice. At
// T = 0.003, D = 512 this took the worst loss error from 6.3e-4 to 3.2e-4 at a spread of kappa of
// 5% (gradients: 3.9e-4 to 2.9e-4) and from 3.0e-3 to 1.9e-3 (1.0e-3 to 5.3e-4) at 30%.
template <typename T, typename Label>
void refine_own(const Problem<T>& op, const Panel<T>& panel, const int64_t* rows, int64_t count,
                const Label& label_of, Block<T>& block) {
  for (int64_t r = 0; r < count; ++r) {
    const int64_t j = label_of(rows[r] / op.N) - panel.first;
    if (j < 0 || j >= panel.width) continue;
    const int64_t proxy = (panel.first + j) * op.D, at = r * kPanel + j;
    exact_products(op, op.samples + row_offset(op, rows[r]), op.concentration + proxy,
                   op.loc + proxy, panel.scalars[j].inverse_kbar, block.num.data() + at,
                   block.delta.data() + at);
  }
}

template <typename T>
NIVMF_CLONES void row_scores(const Problem<T>& op, const T* __restrict__ num,
                             const T* __restrict__ delta, const T* __restrict__ bias, int64_t size,
                             T* __restrict__ z) {
  const T half = T(op.D) / 2;
  if (op.projection && op.exact) {
    for (int64_t j = 0; j < size; ++j) {
      z[j] = num[j] / std::sqrt(1 + delta[j]) - half * log1p_of(delta[j]) + bias[j];
    }
  } else if (op.projection) {
    for (int64_t j = 0; j < size; ++j) z[j] = num[j] / std::sqrt(1 + delta[j]) + bias[j];
  } else if (op.exact) {
    for (int64_t j = 0; j < size; ++j) z[j] = num[j] - half * log1p_of(delta[j]) + bias[j];
  } else {
    for (int64_t j = 0; j < size; ++j) z[j] = num[j] + bias[j];
  }
}

// A maximum in raw units and the sum of exp((z - maximum) / T). Dividing by T first would lose
// digits: z / T is large, and its rounding error with it.
struct LogSum {
  double max = -INFINITY, sum = 0;

  void add(const LogSum& other, double temperature) {
    if (other.max > max) {
      sum = sum * std::exp((max - other.max) / temperature) + other.sum;
      max = other.max;
    } else {
      sum += other.sum * (other.max == max ? 1 : std::exp((other.max - max) / temperature));
    }
  }
};

template <typename T>
NIVMF_CLONES LogSum row_log_sum(const T* z, int64_t size, T scale) {
  T lanes[kLanes<T>];
  NIVMF_LANES(T, l) lanes[l] = -INFINITY;
  for (int64_t j = 0; j < size; j += kLanes<T>) {
    NIVMF_LANES(T, l) lanes[l] = z[j + l] > lanes[l] ? z[j + l] : lanes[l];
  }
  const T max = *std::max_element(lanes, lanes + kLanes<T>);
  NIVMF_LANES(T, l) lanes[l] = 0;
  for (int64_t j = 0; j < size; j += kLanes<T>) {
    NIVMF_LANES(T, l) lanes[l] += exp2_of((z[j + l] - max) * scale);
  }
  return {double(max), double(sum_of(lanes))};
}

}  // namespace
}  // namespace nivmf
