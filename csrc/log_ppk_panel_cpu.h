// The operands of the CPU's log-PPK, and how its work is cut, by the shapes alone: proxies are
// prepared in double, a panel of them at a time, and packed; tasks are groups of panels and of
// images.
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
constexpr int64_t kRowGroup = 256;  // rows worth a gradient of the proxies of their own
constexpr int64_t kTasks = 16;      // enough; each has its own memory
constexpr double kLog2E = 1.44269504088896340736;

// ---- proxies ------------------------------------------------------------------------------------

template <typename T>
struct Task {  // the op and what all its parts share
  const T *samples, *loc, *concentration;
  int64_t N, B, P, D;
  double temperature;
  bool exact, projection;
  int64_t workspace;
  LogNormalizerPlan<double> plan;
  double common;  // taken off all biases, so that the scores are small numbers; any number is right
  int64_t padded;  // D, to whole lanes
  bool squares;    // delta is needed
  T scale;         // log2 e / T

  Task(const LogPpkSizes& sizes, const LogPpkInputs<T>& in)
      : samples(in.samples),
        loc(in.loc),
        concentration(in.concentration),
        N(sizes.samples),
        B(sizes.images),
        P(sizes.proxies),
        D(sizes.dim),
        temperature(double(*in.temperature)),
        exact(sizes.options.exact),
        projection(sizes.options.projection),
        workspace(sizes.options.workspace),
        plan(make_log_normalizer_plan<double>(D)),
        common(0),
        padded(round_up(D, kLanes<T>)),
        squares(projection || exact) {
    if (!(temperature > 0)) temperature = NAN;
    scale = T(kLog2E / temperature);
  }
};

struct Proxy {
  double inverse_kbar;  // kbar: the geometric mean of kappa
  double bias;          // of the score, in full
  double pull;          // -d bias / d|K mu| / |K mu|
};

// One proxy in double, filled up to whole groups so that the sums have no remainder.
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
        const double along = kappa[d + l] * mu[d + l];
        product[l] *= kappa[d + l];
        squares[l] += along * along;
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
Proxy describe(const Task<T>& op, int64_t j, ProxyRow& row) {
  load_proxy(op.concentration + j * op.D, op.loc + j * op.D, op.D, row);
  const double length = std::sqrt(row.square_sum), dim = double(op.D);
  const LogNormalizer<double> normalizer = log_normalizer(length, op.plan);
  Proxy out = {std::exp(-row.log_sum / dim), normalizer.g,
               length > 0 ? normalizer.a / length : 1 / dim};
  if (!op.exact) {
    out.bias += row.log_sum - std::log(length);
    out.pull += 1 / row.square_sum;
  }
  return out;
}

