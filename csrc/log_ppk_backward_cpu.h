// The backward of log-PPK on the CPU: the softmax weights of a block's scores, the gradients made
// from them, and the tasks that sum those in a fixed order.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <iterator>
#include <memory>
#include <numeric>
#include <vector>

#include "log_ppk_panel_cpu.h"
#include "log_ppk_score_cpu.h"
#include "products_cpu.h"

namespace nivmf {
namespace {

// Row stride of g1 and g2: holds whole tiles of proxies, and is no power of two, because columns
// of such a stride would share a few sets of the L1.
constexpr int64_t kStride = kPanel + 16;

// ---- one panel ----------------------------------------------------------------------------------

// The softmax of an image: weight(z) = grad exp2((z - max) scale - lse). own_*: the same over the
// samples of the own proxy alone.
template <typename T>
struct Softmax {
  T grad, max, lse, own_max, own_lse;
  int64_t label;
  double dead_below;  // scores below this have weights of zero to rounding
};

template <typename T>
struct BackwardJob {
  SavedLayout layout;
  const Softmax<T>* images;  // proxy-NCA's, with its forward's `saved`
  const T* saved;
  const T* grad;     // log-PPK's, [B, P], with its forward's `saved`:
  const T* max_lse;  // [2, B, P]
};

template <typename T>
struct GradientScratch {
  Buffer<T> weight;              // dL/dl of one row
  Buffer<T> g1, g2;              // dL/dnum, dL/ddelta: [kBlock, kStride]
  Buffer<T> x, xx;               // the block, packed in strips
  Buffer<T> dx, dx2;             // [kBlock, pitch]
  Buffer<T> d_linear, d_spread;  // of a panel, in whole tiles; used if there is one row group
  Buffer<double> d_bias;
  Steps of_rows, of_proxies;
  double d_temperature = 0;

