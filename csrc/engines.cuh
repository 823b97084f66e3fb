// The two engines: sum[r][c] += sum_k A[r][k] B[c][k], a kTile x kTile product that a block
// accumulates slab by slab, with fused multiply-adds (Ffma) or tensor cores (Mma). Either operand
// can be squared as it is read. In: tiles (tiles.cuh). Out: accumulators in registers.
// Called by pair_products (log_ppk.cuh) and the two gradients (log_ppk_backward.cuh).
// Design: docs/design/log_ppk_cuda.md.
#pragma once

#include "tiles.cuh"

namespace nivmf {
namespace ppk {

// Each slab is summed from zero and then added: tensor cores truncate as they accumulate, so their
// sums are kept short, and float32 gains the accuracy of blocked summation.

// Fused multiply-adds: every operation in T, 4 x 2 accumulators per thread and product. Used for
// few proxies (small tiles fill the GPU where launches, not flops, dominate), for float64, and on
// GPUs without bf16.
template <typename T_>
struct Ffma {
  using T = T_;
  static constexpr int kTile = 32, kMinBlocks = 3, kRows = kTile / 8, kColumns = kTile / 16;
  static constexpr int kChunk = Tile<T, kTile>::kChunk;
  T sum[kRows][kColumns] = {};

  template <class LayoutA, class LayoutB, bool kSquareA, bool kSquareB>
  NIVMF_D void add(const T* a, const T* b) {
    const int row = threadIdx.x / 16, column = threadIdx.x % 16;
    T part[kRows][kColumns] = {};
#pragma unroll 2
    for (int chunk = 0; chunk < 8; ++chunk) {
      T x[kRows][kChunk], y[kColumns][kChunk];
      NIVMF_UNROLL
      for (int i = 0; i < kRows; ++i) LayoutA::read(a, row + 8 * i, chunk, x[i]);
      NIVMF_UNROLL
      for (int j = 0; j < kColumns; ++j) LayoutB::read(b, column + 16 * j, chunk, y[j]);
      NIVMF_UNROLL
      for (int e = 0; e < kChunk; ++e) {
        NIVMF_UNROLL
        for (int i = 0; i < kRows; ++i) x[i][e] = kSquareA ? x[i][e] * x[i][e] : x[i][e];
        NIVMF_UNROLL
        for (int j = 0; j < kColumns; ++j) {
          const T w = kSquareB ? y[j][e] * y[j][e] : y[j][e];
          NIVMF_UNROLL
          for (int i = 0; i < kRows; ++i) part[i][j] += x[i][e] * w;
        }
      }
    }
    NIVMF_UNROLL
    for (int i = 0; i < kRows; ++i) {
      NIVMF_UNROLL
      for (int j = 0; j < kColumns; ++j) sum[i][j] += part[i][j];
    }
  }

  // f(row, column, value, value) for this thread's part of two products.
  template <class F>
  NIVMF_D static void for_each(const Ffma& first, const Ffma& second, const F& f) {
    const int row = threadIdx.x / 16, column = threadIdx.x % 16;
    NIVMF_UNROLL
    for (int i = 0; i < kRows; ++i) {
      NIVMF_UNROLL
      for (int j = 0; j < kColumns; ++j) {
        f(row + 8 * i, column + 16 * j, first.sum[i][j], second.sum[i][j]);
      }
    }
  }
};

// Tensor cores: x = p0 + p1 (+ p2), each plane the bf16 nearest to the remainder, and the products
// of planes down to the order of the last: 6 of 9 with three planes (2^-27; float32 has 2^-24), 3
// of 4 with two (2^-18). Operands are split into planes in registers, on the way into mma.sync.
// Four warps have 32 x 32 each. Three sets of 32 accumulators are live at once (two products and
// the slab's); with the planes they leave room for three blocks of 128 threads per SM.
template <int kPlanes>
struct Mma {
  using T = float;
  static constexpr int kTile = 64, kMinBlocks = 3;
  float sum[2][4][4] = {};

