// The backward kernels. With g = dL/dz of a pair, G1 = g dz/dnum and G2 = g dz/ddelta:
//   dx = G1 linear + 2 x o (G2 spread),  dlinear = G1' x,  dspread = G2' (x o x).
// In: dL/dlosses [B] or dL/ds [B, P], the forward's maxima and log-sum-exps, and its saved arrays.
// Out: gradients of samples, loc, concentration and temperature. Launched by log_ppk_kernel.cu.
// Design: docs/design/log_ppk_cuda.md; derivation: docs/math.md, "Gradients of log-PPK".
#pragma once

#include "log_ppk.cuh"

namespace nivmf {
namespace ppk {

// ---- the backward, first half: G1 = dL/dnum and G2 = dL/ddelta of every pair --------------------
//
// A tile is dead if it contains no label and if, by the forward's maxima, each of its pairs has
// less than 2^-24 / (N P) of its image's softmax (2^-53 in float64): it is neither computed nor
// written nor read again (docs/math.md, "Dead tiles"). A live tile recomputes its scores, or takes
// the kept ones, and leaves two numbers per pair in the workspace, from which plain products make
// the gradients. Bound by the two products or, with kept scores, by memory: 16 bytes per pair.

template <typename T>
struct PairArgs {
  Problem<T> p;
  Panel<T> panel;
  const T* grad;          // [B], or [B, P] for log-PPK
  const double* partial;  // [4, B]
  const T* max_lse;       // [2, B, P], log-PPK's
  SavedPairs<T> saved;
  PairGradients<T> out;
};

// Loads the constants of a row's softmax, exp2((z - max) scale - lse), with z and max relative to
// the panel's base.
template <class S, typename T>
NIVMF_D void load_softmax(S& s, const PairArgs<T>& a, int row_block) {
  if (int(threadIdx.x) < S::kTile) {
    const double inverse_t = inverse_temperature(a.p);
    const Row row = row_of<S::kTile>(a.p, row_block, threadIdx.x);
    const int64_t B = a.p.B, image = row.valid ? row.image : 0;
    const auto set = [&](double max, double lse, T& to_max, T& to_lse) {
      // A maximum over other shards' proxies may not be representable relative to this base.
      to_max = T(max - *a.panel.base);
      const double left = max - *a.panel.base - double(to_max);
      to_lse = T((left * inverse_t + lse) * kLog2e);
    };
    set(a.partial[image], a.partial[B + image], s.max[threadIdx.x], s.lse[threadIdx.x]);
    set(a.partial[2 * B + image], a.partial[3 * B + image], s.own_max[threadIdx.x],
        s.own_lse[threadIdx.x]);
    if (a.partial[2 * B + image] == -double(INFINITY)) s.lse[threadIdx.x] = T(NAN);
    s.grad[threadIdx.x] = T(double(a.grad[image]) * inverse_t);
  }
}

template <class S, typename T>
NIVMF_D bool tile_is_live(S& s, const PairArgs<T>& a, int row_block, int block) {
  if (threadIdx.x == 0) s.flag = a.saved.max == nullptr;
  __syncthreads();
  if (a.saved.max && int(threadIdx.x) < S::kTile && s.offset[threadIdx.x] >= 0) {
    const Problem<T>& p = a.p;
    const int64_t first = a.panel.first + int64_t(block) * S::kTile;
    const int slot = row_of<S::kTile>(p, row_block, threadIdx.x).slot;
    const T max = a.saved.max[max_at(p, first / S::kTile, row_block, slot)];
    const T bound = dead_log2<T>(p.N, p.P);
    const bool dead = (max - s.max[threadIdx.x]) * s.scale - s.lse[threadIdx.x] < bound;
    const int64_t label = s.label[threadIdx.x] - first;
    if (!dead || (label >= 0 && label < S::kTile)) s.flag = 1;  // NaN is live
  }
  __syncthreads();
  return s.flag != 0;
}

template <class Engine, bool kProxyNca>
__global__ void __launch_bounds__(kThreads, Engine::kMinBlocks)
    pair_kernel(const __grid_constant__ PairArgs<typename Engine::T> a) {
  using T = typename Engine::T;
  constexpr int kTile = Engine::kTile;
  PairShared<Engine>& s = *reinterpret_cast<PairShared<Engine>*>(shared_memory);
  const Problem<T>& p = a.p;
  const int row_block = blockIdx.x % p.row_blocks, block = blockIdx.x / p.row_blocks;
  if (kProxyNca) load_softmax(s, a, row_block);
  load_rows(s, p, row_block);
  const bool live = !kProxyNca || tile_is_live(s, a, row_block, block);
  if (threadIdx.x == 0) a.out.live[int64_t(row_block) * a.panel.blocks + block] = live;
  if (!live) {
    if (threadIdx.x == 0) a.out.by_temperature[blockIdx.x] = 0;
    return;
  }

  if (!a.saved.kept) pair_products(p, a.panel, block, s);
  load_bias(s, a.panel, block);
  __syncthreads();
  const int64_t local = int64_t(block) * kTile, first = a.panel.first + local;
  const int64_t pair_pitch = int64_t(a.panel.blocks) * kTile;
  const Products<T>* kept = kept_tile<Engine>(a.saved.kept, p, first, row_block);
  const double inverse_t = inverse_temperature(p);
  const T scale = s.scale;
  T by_temperature = 0, by_bias = 0;  // a thread stays in one column
#pragma unroll 2
  for (int i = threadIdx.x; i < kTile * kTile; i += kThreads) {
    const int r = i / kTile, c = i % kTile;
    const int64_t at = int64_t(row_block) * kTile + r;
    T g = 0;
    Score<T> v = {};
    if (s.offset[r] >= 0 && local + c < a.panel.count) {
      const bool own = kProxyNca && s.label[r] == first + c;
      Products<T> products = {s.num[r][c], s.delta[r][c]};
      if (kept) {
        products = kept[i];
      } else if (own && a.saved.own) {
        products = a.saved.own[at];
      }
      v = score(p, products, s.bias[c]);
      // dT = -sum dl z / T^2. In proxy-NCA dl sums to 0 over an image, so z may be taken relative
      // to the image's maximum.
      if (kProxyNca) {
        T weight = std::exp2((v.z - s.max[r]) * scale - s.lse[r]);
        if (own) weight -= std::exp2((v.z - s.own_max[r]) * scale - s.own_lse[r]);
        g = s.grad[r] * weight;
        by_temperature += g * (v.z - s.max[r]);
      } else {
        const int64_t pair = row_of<kTile>(p, row_block, r).image * p.P + first + c;
        const T lse = a.max_lse[p.B * p.P + pair] * T(kLog2e);
        g = T(double(a.grad[pair]) * inverse_t) * std::exp2((v.z - a.max_lse[pair]) * scale - lse);
        by_temperature += g * v.z;
      }
    }
    a.out.by_num[at * pair_pitch + local + c] = g * v.by_num;
    if (p.has_spread()) a.out.by_delta[at * pair_pitch + local + c] = g * v.by_delta;
    by_bias += g;
  }
  const double sum = block_sum(double(by_temperature), s.warp);
  if (threadIdx.x == 0) a.out.by_temperature[blockIdx.x] = -sum * inverse_t;
  s.column[threadIdx.x] = by_bias;
  __syncthreads();
  if (int(threadIdx.x) < kTile) {
    T total = 0;
    for (int part = threadIdx.x; part < kThreads; part += kTile) total += s.column[part];
    a.out.by_bias[row_block * pair_pitch + local + threadIdx.x] = total;
  }
}

// ---- the backward, second half: one launch makes all gradients ----------------------------------
//
// There are three kinds of blocks. For the samples: dx, a tile of rows by dimensions, summed over a
// split of the proxies. For the proxies: dlinear and dspread, a tile of proxies by dimensions,
// summed over all rows and turned into the gradients of loc and concentration. And one block for
// the temperature. All skip dead tiles and are bound by the products; reduce_kernel adds the splits
// in order.

template <typename T>
struct GradientArgs {
  Problem<T> p;
  Panel<T> panel;
  PairGradients<T> in;
  int splits, blocks_per_split;
  bool first, last;         // of the chunks of proxies
  double* temperature_sum;  // carried from chunk to chunk
  LogPpkGradients<T> out;   // out.samples: [splits, N, B, D]
};

template <class Engine>
struct GradientShared {
  using T = typename Engine::T;
  static constexpr int kTile = Engine::kTile;
  alignas(16) T stage[2][4][Tile<T, kTile>::kElements];
  T by_bias[kTile];
  double warp[kWarps];
};

template <class Engine, typename T>
NIVMF_D void sample_gradient(const GradientArgs<T>& a, GradientShared<Engine>& s, int tile) {
  constexpr int kTile = Engine::kTile, kDepth = Tile<T, kTile>::kDepth;
  using A = IndexMajor<T, kTile>;
  using B = DepthMajor<T, kTile>;
  const Problem<T>& p = a.p;
  const int tiles = p.pitch / kTile, column = tile % tiles * kTile;
  const int row_block = tile / tiles % p.row_blocks, split = tile / tiles / p.row_blocks;
  const int64_t pair_pitch = int64_t(a.panel.blocks) * kTile;
  const bool two = p.has_spread();
  const auto load = [&](int stage, int block, int slab) {
    const int64_t proxy = int64_t(block) * kTile + slab * kDepth;
    const auto pair = [&](int r, int c) {
      return (int64_t(row_block) * kTile + r) * pair_pitch + proxy + c;
    };
    const auto value = [&](int r, int c) { return (proxy + r) * p.pitch + column + c; };
    load_tile<A, T, kTile>(s.stage[stage][0], true,
                           [&](int r, int c) { return a.in.by_num + pair(r, c); });
    load_tile<B, T, kTile>(s.stage[stage][1], true,
                           [&](int r, int c) { return a.panel.linear + value(r, c); });
    if (!two) return;
    load_tile<A, T, kTile>(s.stage[stage][2], true,
                           [&](int r, int c) { return a.in.by_delta + pair(r, c); });
    load_tile<B, T, kTile>(s.stage[stage][3], true,
                           [&](int r, int c) { return a.panel.spread + value(r, c); });
  };
  Engine linear, spread;
  const auto add = [&](int stage) {
    linear.template add<A, B, false, false>(s.stage[stage][0], s.stage[stage][1]);
    if (two) spread.template add<A, B, false, false>(s.stage[stage][2], s.stage[stage][3]);
  };
  const unsigned char* live = a.in.live + int64_t(row_block) * a.panel.blocks;
  const int begin = split * a.blocks_per_split;
  const int end = min(begin + a.blocks_per_split, a.panel.blocks);
  pipeline<kTile / kDepth>(begin, end, [&](int block) { return live[block] != 0; }, load, add);

  T* out = a.out.samples + split * (int64_t(p.N) * p.B * p.D);
  Engine::for_each(linear, spread, [&](int r, int c, T v, T w) {
    const Row row = row_of<kTile>(p, row_block, r);
    if (!row.valid || column + c >= p.D) return;
    const int64_t at = sample_offset(p, row) + column + c;
    out[at] = two ? v + 2 * p.samples[at] * w : v;
  });
}

template <class Engine, typename T>
NIVMF_D void proxy_gradient(const GradientArgs<T>& a, GradientShared<Engine>& s, int tile) {
  constexpr int kTile = Engine::kTile, kDepth = Tile<T, kTile>::kDepth;
  using Layout = DepthMajor<T, kTile>;
  const Problem<T>& p = a.p;
  const int tiles = p.pitch / kTile, column = tile % tiles * kTile, block = tile / tiles;
  const int64_t pair_pitch = int64_t(a.panel.blocks) * kTile, local = int64_t(block) * kTile;
  const bool two = p.has_spread();
  const auto live = [&](int row_block) {
    return a.in.live[int64_t(row_block) * a.panel.blocks + block] != 0;
  };
  const auto load = [&](int stage, int row_block, int slab) {
    const auto pair = [&](int r, int c) {
      return (int64_t(row_block) * kTile + slab * kDepth + r) * pair_pitch + local + c;
    };
    load_tile<Layout, T, kTile>(s.stage[stage][0], true,
                                [&](int r, int c) { return a.in.by_num + pair(r, c); });
    load_tile<Layout, T, kTile>(s.stage[stage][1], p.vector, [&](int r, int c) -> const T* {
      const Row row = row_of<kTile>(p, row_block, slab * kDepth + r);
      return row.valid && column + c < p.D ? p.samples + sample_offset(p, row) + column + c
                                           : nullptr;
    });
    if (!two) return;
    load_tile<Layout, T, kTile>(s.stage[stage][2], true,
                                [&](int r, int c) { return a.in.by_delta + pair(r, c); });
  };
  Engine linear, spread;
  const auto add = [&](int stage) {
    linear.template add<Layout, Layout, false, false>(s.stage[stage][0], s.stage[stage][1]);
    if (two) spread.template add<Layout, Layout, false, true>(s.stage[stage][2], s.stage[stage][1]);
  };
  if (int(threadIdx.x) < kTile) {
    T sum = 0;
    for (int row_block = 0; row_block < p.row_blocks; ++row_block) {
      if (live(row_block)) sum += a.in.by_bias[row_block * pair_pitch + local + threadIdx.x];
    }
    s.by_bias[threadIdx.x] = sum;
  }
  pipeline<kTile / kDepth>(0, p.row_blocks, live, load, add);

  // kbar cancels in num / sqrt(1 + delta), so that its whole gradient is D by_bias, of which each
  // dimension gets by_bias / kappa.
  Engine::for_each(linear, spread, [&](int r, int c, T by_linear, T by_spread) {
    const int64_t j = local + r;
    if (j >= a.panel.count || column + c >= p.D) return;
    const int64_t at = (a.panel.first + j) * p.D + column + c;
    const T mu = p.loc[at], kappa = p.concentration[at], by_bias = s.by_bias[r];
    const T ratio = kappa * a.panel.inverse_kbar[j], by_length = by_bias * a.panel.bias_slope[j];
    const T by_kappa = by_linear * (p.projection ? 2 * mu * ratio : mu);
    const T spread_term = two ? 2 * ratio * a.panel.inverse_kbar[j] * by_spread : T(0);
    a.out.loc[at] =
        by_linear * (p.projection ? kappa * ratio : kappa) + by_length * kappa * kappa * mu;
    a.out.concentration[at] =
        by_kappa + by_length * kappa * mu * mu + (spread_term + by_bias / kappa);
  });
}

template <class Engine>
__global__ void __launch_bounds__(kThreads, 2)
    gradient_kernel(const __grid_constant__ GradientArgs<typename Engine::T> a) {
  using T = typename Engine::T;
  GradientShared<Engine>& s = *reinterpret_cast<GradientShared<Engine>*>(shared_memory);
  const Problem<T>& p = a.p;
  const int tiles = p.pitch / Engine::kTile;
  const int sample_tiles = tiles * p.row_blocks * a.splits, proxy_tiles = tiles * a.panel.blocks;
  const int tile = blockIdx.x;
  if (tile < sample_tiles) {
    sample_gradient(a, s, tile);
  } else if (tile < sample_tiles + proxy_tiles) {
    proxy_gradient(a, s, tile - sample_tiles);
  } else {
    const int64_t count = int64_t(p.row_blocks) * a.panel.blocks;
    double sum = 0;
    for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += a.in.by_temperature[i];
    sum = block_sum(sum, s.warp);
    if (threadIdx.x != 0) return;
    if (!a.first) sum += *a.temperature_sum;
    *a.temperature_sum = sum;
    if (a.last) *a.out.temperature = T(sum);
  }
}

// Adds the splits' sums to d_samples, in order; overwrites d_samples on the first chunk.
template <typename T>
struct ReduceArgs {
  const T* in;  // [splits, size]
  T* out;
  int64_t size;
  int splits;
  bool first;
};

template <typename T>
__global__ void __launch_bounds__(kThreads) reduce_kernel(const __grid_constant__ ReduceArgs<T> a) {
  const int64_t stride = int64_t(gridDim.x) * kThreads;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < a.size; i += stride) {
    T sum = a.first ? T(0) : a.out[i];
    for (int split = 0; split < a.splits; ++split) sum += a.in[split * a.size + i];
    a.out[i] = sum;
  }
}

}  // namespace ppk
}  // namespace nivmf
