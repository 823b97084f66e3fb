// Threads of the CPU kernels.
#pragma once

#include <cstdint>

#include <torch/csrc/stable/ops.h>

namespace nivmf {

// Calls f(first, last) on disjoint pieces of [begin, end), of at least `grain` items each. Runs on
// torch's own thread pool, so that torch.set_num_threads holds for these kernels too.
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  torch::stable::parallel_for(begin, end, grain, f);
}

}  // namespace nivmf