  GradientScratch(const Problem<T>& op, int64_t slab)
      : weight(kPanel),
        g1(kBlock * kStride),
        g2(kBlock * kStride),
        x(kBlock * op.pitch),
        xx(kBlock * op.pitch),
        dx(kBlock * op.pitch),
        dx2(kBlock * op.pitch),
        d_linear(slab),
        d_spread(slab),
        d_bias(kPanel) {}
};

// sum_j weight_j (z_j - max), with 0 times infinity = 0; divided by -T^2 it is the temperature's
// gradient.
template <typename T>
NIVMF_INLINE double moment(const T* weight, const T* z, T max, int64_t size) {
  T lanes[kLanes<T>] = {};
  for (int64_t j = 0; j < size; j += kLanes<T>) {
    NIVMF_LANES(T, l) lanes[l] += weight[j + l] == 0 ? T(0) : weight[j + l] * (z[j + l] - max);
  }
  return double(sum_of(lanes));
}

// Weights of one row: the softmax over samples and proxies minus that over the samples of the own
// proxy, which is at `label` in this panel or in another. An image's weights sum to zero, so
// subtracting its maximum from every score changes no gradient. Weights of scores below dead_below
// become zero, and the products skip them.
template <typename T>
NIVMF_CLONES double nca_weights(const Softmax<T>& image, const T* __restrict__ z, int64_t width,
                                int64_t size, int64_t label, T scale, T dead_below,
                                T* __restrict__ weight) {
  for (int64_t j = 0; j < size; ++j) {
    const T w = image.grad * exp2_of((z[j] - image.max) * scale - image.lse);
    weight[j] = z[j] < dead_below ? T(0) : w;
  }
  if (label >= 0 && label < width) {
    weight[label] -= image.grad * exp2_of((z[label] - image.own_max) * scale - image.own_lse);
  }
  for (int64_t j = width; j < size; ++j) weight[j] = 0;
  return moment(weight, z, image.max, size);
}

template <typename T>
NIVMF_CLONES double ppk_weights(const T* __restrict__ grad, const T* __restrict__ max,
                                const T* __restrict__ lse, const T* __restrict__ z, int64_t width,
                                int64_t size, T scale, T* __restrict__ weight) {
  for (int64_t j = 0; j < width; ++j) {
    weight[j] = grad[j] * exp2_of((z[j] - max[j]) * scale - lse[j] * T(kLog2E));
  }
  for (int64_t j = width; j < size; ++j) weight[j] = 0;
  return moment(weight, z, T(0), size);
}

template <typename T>
NIVMF_CLONES void row_gradients(const Problem<T>& op, const T* __restrict__ num,
                                const T* __restrict__ delta, const T* __restrict__ weight,
                                int64_t size, T* __restrict__ g1, T* __restrict__ g2,
                                double* __restrict__ d_bias) {
  const T inverse = T(1 / op.temperature), dim = op.exact ? T(op.D) : T(0);
  for (int64_t j = 0; j < size; ++j) {
    g1[j] = weight[j] * inverse;
    d_bias[j] += double(g1[j]);
  }
  if (op.projection) {
    for (int64_t j = 0; j < size; ++j) {
      const T root = 1 / std::sqrt(1 + delta[j]);
      g2[j] = T(-0.5) * g1[j] * (num[j] * root + dim) * (root * root);
      g1[j] *= root;
    }
  } else if (op.exact) {
    for (int64_t j = 0; j < size; ++j) g2[j] = T(-0.5) * g1[j] * dim / (1 + delta[j]);
  }
}

template <typename T>
NIVMF_CLONES void row_gradient(const T* __restrict__ x, const T* __restrict__ dx,
                               const T* __restrict__ dx2, int64_t dim, bool add,
                               T* __restrict__ out) {
  if (dx2 == nullptr) {
    for (int64_t d = 0; d < dim; ++d) out[d] = (add ? out[d] : T(0)) + dx[d];
  } else {
    for (int64_t d = 0; d < dim; ++d) out[d] = (add ? out[d] : T(0)) + (dx[d] + 2 * x[d] * dx2[d]);
  }
}

// One panel against its live rows. Adds to the gradient of every row q, or starts it if reached[q]
// is not set yet.
template <typename T>
void backward_panel(const Problem<T>& op, const BackwardJob<T>& job, int64_t p,
                    const std::vector<int64_t>& rows, char* reached, T* d_samples,
                    const Panel<T>& panel, Block<T>& block, GradientScratch<T>& out, T* d_linear,
                    T* d_spread) {
  const int64_t width = job.layout.width, total = op.B * op.N, count = rows.size();
  const int64_t pairs = op.B * op.P;
  std::fill_n(out.d_bias.data(), kPanel, 0.0);
  for (int64_t start = 0; start < count; start += kBlock) {
    const int64_t size = std::min(kBlock, count - start);
    if (!job.layout.scores) {
      load(op, rows.data() + start, size, block);
      score(op, panel, size, block);
      if (job.images != nullptr) {
        const auto label = [&](int64_t i) { return job.images[i].label; };
        refine_own(op, panel, rows.data() + start, size, label, block);
      }
    }
    for (int64_t r = 0; r < size; ++r) {
      const int64_t q = rows[start + r], image = q / op.N;
      const T* num = block.num.data() + r * kPanel;
      const T* delta = block.delta.data() + r * kPanel;
      if (job.layout.scores) {
        num = job.saved + p * job.layout.columns + op.B + q * width;
        delta = num + total * width;
      }
      T *const z = block.z.data(), *const weight = out.weight.data();
      row_scores(op, num, delta, panel.bias.data(), panel.lanes, z);
      if (job.images != nullptr) {
        const Softmax<T>& softmax = job.images[image];
        const bool all = job.saved[p * job.layout.columns + image] == T(INFINITY);  // as in is_live
        const T dead_below =
            all ? T(-INFINITY) : std::nextafter(T(softmax.dead_below), T(-INFINITY));
        out.d_temperature += nca_weights(softmax, z, panel.width, panel.lanes,
                                         softmax.label - panel.first, op.scale, dead_below, weight);
      } else {
        const int64_t at = image * op.P + panel.first;
        out.d_temperature += ppk_weights(job.grad + at, job.max_lse + at, job.max_lse + pairs + at,
                                         z, panel.width, panel.lanes, op.scale, weight);
      }
      row_gradients(op, num, delta, weight, panel.lanes, out.g1.data() + r * kStride,
                    out.g2.data() + r * kStride, out.d_bias.data());
    }
    for (int64_t r = 0; r < size; ++r) {
      pack_row(op.samples + row_offset(op, rows[start + r]), r, size, op.D, out.x.data(),
               op.squares ? out.xx.data() : nullptr);
    }
    for (int64_t r = size; r % kTileRows != 0; ++r) {  // pad to a whole tile
      std::fill_n(out.g1.data() + r * kStride, panel.lanes, T(0));
      std::fill_n(out.g2.data() + r * kStride, panel.lanes, T(0));
    }
    // g2 is zero where g1 is
    const bool few = out.of_rows.list(size, panel.width, out.g1.data(), kStride, 1) &&
                     out.of_proxies.list(panel.width, size, out.g1.data(), 1, kStride);
    const auto gradients = [&](const Buffer<T>& g, const Buffer<T>& proxies, const Buffer<T>& x,
                               Buffer<T>& dx, T* d_proxies) {
      const auto product = [&](const Steps& steps, int64_t rows, int64_t depth, int64_t row_stride,
                               int64_t stride, const T* b, bool add, T* c) {
        if (few) {
          multiply(steps, rows, op.pitch, depth, g.data(), row_stride, stride, b, add, c, op.pitch);
        } else {
          multiply(rows, op.pitch, depth, g.data(), row_stride, stride, b, add, c, op.pitch);
        }
      };
      product(out.of_rows, size, panel.width, kStride, 1, proxies.data(), false, dx.data());
      product(out.of_proxies, panel.width, size, 1, kStride, x.data(), start > 0, d_proxies);
    };
    gradients(out.g1, panel.linear_rows, out.x, out.dx, d_linear);
    if (op.squares) gradients(out.g2, panel.spread_rows, out.xx, out.dx2, d_spread);
    for (int64_t r = 0; r < size; ++r) {
      const int64_t q = rows[start + r], at = row_offset(op, q);
      row_gradient(op.samples + at, out.dx.data() + r * op.pitch,
                   op.squares ? out.dx2.data() + r * op.pitch : nullptr, op.D, reached[q] != 0,
                   d_samples + at);
      reached[q] = 1;
    }
  }
}

// The gradients of a proxy's loc and concentration from those of its linear, spread and bias.
template <typename T>
NIVMF_CLONES void finish_proxy(const Problem<T>& op, const ProxyScalars& scalars, int64_t j,
                               const T* __restrict__ d_linear, const T* __restrict__ d_spread,
                               double d_bias, const LogPpkGradients<T>& out) {
  const T *const kappa = op.concentration + j * op.D, *const mu = op.loc + j * op.D;
  T* __restrict__ const d_mu = out.loc + j * op.D;
  T* __restrict__ const d_kappa = out.concentration + j * op.D;
  const double inverse = scalars.inverse_kbar, by_length = d_bias * scalars.bias_slope;
  const double power = op.projection ? 2 : 1;  // of kappa in linear
  for (int64_t d = 0; d < op.D; ++d) {
    const double k = double(kappa[d]), m = double(mu[d]), linear = double(d_linear[d]);
    const double scaled = op.projection ? linear * k * inverse : linear;
    d_mu[d] = T(k * (scaled + by_length * k * m));
    const double spread = d_spread == nullptr ? 0 : 2 * inverse * inverse * double(d_spread[d]);
    d_kappa[d] = T(power * m * scaled + spread * k + d_bias / k + by_length * k * m * m);
  }
}

// ---- all panels ---------------------------------------------------------------------------------

template <typename T>
bool is_live(const Problem<T>& op, const BackwardJob<T>& job, int64_t p, int64_t image) {
  if (job.images == nullptr) return true;
  const Softmax<T>& softmax = job.images[image];
  const int64_t label = softmax.label - p * job.layout.width;
  if (label >= 0 && label < job.layout.width) return true;
  // NaN is live; so is a maximum of infinity, by which tests turn the skipping off
  return !(double(job.saved[p * job.layout.columns + image]) < softmax.dead_below);
}

// The size of the gradient of one panel's linear or spread, in whole tiles.
template <typename T>
int64_t slab_size(const Problem<T>& op, const SavedLayout& layout) {
  return round_up(layout.width, kTileRows) * op.pitch;
}

// The tasks' parts of the gradients, added in the order of the tasks.
template <typename T>
struct Parts {
  std::vector<T*> d_samples;  // [panel_groups] x [N, B, D]
  // With several row groups: [row_groups, panels, slab_size]
  std::unique_ptr<T[]> d_linear, d_spread;
  std::vector<double> d_bias;         // [row_groups, P]
  std::vector<double> d_temperature;  // [row_groups, panel_groups]
};

template <typename T>
void backward_task(const Problem<T>& op, const BackwardJob<T>& job, const WorkSplit& split,
                   int64_t task, Parts<T>& parts, const LogPpkGradients<T>& out,
                   const Panels<T>& panels, Panel<T>& own, Block<T>& block,
                   GradientScratch<T>& scratch) {
  const int64_t row_group = task / split.panel_groups, group = task % split.panel_groups;
  const std::vector<int64_t> rows = rows_of(op, row_group, split.row_groups);
  const int64_t slab = slab_size(op, job.layout);
  T* const d_samples = parts.d_samples[group];
  std::vector<int64_t> live;
  std::vector<char> reached(rows.size());  // whether d_samples holds a gradient of the row yet
  scratch.d_temperature = 0;
  const int64_t begin = job.layout.panels * group / split.panel_groups;
  const int64_t end = job.layout.panels * (group + 1) / split.panel_groups;
  for (int64_t p = begin; p < end; ++p) {
    live.clear();
    std::copy_if(rows.begin(), rows.end(), std::back_inserter(live),
                 [&](int64_t q) { return is_live(op, job, p, q / op.N); });
    const int64_t first = p * job.layout.width;
    const int64_t last = std::min(op.P, first + job.layout.width);
    const bool alone = split.row_groups == 1;
    const int64_t at = alone ? 0 : (row_group * job.layout.panels + p) * slab;
    T* const d_linear = (alone ? scratch.d_linear.data() : parts.d_linear.get()) + at;
    T* const d_spread =
        !op.squares ? nullptr : (alone ? scratch.d_spread.data() : parts.d_spread.get()) + at;
    if (live.empty()) {
      if (alone) {
        std::fill_n(out.loc + first * op.D, (last - first) * op.D, T(0));
        std::fill_n(out.concentration + first * op.D, (last - first) * op.D, T(0));
      } else {
        std::fill_n(d_linear, slab, T(0));
        if (op.squares) std::fill_n(d_spread, slab, T(0));
      }
      continue;
    }
    const Panel<T>& panel = panels.get(p, own);
    backward_panel(op, job, p, live, reached.data() - rows[0], d_samples, panel, block, scratch,
                   d_linear, d_spread);
    if (alone) {
      for (int64_t j = first; j < last; ++j) {
        const int64_t row = (j - first) * op.pitch;
        finish_proxy(op, panel.scalars[j - first], j, d_linear + row,
                     op.squares ? d_spread + row : nullptr, scratch.d_bias[j - first], out);
      }
    } else {
      std::copy_n(scratch.d_bias.data(), last - first,
                  parts.d_bias.data() + row_group * op.P + first);
    }
  }
  for (const int64_t q : rows) {
    if (!reached[q - rows[0]]) std::fill_n(d_samples + row_offset(op, q), op.D, T(0));
  }
  parts.d_temperature[task] = scratch.d_temperature;
}

template <typename T>
void backward(const Problem<T>& op, const BackwardJob<T>& job, const LogPpkGradients<T>& out) {
  const WorkSplit split = split_work(op, job.layout.panels);
  const int64_t size = op.N * op.B * op.D, slab = slab_size(op, job.layout);
  const int64_t plane = job.layout.panels * slab;
  const bool alone = split.row_groups == 1;
  const auto uninitialised = [](int64_t count) { return std::unique_ptr<T[]>(new T[count]); };
  const auto slabs = uninitialised((split.panel_groups - 1) * size);
  Parts<T> parts = {{out.samples},
                    uninitialised(alone ? 0 : split.row_groups * plane),
                    uninitialised(alone || !op.squares ? 0 : split.row_groups * plane),
                    std::vector<double>(alone ? 0 : split.row_groups * op.P),
                    std::vector<double>(split.tasks())};
  for (int64_t g = 1; g < split.panel_groups; ++g) {
    parts.d_samples.push_back(slabs.get() + (g - 1) * size);
  }
  const Panels<T> panels(op, job.layout, split.row_groups, !job.layout.scores, true);
  parallel_for(0, split.tasks(), 1, [&](int64_t begin, int64_t end) {
    Panel<T> own = panels.space();
    Block<T> block(op);
    GradientScratch<T> scratch(op, alone ? slab : 0);
    for (int64_t task = begin; task < end; ++task) {
      backward_task(op, job, split, task, parts, out, panels, own, block, scratch);
    }
  });
  if (!alone) {
    parallel_for(0, op.P, 16, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j) {
        const int64_t p = j / job.layout.width, in_panel = j % job.layout.width;
        T* const d_linear = parts.d_linear.get() + p * slab + in_panel * op.pitch;
        T* const d_spread =
            op.squares ? parts.d_spread.get() + p * slab + in_panel * op.pitch : nullptr;
        for (int64_t g = 1; g < split.row_groups; ++g) {
          add(d_linear, d_linear + g * plane, op.D);
          if (op.squares) add(d_spread, d_spread + g * plane, op.D);
          parts.d_bias[j] += parts.d_bias[g * op.P + j];
        }
        finish_proxy(op, panels.shared(p).scalars[in_panel], j, d_linear, d_spread, parts.d_bias[j],
                     out);
      }
    });
  }
  parallel_for(0, size, 1 << 15, [&](int64_t begin, int64_t end) {
    for (int64_t g = 1; g < split.panel_groups; ++g) {
      add(out.samples + begin, parts.d_samples[g] + begin, end - begin);
    }
  });
  const double sum = std::accumulate(parts.d_temperature.begin(), parts.d_temperature.end(), 0.0);
  *out.temperature = T(-sum / (op.temperature * op.temperature));
}

}  // namespace
}  // namespace nivmf
