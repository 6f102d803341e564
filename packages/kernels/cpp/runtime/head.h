// The output layer: products with floats that are not quantised, as in training.
#pragma once

#include "runtime/model.h"

namespace wf {

// logits[token * vocabulary + word] = hidden[token] · head[word], then capped, on the threads of the pool. Every type has a
// kernel, which reads a row once for several tokens. `hidden` is finite.
void multiply_head(const std::shared_ptr<const Model>& model, Isa isa, const float* hidden, int64_t tokens, float* logits);

}  // namespace wf
