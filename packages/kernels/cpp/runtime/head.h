// The output layer, whose weights stay in the file's type.
#pragma once

#include "runtime/model.h"

namespace wf {

// logits[token * vocabulary + word] = hidden[token] · head[word], then capped, on the threads of the pool.
void multiply_head(const std::shared_ptr<const Model>& model, const float* hidden, int64_t tokens, float* logits);

}  // namespace wf
