// Products of blocks.h on the threads of the pool.
#pragma once

#include <memory>

#include "ternary/blocks.h"
#include "ternary/memory.h"

namespace wf {

// A packed matrix that owns its memory. Shared, because a thread that comes late may still read it when its owner has gone.
struct OwnedBlocks {
  Buffer<uint8_t> data;
  BlockMatrix view;

  // From llama.cpp's rows, `row_bytes` each.
  OwnedBlocks(BlockType type, const uint8_t* rows_data, int64_t rows, int64_t columns);
};
using SharedBlocks = std::shared_ptr<const OwnedBlocks>;

// y = x · matrixᵀ, float32 [tokens, rows], for float32 x [tokens, columns].
// Returns the first token that holds a NaN or an infinity, or -1; y is then not written.
int64_t multiply_blocks(Isa isa, const SharedBlocks& matrix, const float* x, int64_t tokens, float* y);

}  // namespace wf
