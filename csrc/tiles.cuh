// Tiles in shared memory: their layout, their copies, and the two-stage pipeline that copies a slab
// while the previous one is added.
// In: a functor that returns addresses in global memory. Out: tiles that the engines read.
// Called by pair_products (log_ppk.cuh), both gradients (log_ppk_backward.cuh) and engines.cuh.
// Design: docs/design/log_ppk_cuda.md.
#pragma once

#include "device.cuh"
#include "host_device.h"

namespace nivmf {
namespace ppk {

// A tile is kTile indices (rows, proxies or dimensions) by kDepth steps of the sum, in chunks of 16
// bytes. It keeps the order of its source: index-major if the source is contiguous along the sum,
// depth-major otherwise. Chunks are permuted so that neither the copies nor the engines' reads have
// bank conflicts.

template <typename T, int kTile>
struct Tile {
  static constexpr int kChunk = 16 / int(sizeof(T)), kDepth = 8 * kChunk,
                       kElements = kTile * kDepth;
};

template <typename T, int kTile>
struct IndexMajor {
  static constexpr int kChunk = Tile<T, kTile>::kChunk, kRowChunks = 8;
  NIVMF_D static int place(int index, int chunk) {
    const int swizzle = ((index & 1) << 2) | ((index >> 1) & 3);
    return (index * kRowChunks + (chunk ^ swizzle)) * kChunk;
  }
  // Reads the steps chunk * kChunk .. + kChunk - 1 of the sum at one index.
  NIVMF_D static void read(const T* tile, int index, int chunk, T (&out)[kChunk]) {
    struct alignas(16) Chunk {
      T value[kChunk];
    };
    const Chunk in = *reinterpret_cast<const Chunk*>(tile + place(index, chunk));
    NIVMF_UNROLL
    for (int e = 0; e < kChunk; ++e) out[e] = in.value[e];
  }
};

template <typename T, int kTile>
struct DepthMajor {
  static constexpr int kChunk = Tile<T, kTile>::kChunk, kRowChunks = kTile / kChunk;
  NIVMF_D static int place(int depth, int chunk) {
    return (depth * kRowChunks + (chunk ^ (((depth >> 2) & 3) << 1))) * kChunk;
  }
  NIVMF_D static void read(const T* tile, int index, int chunk, T (&out)[kChunk]) {
    NIVMF_UNROLL
    for (int e = 0; e < kChunk; ++e) {
      out[e] = tile[place(chunk * kChunk + e, index / kChunk) + index % kChunk];
    }
  }
};

// Starts the copy of a tile; source(row, column) is the address of an element, or null for a zero.
// With `vector`, a chunk is aligned to 16 bytes and either valid or zero as a whole.
template <class Layout, typename T, int kTile, class Source>
NIVMF_D void load_tile(T* tile, bool vector, const Source& source) {
  constexpr int kChunk = Layout::kChunk;
#pragma unroll 1  // unrolled, its addresses would occupy registers that the products need
  for (int n = threadIdx.x; n < kTile * 8; n += kThreads) {
    const int row = n / Layout::kRowChunks, chunk = n % Layout::kRowChunks;
    T* to = tile + Layout::place(row, chunk);
    if (vector) {
      if (const T* from = source(row, chunk * kChunk)) {
        copy_async<16>(to, from);
        continue;
      }
    }
    NIVMF_UNROLL
    for (int e = 0; e < kChunk; ++e) {
      const T* from = vector ? nullptr : source(row, chunk * kChunk + e);
      if (from) {
        copy_async<int(sizeof(T))>(to + e, from);
      } else {
        to[e] = 0;
      }
    }
  }
}

// Runs over the slabs (kSlabs per block) of the live ones among blocks begin .. end - 1, copying
// one slab ahead of the one being added. `live` must be the same for all threads. The stages are
// free again on return.
template <int kSlabs, class Live, class Load, class Add>
NIVMF_D void pipeline(int begin, int end, const Live& live, const Load& load, const Add& add) {
  const auto seek = [&](int block) {
    while (block < end && !live(block)) ++block;
    return block;
  };
  int block = seek(begin), slab = 0, stage = 0;
  if (block < end) load(stage, block, slab);
  while (block < end) {
    const bool done = slab + 1 == kSlabs;
    const int next_block = done ? seek(block + 1) : block, next_slab = done ? 0 : slab + 1;
    wait_for_copies();
    __syncthreads();
    if (next_block < end) load(stage ^ 1, next_block, next_slab);
    add(stage);
    block = next_block;
    slab = next_slab;
    stage ^= 1;
  }
  __syncthreads();
}

}  // namespace ppk
}  // namespace nivmf
