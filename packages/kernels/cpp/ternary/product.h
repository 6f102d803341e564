// Products on the threads of the pool: activations are quantised once, and multiplied with one matrix or several.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "ternary/memory.h"
#include "ternary/ternary.h"

namespace wf {

// A packed matrix that owns its memory. Shared, because a thread that comes late may still read it when its owner has gone.
struct OwnedMatrix {
  Buffer<uint8_t> codes;
  Buffer<float> scales;
  TernaryMatrix view;
};
using SharedMatrix = std::shared_ptr<const OwnedMatrix>;

// Quantised activations that own their memory.
class OwnedActivations {
 public:
  Activations view;
  int64_t bad = -1;  // the first token that holds a NaN or an infinity: all its products are NaN

  OwnedActivations(const Kernels& kernels, const float* x, int64_t tokens, int64_t columns);

 private:
  std::unique_ptr<std::byte[]> memory_;  // one for all, aligned here: asking for it often costs as much as a small product
};

// y[i] = x · matrix[i]ᵀ, float32 [tokens, rows], for float32 x [tokens, columns]. Matrices have the same number of columns.
// Returns the first token that holds a NaN or an infinity, whose products are NaN, or -1.
int64_t multiply(const Kernels& kernels, const std::vector<SharedMatrix>& matrices, const float* x, int64_t tokens,
                 const std::vector<float*>& y);

// The integers of the same products.
int64_t multiply_integer(const Kernels& kernels, const std::vector<SharedMatrix>& matrices, const float* x, int64_t tokens,
                         const std::vector<int32_t*>& y);

}  // namespace wf
