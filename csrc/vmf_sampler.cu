// The vMF sampler on the GPU: x = w mu + sqrt(1 - w^2) t, w by rejection from vmf_radial.h, t the
// direction of normals across mu; backward: dw/dk from vmf_radial_gradient.h.
// Inputs and outputs: vmf_kernels.h. Called by registration_cuda.cpp. One launch in each direction:
// forward a group of lanes, or above 1024 dimensions a block, owns a sample; backward a block owns
// an image. No atomics: every sum has a fixed order. Design: docs/design/sampler.md.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <type_traits>

#include "vmf_kernels.h"
#include "vmf_radial_gradient.h"

namespace nivmf {
namespace {

constexpr int64_t kMaxDim = int64_t(1) << 30;  // an index within a row is an int
constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr int kChunk = 256;  // samples whose row sums the backward holds at a time

template <typename T>
struct alignas(16) Quad {
  T v[4];
};

// Four elements from 4 q on, zero beyond dim. `aligned`: dim % 4 == 0 and the row starts at a
// multiple of 16 bytes.
template <typename T>
__device__ __forceinline__ Quad<T> load_quad(const T* row, int q, int dim, bool aligned) {
  using Vector = std::conditional_t<sizeof(T) == 4, float4, double2>;
  constexpr int kVectors = sizeof(Quad<T>) / sizeof(Vector);
  Quad<T> out = {};
  if (4 * q >= dim) return out;
  if (aligned) {
    Vector parts[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      parts[i] = reinterpret_cast<const Vector*>(row)[kVectors * q + i];
    }
    std::memcpy(&out, parts, sizeof(out));
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (4 * q + i < dim) out.v[i] = row[4 * q + i];
    }
  }
  return out;
}

template <typename T>
__device__ __forceinline__ void store_quad(T* row, int q, int dim, bool aligned, const Quad<T>& a) {
  using Vector = std::conditional_t<sizeof(T) == 4, float4, double2>;
  constexpr int kVectors = sizeof(Quad<T>) / sizeof(Vector);
  if (4 * q >= dim) return;
  if (aligned) {
    Vector parts[kVectors];
    std::memcpy(parts, &a, sizeof(a));
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      reinterpret_cast<Vector*>(row)[kVectors * q + i] = parts[i];
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (4 * q + i < dim) row[4 * q + i] = a.v[i];
    }
  }
}

template <typename T>
__device__ __forceinline__ T dot(const Quad<T>& a, const Quad<T>& b) {
  return a.v[0] * b.v[0] + a.v[1] * b.v[1] + a.v[2] * b.v[2] + a.v[3] * b.v[3];
}

// a + s b
template <typename T>
__device__ __forceinline__ Quad<T> add_scaled(const Quad<T>& a, T s, const Quad<T>& b) {
  return {{a.v[0] + s * b.v[0], a.v[1] + s * b.v[1], a.v[2] + s * b.v[2], a.v[3] + s * b.v[3]}};
}

template <typename T>
__device__ __forceinline__ Quad<T> scaled(const Quad<T>& a, T s) {
  return {{a.v[0] * s, a.v[1] * s, a.v[2] * s, a.v[3] * s}};
}

// Normals 4 q .. 4 q + 3, zero beyond dim.
template <typename T>
__device__ __forceinline__ Quad<T> normal_quad(const SampleStream& stream, int q, int dim) {
  Quad<T> out = {};
  if (4 * q >= dim) return out;
  const PhiloxWords words = stream.words(q, 0);
  const NormalPair<T> low = box_muller(uniform<T>(words.w0), uniform<T>(words.w1));
  const NormalPair<T> high = box_muller(uniform<T>(words.w2), uniform<T>(words.w3));
  out = {{low.first, low.second, high.first, high.second}};
  if (4 * q + 4 > dim) {
#pragma unroll
    for (int i = 1; i < 4; ++i) out.v[i] = 4 * q + i < dim ? out.v[i] : T(0);
  }
  return out;
}

