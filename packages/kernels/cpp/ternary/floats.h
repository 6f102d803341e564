// Kernels on float32 activations: what surrounds the ternary products of a decoder.
#pragma once

#include "ternary/blocks.h"

namespace wf {

// One instruction set's kernels. They agree with the scalar ones up to the order of float32 sums.
struct FloatKernels {
  // y[token * y_stride + row] of the rows of panels [begin, end).
  void (*matmul_blocks)(const BlockMatrix& w, const FloatActivations& x, int64_t begin, int64_t end, float* y, int64_t y_stride);
};

// The kernels that go with an instruction set that is available; the scalar ones where it has none of its own.
const FloatKernels& float_kernels(Isa isa);

extern const FloatKernels kScalarFloats;
extern const FloatKernels kAvx2Floats, kAvx512Floats;  // x86 only

}  // namespace wf
