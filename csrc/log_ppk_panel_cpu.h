// The operands of log-PPK on the CPU, and the split of its work. Proxies are prepared in double, a
// panel at a time, and packed; a task is a group of panels times a group of images, chosen by the
// shapes alone.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

#include "elementary.h"
#include "log_ppk.h"
#include "parallel.h"
#include "simd.h"
#include "vmf_normalizer.h"

namespace nivmf {
namespace {

constexpr int64_t kPanel = 128;     // proxies
constexpr int64_t kRowGroup = 256;  // rows that justify their own copy of the proxies' gradient
constexpr int64_t kTasks = 16;      // at most: each has its own memory
constexpr double kLog2E = 1.44269504088896340736;

// ---- proxies ------------------------------------------------------------------------------------

template <typename T>
struct Problem {  // the call's inputs and options, and values that all its parts share
  const T *samples, *loc, *concentration;
  int64_t N, B, P, D;
  double temperature;
  bool exact, projection;
  int64_t workspace;
  LogNormalizerPlan<double> plan;
  double common;  // subtracted from all biases to keep scores small; any value is correct
  int64_t pitch;  // D padded to whole lanes
  bool squares;   // whether delta is needed
  T scale;        // log2 e / T

  Problem(const LogPpkSizes& sizes, const LogPpkInputs<T>& in)
      : samples(in.samples),
        loc(in.loc),
        concentration(in.concentration),
        N(sizes.N),
        B(sizes.B),
        P(sizes.P),
        D(sizes.D),
        temperature(double(*in.temperature)),
        exact(sizes.options.exact),
        projection(sizes.options.projection),
        workspace(sizes.options.workspace),
        plan(make_log_normalizer_plan<double>(D)),
        common(0),
        pitch(round_up(D, kLanes<T>)),
        squares(projection || exact) {
    if (!(temperature > 0)) temperature = NAN;
    scale = T(kLog2E / temperature);
  }
};

struct ProxyScalars {
  double inverse_kbar;  // kbar is the geometric mean of kappa
  double bias;          // of the score, with nothing subtracted
  double bias_slope;    // (d bias / d|K mu|) / |K mu|
};

// One proxy in double, padded to whole groups so that the sums have no remainder.
constexpr int64_t kGroup = 64;
struct ProxyRow {
  Buffer<double> kappa, mu;
  double log_sum, square_sum;  // of kappa; of kappa mu

  explicit ProxyRow(int64_t dim) : kappa(round_up(dim, kGroup)), mu(round_up(dim, kGroup)) {}
};

template <typename T>
NIVMF_CLONES void load_proxy(const T* kappa_row, const T* mu_row, int64_t dim, ProxyRow& row) {
  constexpr int kWays = 16;
  double *const kappa = row.kappa.data(), *const mu = row.mu.data();
  for (int64_t d = 0; d < dim; ++d) kappa[d] = double(kappa_row[d]);
  for (int64_t d = 0; d < dim; ++d) mu[d] = double(mu_row[d]);
  std::fill(kappa + dim, kappa + round_up(dim, kGroup), 1.0);
  double logs[kWays] = {}, squares[kWays] = {}, bad[kWays] = {};
  for (int64_t begin = 0; begin < dim; begin += kGroup) {
    double product[kWays];
    std::fill_n(product, kWays, 1.0);
    for (int64_t d = begin; d < begin + kGroup; d += kWays) {  // one logarithm for four numbers
      _Pragma("GCC unroll 1") for (int l = 0; l < kWays; ++l) {
        const double k_mu = kappa[d + l] * mu[d + l];
        product[l] *= kappa[d + l];
        squares[l] += k_mu * k_mu;
        bad[l] += kappa[d + l] > 0 && kappa[d + l] < INFINITY ? 0.0 : 1.0;
      }
    }
    _Pragma("GCC unroll 1") for (int l = 0; l < kWays; ++l) logs[l] += fast_log(product[l]);
  }
  for (int l = 1; l < kWays; ++l) {
    logs[0] += logs[l];
    squares[0] += squares[l];
    bad[0] += bad[l];
  }
  row.log_sum = logs[0];
  row.square_sum = bad[0] > 0 ? NAN : squares[0];
}

template <typename T>
ProxyScalars proxy_scalars(const Problem<T>& op, int64_t j, ProxyRow& row) {
  load_proxy(op.concentration + j * op.D, op.loc + j * op.D, op.D, row);
  const double length = std::sqrt(row.square_sum), dim = double(op.D);
  const LogNormalizer<double> normalizer = log_normalizer(length, op.plan);
  ProxyScalars out = {std::exp(-row.log_sum / dim), normalizer.g,
                      length > 0 ? -normalizer.a / length : -1 / dim};
  if (!op.exact) {
    out.bias += row.log_sum - std::log(length);
    out.bias_slope -= 1 / row.square_sum;
  }
  return out;
}

// Prepared in double and rounded once: the logits multiply these by thousands.
template <typename T>
NIVMF_CLONES void round_proxy(const Problem<T>& op, const ProxyRow& row, double inverse_kbar,
                              T* __restrict__ linear, T* __restrict__ spread) {
  const double *const kappa = row.kappa.data(), *const mu = row.mu.data();
  if (op.projection) {
    for (int64_t d = 0; d < op.D; ++d) linear[d] = T(kappa[d] * inverse_kbar * kappa[d] * mu[d]);
  } else {
    for (int64_t d = 0; d < op.D; ++d) linear[d] = T(kappa[d] * mu[d]);
  }
  for (int64_t d = 0; d < op.D; ++d) {
    const double ratio = kappa[d] * inverse_kbar;
    spread[d] = T(ratio * ratio - 1);
  }
}

// A panel of proxies, packed as operands of the products.
template <typename T>
struct Panel {
  int64_t first, width, lanes;  // lanes: width padded to whole lanes
  std::vector<ProxyScalars> scalars;
  Buffer<T> bias;
  Buffer<T> linear, spread;            // strips of proxies, for the scores
  Buffer<T> linear_rows, spread_rows;  // strips of dimensions, for the samples' gradient

