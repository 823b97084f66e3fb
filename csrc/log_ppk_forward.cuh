// The forward kernels, for image b, its samples i, label y and proxies j (lse is log-sum-exp):
//   proxy-NCA: loss_b = lse_ij z_ij / T - lse_i z_iy / T;  log-PPK: s_bj = lse_i z_ij / T - log N.
// In: samples, proxies, temperature, labels. Out: losses [B] and partial [4, B], with maxima and
// products for the backward; or s [B, P] with its maxima and log-sum-exps.
// Launched by log_ppk_kernel.cu. Design: docs/design/log_ppk_cuda.md.
#pragma once

#include "log_ppk.cuh"
#include "vmf_normalizer.h"

namespace nivmf {
namespace ppk {

// ---- preparing the proxies ----------------------------------------------------------------------
//
// One warp per proxy, two passes over its row, in float64: the logits multiply these deviations by
// thousands. Bound by memory (16 bytes per number, in and out): the float64 logarithms take less
// time on a data-centre GPU.

struct ProxyScalars {
  double inverse_kbar, bias, bias_slope;
};

template <typename T>
NIVMF_D ProxyScalars proxy_scalars(const Problem<T>& p, const LogNormalizerPlan<double>& plan,
                                   int64_t j) {
  const T *mu = p.loc + j * p.D, *kappa = p.concentration + j * p.D;
  double logs = 0, squares = 0;
  for (int d = threadIdx.x % 32; d < p.D; d += 32) {
    const double k = double(kappa[d]), v = k * double(mu[d]);
    logs += std::log(k);
    squares += v * v;
  }
  logs = warp_sum(logs);
  squares = warp_sum(squares);
  const double length = std::sqrt(squares);
  const LogNormalizer<double> g = log_normalizer(length, plan);
  const double by_length = p.exact ? -g.a : -g.a - 1 / length;
  return {std::exp(-logs / p.D), p.exact ? g.g : g.g + logs - std::log(length),
          length == 0 ? 0 : by_length / length};
}

template <typename T>
NIVMF_D T proxy_linear(const Problem<T>& p, double mu, double kappa, double inverse_kbar) {
  return T(p.projection ? kappa * mu * (kappa * inverse_kbar) : kappa * mu);
}

template <typename T>
NIVMF_D T proxy_spread(double kappa, double inverse_kbar) {
  const double ratio = kappa * inverse_kbar;
  return T((ratio - 1) * (ratio + 1));
}

template <typename T>
struct PrepareArgs {
  Problem<T> p;
  Panel<T> panel;
  int tile;
  unsigned* tickets;  // to zero; may be null
  int ticket_count;
  LogNormalizerPlan<double> plan;
};

template <typename T>
__global__ void __launch_bounds__(kThreads)
    prepare_kernel(const __grid_constant__ PrepareArgs<T> a) {
  const Problem<T>& p = a.p;
  const int lane = threadIdx.x % 32;
  if (blockIdx.x == 0 && a.tickets) {
    for (int i = threadIdx.x; i < a.ticket_count; i += kThreads) a.tickets[i] = 0;
  }
  const int64_t row = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row >= int64_t(a.panel.blocks) * a.tile) return;
  T *linear = a.panel.linear + row * p.pitch, *spread = a.panel.spread + row * p.pitch;
  if (row >= a.panel.count) {
    for (int d = lane; d < p.pitch; d += 32) linear[d] = spread[d] = 0;
    return;
  }
  const int64_t j = a.panel.first + row;
  const ProxyScalars scalars = proxy_scalars(p, a.plan, j);
  if (lane == 0) {
    a.panel.bias[row] = scalars.bias;
    a.panel.inverse_kbar[row] = T(scalars.inverse_kbar);
    a.panel.bias_slope[row] = T(scalars.bias_slope);
    if (j == 0) *a.panel.base = scalars.bias;
  }
  for (int d = lane; d < p.pitch; d += 32) {
    const bool inside = d < p.D;
    const double mu = inside ? double(p.loc[j * p.D + d]) : 0;
    const double kappa = inside ? double(p.concentration[j * p.D + d]) : 0;
    linear[d] = proxy_linear(p, mu, kappa, scalars.inverse_kbar);
    spread[d] = inside ? proxy_spread<T>(kappa, scalars.inverse_kbar) : T(0);
  }
}

// num and delta of every row at its own proxy, summed in float64: both terms of the loss contain
// this pair, and both read it from here. One warp per row; R dot products, few against R P.
template <typename T>
struct OwnArgs {
  Problem<T> p;
  Products<T>* own;  // [padded rows]
  LogNormalizerPlan<double> plan;
};

template <typename T, int kTile>
__global__ void __launch_bounds__(kThreads) own_kernel(const __grid_constant__ OwnArgs<T> a) {
  const Problem<T>& p = a.p;
  const int64_t at = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (at >= int64_t(p.row_blocks) * kTile) return;
  const Row row = row_of<kTile>(p, int(at / kTile), int(at % kTile));
  const int64_t j = row.valid ? p.labels[row.image] : -1;
  if (j < 0 || j >= p.P) return;
  const ProxyScalars scalars = proxy_scalars(p, a.plan, j);
  const T* x = p.samples + sample_offset(p, row);
  double num = 0, delta = 0;
  for (int d = threadIdx.x % 32; d < p.D; d += 32) {
    const double kappa = double(p.concentration[j * p.D + d]), mu = double(p.loc[j * p.D + d]);
    num += double(x[d]) * double(proxy_linear(p, mu, kappa, scalars.inverse_kbar));
    delta += double(x[d]) * double(x[d]) * double(proxy_spread<T>(kappa, scalars.inverse_kbar));
  }
  num = warp_sum(num);
  delta = warp_sum(delta);
  if (threadIdx.x % 32 == 0) a.own[at] = {T(num), p.has_spread() ? T(delta) : T(0)};
}

// ---- the forward of proxy-NCA -------------------------------------------------------------------
//
// A block takes kTile rows and walks over its split of the proxies. Per row it carries the maximum
// in raw units and the sum of exponentials relative to it, so that dividing by T costs no accuracy.
// Bound by the two products: the epilogue has one log1p, one exp and one root per pair, against 4 D
// flops. The last block to finish an image's rows combines them, in the order of the splits.

template <typename T>
struct ForwardArgs {
  Problem<T> p;
  Panel<T> panel;
  SavedPairs<T> saved;
  ForwardState<T> state;
  int splits, blocks_per_split;
  bool first, last;  // of the chunks of proxies
  double* partial;   // [4, B]
  T* losses;         // [B]
};

template <class Engine, typename T>
NIVMF_D void combine_image(const ForwardArgs<T>& a, int64_t image) {
  const Problem<T>& p = a.p;
  const ForwardState<T>& state = a.state;
  const int lane = threadIdx.x % 32;
  const int64_t rows = int64_t(p.row_blocks) * Engine::kTile, count = int64_t(p.N) * a.splits;
  const double inverse_t = inverse_temperature(p);
  const T scale = T(inverse_t * kLog2e);
  const auto at = [&](int64_t i) {
    return i / p.N * rows + padded_row<Engine::kTile>(p, image, int(i % p.N));
  };
  T max = -T(INFINITY), sum = 0, own_max = -T(INFINITY), own_sum = 0;
  for (int64_t i = lane; i < count; i += 32) max = std::fmax(max, load_fresh(state.max + at(i)));
  max = warp_max(max);
  for (int64_t i = lane; i < count; i += 32) {
    sum += load_fresh(state.sum + at(i)) *
           std::exp2((load_fresh(state.max + at(i)) - as_shift(max)) * scale);
  }
  sum = warp_sum(sum);

  const int64_t label = p.labels[image];
  const bool known = label >= 0 && label < p.P;
  if (known) {
    for (int s = lane; s < p.N; s += 32) {
      own_max = std::fmax(own_max, load_fresh(state.own_z + at(s)));
    }
    own_max = warp_max(own_max);
    for (int s = lane; s < p.N; s += 32) {
      own_sum += std::exp2((load_fresh(state.own_z + at(s)) - as_shift(own_max)) * scale);
    }
    own_sum = warp_sum(own_sum);
  }
  if (lane != 0) return;
  const double lse = std::log(double(sum)), own_lse = known ? std::log(double(own_sum)) : 0;
  a.partial[image] = *a.panel.base + double(max);
  a.partial[p.B + image] = lse;
  a.partial[2 * p.B + image] = *a.panel.base + double(own_max);
  a.partial[3 * p.B + image] = own_lse;
  const double loss = (double(max) - double(own_max)) * inverse_t + (lse - own_lse);
  a.losses[image] = known ? T(loss) : T(NAN);
}

template <class Engine>
__global__ void __launch_bounds__(kThreads, Engine::kMinBlocks)
    forward_kernel(const __grid_constant__ ForwardArgs<typename Engine::T> a) {
  using T = typename Engine::T;
  constexpr int kTile = Engine::kTile, kLanes = PairShared<Engine>::kLanes;
  PairShared<Engine>& s = *reinterpret_cast<PairShared<Engine>*>(shared_memory);
  const Problem<T>& p = a.p;
  // Blocks that run at the same time share their proxies: the panel is read from memory once, and
  // the samples stay in the L2.
  const int begin = blockIdx.x / p.row_blocks * a.blocks_per_split;
  const auto here = [&] {  // [split, padded row]
    const unsigned split = blockIdx.x / p.row_blocks, row_block = blockIdx.x % p.row_blocks;
    return (int64_t(split) * p.row_blocks + row_block) * kTile + threadIdx.x;
  };
  // State carried from tile to tile stays in shared memory, because the products need every
  // register.
  if (int(threadIdx.x) < kTile) {
    s.max[threadIdx.x] = a.first ? -T(INFINITY) : a.state.max[here()];
    s.sum[threadIdx.x] = a.first ? T(0) : a.state.sum[here()];
  }
  if (threadIdx.x == 0) s.end = min(begin + a.blocks_per_split, a.panel.blocks);
  load_rows(s, p, blockIdx.x % p.row_blocks);

  for (int block = begin; block < s.end; ++block) {
    pair_products(p, a.panel, block, s);
    load_bias(s, a.panel, block);
    __syncthreads();
    const int row_block = s.row_block;
    const int64_t local = int64_t(block) * kTile, first = a.panel.first + local;
    Products<T>* kept = kept_tile<Engine>(a.saved.kept, p, first, row_block);
#pragma unroll 2
    for (int i = threadIdx.x; i < kTile * kTile; i += kThreads) {
      const int r = i / kTile, c = i % kTile;
      const int64_t at = int64_t(row_block) * kTile + r;
      const bool own = s.label[r] == first + c;
      Products<T> v = {s.num[r][c], s.delta[r][c]};
      if (own && a.saved.own) v = a.saved.own[at];
      if (kept) kept[i] = v;
      const bool valid = s.offset[r] >= 0 && local + c < a.panel.count;
      const T z = valid ? score(p, v, s.bias[c]).z : -T(INFINITY);
      if (own) a.state.own_z[at] = z;
      s.num[r][c] = z;
    }
    __syncthreads();
    const int row = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
    T tile_max = -T(INFINITY);
#pragma unroll 4
    for (int c = lane; c < kTile; c += kLanes) tile_max = std::fmax(tile_max, s.num[row][c]);
    for (int mask = 1; mask < kLanes; mask *= 2) {
      tile_max = std::fmax(tile_max, shuffle_xor(tile_max, mask));
    }
    const T shift = as_shift(std::fmax(s.max[row], tile_max)), scale = s.scale;
    T tile_sum = 0;
#pragma unroll 4
    for (int c = lane; c < kTile; c += kLanes) {
      tile_sum += std::exp2((s.num[row][c] - shift) * scale);
    }
    for (int mask = 1; mask < kLanes; mask *= 2) tile_sum += shuffle_xor(tile_sum, mask);
    if (lane == 0) {
      s.tile_max[row] = tile_max;
      s.tile_sum[row] = tile_sum;
    }
    __syncthreads();
    if (int(threadIdx.x) < kTile) {
      const T previous = s.max[threadIdx.x], next = std::fmax(previous, s.tile_max[threadIdx.x]);
      const T before = s.sum[threadIdx.x] * std::exp2((previous - as_shift(next)) * scale);
      s.sum[threadIdx.x] = before + s.tile_sum[threadIdx.x];
      s.max[threadIdx.x] = next;
    }
    if (a.saved.max) {
      if (int(threadIdx.x) < p.images_per_block) {
        const int size = p.N <= kTile ? p.N : kTile;
        T best = -T(INFINITY);
        for (int i = 0; i < size; ++i) best = std::fmax(best, s.tile_max[threadIdx.x * size + i]);
        a.saved.max[max_at(p, first / kTile, row_block, int(threadIdx.x))] = best;
      }
    }
  }
  if (int(threadIdx.x) < kTile) {
    a.state.max[here()] = s.max[threadIdx.x];
    a.state.sum[here()] = s.sum[threadIdx.x];
  }
  if (!a.last) return;

  const int row_block = s.row_block;
  __syncthreads();
  if (threadIdx.x == 0) {
    s.flag = take_ticket(a.state.tickets + row_block / p.blocks_per_image,
                         unsigned(a.splits) * unsigned(p.blocks_per_image));
  }
  __syncthreads();
  if (!s.flag) return;
  const int64_t image = row_block / p.blocks_per_image * int64_t(p.images_per_block);
  for (int i = threadIdx.x / 32; i < p.images_per_block; i += kWarps) {
    if (image + i < p.B) combine_image<Engine>(a, image + i);
  }
}

// ---- the forward of log-PPK: a log-sum-exp over each image's samples ----------------------------

template <typename T>
struct LogPpkArgs {
  Problem<T> p;
  Panel<T> panel;
  T* out;      // [B, P]
  T* max_lse;  // [2, B, P]: max over the samples in raw units, lse relative to it
  double* common;
};

template <class Engine>
__global__ void __launch_bounds__(kThreads, Engine::kMinBlocks)
    log_ppk_kernel(const __grid_constant__ LogPpkArgs<typename Engine::T> a) {
  using T = typename Engine::T;
  constexpr int kTile = Engine::kTile;
  PairShared<Engine>& s = *reinterpret_cast<PairShared<Engine>*>(shared_memory);
  const Problem<T>& p = a.p;
  const int groups = p.row_blocks / p.blocks_per_image;
  const int group = blockIdx.x % groups, block = blockIdx.x / groups;
  const int size = p.N <= kTile ? p.N : kTile;
  const int64_t local = int64_t(block) * kTile;
  if (blockIdx.x == 0 && threadIdx.x == 0) *a.common = *a.panel.base;

  // Of column c on thread c < kTile; carried over the blocks of an image that has several.
  T max = -T(INFINITY), sum = 0;
  for (int part = 0; part < p.blocks_per_image; ++part) {
    load_rows(s, p, group * p.blocks_per_image + part);
    pair_products(p, a.panel, block, s);
    load_bias(s, a.panel, block);
    __syncthreads();
#pragma unroll 2
    for (int i = threadIdx.x; i < kTile * kTile; i += kThreads) {
      const int r = i / kTile, c = i % kTile;
      const Products<T> v = {s.num[r][c], s.delta[r][c]};
      s.num[r][c] = s.offset[r] >= 0 ? score(p, v, s.bias[c]).z : -T(INFINITY);
    }
    __syncthreads();
    const double inverse_t = inverse_temperature(p);
    const T scale = s.scale;
    for (int i = threadIdx.x; i < p.images_per_block * kTile; i += kThreads) {
      const int slot = i / kTile, column = i % kTile;
      const int64_t image = int64_t(group) * p.images_per_block + slot, j = local + column;
      const T previous = part > 0 ? max : -T(INFINITY);
      max = previous;
      for (int r = 0; r < size; ++r) max = std::fmax(max, s.num[slot * size + r][column]);
      const T shift = as_shift(max);
      sum = part > 0 ? sum * std::exp2((previous - shift) * scale) : T(0);
      for (int r = 0; r < size; ++r) {
        sum += std::exp2((s.num[slot * size + r][column] - shift) * scale);
      }
      if (part + 1 == p.blocks_per_image && image < p.B && j < a.panel.count) {
        const int64_t at = image * p.P + a.panel.first + j;
        const double log_sum = std::log(double(sum));
        a.max_lse[at] = max;
        a.max_lse[p.B * p.P + at] = T(log_sum);
        a.out[at] = T(double(max) * inverse_t + (log_sum - std::log(double(p.N))));
      }
    }
  }
}

}  // namespace ppk
}  // namespace nivmf
