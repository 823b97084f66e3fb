// The launchers of log_ppk.cuh: which tiles, how the proxies are cut into chunks that fit the
// workspace, who keeps what.
//
// One chunk and a warm `saved` make a training step four launches: prepare, forward; pair, gradient
// (five on tensor cores, with the own proxies' scores, six with the ordered sum of d_samples).
// Nothing here depends on values or waits for the device.
#include <algorithm>

#include "log_ppk.h"
#include "log_ppk_backward.cuh"
#include "log_ppk_forward.cuh"

namespace nivmf {
namespace ppk {
namespace {

// Up to here launches cost more than flops: small tiles and FFMA.
constexpr int64_t kSmallProxies = 512;

// Blocks that keep a GPU busy, and how many slabs make a block worth while. Constants, so that
// results do not depend on the number of multiprocessors.
constexpr int64_t kEnoughBlocks = 1056, kProxiesPerSplit = 1536, kMaxSplits = 16;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Hands out pieces of a buffer, or, without one, finds how large it must be.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}
  template <typename T>
  T* take(int64_t count) {
    char* at = base_ ? base_ + size_ : nullptr;
    size_ += ceil_div(count * int64_t(sizeof(T)), 256) * 256;
    return reinterpret_cast<T*>(at);
  }
  int64_t size() const { return size_; }

 private:
  char* base_;
  int64_t size_ = 0;
};

template <typename T>
struct Plan {
  bool tensor_cores;
  int tile;
  int images_per_block, blocks_per_image, row_blocks, blocks, pitch;  // `blocks` of proxies
  int64_t rows, proxies;                                              // padded to tiles
  bool keep_maxima, keep_panels, keep_scores;
  int chunk, back_chunk;  // blocks of proxies that one launch takes, forward and backward
  int splits;             // of a forward chunk
  int back_splits;

  explicit Plan(const LogPpkSizes& s) {
    tensor_cores = sizeof(T) == 4 && s.proxies > kSmallProxies && has_tensor_cores();
    tile = tensor_cores ? Mma<2>::kTile : Ffma<T>::kTile;
    images_per_block = s.samples <= tile ? int(tile / s.samples) : 1;
    blocks_per_image = int(ceil_div(s.samples, tile));
    row_blocks = int(ceil_div(s.images, images_per_block) * blocks_per_image);
    blocks = int(ceil_div(s.proxies, tile));
    pitch = int(ceil_div(s.dim, tile) * tile);
    rows = int64_t(row_blocks) * tile;
    proxies = int64_t(blocks) * tile;

    const int64_t half = s.options.workspace / 2, panel = proxy_bytes() * proxies;
    int64_t left = half;
    const auto fits = [&](int64_t bytes) {
      const bool yes = s.options.keep && bytes <= left;
      if (yes) left -= bytes;
      return yes;
    };
    keep_maxima = fits(int64_t(blocks) * row_blocks * images_per_block * sizeof(T));
    keep_panels = fits(panel);
    keep_scores = fits(2 * rows * proxies * sizeof(T));

    const auto chunk_of = [&](int64_t bytes) {
      return int(std::clamp<int64_t>(half / std::max<int64_t>(bytes * tile, 1), 1, blocks));
    };
    chunk = keep_panels ? blocks : chunk_of(proxy_bytes());
    back_chunk = chunk_of((keep_panels ? 0 : proxy_bytes()) + (2 * rows + row_blocks) * sizeof(T));
    splits = int(std::clamp<int64_t>(kEnoughBlocks / row_blocks, 1, chunk));
    back_splits = int(std::min(ceil_div(int64_t(back_chunk) * tile, kProxiesPerSplit), kMaxSplits));
  }

  int64_t proxy_bytes() const { return 2 * pitch * sizeof(T) + sizeof(double) + 2 * sizeof(T); }
  bool slabs() const { return back_splits > 1 || back_chunk < blocks; }
};

// Everything that lives in `saved` and `scratch`.
template <typename T>
struct Saved {
  Products<T>*own, *kept = nullptr;
  T* maxima = nullptr;
  Panel<T> panel = {};

  Saved(const Plan<T>& plan, Arena& arena) {
    own = plan.tensor_cores ? arena.template take<Products<T>>(plan.rows) : nullptr;
    if (plan.keep_maxima) {
      maxima =
          arena.template take<T>(int64_t(plan.blocks) * plan.row_blocks * plan.images_per_block);
    }
    if (plan.keep_panels) panel = take_panel(plan, plan.blocks, arena);
    if (plan.keep_scores) kept = arena.template take<Products<T>>(plan.rows * plan.proxies);
  }

