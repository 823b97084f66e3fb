// log-PPK and proxy-NCA on the CPU:
//     z = num / sqrt(1 + delta) - D/2 log1p(delta) + bias,  num = x . linear,  delta = x^2 . spread
// for rows x (samples, image by image) and proxies. Inputs and outputs: log_ppk.h. Called by
// registration_cpu.cpp. This file has both forwards and the entry points; log_ppk_panel_cpu.h the
// operands, log_ppk_score_cpu.h the scores, log_ppk_backward_cpu.h the gradients. They form one
// translation unit to save compile time. Design: docs/design/log_ppk_cpu.md.
#include "log_ppk.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "elementary.h"
#include "log_ppk_backward_cpu.h"
#include "log_ppk_panel_cpu.h"
#include "log_ppk_score_cpu.h"
#include "parallel.h"

namespace nivmf {
namespace {

// Calls visit(index of the panel, rows, panel, block) for every panel of every group of rows.
template <typename T, typename Visit>
void for_each_panel(const Problem<T>& op, const SavedLayout& layout, const Visit& visit) {
  const int64_t row_groups = split_work(op, layout.panels).row_groups;
  const Panels<T> panels(op, layout, row_groups, true, false);
  parallel_for(0, layout.panels * row_groups, 1, [&](int64_t begin, int64_t end) {
    Panel<T> own = panels.space();
    Block<T> block(op);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t p = task % layout.panels;
      visit(p, rows_of(op, task / layout.panels, row_groups), panels.get(p, own), block);
    }
  });
}

// ---- proxy-NCA ----------------------------------------------------------------------------------

template <typename T>
struct NcaForward {
  const int64_t* labels;
  SavedLayout layout;
  T* saved;
  std::vector<T> own;            // [B, N], scores at the own proxy
  std::vector<LogSum> by_panel;  // [panels, B]
};

template <typename T>
void forward_panel(const Problem<T>& op, NcaForward<T>& out, int64_t p,
                   const std::vector<int64_t>& rows, const Panel<T>& panel, Block<T>& block) {
  const int64_t width = out.layout.width, total = op.B * op.N, count = rows.size();
  T* const maxima = out.saved + p * out.layout.columns;
  T* const products = maxima + op.B;
  LogSum* const images = out.by_panel.data() + p * op.B;
  for (int64_t start = 0; start < count; start += kBlock) {
    const int64_t size = std::min(kBlock, count - start);
    load(op, rows.data() + start, size, block);
    score(op, panel, size, block);
    refine_own(
        op, panel, rows.data() + start, size, [&](int64_t i) { return out.labels[i]; }, block);
    for (int64_t r = 0; r < size; ++r) {
      const int64_t q = rows[start + r], image = q / op.N;
      const T* const num = block.num.data() + r * kPanel;
      const T* const delta = block.delta.data() + r * kPanel;
      if (out.layout.scores) {
        std::copy_n(num, panel.lanes, products + q * width);
        std::copy_n(delta, panel.lanes, products + (total + q) * width);
      }
      T* const z = block.z.data();
      row_scores(op, num, delta, panel.bias.data(), panel.lanes, z);
      images[image].add(row_log_sum(z, panel.lanes, op.scale), op.temperature);
      maxima[image] = T(images[image].max);
      const int64_t label = out.labels[image] - panel.first;
      if (label >= 0 && label < panel.width) out.own[q] = z[label];
    }
  }
}

// ---- log-PPK ------------------------------------------------------------------------------------

template <typename T>
struct PpkForward {
  int64_t width;
  T* values;  // [B, P]
  T* max;     // [B, P]
  T* lse;     // [B, P]
};

// Adds a sample to the running maximum and sum of an image.
template <typename T>
NIVMF_CLONES void add_sample(const T* __restrict__ z, int64_t size, T scale, T* __restrict__ max,
                             T* __restrict__ sum) {
  for (int64_t j = 0; j < size; ++j) {
    const T greater = z[j] > max[j] ? z[j] : max[j];
    sum[j] = sum[j] * exp2_of((max[j] - greater) * scale) + exp2_of((z[j] - greater) * scale);
    max[j] = greater;
  }
}

template <typename T>
void ppk_panel(const Problem<T>& op, const PpkForward<T>& out, int64_t p,
               const std::vector<int64_t>& rows, const Panel<T>& panel, Block<T>& block) {
  const int64_t count = rows.size();
  Buffer<T> max(kPanel), sum(kPanel);
  for (int64_t start = 0; start < count; start += kBlock) {
    const int64_t size = std::min(kBlock, count - start);
    load(op, rows.data() + start, size, block);
    score(op, panel, size, block);
    for (int64_t r = 0; r < size; ++r) {
      const int64_t q = rows[start + r], sample = q % op.N;
      if (sample == 0) {
        std::fill_n(max.data(), kPanel, T(-INFINITY));
        std::fill_n(sum.data(), kPanel, T(0));
      }
      row_scores(op, block.num.data() + r * kPanel, block.delta.data() + r * kPanel,
                 panel.bias.data(), panel.lanes, block.z.data());
      add_sample(block.z.data(), panel.lanes, op.scale, max.data(), sum.data());
      if (sample < op.N - 1) continue;
      for (int64_t j = 0; j < panel.width; ++j) {
        const int64_t at = q / op.N * op.P + panel.first + j;
        const double lse = std::log(double(sum[j]));
        out.max[at] = max[j];
        out.lse[at] = T(lse);
        out.values[at] = T(double(max[j]) / op.temperature + lse - std::log(double(op.N)));
      }
    }
  }
}

}  // namespace

template <typename T>
SavedShape proxy_nca_saved_cpu(const LogPpkSizes& sizes) {
  const SavedLayout layout = saved_layout<T>(sizes);
  return {layout.panels, layout.columns};
}