  Panel(const Problem<T>& op, int64_t width, bool scores, bool gradients)
      : scalars(width),
        bias(round_up(width, kLanes<T>)),
        linear(scores ? op.pitch * round_up(width, kLanes<T>) : 0),
        spread(scores && op.squares ? op.pitch * round_up(width, kLanes<T>) : 0),
        linear_rows(gradients ? op.pitch * width : 0),
        spread_rows(gradients && op.squares ? op.pitch * width : 0) {}
};

template <typename T>
NIVMF_CLONES void place(const T* __restrict__ row, int64_t j, int64_t dim, int64_t width,
                        T* __restrict__ strips, T* __restrict__ row_strips) {
  if (strips != nullptr) {
    T* const to = strips + j / kLanes<T> * kLanes<T> * dim + j % kLanes<T>;
    for (int64_t d = 0; d < dim; ++d) to[d * kLanes<T>] = row[d];
  }
  if (row_strips != nullptr) {
    for (int64_t d = 0; d < dim; d += kLanes<T>) {
      T* const to = row_strips + d * width + j * kLanes<T>;
      NIVMF_LANES(T, l) to[l] = row[d + l];
    }
  }
}

// Prepares a panel on all threads, or on the caller's if that is a task already running on one.
template <typename T>
void prepare(const Problem<T>& op, int64_t first, int64_t width, Panel<T>& panel) {
  panel.first = first;
  panel.width = std::min(width, op.P - first);
  panel.lanes = round_up(panel.width, kLanes<T>);
  parallel_for(0, panel.width, 16, [&](int64_t begin, int64_t end) {
    ProxyRow row(op.D);
    Buffer<T> linear(op.pitch), spread(op.pitch);
    for (int64_t j = begin; j < end; ++j) {
      const ProxyScalars scalars = panel.scalars[j] = proxy_scalars(op, first + j, row);
      panel.bias[j] = T(scalars.bias - op.common);
      round_proxy(op, row, scalars.inverse_kbar, linear.data(), spread.data());
      place(linear.data(), j, op.D, panel.width, panel.linear.data(), panel.linear_rows.data());
      if (op.squares) {
        place(spread.data(), j, op.D, panel.width, panel.spread.data(), panel.spread_rows.data());
      }
    }
  });
  for (int64_t j = panel.width; j < panel.lanes; ++j) panel.bias[j] = -INFINITY;
}

// The mean bias of the first `count` proxies.
template <typename T>
double mean_bias(const Problem<T>& op, int64_t count) {
  std::vector<double> bias(std::min(op.P, count));
  parallel_for(0, int64_t(bias.size()), 32, [&](int64_t begin, int64_t end) {
    ProxyRow row(op.D);
    for (int64_t j = begin; j < end; ++j) bias[j] = proxy_scalars(op, j, row).bias;
  });
  double sum = 0;
  for (const double value : bias) sum += value;
  return sum / double(bias.size());
}

// ---- splitting the work -------------------------------------------------------------------------

// `saved` of the proxy-NCA ops is [panels, columns]: for each panel of `width` proxies, every
// image's largest score and, if `scores`, the two products num and delta of every row (image,
// sample), [2, B * N, width].
struct SavedLayout {
  int64_t width, panels, columns;
  bool scores;
};

SavedLayout without_scores(int64_t proxies) {
  const int64_t width = std::min(kPanel, round_up(proxies, 16));
  return {width, ceil_div(proxies, width), 0, false};
}

template <typename T>
SavedLayout saved_layout(const LogPpkSizes& sizes) {
  SavedLayout out = without_scores(sizes.P);
  const int64_t scores = 2 * sizes.N * sizes.B * out.width;
  const int64_t workspace = sizes.options.workspace;
  out.scores =
      sizes.options.keep && out.panels * scores * int64_t(sizeof(T)) <= workspace - workspace / 8;
  out.columns = sizes.B + (out.scores ? scores : 0);
  return out;
}

// Each group of panels needs its own copy of the samples' gradient, each group of images its own
// copy of the proxies': as many groups as are useful and fit an eighth of the workspace.
struct WorkSplit {
  int64_t panel_groups = 1, row_groups = 1;

