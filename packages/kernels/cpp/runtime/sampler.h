// Choosing a token by its logits.
#pragma once

#include <cstdint>
#include <vector>

#include "runtime/result.h"

namespace wf {

struct SamplerOptions {
  float temperature = 0;  // 0: the largest logit, of equal ones the first
  int64_t top_k = 0;      // only so many of the most probable tokens; 0: all
  float top_p = 1;        // only the most probable tokens that together have this probability
  uint64_t seed = 0;
};

// Chooses a token. The draw depends on the seed and on `index`, the number of the draw, alone: so texts do not depend on the batch.
Result<int64_t> sample(const float* logits, int64_t count, const SamplerOptions& options, uint64_t index);

}  // namespace wf