template <typename T>
int64_t log_ppk_forward_scratch_bytes_cpu(const LogPpkSizes&) {
  return 0;
}

template <typename T>
int64_t log_ppk_backward_scratch_bytes_cpu(const LogPpkSizes&) {
  return 0;
}

template <typename T>
int proxy_nca_cpu(const LogPpkSizes& sizes, const LogPpkInputs<T>& in, T* losses, double* partial,
                  void* saved, void*, void*) {
  Problem<T> op(sizes, in);
  op.common = mean_bias(op, kPanel);
  const int64_t B = op.B, N = op.N;
  const int64_t* const labels = in.labels;
  const SavedLayout layout = saved_layout<T>(sizes);
  NcaForward<T> out = {labels, layout, static_cast<T*>(saved), std::vector<T>(B * N),
                       std::vector<LogSum>(layout.panels * B)};
  for_each_panel(op, layout,
                 [&](int64_t p, const std::vector<int64_t>& rows, const Panel<T>& panel,
                     Block<T>& block) { forward_panel(op, out, p, rows, panel, block); });
  for (int64_t i = 0; i < B; ++i) {
    LogSum all, own;
    for (int64_t p = 0; p < layout.panels; ++p) all.add(out.by_panel[p * B + i], op.temperature);
    const bool known = labels[i] >= 0 && labels[i] < op.P;
    for (int64_t s = 0; known && s < N; ++s) {
      own.add({double(out.own[i * N + s]), 1}, op.temperature);
    }
    const double lse = std::log(all.sum), own_lse = known ? std::log(own.sum) : 0;
    partial[i] = all.max + op.common;
    partial[B + i] = lse;
    partial[2 * B + i] = known ? own.max + op.common : -INFINITY;
    partial[3 * B + i] = own_lse;
    losses[i] = known ? T((all.max - own.max) / op.temperature + (lse - own_lse)) : T(NAN);
  }
  return 0;
}

template <typename T>
int proxy_nca_backward_cpu(const LogPpkSizes& sizes, const LogPpkInputs<T>& in, const T* grad,
                           const double* partial, const void* saved, void*,
                           const LogPpkGradients<T>& out, void*) {
  Problem<T> op(sizes, in);
  op.common = mean_bias(op, kPanel);
  const int64_t B = op.B;
  const double dead_log = double(dead_log2<T>(op.N, op.P)) / kLog2E;
  std::vector<Softmax<T>> images(B);
  for (int64_t i = 0; i < B; ++i) {
    const double max = partial[i] - op.common, own_max = partial[2 * B + i] - op.common;
    const bool known = own_max > -INFINITY;
    Softmax<T>& s = images[i];
    s = {known ? grad[i] : T(NAN), T(max), T(0), T(own_max), T(0), in.labels[i], NAN};
    s.lse = T(kLog2E * (partial[B + i] + (max - double(s.max)) / op.temperature));
    s.own_lse = T(kLog2E * (partial[3 * B + i] + (own_max - double(s.own_max)) / op.temperature));
    if (known) s.dead_below = max + op.temperature * (partial[B + i] + dead_log);
  }
  const SavedLayout layout = saved_layout<T>(sizes);
  backward(op, {layout, images.data(), static_cast<const T*>(saved), nullptr, nullptr}, out);
  return 0;
}

template <typename T>
int log_ppk_cpu(const LogPpkSizes& sizes, const LogPpkInputs<T>& in, T* values, T* saved,
                double* common, void*, void*) {
  Problem<T> op(sizes, in);
  *common = op.common = mean_bias(op, op.P);
  const SavedLayout layout = without_scores(op.P);
  const PpkForward<T> out = {layout.width, values, saved, saved + op.B * op.P};
  for_each_panel(op, layout,
                 [&](int64_t p, const std::vector<int64_t>& rows, const Panel<T>& panel,
                     Block<T>& block) { ppk_panel(op, out, p, rows, panel, block); });
  return 0;
}

template <typename T>
int log_ppk_backward_cpu(const LogPpkSizes& sizes, const LogPpkInputs<T>& in, const T* grad,
                         const T* saved, void*, const LogPpkGradients<T>& out, void*) {
  Problem<T> op(sizes, in);
  op.common = mean_bias(op, op.P);
  backward(op, {without_scores(op.P), nullptr, nullptr, grad, saved}, out);
  return 0;
}

#define NIVMF_INSTANTIATE(T)                                                                   \
  template SavedShape proxy_nca_saved_cpu<T>(const LogPpkSizes&);                              \
  template int64_t log_ppk_forward_scratch_bytes_cpu<T>(const LogPpkSizes&);                   \
  template int64_t log_ppk_backward_scratch_bytes_cpu<T>(const LogPpkSizes&);                  \
  template int proxy_nca_cpu(const LogPpkSizes&, const LogPpkInputs<T>&, T*, double*, void*,   \
                             void*, void*);                                                    \
  template int proxy_nca_backward_cpu(const LogPpkSizes&, const LogPpkInputs<T>&, const T*,    \
                                      const double*, const void*, void*,                       \
                                      const LogPpkGradients<T>&, void*);                       \
  template int log_ppk_cpu(const LogPpkSizes&, const LogPpkInputs<T>&, T*, T*, double*, void*, \
                           void*);                                                             \
  template int log_ppk_backward_cpu(const LogPpkSizes&, const LogPpkInputs<T>&, const T*,      \
                                    const T*, void*, const LogPpkGradients<T>&, void*);
NIVMF_INSTANTIATE(float)
NIVMF_INSTANTIATE(double)
#undef NIVMF_INSTANTIATE

}  // namespace nivmf
