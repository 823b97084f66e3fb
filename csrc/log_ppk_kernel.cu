// CUDA's entry points of log_ppk.h, which launch the kernels for one chunk of proxies after
// another. Per chunk: prepare and forward; pair and gradient, and reduce if d_samples is a sum of
// several parts. With tensor cores the own proxies' scores take one more launch. With one chunk a
// training step takes four to six launches; nothing here depends on values or waits for the device.
// Called by registration_cuda.cpp. Design: docs/design/log_ppk_cuda.md.
#include <algorithm>

#include "log_ppk.h"
#include "log_ppk_backward.cuh"
#include "log_ppk_forward.cuh"
#include "log_ppk_plan.h"

namespace nivmf {
namespace ppk {
namespace {

static_assert(Ffma<float>::kTile == kFfmaTile && Ffma<double>::kTile == kFfmaTile &&
              Mma<2>::kTile == kMmaTile && Mma<3>::kTile == kMmaTile);

// Queries the device only if the answer matters.
template <typename T>
Plan<T> make_plan(const LogPpkSizes& s) {
  return Plan<T>(s, Plan<T>::wants_tensor_cores(s) && has_tensor_cores());
}

template <typename T>
Problem<T> make_problem(const LogPpkSizes& s, const LogPpkInputs<T>& in, const Plan<T>& plan) {
  Problem<T> p = {in};
  p.B = s.B;
  p.P = s.P;
  p.N = int(s.N);
  p.D = int(s.D);
  p.exact = s.options.exact;
  p.projection = s.options.projection;
  p.vector = s.D * sizeof(T) % 16 == 0 && reinterpret_cast<uintptr_t>(in.samples) % 16 == 0;
  p.images_per_block = plan.images_per_block;
  p.blocks_per_image = plan.blocks_per_image;
  p.row_blocks = plan.row_blocks;
  p.pitch = plan.pitch;
  return p;
}

// The panel of the chunk that starts at block `begin`: a part of `panel` if that holds all proxies
// (`whole`), else its start.
template <typename T>
Panel<T> chunk_panel(Panel<T> panel, const Plan<T>& plan, bool whole, int64_t P, int begin,
                     int blocks) {
  panel.first = int64_t(begin) * plan.tile;
  panel.blocks = std::min(blocks, plan.blocks - begin);
  panel.count = std::min(P - panel.first, int64_t(panel.blocks) * plan.tile);
  if (whole) {
    panel.linear += panel.first * plan.pitch;
    panel.spread += panel.first * plan.pitch;
    panel.bias += panel.first;
    panel.inverse_kbar += panel.first;
    panel.bias_slope += panel.first;
  }
  return panel;
}

template <typename T>
int prepare(const Problem<T>& p, const Panel<T>& panel, const Plan<T>& plan, unsigned* tickets,
            void* stream) {
  const PrepareArgs<T> args = {p,       panel,         plan.tile,
                               tickets, plan.groups(), make_log_normalizer_plan<double>(p.D)};
  return launch(prepare_kernel<T>, ceil_div(int64_t(panel.blocks) * plan.tile, kWarps), 0, stream,
                args);
}

template <class Engine, typename T>
int run_forward(const Plan<T>& plan, ForwardArgs<T> a, const Panel<T>& panel, void* stream) {
  constexpr size_t kShared = sizeof(PairShared<Engine>);
  for (int begin = 0; begin < plan.blocks; begin += plan.chunk) {
    a.panel = chunk_panel(panel, plan, plan.keep_panels, a.p.P, begin, plan.chunk);
    a.first = begin == 0;
    a.last = begin + plan.chunk >= plan.blocks;
    a.blocks_per_split = int(ceil_div(a.panel.blocks, a.splits));
    if (const int error =
            prepare(a.p, a.panel, plan, a.first ? a.state.tickets : nullptr, stream)) {
      return error;
    }
    const int64_t blocks = int64_t(a.p.row_blocks) * a.splits;
    if (const int error = launch(forward_kernel<Engine>, blocks, kShared, stream, a)) return error;
  }
  return 0;
}

template <class Engine, typename T>
int run_log_ppk(const Plan<T>& plan, LogPpkArgs<T> a, const Panel<T>& panel, void* stream) {
  constexpr size_t kShared = sizeof(PairShared<Engine>);
  for (int begin = 0; begin < plan.blocks; begin += plan.chunk) {
    a.panel = chunk_panel(panel, plan, false, a.p.P, begin, plan.chunk);
    if (const int error = prepare(a.p, a.panel, plan, nullptr, stream)) return error;
    const int64_t blocks = int64_t(plan.groups()) * a.panel.blocks;
    if (const int error = launch(log_ppk_kernel<Engine>, blocks, kShared, stream, a)) return error;
  }
  return 0;
}

// ScoreEngine, which recomputes scores, must be the forward's; GradientEngine makes the products.
template <class ScoreEngine, class GradientEngine, bool kProxyNca, typename T>
int run_backward(const Plan<T>& plan, PairArgs<T> a, const Panel<T>& panel, bool prepared,
                 const BackwardScratch<T>& scratch, const LogPpkGradients<T>& out, void* stream) {
  const int64_t size = int64_t(a.p.N) * a.p.B * a.p.D;
  for (int begin = 0; begin < plan.blocks; begin += plan.back_chunk) {
    const bool first = begin == 0, last = begin + plan.back_chunk >= plan.blocks;
    a.panel = chunk_panel(panel, plan, prepared, a.p.P, begin, plan.back_chunk);
    if (!prepared) {
      if (const int error = prepare(a.p, a.panel, plan, nullptr, stream)) return error;
    }
    if (const int error =
            launch(pair_kernel<ScoreEngine, kProxyNca>, int64_t(plan.row_blocks) * a.panel.blocks,
                   sizeof(PairShared<ScoreEngine>), stream, a)) {
      return error;
    }
    const int splits = plan.back_splits, blocks_per_split = int(ceil_div(a.panel.blocks, splits));
    GradientArgs<T> g = {
        a.p, a.panel, a.out, splits, blocks_per_split, first, last, scratch.temperature_sum, out};
    if (scratch.slabs) g.out.samples = scratch.slabs;
    const int64_t tiles = plan.pitch / plan.tile;
    const int64_t blocks = tiles * (int64_t(plan.row_blocks) * splits + a.panel.blocks) + 1;
    if (const int error = launch(gradient_kernel<GradientEngine>, blocks,
                                 sizeof(GradientShared<GradientEngine>), stream, g)) {
      return error;
    }
    if (!scratch.slabs) continue;
    const ReduceArgs<T> r = {scratch.slabs, out.samples, size, splits, first};
    const int64_t reduce_blocks = std::min<int64_t>(ceil_div(size, kThreads), 4096);
    if (const int error = launch(reduce_kernel<T>, reduce_blocks, 0, stream, r)) return error;
  }
  return 0;
}

// Calls f with the engines of the scores and of the gradients. kFloat32 spends six products of
// planes on the scores, because 1/T multiplies their error.
template <typename T, class F>
int with_engines(const LogPpkSizes& s, const Plan<T>& plan, const F& f) {
  if constexpr (sizeof(T) == 4) {
    if (plan.tensor_cores) {
      return s.options.precision == kFast ? f(Mma<2>{}, Mma<2>{}) : f(Mma<3>{}, Mma<2>{});
    }
  }
  return f(Ffma<T>{}, Ffma<T>{});
}

template <bool kProxyNca, typename T>
int backward(const LogPpkSizes& s, const LogPpkInputs<T>& in, const T* grad, const double* partial,
             const T* max_lse, const void* saved_bytes, void* scratch_bytes,
             const LogPpkGradients<T>& out, void* stream) {
  if (s.B == 0) return 0;
  const Plan<T> plan = make_plan<T>(s);
  PairArgs<T> a = {};
  a.p = make_problem(s, in, plan);
  a.grad = grad;
  a.partial = partial;
  a.max_lse = max_lse;
  const bool prepared = saved_bytes && plan.keep_panels;
  Arena arena(scratch_bytes);
  const BackwardScratch<T> scratch(plan, !prepared, s.N * s.B * s.D, arena);
  a.out = scratch.pairs;
  Panel<T> panel = scratch.panel;
  if (saved_bytes) {
    Arena saved_arena(const_cast<void*>(saved_bytes));  // only read from here on
    const Saved<T> saved(plan, saved_arena);
    a.saved = saved.pairs;
    if (prepared) panel = saved.panel;
  }
  return with_engines(s, plan, [&](auto score, auto gradient) {
    return run_backward<decltype(score), decltype(gradient), kProxyNca>(plan, a, panel, prepared,
                                                                        scratch, out, stream);
  });
}

}  // namespace
}  // namespace ppk

template <typename T>
SavedShape proxy_nca_saved_cuda(const LogPpkSizes& sizes) {
  if (sizes.B == 0) return {1, 0};
  ppk::Arena arena(nullptr);
  ppk::Saved<T>(ppk::make_plan<T>(sizes), arena);
  return {1, arena.size() / int64_t(sizeof(T))};
}

template <typename T>
int64_t log_ppk_forward_scratch_bytes_cuda(const LogPpkSizes& sizes) {
  if (sizes.B == 0) return 0;
  ppk::Arena arena(nullptr);
  ppk::ForwardScratch<T>(ppk::make_plan<T>(sizes), true, arena);
  return arena.size();
}

template <typename T>
int64_t log_ppk_backward_scratch_bytes_cuda(const LogPpkSizes& sizes) {
  if (sizes.B == 0) return 0;
  ppk::Arena arena(nullptr);
  ppk::BackwardScratch<T>(ppk::make_plan<T>(sizes), true, sizes.N * sizes.B * sizes.D, arena);
  return arena.size();
}

template <typename T>
int proxy_nca_cuda(const LogPpkSizes& s, const LogPpkInputs<T>& in, T* losses, double* partial,
                   void* saved_bytes, void* scratch_bytes, void* stream) {
  using namespace ppk;
  if (s.B == 0) return 0;
  const Plan<T> plan = make_plan<T>(s);
  Arena saved_arena(saved_bytes), arena(scratch_bytes);
  const Saved<T> saved(plan, saved_arena);
  const ForwardScratch<T> scratch(plan, !plan.keep_panels, arena);
  ForwardArgs<T> a = {};
  a.p = make_problem(s, in, plan);
  a.saved = saved.pairs;
  a.state = scratch.state;
  a.splits = plan.splits;
  a.partial = partial;
  a.losses = losses;
  if constexpr (sizeof(T) == 4) {
    if (plan.tensor_cores) {
      const OwnArgs<T> own = {a.p, a.saved.own, make_log_normalizer_plan<double>(s.D)};
      const int64_t blocks = ceil_div(plan.rows, kWarps);
      if (const int error = launch(own_kernel<T, kMmaTile>, blocks, 0, stream, own)) return error;
    }
  }
  const Panel<T>& panel = plan.keep_panels ? saved.panel : scratch.panel;
  return with_engines(s, plan, [&](auto score, auto) {
    return run_forward<decltype(score)>(plan, a, panel, stream);
  });
}

template <typename T>
int proxy_nca_backward_cuda(const LogPpkSizes& sizes, const LogPpkInputs<T>& in, const T* grad,
                            const double* partial, const void* saved, void* scratch,
                            const LogPpkGradients<T>& out, void* stream) {
  return ppk::backward<true>(sizes, in, grad, partial, static_cast<const T*>(nullptr), saved,
                             scratch, out, stream);
}

template <typename T>
int log_ppk_cuda(const LogPpkSizes& s, const LogPpkInputs<T>& in, T* values, T* saved,
                 double* common, void* scratch_bytes, void* stream) {
  using namespace ppk;
  if (s.B == 0) return 0;
  const Plan<T> plan = make_plan<T>(s);
  Arena arena(scratch_bytes);
  const ForwardScratch<T> scratch(plan, true, arena);
  const LogPpkArgs<T> a = {make_problem(s, in, plan), {}, values, saved, common};
  return with_engines(s, plan, [&](auto score, auto) {
    return run_log_ppk<decltype(score)>(plan, a, scratch.panel, stream);
  });
}

template <typename T>
int log_ppk_backward_cuda(const LogPpkSizes& sizes, const LogPpkInputs<T>& in, const T* grad,
                          const T* saved, void* scratch, const LogPpkGradients<T>& out,
                          void* stream) {
  return ppk::backward<false>(sizes, in, grad, nullptr, saved, nullptr, scratch, out, stream);
}

#define NIVMF_INSTANTIATE(T)                                                                    \
  template SavedShape proxy_nca_saved_cuda<T>(const LogPpkSizes&);                              \
  template int64_t log_ppk_forward_scratch_bytes_cuda<T>(const LogPpkSizes&);                   \
  template int64_t log_ppk_backward_scratch_bytes_cuda<T>(const LogPpkSizes&);                  \
  template int proxy_nca_cuda(const LogPpkSizes&, const LogPpkInputs<T>&, T*, double*, void*,   \
                              void*, void*);                                                    \
  template int proxy_nca_backward_cuda(const LogPpkSizes&, const LogPpkInputs<T>&, const T*,    \
                                       const double*, const void*, void*,                       \
                                       const LogPpkGradients<T>&, void*);                       \
  template int log_ppk_cuda(const LogPpkSizes&, const LogPpkInputs<T>&, T*, T*, double*, void*, \
                            void*);                                                             \
  template int log_ppk_backward_cuda(const LogPpkSizes&, const LogPpkInputs<T>&, const T*,      \
                                     const T*, void*, const LogPpkGradients<T>&, void*);
NIVMF_INSTANTIATE(float)
NIVMF_INSTANTIATE(double)
#undef NIVMF_INSTANTIATE

}  // namespace nivmf
