// Random words by counter: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
#pragma once

#include <stdint.h>

#include "common/portable.h"

namespace ph {

struct RandomWords {
  uint32_t words[4];
};

// The four words of a counter, under a key of 64 bits.
PH_HOST_DEVICE RandomWords philox(uint32_t count, uint64_t seed) {
  uint32_t counter[4] = {count, 0, 0, 0};
  uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = static_cast<uint64_t>(0xd2511f53u) * counter[0],
                   second = static_cast<uint64_t>(0xcd9e8d57u) * counter[2];
    counter[0] = static_cast<uint32_t>(second >> 32) ^ counter[1] ^ key[0];
    counter[1] = static_cast<uint32_t>(second);
    counter[2] = static_cast<uint32_t>(first >> 32) ^ counter[3] ^ key[1];
    counter[3] = static_cast<uint32_t>(first);
    key[0] += 0x9e3779b9u;
    key[1] += 0xbb67ae85u;
  }
  return {{counter[0], counter[1], counter[2], counter[3]}};
}

}  // namespace ph
