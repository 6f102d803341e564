// Choosing a token by its logits.
#pragma once

#include <cstdint>
#include <optional>
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

// Turns logits [rows, count] into logarithms of probabilities, x - max - log(sum of e^(x - max)), in place: each within its own rounding to
// float32. All are left alone if one is not finite.
std::optional<Error> log_probabilities(float* logits, int64_t rows, int64_t count);

}  // namespace wf