  static Panel<T> take_panel(const Plan<T>& plan, int blocks, Arena& arena) {
    const int64_t proxies = int64_t(blocks) * plan.tile;
    Panel<T> panel = {};
    panel.linear = arena.template take<T>(proxies * plan.pitch);
    panel.spread = arena.template take<T>(proxies * plan.pitch);
    panel.bias = arena.template take<double>(proxies);
    panel.base = arena.template take<double>(1);
    panel.inverse_scale = arena.template take<T>(proxies);
    panel.bias_slope = arena.template take<T>(proxies);
    return panel;
  }
};

template <typename T>
struct ForwardScratch {
  Panel<T> panel = {};
  T *top, *sum, *own_z;
  unsigned* tickets;
  int ticket_count;

  ForwardScratch(const Plan<T>& plan, bool own_panel, Arena& arena) {
    if (own_panel) panel = Saved<T>::take_panel(plan, plan.chunk, arena);
    top = arena.template take<T>(plan.splits * plan.rows);
    sum = arena.template take<T>(plan.splits * plan.rows);
    own_z = arena.template take<T>(plan.rows);
    ticket_count = plan.row_blocks / plan.blocks_per_image;
    tickets = arena.template take<unsigned>(ticket_count);
  }
};

template <typename T>
struct BackwardScratch {
  Panel<T> panel = {};
  T *by_num, *by_delta, *by_bias, *slabs = nullptr;
  unsigned char* alive;
  double *by_temperature, *temperature_sum;

  BackwardScratch(const Plan<T>& plan, bool own_panel, int64_t samples_size, Arena& arena) {
    if (own_panel) panel = Saved<T>::take_panel(plan, plan.back_chunk, arena);
    const int64_t proxies = int64_t(plan.back_chunk) * plan.tile;
    const int64_t tiles = int64_t(plan.back_chunk) * plan.row_blocks;
    by_num = arena.template take<T>(plan.rows * proxies);
    by_delta = arena.template take<T>(plan.rows * proxies);
    by_bias = arena.template take<T>(plan.row_blocks * proxies);
    if (plan.slabs()) slabs = arena.template take<T>(plan.back_splits * samples_size);
    alive = arena.template take<unsigned char>(tiles);
    by_temperature = arena.template take<double>(tiles);
    temperature_sum = arena.template take<double>(1);
  }
};

template <typename T>
Problem<T> make_problem(const LogPpkSizes& s, const LogPpkInputs<T>& in, const Plan<T>& plan) {
  Problem<T> p = {};
  p.samples = in.samples;
  p.loc = in.loc;
  p.concentration = in.concentration;
  p.temperature = in.temperature;
  p.labels = in.labels;
  p.B = s.images;
  p.P = s.proxies;
  p.N = int(s.samples);
  p.D = int(s.dim);
  p.exact = s.options.exact;
  p.projection = s.options.projection;
  p.vector = s.dim * sizeof(T) % 16 == 0 && reinterpret_cast<uintptr_t>(in.samples) % 16 == 0;
  p.images_per_block = plan.images_per_block;
  p.blocks_per_image = plan.blocks_per_image;
  p.row_blocks = plan.row_blocks;
  p.pitch = plan.pitch;
  return p;
}

// The part of a panel of all proxies, or the panel that holds a chunk alone, for the chunk that
// starts at block `begin`.
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
    panel.inverse_scale += panel.first;
    panel.bias_slope += panel.first;
  }
  return panel;
}

template <typename T>
int prepare(const Problem<T>& p, const Panel<T>& panel, const Plan<T>& plan, unsigned* tickets,
            int ticket_count, void* stream) {
  const PrepareArgs<T> args = {p,       panel,        plan.tile,
                               tickets, ticket_count, make_log_normalizer_plan<double>(p.D)};
  return launch(prepare_kernel<T>, ceil_div(int64_t(panel.blocks) * plan.tile, kWarps), 0, stream,
                args);
}

template <class Engine, typename T>
int run_forward(const LogPpkSizes& s, const Plan<T>& plan, ForwardArgs<T> a, const Saved<T>& saved,
                const ForwardScratch<T>& scratch, void* stream) {
  constexpr size_t kShared = sizeof(PairShared<Engine>);
  for (int begin = 0; begin < plan.blocks; begin += plan.chunk) {
    a.panel = chunk_panel(plan.keep_panels ? saved.panel : scratch.panel, plan, plan.keep_panels,
                          s.proxies, begin, plan.chunk);
    a.first = begin == 0;
    a.last = begin + plan.chunk >= plan.blocks;
    a.blocks_per_split = int(ceil_div(a.panel.blocks, a.splits));
    if (const int error = prepare(a.p, a.panel, plan, a.first ? a.tickets : nullptr,
                                  scratch.ticket_count, stream)) {
      return error;
    }
    const int64_t blocks = int64_t(a.p.row_blocks) * a.splits;
    if (const int error = launch(forward_kernel<Engine>, blocks, kShared, stream, a)) return error;
  }
  return 0;
}