  NIVMF_D static void split(float x, float y, uint32_t (&planes)[kPlanes]) {
    NIVMF_UNROLL
    for (int p = 0; p < kPlanes; ++p) {
      planes[p] = pack_bf16(x, y);
      x -= bits_as_float(planes[p] << 16);
      y -= bits_as_float(planes[p] & 0xffff0000u);
    }
  }

  // The sum may run over k in any order that both operands share: lane q of a group of four takes
  // steps 4q .. 4q + 3 of 16 (one chunk) where PTX names 2q, 2q + 1, 2q + 8 and 2q + 9.
  template <class Layout, bool kSquare>
  NIVMF_D static void read(const float* tile, int index, int chunk, uint32_t (&low)[kPlanes],
                           uint32_t (&high)[kPlanes]) {
    float v[4];
    Layout::read(tile, index, chunk, v);
    NIVMF_UNROLL
    for (int e = 0; e < 4; ++e) v[e] = kSquare ? v[e] * v[e] : v[e];
    split(v[0], v[1], low);
    split(v[2], v[3], high);
  }

  template <class LayoutA, class LayoutB, bool kSquareA, bool kSquareB>
  NIVMF_D void add(const float* a, const float* b) {
    const int warp = threadIdx.x / 32, group = threadIdx.x % 32 / 4, quad = threadIdx.x % 4;
    const int row = warp / 2 * 32 + group, column = warp % 2 * 32 + group;
    float part[2][4][4] = {};
#pragma unroll 1
    for (int step = 0; step < 2; ++step) {
      uint32_t x[kPlanes][2][4];
      NIVMF_UNROLL
      for (int i = 0; i < 4; ++i) {  // rows 8i of 32: halves of two 16 x 16 operands
        uint32_t low[kPlanes], high[kPlanes];
        read<LayoutA, kSquareA>(a, row + 8 * i, 4 * step + quad, low, high);
        NIVMF_UNROLL
        for (int p = 0; p < kPlanes; ++p) {
          x[p][i / 2][i % 2] = low[p];
          x[p][i / 2][i % 2 + 2] = high[p];
        }
      }
      NIVMF_UNROLL
      for (int j = 0; j < 4; ++j) {
        uint32_t low[kPlanes], high[kPlanes];
        read<LayoutB, kSquareB>(b, column + 8 * j, 4 * step + quad, low, high);
        NIVMF_UNROLL
        for (int order = kPlanes - 1; order >= 0; --order) {  // the small products first
          NIVMF_UNROLL
          for (int p = 0; p <= order; ++p) {
            const uint32_t y[2] = {low[order - p], high[order - p]};
            mma_bf16(part[0][j], x[p][0], y);
            mma_bf16(part[1][j], x[p][1], y);
          }
        }
      }
    }
    NIVMF_UNROLL
    for (int i = 0; i < 2; ++i) {
      NIVMF_UNROLL
      for (int j = 0; j < 4; ++j) {
        NIVMF_UNROLL
        for (int e = 0; e < 4; ++e) sum[i][j][e] += part[i][j][e];
      }
    }
  }

  template <class F>
  NIVMF_D static void for_each(const Mma& first, const Mma& second, const F& f) {
    const int warp = threadIdx.x / 32, group = threadIdx.x % 32 / 4, quad = threadIdx.x % 4;
    NIVMF_UNROLL
    for (int i = 0; i < 2; ++i) {
      NIVMF_UNROLL
      for (int j = 0; j < 4; ++j) {
        NIVMF_UNROLL
        for (int e = 0; e < 4; ++e) {
          f(warp / 2 * 32 + 16 * i + group + e / 2 * 8, warp % 2 * 32 + 8 * j + 2 * quad + e % 2,
            first.sum[i][j][e], second.sum[i][j][e]);
        }
      }
    }
  }
};

}  // namespace ppk
}  // namespace nivmf