// Prepared in double and rounded once: the logits are these times thousands.
template <typename T>
NIVMF_CLONES void round_proxy(const Task<T>& op, const ProxyRow& row, double inverse_kbar,
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

// The proxies of one panel as operands.
template <typename T>
struct Panel {
  int64_t first, width, lanes;  // lanes: width up to whole lanes
  std::vector<Proxy> proxy;
  Buffer<T> bias;
  Buffer<T> linear, spread;            // strips of proxies, for the scores
  Buffer<T> linear_rows, spread_rows;  // strips of dimensions, for the samples' gradient

  Panel(const Task<T>& op, int64_t width, bool scores, bool gradients)
      : proxy(width),
        bias(round_up(width, kLanes<T>)),
        linear(scores ? op.padded * round_up(width, kLanes<T>) : 0),
        spread(scores && op.squares ? op.padded * round_up(width, kLanes<T>) : 0),
        linear_rows(gradients ? op.padded * width : 0),
        spread_rows(gradients && op.squares ? op.padded * width : 0) {}
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

// On all threads, unless a task on one of them asks.
template <typename T>
void prepare(const Task<T>& op, int64_t first, int64_t width, Panel<T>& panel) {
  panel.first = first;
  panel.width = std::min(width, op.P - first);
  panel.lanes = round_up(panel.width, kLanes<T>);
  parallel_for(0, panel.width, 16, [&](int64_t begin, int64_t end) {
    ProxyRow row(op.D);
    Buffer<T> linear(op.padded), spread(op.padded);
    for (int64_t j = begin; j < end; ++j) {
      const Proxy proxy = panel.proxy[j] = describe(op, first + j, row);
      panel.bias[j] = T(proxy.bias - op.common);
      round_proxy(op, row, proxy.inverse_kbar, linear.data(), spread.data());
      place(linear.data(), j, op.D, panel.width, panel.linear.data(), panel.linear_rows.data());
      if (op.squares) {
        place(spread.data(), j, op.D, panel.width, panel.spread.data(), panel.spread_rows.data());
      }
    }
  });
  for (int64_t j = panel.width; j < panel.lanes; ++j) panel.bias[j] = -INFINITY;
}

// Mean bias of the first proxies.
template <typename T>
double mean_bias(const Task<T>& op, int64_t count) {
  std::vector<double> bias(std::min(op.P, count));
  parallel_for(0, int64_t(bias.size()), 32, [&](int64_t begin, int64_t end) {
    ProxyRow row(op.D);
    for (int64_t j = begin; j < end; ++j) bias[j] = describe(op, j, row).bias;
  });
  double sum = 0;
  for (const double value : bias) sum += value;
  return sum / double(bias.size());
}

// ---- cutting the work ---------------------------------------------------------------------------

// `saved` of the proxy-NCA ops is [panels, columns]: per panel of `width` proxies each image's
// largest score and, if `scores`, of every row (image, sample) the two products that make its
// scores, [2, B * N, width].
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
  SavedLayout out = without_scores(sizes.proxies);
  const int64_t scores = 2 * sizes.samples * sizes.images * out.width;
  const int64_t workspace = sizes.options.workspace;
  out.scores =
      sizes.options.keep && out.panels * scores * int64_t(sizeof(T)) <= workspace - workspace / 8;
  out.columns = sizes.images + (out.scores ? scores : 0);
  return out;
}

// Groups of panels each need a gradient of the samples of their own, groups of images one of the
// proxies: as many as are useful and fit an eighth of the workspace.
struct Cut {
  int64_t panel_groups = 1, row_groups = 1;

  int64_t tasks() const { return panel_groups * row_groups; }
};

template <typename T>
Cut cut(const Task<T>& op, int64_t panels) {
  const int64_t rows = op.N * op.B, budget = op.workspace / 8 / int64_t(sizeof(T));
  Cut out;
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
std::vector<int64_t> rows_of(const Task<T>& op, int64_t group, int64_t groups) {
  const int64_t begin = op.B * group / groups, end = op.B * (group + 1) / groups;
  std::vector<int64_t> rows((end - begin) * op.N);
  std::iota(rows.begin(), rows.end(), begin * op.N);
  return rows;
}

// Panels for the tasks of one pass. Where several groups of rows meet each panel, all are prepared
// before, once (they fit: see `cut`); else each task prepares the panel it has come to.
template <typename T>
class Panels {
 public:
  Panels(const Task<T>& op, const SavedLayout& layout, int64_t row_groups, bool scores,
         bool gradients)
      : op_(op), layout_(layout), scores_(scores), gradients_(gradients) {
    for (int64_t p = 0; row_groups > 1 && p < layout.panels; ++p) {
      shared_.emplace_back(op, layout.width, scores, gradients);
      prepare(op, p * layout.width, layout.width, shared_.back());
    }
  }

  // Space for one panel of a task's own, if it will need it.
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
  const Task<T>& op_;
  const SavedLayout& layout_;
  bool scores_, gradients_;
  std::vector<Panel<T>> shared_;
};

}  // namespace
}  // namespace nivmf