// The same bits in every lane of the group: at each step both partners add the same two numbers.
template <int kGroup, typename T>
__device__ __forceinline__ T group_sum(T value) {
  if constexpr (kGroup > 1) {
    const unsigned lanes =
        kGroup == 32 ? ~0u : ((1u << kGroup) - 1) << (threadIdx.x % 32 / kGroup * kGroup);
#pragma unroll
    for (int step = 1; step < kGroup; step *= 2) value += __shfl_xor_sync(lanes, value, step);
  }
  return value;
}

template <typename T>
__device__ __forceinline__ T block_sum(T value) {
  __shared__ T warps[kWarps];
  value = group_sum<32>(value);
  __syncthreads();
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  T sum = 0;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) sum += warps[i];
  return sum;
}

template <typename T>
struct Forward {
  const T* loc;
  const T* concentration;
  const int64_t* seed;
  int64_t image_offset, n, batch, dim;
  T* samples;
  T* one_minus_w;
  bool aligned;
};

struct Row {
  int64_t sample, image;
};

// 64-bit division is slow and almost never needed.
__device__ __forceinline__ Row split_row(int64_t row, int64_t batch) {
  if ((row | batch) >> 32 == 0) {
    const uint32_t sample = uint32_t(row) / uint32_t(batch);
    return {sample, uint32_t(row) - sample * uint32_t(batch)};
  }
  return {row / batch, row % batch};
}

// The sample is x = along loc + scale v, where v is the normals minus `taken` mu.
template <typename T>
struct Placement {
  T along, scale, one_minus_w;
};

template <typename T>
__device__ __forceinline__ Placement<T> place(T g, T chi2, T taken, T length, const Forward<T>& op,
                                              const Row& row, const SampleStream& stream) {
  const T k = op.concentration[row.image];
  if (!is_distribution(length, k)) return {T(NAN), T(NAN), T(NAN)};
  chi2 = std::fmax(chi2, T(1e-30));
  const Radial<T> radial = draw_radial(g, chi2, make_radial_law(k, op.dim), stream);
  const T scale = radial.s / std::sqrt(chi2);
  return {(radial.w + scale * taken) / length, scale, radial.one_minus_w};
}

// A group of kGroup lanes owns a sample, and each lane holds up to kQuads blocks of 4 normals in
// registers. Sums over the group are butterflies, so all its lanes hold the same bits and run the
// rejection loop together, without a broadcast and without divergence inside a group.
template <typename T, int kGroup, int kQuads>
__global__ void __launch_bounds__(kThreads) rsample_kernel(const Forward<T> op) {
  constexpr int kGroups = kThreads / kGroup;
  // In few dimensions the tangent can be short, and the rounding error that the first pass leaves
  // along mu is then visible.
  constexpr bool kTwice = kGroup < 32;
  const int lane = threadIdx.x % kGroup, dim = int(op.dim);
  const int64_t rows = op.n * op.batch, stride = int64_t(gridDim.x) * kGroups;
  for (int64_t r = int64_t(blockIdx.x) * kGroups + threadIdx.x / kGroup; r < rows; r += stride) {
    const Row row = split_row(r, op.batch);
    const T* const row_loc = op.loc + row_offset(0, row.image, op.batch, op.dim);
    const SampleStream stream(*op.seed, row.sample, row.image + op.image_offset);
    Quad<T> loc[kQuads], v[kQuads];
    T square = 0, g = 0;
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      loc[i] = load_quad(row_loc, i * kGroup + lane, dim, op.aligned);
      v[i] = normal_quad<T>(stream, i * kGroup + lane, dim);
      square += dot(loc[i], loc[i]);
      g += dot(v[i], loc[i]);
    }
    const T length = std::sqrt(group_sum<kGroup>(square)), inverse = 1 / length;
    g = group_sum<kGroup>(g) * inverse;
    T rest = 0, chi2 = 0;
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      const Quad<T> tangent = add_scaled(v[i], -g * inverse, loc[i]);
      rest += dot(tangent, loc[i]);
      chi2 += dot(tangent, tangent);
      if (kTwice) v[i] = tangent;
    }
    rest = group_sum<kGroup>(rest) * inverse;
    T taken = -(g + rest);
    if (kTwice) {
      taken = chi2 = 0;
#pragma unroll
      for (int i = 0; i < kQuads; ++i) {
        v[i] = add_scaled(v[i], -rest * inverse, loc[i]);
        chi2 += dot(v[i], v[i]);
      }
    }
    chi2 = group_sum<kGroup>(chi2) - (kTwice ? 0 : rest * rest);
    const Placement<T> at = place(g, chi2, taken, length, op, row, stream);
    T* const out = op.samples + row_offset(row.sample, row.image, op.batch, op.dim);
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      store_quad(out, i * kGroup + lane, dim, op.aligned,
                 add_scaled(scaled(loc[i], at.along), at.scale, v[i]));
    }
    if (lane == 0) op.one_minus_w[row_offset(row.sample, row.image, op.batch, 1)] = at.one_minus_w;
  }
}

