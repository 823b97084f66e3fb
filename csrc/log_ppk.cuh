// The score z of a pair, a sample row x and a proxy j (`score` in nivmf_fast/reference/model.py):
//   z = num / sqrt(1 + delta) - (D/2) log1p(delta) + bias,  num = x . linear_j,
//   delta = (x o x) . spread_j.  In: samples [N, B, D], a panel of prepared proxies.
// Out: num and delta of a tile of kTile x kTile pairs, in shared memory. Called by
// log_ppk_forward.cuh and log_ppk_backward.cuh. Design: docs/design/log_ppk_cuda.md.
#pragma once

#include "engines.cuh"
#include "host_device.h"
#include "log_ppk_plan.h"

namespace nivmf {
namespace ppk {

// ---- the problem --------------------------------------------------------------------------------

template <typename T>
struct Problem : LogPpkInputs<T> {
  int64_t B, P;
  int N, D;
  bool exact, projection;
  bool vector;  // rows of `samples` are aligned to 16 bytes
  int images_per_block, blocks_per_image, row_blocks;
  int pitch;  // D padded to whole tiles, the row length of linear and spread

  NIVMF_D bool has_spread() const { return exact || projection; }
};

struct Row {
  int64_t image, sample;
  int slot;  // index among the block's images
  bool valid;
};

// Rows are ordered image by image: a block holds whole images (or samples of one image, if
// N > kTile), so a tile of pairs is dead once it is dead for those few images. Rows that no whole
// image fills stay empty (4 of 64 at N = 5).
template <int kTile, typename T>
NIVMF_D Row row_of(const Problem<T>& p, int block, int local) {
  if (p.N <= kTile) {
    const int slot = local / p.N;
    const int64_t image = int64_t(block) * p.images_per_block + slot;
    return {image, local - slot * p.N, slot, slot < p.images_per_block && image < p.B};
  }
  const int64_t sample = int64_t(block % p.blocks_per_image) * kTile + local;
  return {block / p.blocks_per_image, sample, 0, sample < p.N};
}

// The inverse of row_of: block * kTile + local.
template <int kTile, typename T>
NIVMF_D int64_t padded_row(const Problem<T>& p, int64_t image, int sample) {
  if (p.N <= kTile) {
    const int64_t block = image / p.images_per_block;
    return block * kTile + (image - block * p.images_per_block) * p.N + sample;
  }
  return (image * p.blocks_per_image + sample / kTile) * kTile + sample % kTile;
}

template <typename T>
NIVMF_D int64_t sample_offset(const Problem<T>& p, const Row& row) {
  return row_offset(row.sample, row.image, p.B, p.D);
}

// 1/T; NaN for a temperature at or below 0.
template <typename T>
NIVMF_D double inverse_temperature(const Problem<T>& p) {
  const double t = double(*p.temperature);
  return t > 0 ? 1 / t : double(NAN);
}

constexpr double kLog2e = 1.44269504088896340736;

// ---- the score of a pair and its derivatives ----------------------------------------------------

template <typename T>
struct Score {
  T z, by_num, by_delta;
};

template <typename T>
NIVMF_D Score<T> score(const Problem<T>& p, const Products<T>& v, T bias) {
  const T inverse = 1 / (1 + v.delta), half_dim = T(p.D) / 2;
  Score<T> out;
  out.by_num = p.projection ? 1 / std::sqrt(1 + v.delta) : T(1);
  out.z = v.num * out.by_num;
  out.by_delta = p.projection ? -out.z * inverse / 2 : T(0);
  if (p.exact) {
    out.z -= half_dim * std::log1p(v.delta);
    out.by_delta -= half_dim * inverse;
  }
  out.z += bias;
  return out;
}

// A maximum to subtract; 0 for an empty one, since exp(-inf - -inf) is NaN.
template <typename T>
NIVMF_D T as_shift(T max) {
  return max == -T(INFINITY) ? T(0) : max;
}

// The products of a tile, kept for the backward; null if the workspace is too small for them.
template <class Engine, typename T>
NIVMF_D Products<T>* kept_tile(Products<T>* kept, const Problem<T>& p, int64_t first,
                               int row_block) {
  constexpr int kTile = Engine::kTile;
  return kept ? kept + (first / kTile * p.row_blocks + row_block) * (kTile * kTile) : nullptr;
}

// The index in SavedPairs::max of an image's largest score in a tile.
template <typename T>
NIVMF_D int64_t max_at(const Problem<T>& p, int64_t block, int row_block, int slot) {
  return (block * p.row_blocks + row_block) * p.images_per_block + slot;
}

// The shared memory of the kernels on pairs.
template <class Engine>
struct PairShared {
  using T = typename Engine::T;
  static constexpr int kTile = Engine::kTile;
  static constexpr int kLanes = kThreads / kTile;  // threads that share a row
  union {
    alignas(16) T stage[2][3][Tile<T, kTile>::kElements];
    struct {  // after the products; padded so that rows read together are on different banks
      T num[kTile][kTile + kLanes], delta[kTile][kTile + kLanes];
    };
  };
  int64_t offset[kTile];  // of the row's sample; -1 for an empty row
  int64_t label[kTile];   // of the row's image; -1 if no proxy has it
  T bias[kTile];
  T tile_max[kTile], tile_sum[kTile];  // of the tile, per row
  T max[kTile], sum[kTile];            // over the tiles so far, per row: the forward's
  T lse[kTile], own_max[kTile], own_lse[kTile], grad[kTile];  // the backward's, with `max`
  T scale;                                                    // log2(e) / T
  T column[kThreads];
  double warp[kWarps];
  int flag, row_block, end;
};

template <class S, typename T>
NIVMF_D void load_rows(S& s, const Problem<T>& p, int row_block) {
  if (int(threadIdx.x) < S::kTile) {
    const Row row = row_of<S::kTile>(p, row_block, threadIdx.x);
    s.offset[threadIdx.x] = row.valid ? sample_offset(p, row) : -1;
    const int64_t label = row.valid && p.labels ? p.labels[row.image] : -1;
    s.label[threadIdx.x] = label < p.P ? label : -1;
  }
  if (threadIdx.x == 0) {
    s.scale = T(inverse_temperature(p) * kLog2e);
    s.row_block = row_block;
  }
  __syncthreads();
}

template <class S, typename T>
NIVMF_D void load_bias(S& s, const Panel<T>& panel, int block) {
  const int64_t j = int64_t(block) * S::kTile + threadIdx.x;
  if (int(threadIdx.x) < S::kTile) {
    s.bias[threadIdx.x] = j < panel.count ? T(panel.bias[j] - *panel.base) : T(0);
  }
}

// num and delta of one tile of pairs, left in shared memory so that loops over pairs can run along
// rows or columns without unrolling.
template <class Engine, typename T>
NIVMF_D void pair_products(const Problem<T>& p, const Panel<T>& panel, int block,
                           PairShared<Engine>& s) {
  constexpr int kTile = Engine::kTile, kDepth = Tile<T, kTile>::kDepth;
  using Layout = IndexMajor<T, kTile>;
  const bool two = p.has_spread();
  Engine num, delta;
  const auto load = [&](int stage, int slab, int) {
    load_tile<Layout, T, kTile>(s.stage[stage][0], p.vector, [&](int row, int column) -> const T* {
      column += slab * kDepth;
      return s.offset[row] >= 0 && column < p.D ? p.samples + s.offset[row] + column : nullptr;
    });
    const auto at = [&](int row, int column) {
      return int64_t(block * kTile + row) * p.pitch + slab * kDepth + column;
    };
    load_tile<Layout, T, kTile>(s.stage[stage][1], true, [&](int row, int column) {
      return panel.linear + at(row, column);
    });
    if (!two) return;
    load_tile<Layout, T, kTile>(s.stage[stage][2], true, [&](int row, int column) {
      return panel.spread + at(row, column);
    });
  };
  const auto add = [&](int stage) {
    num.template add<Layout, Layout, false, false>(s.stage[stage][0], s.stage[stage][1]);
    if (two) delta.template add<Layout, Layout, true, false>(s.stage[stage][0], s.stage[stage][2]);
  };
  pipeline<1>(0, (p.D + kDepth - 1) / kDepth, [](int) { return true; }, load, add);
  Engine::for_each(num, delta, [&](int r, int c, T n, T d) {
    s.num[r][c] = n;
    s.delta[r][c] = d;
  });
}

}  // namespace ppk
}  // namespace nivmf
