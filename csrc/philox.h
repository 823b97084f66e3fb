// The random stream, the same in every backend: Philox 4x32-10 (Salmon et al., "Parallel random
// numbers: as easy as 1, 2, 3", SC 2011), key = the seed's two words, counter = (block, sample,
// image, part). In part 0, block j gives the normals 4j .. 4j + 3. Part a >= 1 is the a-th attempt
// of the rejection: block 0 has its uniforms, block r >= 1 round r of its gamma draw. No draw
// depends on another sample's.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace nivmf {

struct PhiloxWords {
  uint32_t w0, w1, w2, w3;
};

// Unrolled by recursion: a loop inside would keep GCC from vectorising a loop over counters.
template <int kRounds = 10>
NIVMF_HD PhiloxWords philox(uint32_t key0, uint32_t key1, PhiloxWords c) {
  if constexpr (kRounds == 0) {
    return c;
  } else {
    const uint64_t p0 = uint64_t(0xD2511F53u) * c.w0, p1 = uint64_t(0xCD9E8D57u) * c.w2;
    return philox<kRounds - 1>(key0 + 0x9E3779B9u, key1 + 0xBB67AE85u,
                               {uint32_t(p1 >> 32) ^ c.w1 ^ key0, uint32_t(p1),
                                uint32_t(p0 >> 32) ^ c.w3 ^ key1, uint32_t(p0)});
  }
}

// In (0, 1]: the product is exact, so the one rounding of the sum is the same with and without FMA.
template <typename T>
NIVMF_HD T uniform(uint32_t word) {
  return T(word) * T(0x1p-32) + T(0x1p-33);
}

// One sample's part of the stream.
struct SampleStream {
  uint32_t key0, key1, sample, image;

  NIVMF_HD SampleStream(int64_t seed, int64_t sample_index, int64_t image_index)
      : key0(uint32_t(uint64_t(seed))),
        key1(uint32_t(uint64_t(seed) >> 32)),
        sample(uint32_t(uint64_t(sample_index))),
        image(uint32_t(uint64_t(image_index))) {}

  NIVMF_HD PhiloxWords words(uint32_t block, uint32_t part) const {
    return philox(key0, key1, {block, sample, image, part});
  }
};

}  // namespace nivmf