// The same for any dim: a block owns a sample and keeps its normals in the output row, which stays
// in cache.
template <typename T>
__global__ void __launch_bounds__(kThreads) rsample_large_kernel(const Forward<T> op) {
  const int dim = int(op.dim), quads = (dim - 1) / 4 + 1;
  const int64_t rows = op.n * op.batch;
  for (int64_t r = blockIdx.x; r < rows; r += gridDim.x) {
    const Row row = split_row(r, op.batch);
    const T* const row_loc = op.loc + row_offset(0, row.image, op.batch, op.dim);
    T* const out = op.samples + row_offset(row.sample, row.image, op.batch, op.dim);
    const SampleStream stream(*op.seed, row.sample, row.image + op.image_offset);
    T square = 0, g = 0;
    for (int q = threadIdx.x; q < quads; q += kThreads) {
      const Quad<T> loc = load_quad(row_loc, q, dim, op.aligned);
      const Quad<T> v = normal_quad<T>(stream, q, dim);
      square += dot(loc, loc);
      g += dot(v, loc);
      store_quad(out, q, dim, op.aligned, v);
    }
    const T length = std::sqrt(block_sum(square)), inverse = 1 / length;
    g = block_sum(g) * inverse;
    T rest = 0, chi2 = 0;
    for (int q = threadIdx.x; q < quads; q += kThreads) {
      const Quad<T> loc = load_quad(row_loc, q, dim, op.aligned);
      const Quad<T> tangent = add_scaled(load_quad(out, q, dim, op.aligned), -g * inverse, loc);
      rest += dot(tangent, loc);
      chi2 += dot(tangent, tangent);
    }
    rest = block_sum(rest) * inverse;
    chi2 = block_sum(chi2) - rest * rest;
    const Placement<T> at = place(g, chi2, -(g + rest), length, op, row, stream);
    for (int q = threadIdx.x; q < quads; q += kThreads) {
      const Quad<T> loc = load_quad(row_loc, q, dim, op.aligned);
      const Quad<T> v = load_quad(out, q, dim, op.aligned);
      store_quad(out, q, dim, op.aligned, add_scaled(scaled(loc, at.along), at.scale, v));
    }
    if (threadIdx.x == 0)
      op.one_minus_w[row_offset(row.sample, row.image, op.batch, 1)] = at.one_minus_w;
  }
}

template <typename T>
struct Backward {
  const T* grad;
  const T* samples;
  const T* one_minus_w;
  const T* loc;
  const T* concentration;
  int64_t n, batch, dim;
  T* grad_loc;
  T* grad_concentration;
  bool aligned;
};

// phi, computed by a whole warp: the quadrature's nodes are spread over its lanes.
template <typename T>
__device__ __forceinline__ T warp_radial_gradient(T one_minus_w, const RadialGradient<T>& image,
                                                  const RadialGradientPlan<T>& plan) {
  if (plan.series) return radial_gradient_series(one_minus_w, image);
  const AngularQuadrature<T> q = make_angular_quadrature(one_minus_w, image);
  T sum = 0;
  for (int i = threadIdx.x % 32; i < GradientAccuracy<T>::kNodes; i += 32) {
    sum += angular_term(plan.node[i], plan.weight[i], q);
  }
  return q.scale * group_sum<32>(sum);
}

