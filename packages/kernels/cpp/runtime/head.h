// The output layer: products with floats that are not quantised, as in training.
#pragma once

#include "runtime/model.h"

namespace wf {

// logits[token * vocabulary + word] = hidden[token] · head[word], then capped, on the threads of the pool. Q8_0, Q6_K and Q4_1 have
// kernels; a row of another type is dequantised once for all tokens. `hidden` is finite.
void multiply_head(const std::shared_ptr<const Model>& model, Isa isa, const float* hidden, int64_t tokens, float* logits);

}  // namespace wf
