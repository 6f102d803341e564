// Attention of some tokens to what their slots hold, on the threads of the pool.
#pragma once

#include <memory>
#include <vector>

#include "runtime/cache.h"
#include "ternary/floats.h"

namespace wf {

// The positions [first, end) of a slot that one token attends to.
struct Attended {
  int64_t slot, first, end;
};

// out[i] = attention of token i's query heads, [heads, head width] in `queries` and `out` of each token, in a layer of the cache.
// Results do not depend on the number of threads.
void attend(const FloatKernels& kernels, const std::shared_ptr<const Cache>& cache, int64_t layer, std::vector<Attended> tokens, int64_t heads,
            float scale, const float* queries, float* out);

}  // namespace wf
