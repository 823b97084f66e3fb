// Matrix products of log-PPK on the CPU: small tiles in registers, a fixed order for every sum.
// (torch's matmul has its own threads and its own order.)
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "host_device.h"
#include "simd.h"

namespace nivmf {
namespace {

// Steps of a sum at a time: short sums are more accurate, and short strips stay in the L1.
constexpr int64_t kDepth = 128;
constexpr int64_t kTileRows = 6;  // with kLanes columns: 6 or 12 of 16 or 32 vector registers

// Sums of kTileRows rows and kLanes columns, in registers.
template <typename T>
struct Tile {
  T sum[kTileRows][kLanes<T>];

  NIVMF_INLINE void clear() {
    for (int64_t t = 0; t < kTileRows; ++t) {
      NIVMF_LANES(T, l) sum[t][l] = 0;
    }
  }

  // Adds the products of one number of each row of a, row_stride apart, with kLanes of b.
  NIVMF_INLINE void step(const T* a, int64_t row_stride, const T* b) {
    NIVMF_UNROLL
    for (int64_t t = 0; t < kTileRows; ++t) {
      const T x = a[t * row_stride];
      NIVMF_LANES(T, l) sum[t][l] += x * b[l];
    }
  }

  NIVMF_INLINE void store(bool add, T* __restrict__ c, int64_t c_stride) const {
    for (int64_t t = 0; t < kTileRows; ++t) {
      if (add) {
        NIVMF_LANES(T, l) c[t * c_stride + l] += sum[t][l];
      } else {
        NIVMF_LANES(T, l) c[t * c_stride + l] = sum[t][l];
      }
    }
  }
};

// c [rows, columns] (+)= a [rows, depth] b [depth, columns]. b is in strips of kLanes columns, a
// has two strides. Writes whole tiles: multiples of kTileRows rows and of kLanes columns.
template <typename T>
NIVMF_CLONES void multiply(int64_t rows, int64_t columns, int64_t depth, const T* a,
                           int64_t row_stride, int64_t stride, const T* __restrict__ b, bool add,
                           T* __restrict__ c, int64_t c_stride) {
  for (int64_t begin = 0; begin < depth; begin += kDepth) {
    const int64_t end = std::min(begin + kDepth, depth);
    for (int64_t j = 0; j < columns; j += kLanes<T>) {
      const T* const strip = b + j * depth;
      for (int64_t i = 0; i < rows; i += kTileRows) {
        const T* const from = a + i * row_stride;
        Tile<T> tile;
        tile.clear();
        for (int64_t k = begin; k < end; ++k) {
          tile.step(from + k * stride, row_stride, strip + k * kLanes<T>);
        }
        tile.store(add || begin > 0, c + i * c_stride + j, c_stride);
      }
    }
  }
}

// Lists, for each tile of rows of a, the steps at which it is not all zero, for the product below:
// skipping terms of zero changes no bit.
struct Steps {
  std::vector<int32_t> step, end;  // end: of each tile's steps

  // Fills the lists; true if they skip enough to pay for their indirection.
  template <typename T>
  bool list(int64_t rows, int64_t depth, const T* a, int64_t row_stride, int64_t stride);
};

template <typename T>
NIVMF_CLONES int64_t list_steps(int64_t depth, const T* __restrict__ a, int64_t row_stride,
                                int64_t stride, int32_t* __restrict__ out) {
  int64_t count = 0;
  for (int64_t k = 0; k < depth; ++k) {
    bool used = false;
    NIVMF_UNROLL
    for (int64_t t = 0; t < kTileRows; ++t) used |= a[t * row_stride + k * stride] != 0;
    out[count] = int32_t(k);
    count += used;
  }
  return count;
}

template <typename T>
bool Steps::list(int64_t rows, int64_t depth, const T* a, int64_t row_stride, int64_t stride) {
  const int64_t tiles = ceil_div(rows, kTileRows);
  step.resize(tiles * depth + 1);
  end.resize(tiles);
  int64_t count = 0;
  for (int64_t i = 0; i < tiles; ++i) {
    count +=
        list_steps(depth, a + i * kTileRows * row_stride, row_stride, stride, step.data() + count);
    end[i] = int32_t(count);
  }
  return 2 * count < tiles * depth;
}

template <typename T>
NIVMF_CLONES void multiply(const Steps& steps, int64_t rows, int64_t columns, int64_t depth,
                           const T* a, int64_t row_stride, int64_t stride, const T* __restrict__ b,
                           bool add, T* __restrict__ c, int64_t c_stride) {
  for (int64_t j = 0; j < columns; j += kLanes<T>) {
    const T* const strip = b + j * depth;
    const int32_t* k = steps.step.data();
    for (int64_t i = 0; i < rows; i += kTileRows) {
      const T* const from = a + i * row_stride;
      const int32_t* const end = steps.step.data() + steps.end[i / kTileRows];
      Tile<T> tile;
      tile.clear();
      for (; k < end; ++k) tile.step(from + *k * stride, row_stride, strip + *k * kLanes<T>);
      tile.store(add, c + i * c_stride + j, c_stride);
    }
  }
}

template <typename T>
NIVMF_CLONES void add(T* __restrict__ sum, const T* __restrict__ term, int64_t size) {
  for (int64_t i = 0; i < size; ++i) sum[i] += term[i];
}

}  // namespace
}  // namespace nivmf