  int64_t tasks() const { return panel_groups * row_groups; }
};

template <typename T>
WorkSplit split_work(const Problem<T>& op, int64_t panels) {
  const int64_t rows = op.N * op.B, budget = op.workspace / 8 / int64_t(sizeof(T));
  WorkSplit out;
  while (2 * out.tasks() <= kTasks && 2 * out.panel_groups <= panels &&
         2 * out.panel_groups * rows * op.D <= budget) {
    out.panel_groups *= 2;
  }
  while (2 * out.tasks() <= kTasks && 2 * out.row_groups * kRowGroup <= rows &&
         2 * out.row_groups <= op.B && 4 * out.row_groups * op.P * op.D <= budget) {
    out.row_groups *= 2;
  }
  return out;
}

// The rows of one group of images.
template <typename T>
std::vector<int64_t> rows_of(const Problem<T>& op, int64_t group, int64_t groups) {
  const int64_t begin = op.B * group / groups, end = op.B * (group + 1) / groups;
  std::vector<int64_t> rows((end - begin) * op.N);
  std::iota(rows.begin(), rows.end(), begin * op.N);
  return rows;
}

// Panels for the tasks of one pass. If several groups of rows visit each panel, all panels are
// prepared once beforehand (they fit: see split_work); else each task prepares its current panel.
template <typename T>
class Panels {
 public:
  Panels(const Problem<T>& op, const SavedLayout& layout, int64_t row_groups, bool scores,
         bool gradients)
      : op_(op), layout_(layout), scores_(scores), gradients_(gradients) {
    for (int64_t p = 0; row_groups > 1 && p < layout.panels; ++p) {
      shared_.emplace_back(op, layout.width, scores, gradients);
      prepare(op, p * layout.width, layout.width, shared_.back());
    }
  }

  // Space for the one panel that a task prepares itself; empty if panels are shared.
  Panel<T> space() const {
    return shared_.empty() ? Panel<T>(op_, layout_.width, scores_, gradients_)
                           : Panel<T>(op_, 0, false, false);
  }

  const Panel<T>& shared(int64_t p) const { return shared_[p]; }

  const Panel<T>& get(int64_t p, Panel<T>& own) const {
    if (!shared_.empty()) return shared_[p];
    prepare(op_, p * layout_.width, layout_.width, own);
    return own;
  }

 private:
  const Problem<T>& op_;
  const SavedLayout& layout_;
  bool scores_, gradients_;
  std::vector<Panel<T>> shared_;
};

}  // namespace
}  // namespace nivmf