template <class Engine, typename T>
int run_log_ppk(const LogPpkSizes& s, const Plan<T>& plan, LogPpkArgs<T> a,
                const ForwardScratch<T>& scratch, void* stream) {
  constexpr size_t kShared = sizeof(PairShared<Engine>);
  for (int begin = 0; begin < plan.blocks; begin += plan.chunk) {
    a.panel = chunk_panel(scratch.panel, plan, false, s.proxies, begin, plan.chunk);
    if (const int error = prepare(a.p, a.panel, plan, nullptr, 0, stream)) return error;
    const int64_t blocks = int64_t(plan.row_blocks / plan.blocks_per_image) * a.panel.blocks;
    if (const int error = launch(log_ppk_kernel<Engine>, blocks, kShared, stream, a)) return error;
  }
  return 0;
}

// ScoreEngine recomputes scores and must be the forward's; GradientEngine makes the products.
template <class ScoreEngine, class GradientEngine, bool kProxyNca, typename T>
int run_backward(const LogPpkSizes& s, const Plan<T>& plan, PairArgs<T> a, const Panel<T>* kept,
                 const BackwardScratch<T>& scratch, const LogPpkGradients<T>& out, void* stream) {
  const int64_t size = s.samples * s.images * s.dim;
  for (int begin = 0; begin < plan.blocks; begin += plan.back_chunk) {
    const bool first = begin == 0, last = begin + plan.back_chunk >= plan.blocks;
    a.panel = chunk_panel(kept ? *kept : scratch.panel, plan, kept != nullptr, s.proxies, begin,
                          plan.back_chunk);
    if (!kept) {
      if (const int error = prepare(a.p, a.panel, plan, nullptr, 0, stream)) return error;
    }
    if (const int error =
            launch(pair_kernel<ScoreEngine, kProxyNca>, int64_t(plan.row_blocks) * a.panel.blocks,
                   sizeof(PairShared<ScoreEngine>), stream, a)) {
      return error;
    }
    GradientArgs<T> g = {};
    g.p = a.p;
    g.panel = a.panel;
    g.by_num = a.by_num;
    g.by_delta = a.by_delta;
    g.by_bias = a.by_bias;
    g.alive = a.alive;
    g.by_temperature = a.by_temperature;
    g.splits = plan.back_splits;
    g.blocks_per_split = int(ceil_div(a.panel.blocks, plan.back_splits));
    g.first = first;
    g.last = last;
    g.d_samples = scratch.slabs ? scratch.slabs : out.samples;
    g.d_loc = out.loc;
    g.d_concentration = out.concentration;
    g.temperature_sum = scratch.temperature_sum;
    g.d_temperature = out.temperature;
    const int64_t tiles = plan.pitch / plan.tile;
    const int64_t blocks = tiles * (int64_t(plan.row_blocks) * g.splits + a.panel.blocks) + 1;
    if (const int error = launch(gradient_kernel<GradientEngine>, blocks,
                                 sizeof(GradientShared<GradientEngine>), stream, g)) {
      return error;
    }
    if (!scratch.slabs) continue;
    const ReduceArgs<T> r = {scratch.slabs, out.samples, size, g.splits, first};
    const int64_t reduce_blocks = std::min<int64_t>(ceil_div(size, kThreads), 4096);
    if (const int error = launch(reduce_kernel<T>, reduce_blocks, 0, stream, r)) return error;
  }
  return 0;
}

// Calls f with the engines of scores and of gradients: "float32" pays six products for scores,
// whose error T multiplies.
template <typename T, class F>
int with_engines(const Plan<T>& plan, bool fast, const F& f) {
  if constexpr (sizeof(T) == 4) {
    if (plan.tensor_cores) {
      return fast ? f(Mma<2>{}, Mma<2>{}) : f(Mma<3>{}, Mma<2>{});
    }
  }
  return f(Ffma<T>{}, Ffma<T>{});
}

