// log-PPK and its proxy-NCA loss on the GPU: tiles, products, online log-sum-exp and the
// recomputing backward. No torch.
//
// Letters: B images, N samples each, P proxies, dimension D, temperature T. A *pair* is a sample
// row r and a proxy j:
//     z = num / sqrt(1 + delta) - (D/2) log1p(delta) + bias
//     num = x . linear_j,  delta = (x o x) . spread_j
// (nivmf_fast/reference.py, `prepare_proxies` and `score`). All kernels work on square tiles of
// pairs, kTile x kTile.
//
// Rows are ordered image by image, so that a block of rows holds whole images (or one image's
// samples, if N > kTile): a tile of pairs is then dead as soon as its few images find it dead. Rows
// that do not fill a block stay empty (60 of 64 at N = 5).
//
// Operands travel as the float32 they are, through swizzled shared memory, and are split into bf16
// planes in registers on their way into mma.sync. Planes made beforehand would be 6 bytes a number
// where float32 has 4, and x o x would need its own: counted at the tensor cores' peak on an H100,
// a 64 x 64 tile at six products would ask the L2 for 40 bytes a clock and SM, where it has
// about 24. This way it asks for 20, and shared memory holds half as much. The price is some 4 ALU
// instructions for each mma, issued beside them.
#pragma once

#include <cstdint>
#include <type_traits>

#include "log_ppk.h"
#include "vmf_normalizer.h"

#ifdef __CUDACC__
#define NIVMF_D __device__ __forceinline__
#else
#define NIVMF_D inline  // tests/cuda_on_host.h, which also has the primitives below
#endif

