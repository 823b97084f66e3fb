// Helpers that let the CPU kernels' inner loops vectorise: clones of a function for newer CPUs,
// loops over lanes, and buffers that start on a cache line.
#pragma once

#include <cstdint>
#include <vector>

#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12 && defined(__x86_64__) && \
    defined(__gnu_linux__)
#define NIVMF_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define NIVMF_CLONES
#endif
#define NIVMF_INLINE inline __attribute__((always_inline))  // into the clones
// A loop over lanes, not unrolled: GCC vectorises the loop, but not its unrolled form.
#define NIVMF_LANES(T, l) _Pragma("GCC unroll 1") for (int l = 0; l < kLanes<T>; ++l)

namespace nivmf {
namespace {

template <typename T>
constexpr int64_t kLanes = 64 / sizeof(T);

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// An array of zeros that starts on a cache line.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t size = 0) : lines_(ceil_div(size, kLanes<T>)) {}
  T* data() { return reinterpret_cast<T*>(lines_.data()); }
  const T* data() const { return reinterpret_cast<const T*>(lines_.data()); }
  T& operator[](int64_t i) { return data()[i]; }

 private:
  struct alignas(64) Line {
    T lane[kLanes<T>] = {};
  };
  std::vector<Line> lines_;
};

// The sum of kLanes numbers; overwrites them.
template <typename T>
NIVMF_INLINE T sum_of(T* lanes) {
  for (int64_t width = kLanes<T> / 2; width > 0; width /= 2) {
    for (int64_t l = 0; l < width; ++l) lanes[l] += lanes[l + width];
  }
  return lanes[0];
}

}  // namespace
}  // namespace nivmf
