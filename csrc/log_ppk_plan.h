// Memory of log-PPK on CUDA: tiles, chunks of proxies that fit the workspace, and the arrays in
// `saved` and `scratch`. In: the sizes and options of a call, and whether the device has tensor
// cores. Out: a Plan, and pointers into the caller's buffers, or the bytes they need.
// Called by log_ppk_kernel.cu; includes no CUDA, so that tests can call it on the host.
// Design: docs/design/log_ppk_cuda.md.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "log_ppk.h"

namespace nivmf {
namespace ppk {

// The tiles of the two engines. Up to kSmallProxies launches dominate, not flops: Ffma's small
// tiles are used.
constexpr int kFfmaTile = 32, kMmaTile = 64;
constexpr int64_t kSmallProxies = 512;

// The number of blocks that fills a GPU, and of proxies that makes a split worthwhile. Constants,
// so that results do not depend on the number of multiprocessors.
constexpr int64_t kEnoughBlocks = 1056, kProxiesPerSplit = 1536, kMaxSplits = 16;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---- arrays -------------------------------------------------------------------------------------

template <typename T>
struct alignas(2 * sizeof(T)) Products {
  T num, delta;
};

// A range of proxies, prepared: `linear` and `spread` [.., pitch] with zeros in the padding, the
// other arrays with one element per proxy.
template <typename T>
struct Panel {
  T *linear, *spread;
  double* bias;     // less log C_D(0)
  double* base;     // the bias of proxy 0, subtracted from all scores
  T* inverse_kbar;  // 1 / kbar
  T* bias_slope;    // (d bias / d|K mu|) / |K mu|
  int64_t first;    // the proxy of row 0
  int64_t count;    // proxies
  int blocks;       // tiles
};

// Arrays that proxy-NCA's forward leaves for its backward; each may be null.
template <typename T>
struct SavedPairs {
  Products<T>* own;  // [padded rows], at the own proxy; with tensor cores only
  T* max;            // [proxy blocks, row blocks, images_per_block]: of an image's scores in a tile
  Products<T>* kept;  // [proxy blocks, row blocks, kTile, kTile]
};

// State that the blocks of a forward share.
template <typename T>
struct ForwardState {
  T *max, *sum;       // [splits, padded rows], carried from chunk to chunk
  T* own_z;           // [padded rows]
  unsigned* tickets;  // one per group of row blocks that share images
};

// Arrays that the first half of the backward leaves for the second.
template <typename T>
struct PairGradients {
  T *by_num, *by_delta;    // [padded rows, panel.blocks * kTile]
  T* by_bias;              // [row blocks, panel.blocks * kTile]: sums over the block's rows
  unsigned char* live;     // [row blocks, panel.blocks]
  double* by_temperature;  // one per block
};

// ---- how large they are -------------------------------------------------------------------------

// Hands out pieces of a buffer; without one, only adds up their size.
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

// Half of the workspace bounds the saved arrays, half the scratch of one call, whether or not
// anything is kept: without options.keep a call saves the own products alone.
template <typename T>
struct Plan {
  bool tensor_cores;
  int tile;
  int images_per_block, blocks_per_image, row_blocks, blocks, pitch;  // blocks: of proxies
  int64_t rows, proxies;                                              // padded to tiles
  bool keep_max, keep_panels, keep_scores;
  int chunk, back_chunk;  // blocks of proxies that one launch takes, forward and backward
  int splits;             // of a forward chunk
  int back_splits;

  static bool wants_tensor_cores(const LogPpkSizes& s) {
    return sizeof(T) == 4 && s.P > kSmallProxies;
  }

  Plan(const LogPpkSizes& s, bool has_tensor_cores) {
    tensor_cores = has_tensor_cores && wants_tensor_cores(s);
    tile = tensor_cores ? kMmaTile : kFfmaTile;
    images_per_block = s.N <= tile ? int(tile / s.N) : 1;
    blocks_per_image = int(ceil_div(s.N, tile));
    row_blocks = int(ceil_div(s.B, images_per_block) * blocks_per_image);
    blocks = int(ceil_div(s.P, tile));
    pitch = int(ceil_div(s.D, tile) * tile);
    rows = int64_t(row_blocks) * tile;
    proxies = int64_t(blocks) * tile;

    const int64_t half = s.options.workspace / 2;
    int64_t left = half;
    const auto fits = [&](int64_t bytes) {
      const bool yes = s.options.keep && bytes <= left;
      if (yes) left -= bytes;
      return yes;
    };
    keep_max = fits(max_count() * sizeof(T));
    keep_panels = fits(proxy_bytes() * proxies);
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
  int64_t max_count() const { return int64_t(blocks) * row_blocks * images_per_block; }
  int groups() const { return row_blocks / blocks_per_image; }  // of row blocks that share images
  bool slabs() const { return back_splits > 1 || back_chunk < blocks; }

  Panel<T> take_panel(int panel_blocks, Arena& arena) const {
    const int64_t count = int64_t(panel_blocks) * tile;
    Panel<T> panel = {};
    panel.linear = arena.template take<T>(count * pitch);
    panel.spread = arena.template take<T>(count * pitch);
    panel.bias = arena.template take<double>(count);
    panel.base = arena.template take<double>(1);
    panel.inverse_kbar = arena.template take<T>(count);
    panel.bias_slope = arena.template take<T>(count);
    return panel;
  }
};

// The layout of `saved`. The own products come first, then the maxima.
template <typename T>
struct Saved {
  SavedPairs<T> pairs = {};
  Panel<T> panel = {};

  Saved(const Plan<T>& plan, Arena& arena) {
    if (plan.tensor_cores) pairs.own = arena.template take<Products<T>>(plan.rows);
    if (plan.keep_max) pairs.max = arena.template take<T>(plan.max_count());
    if (plan.keep_panels) panel = plan.take_panel(plan.blocks, arena);
    if (plan.keep_scores) pairs.kept = arena.template take<Products<T>>(plan.rows * plan.proxies);
  }
};

template <typename T>
struct ForwardScratch {
  Panel<T> panel = {};
  ForwardState<T> state = {};

  ForwardScratch(const Plan<T>& plan, bool own_panel, Arena& arena) {
    if (own_panel) panel = plan.take_panel(plan.chunk, arena);
    state.max = arena.template take<T>(plan.splits * plan.rows);
    state.sum = arena.template take<T>(plan.splits * plan.rows);
    state.own_z = arena.template take<T>(plan.rows);
    state.tickets = arena.template take<unsigned>(plan.groups());
  }
};

template <typename T>
struct BackwardScratch {
  Panel<T> panel = {};
  PairGradients<T> pairs = {};
  T* slabs = nullptr;  // [splits, N, B, D]
  double* temperature_sum;

  BackwardScratch(const Plan<T>& plan, bool own_panel, int64_t samples_size, Arena& arena) {
    if (own_panel) panel = plan.take_panel(plan.back_chunk, arena);
    const int64_t proxies = int64_t(plan.back_chunk) * plan.tile;
    const int64_t tiles = int64_t(plan.back_chunk) * plan.row_blocks;
    pairs.by_num = arena.template take<T>(plan.rows * proxies);
    pairs.by_delta = arena.template take<T>(plan.rows * proxies);
    pairs.by_bias = arena.template take<T>(plan.row_blocks * proxies);
    if (plan.slabs()) slabs = arena.template take<T>(plan.back_splits * samples_size);
    pairs.live = arena.template take<unsigned char>(tiles);
    pairs.by_temperature = arena.template take<double>(tiles);
    temperature_sum = arena.template take<double>(1);
  }
};

}  // namespace ppk
}  // namespace nivmf
