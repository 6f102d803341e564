// What a tensor's bytes stand for.
#pragma once

#include <cstdint>

#include "runtime/gguf.h"

namespace wf {

// Whether a type's bytes are ternary codes with scales, for which `ternary_row` is there.
bool is_ternary(Type type);

// Dequantises one row of a tensor to float32 [columns], as ggml does it: the product of code and scale in float32.
void float_row(const Tensor& tensor, int64_t row, float* out);

// Reads one row of a ternary type: codes t + 1 in {0, 1, 2} (a damaged file has 3, too), and the scale of each block, float32
// [columns / block]; of I2_S one scale, the tensor's.
void ternary_row(const Tensor& tensor, int64_t row, uint8_t* codes, float* scales);

// Whether every number of a float tensor is finite: of blocks, whether their scales are.
bool all_finite(const Tensor& tensor);

}  // namespace wf