namespace nivmf {
namespace ppk {

constexpr int kThreads = 128, kWarps = kThreads / 32;

// ---- what the hardware does ---------------------------------------------------------------------

#ifdef __CUDACC__

// Copies into shared memory without passing through registers; sm_70 and sm_75 take the registers.
template <int kBytes>
NIVMF_D void copy_async(void* to, const void* from) {
#if __CUDA_ARCH__ >= 800
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(address), "l"(from), "n"(kBytes)
               : "memory");
#else
  using Word =
      typename std::conditional<kBytes == 16, int4,
                                typename std::conditional<kBytes == 8, int2, int>::type>::type;
  *static_cast<Word*>(to) = *static_cast<const Word*>(from);
#endif
}

NIVMF_D void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// Two floats rounded to bf16: the low half holds x, the high half y.
NIVMF_D uint32_t pack_bf16(float x, float y) {
  uint32_t out = 0;
#if __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(y), "f"(x));
#endif
  return out;
}

NIVMF_D float bits_as_float(uint32_t bits) { return __uint_as_float(bits); }

// c += a b for 16 x 16 times 16 x 8, spread over a warp as PTX lays it down.
NIVMF_D void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

template <typename T>
NIVMF_D T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// What other blocks wrote in this launch: past the L1, which does not see it.
template <typename T>
NIVMF_D T load_fresh(const T* from) {
  return __ldcg(from);
}

// True for the last of `count` callers; the counter is 0 again after it.
NIVMF_D bool take_ticket(unsigned* counter, unsigned count) {
  __threadfence();  // what this block wrote, before the ticket; what the others wrote, after it
  const bool last = atomicInc(counter, count - 1) == count - 1;
  __threadfence();
  return last;
}

extern __shared__ __align__(16) unsigned char shared_memory[];

#endif  // __CUDACC__

template <typename T>
NIVMF_D T warp_sum(T value) {
  for (int mask = 16; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

template <typename T>
NIVMF_D T warp_max(T value) {
  for (int mask = 16; mask > 0; mask /= 2) value = std::fmax(value, shuffle_xor(value, mask));
  return value;
}

// The sum over the block, in an order that is always the same; on thread 0. `scratch` holds one
// double a warp.
NIVMF_D double block_sum(double value, double* scratch) {
  value = warp_sum(value);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  double sum = 0;
  for (int warp = 0; warp < kWarps; ++warp) sum += scratch[warp];
  return sum;
}

// ---- the problem --------------------------------------------------------------------------------

template <typename T>
struct Problem {
  const T *samples, *loc, *concentration, *temperature;  // [N, B, D], [P, D], [P, D], []
  const int64_t* labels;                                 // [B]; null for the plain log-PPK
  int64_t B, P;
  int N, D;
  bool exact, projection;
  bool vector;  // rows of `samples` start on 16 bytes
  int images_per_block, blocks_per_image, row_blocks;
  int pitch;  // D padded to whole tiles

  NIVMF_D bool has_spread() const { return exact || projection; }
};

// Some contiguous proxies, prepared: `linear` and `spread` [.., pitch] with zeros in the padding,
// the rest one per proxy.
template <typename T>
struct Panel {
  T *linear, *spread;
  double* bias;      // less log C_D(0)
  double* base;      // the bias of proxy 0, which all scores leave out
  T* inverse_scale;  // 1 / kbar
  T* bias_slope;     // d bias / d|K mu| / |K mu|
  int64_t first;     // which proxy is row 0
  int64_t count;     // proxies
  int blocks;        // tiles
};

struct Row {
  int64_t image, sample;
  int slot;  // which of the block's images
  bool valid;
};

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

// 1/T; no temperature at or below 0 makes a number.
template <typename T>
NIVMF_D double inverse_temperature(const Problem<T>& p) {
  const double t = double(*p.temperature);
  return t > 0 ? 1 / t : double(NAN);
}

constexpr double kLog2e = 1.44269504088896340736;

// ---- tiles in shared memory ---------------------------------------------------------------------
//
// A tile is kTile indices (rows, proxies or dimensions) by kDepth steps of the sum, in chunks of 16
// bytes. It lies as its source does: index-major if the source is contiguous along the sum, else
// depth-major. Chunks are permuted so that neither the copies nor the reads of the two engines
// below meet a bank twice.

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
  // The sum's steps chunk * kChunk .. + kChunk - 1 at one index.
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
// With `vector`, whole chunks are valid or not and lie on 16 bytes.
template <class Layout, typename T, int kTile, class Source>
NIVMF_D void load_tile(T* tile, bool vector, const Source& source) {
  constexpr int kChunk = Layout::kChunk;
#pragma unroll 1  // unrolled, its addresses would live in registers that the products need
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

// Runs over the slabs (kSlabs a block) of the blocks begin .. end - 1 that are alive, copying one
// slab ahead of the one that is being added. All threads see the same `alive`. The stages are free
// again on return.
template <int kSlabs, class Alive, class Load, class Add>
NIVMF_D void pipeline(int begin, int end, const Alive& alive, const Load& load, const Add& add) {
  const auto seek = [&](int block) {
    while (block < end && !alive(block)) ++block;
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

// ---- the two engines: a kTile x kTile product that a block accumulates slab by slab -------------
//
// Each slab is summed apart and then added: tensor cores truncate when they accumulate, so long
// sums stay out of them, and float32 gains what any blocked summation gains.

// Fused multiply-adds: every operation in T, 4 x 2 sums a thread and product. For few proxies
// (small tiles fill the machine where launches, not flops, are the cost), for float64, and for GPUs
// without bf16.
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

// Tensor cores: x = p0 + p1 (+ p2), each the bf16 nearest to what is left, and products of planes
// down to the order of the last: 6 of 9 with three planes (2^-27, float32 has 2^-24), 3 of 4 with
// two (2^-18). Four warps of 32 x 32. Three such sums of 32 registers are alive at once (two
// products and the slab's), and with the planes they leave room for three blocks of 128 threads on
// an SM.
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

  // The sum runs over k in any order that both operands share: lane q of a group of four takes
  // steps 4q .. 4q + 3 of 16, one chunk, where PTX names 2q, 2q + 1, 2q + 8 and 2q + 9.
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

// ---- the score of a pair and its derivatives ----------------------------------------------------

template <typename T>
struct alignas(2 * sizeof(T)) Products {
  T num, delta;
};

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

// A maximum to subtract: an empty one (-inf) must not turn exp(-inf - -inf) into NaN.
template <typename T>
NIVMF_D T as_shift(T top) {
  return top == -T(INFINITY) ? T(0) : top;
}

// Where a tile's products are kept for the backward, if the workspace allows it.
template <class Engine, typename T>
NIVMF_D Products<T>* kept_tile(Products<T>* kept, const Problem<T>& p, int64_t first,
                               int row_block) {
  constexpr int kTile = Engine::kTile;
  return kept ? kept + (first / kTile * p.row_blocks + row_block) * (kTile * kTile) : nullptr;
}

// What the kernels on pairs keep in shared memory.
template <class Engine>
struct PairShared {
  using T = typename Engine::T;
  static constexpr int kTile = Engine::kTile;
  static constexpr int kLanes = kThreads / kTile;  // threads that share a row
  union {
    alignas(16) T stage[2][3][Tile<T, kTile>::kElements];
    struct {  // afterwards; the padding keeps rows that are read together on different banks
      T num[kTile][kTile + kLanes], delta[kTile][kTile + kLanes];
    };
  };
  int64_t offset[kTile];  // of the row's sample, -1 if there is none
  int64_t label[kTile];   // of the row's image, -1 if it is no proxy
  T bias[kTile];
  T highest[kTile], fresh[kTile];  // of the tile, per row
  T top[kTile], sum[kTile];        // so far: the forward's state, per row
  T rest[kTile], own_top[kTile], own_rest[kTile], grad[kTile];  // the backward's, with `top`
  T scale;                                                      // log2(e) / T
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

// num and delta of one tile of pairs, left in shared memory: there the loops over pairs need not be
// unrolled, and both the rows and the columns are at hand.
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

// ---- preparing the proxies ----------------------------------------------------------------------
//
// One warp a proxy, two passes over its row, in float64: the logits are these deviations times
// thousands. Limited by memory (16 bytes a number in and out); its float64 logarithms stay below
// that on a data-centre GPU.

struct ProxyScalars {
  double inverse_scale, bias, bias_slope;
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
  const double slope = p.exact ? -g.a : -g.a - 1 / length;
  return {std::exp(-logs / p.D), p.exact ? g.g : g.g + logs - std::log(length),
          length == 0 ? 0 : slope / length};
}

template <typename T>
NIVMF_D T proxy_linear(const Problem<T>& p, double mu, double kappa, double inverse_scale) {
  return T(p.projection ? kappa * mu * (kappa * inverse_scale) : kappa * mu);
}

template <typename T>
NIVMF_D T proxy_spread(double kappa, double inverse_scale) {
  const double ratio = kappa * inverse_scale;
  return T((ratio - 1) * (ratio + 1));
}

template <typename T>
struct PrepareArgs {
  Problem<T> p;
  Panel<T> panel;
  int tile;
  unsigned* tickets;  // to be zeroed; may be null
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
    a.panel.inverse_scale[row] = T(scalars.inverse_scale);
    a.panel.bias_slope[row] = T(scalars.bias_slope);
    if (j == 0) *a.panel.base = scalars.bias;
  }
  for (int d = lane; d < p.pitch; d += 32) {
    const bool inside = d < p.D;
    const double mu = inside ? double(p.loc[j * p.D + d]) : 0;
    const double kappa = inside ? double(p.concentration[j * p.D + d]) : 0;
    linear[d] = proxy_linear(p, mu, kappa, scalars.inverse_scale);
    spread[d] = inside ? proxy_spread<T>(kappa, scalars.inverse_scale) : T(0);
  }
}

// num and delta of every row with its own proxy, summed in float64: the loss is a difference in
// which this pair stands on both sides, so both take it from here. One warp a row; R dot products,
// small beside R P.
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
    num += double(x[d]) * double(proxy_linear(p, mu, kappa, scalars.inverse_scale));
    delta += double(x[d]) * double(x[d]) * double(proxy_spread<T>(kappa, scalars.inverse_scale));
  }
  num = warp_sum(num);
  delta = warp_sum(delta);
  if (threadIdx.x % 32 == 0) a.own[at] = {T(num), p.has_spread() ? T(delta) : T(0)};
}

// ---- the forward of proxy-NCA -------------------------------------------------------------------
//
// A block takes kTile rows and walks over its split of the proxies; per row it carries the maximum
// in raw units and the sum of exponentials relative to it, so nothing is lost to z / T. Limited by
// the two products: the epilogue has one log1p, one exp and one root a pair against 4 D flops. The
// last block to finish an image's rows combines them, splits in order.

template <typename T>
struct ForwardArgs {
  Problem<T> p;
  Panel<T> panel;
  int splits, blocks_per_split;
  bool first, last;        // of the chunks of proxies
  T *top, *sum;            // [splits, padded rows], carried from chunk to chunk
  T* own_z;                // [padded rows]
  const Products<T>* own;  // [padded rows] or null
  T* maxima;               // [proxy blocks, row blocks, images_per_block] or null
  Products<T>* kept;       // [proxy blocks, row blocks, kTile, kTile] or null
  unsigned* tickets;       // one a group of row blocks that share images
  double* partial;         // [4, B]
  T* losses;               // [B]
};

template <class Engine, typename T>
NIVMF_D void combine_image(const ForwardArgs<T>& a, int64_t image) {
  const Problem<T>& p = a.p;
  const int lane = threadIdx.x % 32;
  const int64_t rows = int64_t(p.row_blocks) * Engine::kTile, count = int64_t(p.N) * a.splits;
  const double inverse_t = inverse_temperature(p);
  const T scale = T(inverse_t * kLog2e);
  const auto at = [&](int64_t i) {
    return i / p.N * rows + padded_row<Engine::kTile>(p, image, int(i % p.N));
  };
  T top = -T(INFINITY), sum = 0, own_top = -T(INFINITY), own_sum = 0;
  for (int64_t i = lane; i < count; i += 32) top = std::fmax(top, load_fresh(a.top + at(i)));
  top = warp_max(top);
  for (int64_t i = lane; i < count; i += 32) {
    sum +=
        load_fresh(a.sum + at(i)) * std::exp2((load_fresh(a.top + at(i)) - as_shift(top)) * scale);
  }
  sum = warp_sum(sum);

  const int64_t label = p.labels[image];
  const bool known = label >= 0 && label < p.P;
  if (known) {
    for (int s = lane; s < p.N; s += 32) own_top = std::fmax(own_top, load_fresh(a.own_z + at(s)));
    own_top = warp_max(own_top);
    for (int s = lane; s < p.N; s += 32) {
      own_sum += std::exp2((load_fresh(a.own_z + at(s)) - as_shift(own_top)) * scale);
    }
    own_sum = warp_sum(own_sum);
  }
  if (lane != 0) return;
  const double log_z = std::log(double(sum)), own_log_z = known ? std::log(double(own_sum)) : 0;
  a.partial[image] = *a.panel.base + double(top);
  a.partial[p.B + image] = log_z;
  a.partial[2 * p.B + image] = *a.panel.base + double(own_top);
  a.partial[3 * p.B + image] = own_log_z;
  const double loss = (double(top) - double(own_top)) * inverse_t + (log_z - own_log_z);
  a.losses[image] = known ? T(loss) : T(NAN);
}

template <class Engine>
__global__ void __launch_bounds__(kThreads, Engine::kMinBlocks)
    forward_kernel(const __grid_constant__ ForwardArgs<typename Engine::T> a) {
  using T = typename Engine::T;
  constexpr int kTile = Engine::kTile, kLanes = PairShared<Engine>::kLanes;
  PairShared<Engine>& s = *reinterpret_cast<PairShared<Engine>*>(shared_memory);
  const Problem<T>& p = a.p;
  // Blocks that run side by side share their proxies: a panel comes from memory once, the samples
  // stay in the L2.
  const int begin = blockIdx.x / p.row_blocks * a.blocks_per_split;
  const auto state = [&] {  // [split, padded row]
    const unsigned split = blockIdx.x / p.row_blocks, row_block = blockIdx.x % p.row_blocks;
    return (int64_t(split) * p.row_blocks + row_block) * kTile + threadIdx.x;
  };
  // What lives from tile to tile waits in shared memory: the products need every register.
  if (int(threadIdx.x) < kTile) {
    s.top[threadIdx.x] = a.first ? -T(INFINITY) : a.top[state()];
    s.sum[threadIdx.x] = a.first ? T(0) : a.sum[state()];
  }
  if (threadIdx.x == 0) s.end = min(begin + a.blocks_per_split, a.panel.blocks);
  load_rows(s, p, blockIdx.x % p.row_blocks);

  for (int block = begin; block < s.end; ++block) {
    pair_products(p, a.panel, block, s);
    load_bias(s, a.panel, block);
    __syncthreads();
    const int row_block = s.row_block;
    const int64_t local = int64_t(block) * kTile, first = a.panel.first + local;
    Products<T>* kept = kept_tile<Engine>(a.kept, p, first, row_block);
#pragma unroll 2
    for (int i = threadIdx.x; i < kTile * kTile; i += kThreads) {
      const int r = i / kTile, c = i % kTile;
      const int64_t at = int64_t(row_block) * kTile + r;
      const bool own = s.label[r] == first + c;
      Products<T> v = {s.num[r][c], s.delta[r][c]};
      if (own && a.own) v = a.own[at];
      if (kept) kept[i] = v;
      const bool valid = s.offset[r] >= 0 && local + c < a.panel.count;
      const T z = valid ? score(p, v, s.bias[c]).z : -T(INFINITY);
      if (own) a.own_z[at] = z;
      s.num[r][c] = z;
    }
    __syncthreads();
    const int row = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
    T highest = -T(INFINITY);
#pragma unroll 4
    for (int c = lane; c < kTile; c += kLanes) highest = std::fmax(highest, s.num[row][c]);
    for (int mask = 1; mask < kLanes; mask *= 2) {
      highest = std::fmax(highest, shuffle_xor(highest, mask));
    }
    const T shift = as_shift(std::fmax(s.top[row], highest)), scale = s.scale;
    T fresh = 0;
#pragma unroll 4
    for (int c = lane; c < kTile; c += kLanes) fresh += std::exp2((s.num[row][c] - shift) * scale);
    for (int mask = 1; mask < kLanes; mask *= 2) fresh += shuffle_xor(fresh, mask);
    if (lane == 0) {
      s.highest[row] = highest;
      s.fresh[row] = fresh;
    }
    __syncthreads();
    if (int(threadIdx.x) < kTile) {
      const T previous = s.top[threadIdx.x], next = std::fmax(previous, s.highest[threadIdx.x]);
      const T before = s.sum[threadIdx.x] * std::exp2((previous - as_shift(next)) * scale);
      s.sum[threadIdx.x] = before + s.fresh[threadIdx.x];
      s.top[threadIdx.x] = next;
    }
    if (a.maxima) {
      if (int(threadIdx.x) < p.images_per_block) {
        const int size = p.N <= kTile ? p.N : kTile;
        T best = -T(INFINITY);
        for (int i = 0; i < size; ++i) best = std::fmax(best, s.highest[threadIdx.x * size + i]);
        a.maxima[((first / kTile) * p.row_blocks + row_block) * p.images_per_block + threadIdx.x] =
            best;
      }
    }
  }
  if (int(threadIdx.x) < kTile) {
    a.top[state()] = s.top[threadIdx.x];
    a.sum[state()] = s.sum[threadIdx.x];
  }
  if (!a.last) return;

  const int row_block = s.row_block;
  __syncthreads();
  if (threadIdx.x == 0) {
    s.flag = take_ticket(a.tickets + row_block / p.blocks_per_image,
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
  T* out;   // [B, P]
  T* rest;  // [2, B, P]: the maximum over the samples in raw units, log-sum-exp relative to it
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

  T top = -T(INFINITY),
    sum = 0;  // of thread c < kTile's column, carried while an image has more rows than a block
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
      const T previous = part > 0 ? top : -T(INFINITY);
      top = previous;
      for (int r = 0; r < size; ++r) top = std::fmax(top, s.num[slot * size + r][column]);
      const T shift = as_shift(top);
      sum = part > 0 ? sum * std::exp2((previous - shift) * scale) : T(0);
      for (int r = 0; r < size; ++r) {
        sum += std::exp2((s.num[slot * size + r][column] - shift) * scale);
      }
      if (part + 1 == p.blocks_per_image && image < p.B && j < a.panel.count) {
        const int64_t at = image * p.P + a.panel.first + j;
        const double log_sum = std::log(double(sum));
        a.rest[at] = top;
        a.rest[p.B * p.P + at] = T(log_sum);
        a.out[at] = T(double(top) * inverse_t + (log_sum - std::log(double(p.N))));
      }
    }
  }
}

// ---- the backward, first half: G1 = dL/dnum and G2 = dL/ddelta of every pair --------------------
//
// A tile in which, by the maxima that the forward stored, no pair holds 2^-24 / (N P) of its
// image's softmax (2^-53 in float64), and which holds no label, is dead: neither computed nor
// written nor read again. A live one recomputes its scores (or takes the kept ones) and leaves two
// numbers a pair in the workspace, from which plain products make the gradients. To do both at once
// needs the sums of four products in registers. To do it in two passes, one for the samples and one
// for the proxies, needs no workspace but the scores twice, at six products of planes each: 48 such
// products a step where this takes 36, by count more than the traffic that it would save.
// Limited by the two products, or, from kept scores, by memory: 16 bytes a pair.

template <typename T>
struct PairArgs {
  Problem<T> p;
  Panel<T> panel;
  const T* grad;           // [B], or [B, P] for log-PPK
  const double* partial;   // [4, B]
  const T* rest;           // [2, B, P], log-PPK
  const Products<T>* own;  // these three may be null
  const T* maxima;
  Products<T>* kept;
  T *by_num, *by_delta;    // [padded rows, panel.blocks * kTile]
  T* by_bias;              // [row blocks, panel.blocks * kTile]: sums over the block's rows
  unsigned char* alive;    // [row blocks, panel.blocks]
  double* by_temperature;  // a block
};

// The shared constants of a row: p = exp2((z - top) scale - rest), z and top relative to the
// panel's base.
template <class S, typename T>
NIVMF_D void load_softmax(S& s, const PairArgs<T>& a, int row_block) {
  if (int(threadIdx.x) < S::kTile) {
    const double inverse_t = inverse_temperature(a.p);
    const Row row = row_of<S::kTile>(a.p, row_block, threadIdx.x);
    const int64_t B = a.p.B, image = row.valid ? row.image : 0;
    const auto set = [&](double top, double log_z, T& to_top, T& to_rest) {
      to_top = T(
          top - *a.panel.base);  // a maximum of other proxies need not be a T relative to this base
      const double left = top - *a.panel.base - double(to_top);
      to_rest = T((left * inverse_t + log_z) * kLog2e);
    };
    set(a.partial[image], a.partial[B + image], s.top[threadIdx.x], s.rest[threadIdx.x]);
    set(a.partial[2 * B + image], a.partial[3 * B + image], s.own_top[threadIdx.x],
        s.own_rest[threadIdx.x]);
    if (a.partial[2 * B + image] == -double(INFINITY)) s.rest[threadIdx.x] = T(NAN);
    s.grad[threadIdx.x] = T(double(a.grad[image]) * inverse_t);
  }
}

template <class S, typename T>
NIVMF_D bool tile_is_alive(S& s, const PairArgs<T>& a, int row_block, int block) {
  if (threadIdx.x == 0) s.flag = a.maxima == nullptr;
  __syncthreads();
  if (a.maxima && int(threadIdx.x) < S::kTile && s.offset[threadIdx.x] >= 0) {
    const Problem<T>& p = a.p;
    const int64_t first = a.panel.first + int64_t(block) * S::kTile;
    const int slot = row_of<S::kTile>(p, row_block, threadIdx.x).slot;
    const T highest =
        a.maxima[(first / S::kTile * p.row_blocks + row_block) * p.images_per_block + slot];
    const T bound = dead_log2<T>(p.N, p.P);
    const bool dead = (highest - s.top[threadIdx.x]) * s.scale - s.rest[threadIdx.x] < bound;
    const int64_t label = s.label[threadIdx.x] - first;
    if (!dead || (label >= 0 && label < S::kTile)) s.flag = 1;  // NaN is alive
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
  const bool alive = !kProxyNca || tile_is_alive(s, a, row_block, block);
  if (threadIdx.x == 0) a.alive[int64_t(row_block) * a.panel.blocks + block] = alive;
  if (!alive) {
    if (threadIdx.x == 0) a.by_temperature[blockIdx.x] = 0;
    return;
  }

  if (!a.kept) pair_products(p, a.panel, block, s);
  load_bias(s, a.panel, block);
  __syncthreads();
  const int64_t local = int64_t(block) * kTile, first = a.panel.first + local;
  const int64_t pitch = int64_t(a.panel.blocks) * kTile;
  const Products<T>* kept = kept_tile<Engine>(a.kept, p, first, row_block);
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
      } else if (own && a.own) {
        products = a.own[at];
      }
      v = score(p, products, s.bias[c]);
      // dT = -sum dl z / T^2; over an image of proxy-NCA dl sums to 0, so z may be taken from its
      // maximum.
      if (kProxyNca) {
        T weight = std::exp2((v.z - s.top[r]) * scale - s.rest[r]);
        if (own) weight -= std::exp2((v.z - s.own_top[r]) * scale - s.own_rest[r]);
        g = s.grad[r] * weight;
        by_temperature += g * (v.z - s.top[r]);
      } else {
        const int64_t pair = row_of<kTile>(p, row_block, r).image * p.P + first + c;
        const T rest = a.rest[p.B * p.P + pair] * T(kLog2e);
        g = T(double(a.grad[pair]) * inverse_t) * std::exp2((v.z - a.rest[pair]) * scale - rest);
        by_temperature += g * v.z;
      }
    }
    a.by_num[at * pitch + local + c] = g * v.by_num;
    if (p.has_spread()) a.by_delta[at * pitch + local + c] = g * v.by_delta;
    by_bias += g;
  }
  const double sum = block_sum(double(by_temperature), s.warp);
  if (threadIdx.x == 0) a.by_temperature[blockIdx.x] = -sum * inverse_t;
  s.column[threadIdx.x] = by_bias;
  __syncthreads();
  if (int(threadIdx.x) < kTile) {
    T total = 0;
    for (int part = threadIdx.x; part < kThreads; part += kTile) total += s.column[part];
    a.by_bias[row_block * pitch + local + threadIdx.x] = total;
  }
}

// ---- the backward, second half: one launch makes all gradients ----------------------------------
//
// Blocks of three kinds. Of the samples: dx = G1 linear + 2 x o (G2 spread), a tile of rows by
// dimensions, summed over a split of the proxies. Of the proxies: dlinear = G1' x and dspread = G2'
// (x o x), a tile of proxies by dimensions, summed over all rows and carried through to loc and
// concentration. One block for the temperature. All skip dead tiles and are limited by the
// products; whatever is split is added up in order by reduce_kernel.

template <typename T>
struct GradientArgs {
  Problem<T> p;
  Panel<T> panel;
  const T *by_num, *by_delta, *by_bias;
  const unsigned char* alive;
  const double* by_temperature;
  int splits, blocks_per_split;
  bool first, last;            // of the chunks of proxies
  T* d_samples;                // [splits, N, B, D]
  T *d_loc, *d_concentration;  // [P, D]
  double* temperature_sum;     // carried from chunk to chunk
  T* d_temperature;
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
  const int64_t pitch = int64_t(a.panel.blocks) * kTile;
  const bool two = p.has_spread();
  const auto load = [&](int stage, int block, int slab) {
    const int64_t proxy = int64_t(block) * kTile + slab * kDepth;
    const auto pair = [&](int r, int c) {
      return (int64_t(row_block) * kTile + r) * pitch + proxy + c;
    };
    const auto value = [&](int r, int c) { return (proxy + r) * p.pitch + column + c; };
    load_tile<A, T, kTile>(s.stage[stage][0], true,
                           [&](int r, int c) { return a.by_num + pair(r, c); });
    load_tile<B, T, kTile>(s.stage[stage][1], true,
                           [&](int r, int c) { return a.panel.linear + value(r, c); });
    if (!two) return;
    load_tile<A, T, kTile>(s.stage[stage][2], true,
                           [&](int r, int c) { return a.by_delta + pair(r, c); });
    load_tile<B, T, kTile>(s.stage[stage][3], true,
                           [&](int r, int c) { return a.panel.spread + value(r, c); });
  };
  Engine linear, spread;
  const auto add = [&](int stage) {
    linear.template add<A, B, false, false>(s.stage[stage][0], s.stage[stage][1]);
    if (two) spread.template add<A, B, false, false>(s.stage[stage][2], s.stage[stage][3]);
  };
  const unsigned char* alive = a.alive + int64_t(row_block) * a.panel.blocks;
  const int begin = split * a.blocks_per_split;
  const int end = min(begin + a.blocks_per_split, a.panel.blocks);
  pipeline<kTile / kDepth>(begin, end, [&](int block) { return alive[block] != 0; }, load, add);

  T* out = a.d_samples + split * (int64_t(p.N) * p.B * p.D);
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
  const int64_t pitch = int64_t(a.panel.blocks) * kTile, local = int64_t(block) * kTile;
  const bool two = p.has_spread();
  const auto alive = [&](int row_block) {
    return a.alive[int64_t(row_block) * a.panel.blocks + block] != 0;
  };
  const auto load = [&](int stage, int row_block, int slab) {
    const auto pair = [&](int r, int c) {
      return (int64_t(row_block) * kTile + slab * kDepth + r) * pitch + local + c;
    };
    load_tile<Layout, T, kTile>(s.stage[stage][0], true,
                                [&](int r, int c) { return a.by_num + pair(r, c); });
    load_tile<Layout, T, kTile>(s.stage[stage][1], p.vector, [&](int r, int c) -> const T* {
      const Row row = row_of<kTile>(p, row_block, slab * kDepth + r);
      return row.valid && column + c < p.D ? p.samples + sample_offset(p, row) + column + c
                                           : nullptr;
    });
    if (!two) return;
    load_tile<Layout, T, kTile>(s.stage[stage][2], true,
                                [&](int r, int c) { return a.by_delta + pair(r, c); });
  };
  Engine linear, spread;
  const auto add = [&](int stage) {
    linear.template add<Layout, Layout, false, false>(s.stage[stage][0], s.stage[stage][1]);
    if (two) spread.template add<Layout, Layout, false, true>(s.stage[stage][2], s.stage[stage][1]);
  };
  if (int(threadIdx.x) < kTile) {
    T sum = 0;
    for (int row_block = 0; row_block < p.row_blocks; ++row_block) {
      if (alive(row_block)) sum += a.by_bias[row_block * pitch + local + threadIdx.x];
    }
    s.by_bias[threadIdx.x] = sum;
  }
  pipeline<kTile / kDepth>(0, p.row_blocks, alive, load, add);

  // The scale kbar cancels in num / sqrt(1 + delta), so its whole gradient is D by_bias, 1 / kappa
  // of it for each dimension.
  Engine::for_each(linear, spread, [&](int r, int c, T by_linear, T by_spread) {
    const int64_t j = local + r;
    if (j >= a.panel.count || column + c >= p.D) return;
    const int64_t at = (a.panel.first + j) * p.D + column + c;
    const T mu = p.loc[at], kappa = p.concentration[at], by_bias = s.by_bias[r];
    const T ratio = kappa * a.panel.inverse_scale[j], weight = by_bias * a.panel.bias_slope[j];
    const T by_kappa = by_linear * (p.projection ? 2 * mu * ratio : mu);
    const T spread_term = two ? 2 * ratio * a.panel.inverse_scale[j] * by_spread : T(0);
    a.d_loc[at] = by_linear * (p.projection ? kappa * ratio : kappa) + weight * kappa * kappa * mu;
    a.d_concentration[at] = by_kappa + weight * kappa * mu * mu + (spread_term + by_bias / kappa);
  });
}

template <class Engine>
__global__ void __launch_bounds__(kThreads, 2)
    gradient_kernel(const __grid_constant__ GradientArgs<typename Engine::T> a) {
  using T = typename Engine::T;
  GradientShared<Engine>& s = *reinterpret_cast<GradientShared<Engine>*>(shared_memory);
  const Problem<T>& p = a.p;
  const int tiles = p.pitch / Engine::kTile;
  const int of_samples = tiles * p.row_blocks * a.splits, of_proxies = tiles * a.panel.blocks;
  const int tile = blockIdx.x;
  if (tile < of_samples) {
    sample_gradient(a, s, tile);
  } else if (tile < of_samples + of_proxies) {
    proxy_gradient(a, s, tile - of_samples);
  } else {
    const int64_t count = int64_t(p.row_blocks) * a.panel.blocks;
    double sum = 0;
    for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += a.by_temperature[i];
    sum = block_sum(sum, s.warp);
    if (threadIdx.x != 0) return;
    if (!a.first) sum += *a.temperature_sum;
    *a.temperature_sum = sum;
    if (a.last) *a.d_temperature = T(sum);
  }
}

// d_samples (+)= the splits' sums, in order.
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