// A block owns an image, so that its second pass over the rows finds them in cache and every sum
// has a fixed order. `width` neighbouring threads (a power of two) cover a row's quads; with few
// quads, kThreads / width samples run in parallel. (The launch bound of 4 blocks lets ptxas use
// enough registers to avoid spills in double.)
template <typename T>
__global__ void __launch_bounds__(kThreads, 4)
    rsample_backward_kernel(const Backward<T> op,
                            const __grid_constant__ RadialGradientPlan<T> plan, int width) {
  __shared__ T row_w[kChunk], row_along[kChunk], row_k[kChunk];
  __shared__ Quad<T> partial[kThreads];
  __shared__ RadialGradient<T> radial;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int column = threadIdx.x % width, part = threadIdx.x / width, parts = kThreads / width;
  const int dim = int(op.dim), quads = (dim - 1) / 4 + 1;
  for (int64_t image = blockIdx.x; image < op.batch; image += gridDim.x) {
    const T* const loc = op.loc + row_offset(0, image, op.batch, op.dim);
    T* const step = op.grad_loc + row_offset(0, image, op.batch, op.dim);
    T square = 0;
    for (int q = threadIdx.x; q < quads; q += kThreads) {
      const Quad<T> center = load_quad(loc, q, dim, op.aligned);
      square += dot(center, center);
    }
    const T k = op.concentration[image], sum = block_sum(square);
    const T length = is_distribution(std::sqrt(sum), k) ? std::sqrt(sum) : T(NAN),
            inverse = 1 / length;
    if (threadIdx.x == 0) radial = make_radial_gradient(k, plan);
    T grad_k = 0;
    int64_t first = 0;
    do {  // at least once: with no samples the gradients are 0
      const int count = int(op.n - first < kChunk ? op.n - first : kChunk);
      __syncthreads();
      for (int s = warp; s < count; s += kWarps) {
        const int64_t offset = row_offset(first + s, image, op.batch, op.dim);
        T along = 0, apart = 0;
        for (int q = lane; q < quads; q += 32) {
          const Quad<T> mu = scaled(load_quad(loc, q, dim, op.aligned), inverse);
          const Quad<T> g = load_quad(op.grad + offset, q, dim, op.aligned);
          const Quad<T> x = load_quad(op.samples + offset, q, dim, op.aligned);
          along += dot(g, mu);
          apart += dot(g, add_scaled(mu, T(-1), x));
        }
        along = group_sum<32>(along);
        apart = group_sum<32>(apart);
        const T one_minus_w = op.one_minus_w[row_offset(first + s, image, op.batch, 1)];
        const T w = 1 - one_minus_w;
        const T phi = warp_radial_gradient(one_minus_w, radial, plan);
        if (lane == 0) {
          row_w[s] = w;
          row_along[s] = along;
          row_k[s] = phi * (one_minus_w * along + w * apart);
        }
      }
      __syncthreads();
      for (int s = threadIdx.x; s < count; s += kThreads) grad_k += row_k[s];
      for (int base = 0; base < quads; base += width) {
        const int q = base + column;
        Quad<T> total = {};
        if (q < quads) {
          for (int s = part; s < count; s += parts) {
            const int64_t offset = row_offset(first + s, image, op.batch, op.dim);
            const Quad<T> g = load_quad(op.grad + offset, q, dim, op.aligned);
            const Quad<T> x = load_quad(op.samples + offset, q, dim, op.aligned);
            total = add_scaled(add_scaled(total, row_w[s], g), -row_along[s], x);
          }
        }
        if (parts > 1) {
          partial[threadIdx.x] = total;
          __syncthreads();
          for (int p = 1; part == 0 && p < parts; ++p) {
            total = add_scaled(total, T(1), partial[p * width + column]);
          }
          __syncthreads();
        }
        if (part == 0 && q < quads) {
          if (first > 0) total = add_scaled(total, T(1), load_quad(step, q, dim, op.aligned));
          store_quad(step, q, dim, op.aligned, total);
        }
      }
      first += kChunk;
    } while (first < op.n);
    grad_k = block_sum(grad_k);
    T normal = 0;
    for (int q = threadIdx.x; part == 0 && q < quads; q += width) {
      const Quad<T> mu = scaled(load_quad(loc, q, dim, op.aligned), inverse);
      normal += dot(mu, load_quad(step, q, dim, op.aligned));
    }
    normal = block_sum(normal);
    for (int q = threadIdx.x; part == 0 && q < quads; q += width) {
      const Quad<T> mu = scaled(load_quad(loc, q, dim, op.aligned), inverse);
      const Quad<T> tangent = add_scaled(load_quad(step, q, dim, op.aligned), -normal, mu);
      store_quad(step, q, dim, op.aligned, scaled(tangent, inverse));
    }
    if (threadIdx.x == 0) op.grad_concentration[image] = length > 0 ? grad_k : T(NAN);
  }
}

