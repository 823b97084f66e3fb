// Runs CUDA kernels on the CPU, so that what they compute can be tested without a GPU: one block
// after another in a random order, each thread a fiber of its own, in a random order between
// barriers. It is made to expose what a GPU would forgive: shared memory starts as NaN; an
// asynchronous copy spoils its target at once and delivers only when waited for; a block whose
// threads do not all reach the same barrier aborts. Include it before the .cu file, compiled as C++
// without __CUDACC__.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#define __global__
#define __launch_bounds__(...)
#define __grid_constant__

struct HostIndex {
  unsigned x;
};
inline HostIndex threadIdx, blockIdx, gridDim;
alignas(16) inline unsigned char shared_memory[256 << 10];

namespace host {

constexpr int kThreads = 128;

struct Barrier {
  int expected = 0, arrived = 0;
  unsigned generation = 0;
  void release_if_full() {
    if (arrived == expected && expected > 0) {
      arrived = 0;
      ++generation;
    }
  }
};

struct Copy {
  void* to;
  const void* from;
  int bytes;
};

struct Fiber {
  jmp_buf at;
  ucontext_t start;
  std::unique_ptr<char[]> stack{new char[1 << 18]};
  bool started, done;
  const Barrier* waits_for;
  unsigned generation;
  std::vector<Copy> copies;
  unsigned exchanges;
};

inline Fiber fibers[kThreads];
inline Barrier block, warps[kThreads / 32];
inline jmp_buf scheduler;
inline int current;
inline void (*body)(void*);
inline void* body_argument;
inline std::mt19937 order(1);
inline int64_t launches = 0, copies = 0;
inline unsigned char mailbox[2][kThreads]
                            [64];  // double-buffered: one barrier an exchange is enough

inline void yield() {
  if (!_setjmp(fibers[current].at)) _longjmp(scheduler, 1);
}

inline void wait_at(Barrier& barrier) {
  Fiber& fiber = fibers[current];
  fiber.waits_for = &barrier;
  fiber.generation = barrier.generation;
  ++barrier.arrived;
  barrier.release_if_full();
  if (fiber.generation == barrier.generation) yield();
  fiber.waits_for = nullptr;
}

inline void enter() {
  body(body_argument);
  fibers[current].done = true;
  for (Barrier* barrier : {&block, &warps[current / 32]}) {
    --barrier->expected;
    barrier->release_if_full();
  }
  _longjmp(scheduler, 1);
}

inline void run_block() {
  std::memset(shared_memory, 0xff, sizeof(shared_memory));
  block = Barrier{kThreads};
  for (Barrier& warp : warps) warp = Barrier{32};
  std::vector<int> sequence(kThreads);
  for (int i = 0; i < kThreads; ++i) {
    sequence[i] = i;
    fibers[i].started = fibers[i].done = false;
    fibers[i].waits_for = nullptr;
    fibers[i].copies.clear();
    fibers[i].exchanges = 0;
  }
  for (volatile bool left = true; left;) {
    std::shuffle(sequence.begin(), sequence.end(), order);
    volatile bool moved = false;
    left = false;
    for (volatile int i = 0; i < kThreads; i = i + 1) {
      Fiber& fiber = fibers[sequence[i]];
      if (fiber.done) continue;
      left = true;
      if (fiber.waits_for && fiber.waits_for->generation == fiber.generation) continue;
      moved = true;
      current = sequence[i];
      threadIdx.x = unsigned(current);
      if (_setjmp(scheduler)) continue;
      if (fibers[current].started) _longjmp(fibers[current].at, 1);
      Fiber& fresh = fibers[current];
      fresh.started = true;
      getcontext(&fresh.start);
      fresh.start.uc_stack.ss_sp = fresh.stack.get();
      fresh.start.uc_stack.ss_size = 1 << 18;
      fresh.start.uc_link = nullptr;
      makecontext(&fresh.start, enter, 0);
      setcontext(&fresh.start);
    }
    if (left && !moved) {
      std::fprintf(stderr, "block %u: threads wait at different barriers\n", blockIdx.x);
      std::abort();
    }
  }
}

// Every lane gives `value` and may then read all 32 of its warp until its next exchange.
template <typename V>
const unsigned char (*exchange(const V& value))[64] {
  static_assert(sizeof(V) <= 64);
  Fiber& fiber = fibers[current];
  auto* box = mailbox[fiber.exchanges++ % 2];
  std::memcpy(box[current], &value, sizeof(V));
  wait_at(warps[current / 32]);
  return box + current / 32 * 32;
}

template <typename V>
V letter(const unsigned char (*box)[64], int lane) {
  V value;
  std::memcpy(&value, box[lane], sizeof(V));
  return value;
}

inline float bf16(uint32_t bits) {
  bits <<= 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

}  // namespace host

using std::min;
inline void __syncthreads() { host::wait_at(host::block); }

namespace nivmf {
namespace ppk {

template <int kBytes>
void copy_async(void* to, const void* from) {
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % kBytes != 0) {
    std::fprintf(stderr, "misaligned copy of %d bytes\n", kBytes);
    std::abort();
  }
  std::memset(to, 0xff, kBytes);
  host::fibers[host::current].copies.push_back({to, from, kBytes});
  ++host::copies;
}

inline void wait_for_copies() {
  for (const host::Copy& c : host::fibers[host::current].copies) std::memcpy(c.to, c.from, c.bytes);
  host::fibers[host::current].copies.clear();
}

inline float bits_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t pack_bf16(float x, float y) {  // to nearest even
  const auto round = [](float value) -> uint32_t {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (value != value) return 0x7fff;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  };
  return round(x) | round(y) << 16;
}

// The fragments of mma.m16n8k16 as the PTX manual lays them out; sums in float32.
inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Fragment {
    uint32_t a[4], b[2];
  } mine;
  std::memcpy(mine.a, a, sizeof(a));
  std::memcpy(mine.b, b, sizeof(b));
  const auto* box = host::exchange(mine);
  const int lane = host::current % 32;
  for (int e = 0; e < 4; ++e) {
    const int row = lane / 4 + e / 2 * 8, column = lane % 4 * 2 + e % 2;
    float sum = 0;
    for (int k = 0; k < 16; ++k) {
      const Fragment from_a = host::letter<Fragment>(box, row % 8 * 4 + k % 8 / 2);
      const Fragment from_b = host::letter<Fragment>(box, column * 4 + k % 8 / 2);
      const int half = k % 2 * 16;
      sum += host::bf16(from_a.a[row / 8 + k / 8 * 2] >> half & 0xffff) *
             host::bf16(from_b.b[k / 8] >> half & 0xffff);
    }
    c[e] += sum;
  }
}

template <typename T>
T shuffle_xor(T value, int mask) {
  return host::letter<T>(host::exchange(value), (host::current % 32) ^ mask);
}

template <typename T>
T load_fresh(const T* from) {
  return *from;
}

inline bool take_ticket(unsigned* counter, unsigned count) {
  const bool last = *counter == count - 1;
  *counter = last ? 0 : *counter + 1;
  return last;
}

template <typename Args>
int launch(void (*kernel)(Args), int64_t blocks, size_t shared, void*, const Args& args) {
  if (shared > sizeof(shared_memory)) std::abort();
  struct Call {
    void (*kernel)(Args);
    const Args* args;
  } call = {kernel, &args};
  host::body = [](void* p) {
    const Call& c = *static_cast<Call*>(p);
    c.kernel(*c.args);
  };
  host::body_argument = &call;
  gridDim.x = unsigned(blocks);
  std::vector<unsigned> sequence(blocks);
  for (int64_t i = 0; i < blocks; ++i) sequence[i] = unsigned(i);
  std::shuffle(sequence.begin(), sequence.end(), host::order);
  for (const unsigned index : sequence) {
    blockIdx.x = index;
    host::run_block();
  }
  ++host::launches;
  return 0;
}

inline bool has_tensor_cores() { return true; }

}  // namespace ppk
}  // namespace nivmf