template <bool kProxyNca, typename T>
int backward(const LogPpkSizes& s, const LogPpkInputs<T>& in, const T* grad, const double* partial,
             const T* rest, const void* saved_bytes, void* scratch_bytes,
             const LogPpkGradients<T>& out, void* stream) {
  if (s.images == 0) return 0;
  const Plan<T> plan(s);
  PairArgs<T> a = {};
  a.p = make_problem(s, in, plan);
  a.grad = grad;
  a.partial = partial;
  a.rest = rest;
  Panel<T> kept = {};
  const bool keeps = saved_bytes && plan.keep_panels;
  if (saved_bytes) {
    Arena arena(const_cast<void*>(saved_bytes));  // only read from here on
    const Saved<T> saved(plan, arena);
    a.own = saved.own;
    a.maxima = saved.maxima;
    a.kept = saved.kept;
    kept = saved.panel;
  }
  Arena arena(scratch_bytes);
  const BackwardScratch<T> scratch(plan, !keeps, s.samples * s.images * s.dim, arena);
  a.by_num = scratch.by_num;
  a.by_delta = scratch.by_delta;
  a.by_bias = scratch.by_bias;
  a.alive = scratch.alive;
  a.by_temperature = scratch.by_temperature;
  return with_engines(plan, s.options.precision == kFast, [&](auto score, auto gradient) {
    return run_backward<decltype(score), decltype(gradient), kProxyNca>(
        s, plan, a, keeps ? &kept : nullptr, scratch, out, stream);
  });
}

}  // namespace
}  // namespace ppk

template <typename T>
SavedShape proxy_nca_saved_cuda(const LogPpkSizes& sizes) {
  if (sizes.images == 0) return {1, 0};
  ppk::Arena arena(nullptr);
  ppk::Saved<T>(ppk::Plan<T>(sizes), arena);
  return {1, arena.size() / int64_t(sizeof(T))};
}

template <typename T>
int64_t log_ppk_forward_scratch_bytes_cuda(const LogPpkSizes& sizes) {
  if (sizes.images == 0) return 0;
  ppk::Arena arena(nullptr);
  ppk::ForwardScratch<T>(ppk::Plan<T>(sizes), true, arena);
  return arena.size();
}

template <typename T>
int64_t log_ppk_backward_scratch_bytes_cuda(const LogPpkSizes& sizes) {
  if (sizes.images == 0) return 0;
  ppk::Arena arena(nullptr);
  ppk::BackwardScratch<T>(ppk::Plan<T>(sizes), true, sizes.samples * sizes.images * sizes.dim,
                          arena);
  return arena.size();
}

template <typename T>
int proxy_nca_cuda(const LogPpkSizes& s, const LogPpkInputs<T>& in, T* losses, double* partial,
                   void* saved_bytes, void* scratch_bytes, void* stream) {
  using namespace ppk;
  if (s.images == 0) return 0;
  const Plan<T> plan(s);
  Arena saved_arena(saved_bytes), arena(scratch_bytes);
  const Saved<T> saved(plan, saved_arena);
  const ForwardScratch<T> scratch(plan, !plan.keep_panels, arena);
  ForwardArgs<T> a = {};
  a.p = make_problem(s, in, plan);
  a.splits = plan.splits;
  a.top = scratch.top;
  a.sum = scratch.sum;
  a.own_z = scratch.own_z;
  a.own = saved.own;
  a.maxima = saved.maxima;
  a.kept = saved.kept;
  a.tickets = scratch.tickets;
  a.partial = partial;
  a.losses = losses;
  if constexpr (sizeof(T) == 4) {
    if (plan.tensor_cores) {
      const OwnArgs<T> own = {a.p, saved.own, make_log_normalizer_plan<double>(s.dim)};
      const int64_t blocks = ceil_div(plan.rows, kWarps);
      if (const int error = launch(own_kernel<T, Mma<2>::kTile>, blocks, 0, stream, own))
        return error;
    }
  }
  return with_engines(plan, s.options.precision == kFast, [&](auto score, auto) {
    return run_forward<decltype(score)>(s, plan, a, saved, scratch, stream);
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
int log_ppk_cuda(const LogPpkSizes& s, const LogPpkInputs<T>& in, T* out, T* rest, double* common,
                 void* scratch_bytes, void* stream) {
  using namespace ppk;
  if (s.images == 0) return 0;
  const Plan<T> plan(s);
  Arena arena(scratch_bytes);
  const ForwardScratch<T> scratch(plan, true, arena);
  LogPpkArgs<T> a = {};
  a.p = make_problem(s, in, plan);
  a.out = out;
  a.rest = rest;
  a.common = common;
  return with_engines(plan, s.options.precision == kFast, [&](auto score, auto) {
    return run_log_ppk<decltype(score)>(s, plan, a, scratch, stream);
  });
}

template <typename T>
int log_ppk_backward_cuda(const LogPpkSizes& sizes, const LogPpkInputs<T>& in, const T* grad,
                          const T* rest, void* scratch, const LogPpkGradients<T>& out,
                          void* stream) {
  return ppk::backward<false>(sizes, in, grad, nullptr, rest, nullptr, scratch, out, stream);
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