// Beyond this many blocks the grid-stride loops take over.
int grid_size(int64_t blocks) { return int(std::min<int64_t>(blocks, 1 << 24)); }

bool aligned_rows(int64_t dim, std::initializer_list<const void*> pointers) {
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  return dim % 4 == 0 && std::all_of(pointers.begin(), pointers.end(), aligned);
}

// Takes the smallest group that holds a row, then more quads per lane.
template <int kGroup, int kQuads, typename T>
void launch_rsample(const Forward<T>& op, cudaStream_t stream) {
  const int64_t rows = op.n * op.batch;
  if (op.dim <= 4 * kGroup * kQuads) {
    constexpr int kGroups = kThreads / kGroup;
    rsample_kernel<T, kGroup, kQuads>
        <<<grid_size((rows + kGroups - 1) / kGroups), kThreads, 0, stream>>>(op);
  } else if constexpr (kGroup < 32) {
    launch_rsample<2 * kGroup, kQuads>(op, stream);
  } else if constexpr (kQuads < 8) {
    launch_rsample<kGroup, 2 * kQuads>(op, stream);
  } else {
    rsample_large_kernel<T><<<grid_size(rows), kThreads, 0, stream>>>(op);
  }
}

}  // namespace

template <typename T>
int vmf_rsample_cuda(const T* loc, const T* concentration, const int64_t* seed,
                     int64_t image_offset, int64_t n, int64_t batch, int64_t dim, T* samples,
                     T* one_minus_w, void* stream) {
  if (n * batch == 0) return cudaSuccess;
  if (dim > kMaxDim) return cudaErrorInvalidValue;
  const Forward<T> op = {
      loc,   concentration, seed,    image_offset, n,
      batch, dim,           samples, one_minus_w,  aligned_rows(dim, {loc, samples})};
  launch_rsample<1, 1>(op, static_cast<cudaStream_t>(stream));
  return cudaGetLastError();
}

template <typename T>
int vmf_rsample_backward_cuda(const T* grad, const T* samples, const T* one_minus_w, const T* loc,
                              const T* concentration, int64_t n, int64_t batch, int64_t dim,
                              T* grad_loc, T* grad_concentration, void* stream) {
  if (batch == 0) return cudaSuccess;
  if (dim > kMaxDim) return cudaErrorInvalidValue;
  const Backward<T> op = {grad,
                          samples,
                          one_minus_w,
                          loc,
                          concentration,
                          n,
                          batch,
                          dim,
                          grad_loc,
                          grad_concentration,
                          aligned_rows(dim, {grad, samples, loc, grad_loc})};
  int width = 1;
  while (width < kThreads && 4 * width < dim) width *= 2;
  rsample_backward_kernel<<<grid_size(batch), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      op, make_radial_gradient_plan<T>(dim), width);
  return cudaGetLastError();
}

template int vmf_rsample_cuda(const float*, const float*, const int64_t*, int64_t, int64_t, int64_t,
                              int64_t, float*, float*, void*);
template int vmf_rsample_cuda(const double*, const double*, const int64_t*, int64_t, int64_t,
                              int64_t, int64_t, double*, double*, void*);
template int vmf_rsample_backward_cuda(const float*, const float*, const float*, const float*,
                                       const float*, int64_t, int64_t, int64_t, float*, float*,
                                       void*);
template int vmf_rsample_backward_cuda(const double*, const double*, const double*, const double*,
                                       const double*, int64_t, int64_t, int64_t, double*, double*,
                                       void*);

}  // namespace nivmf
