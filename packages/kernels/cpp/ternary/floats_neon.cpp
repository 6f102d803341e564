// NEON, which every 64-bit Arm processor has.
#include "ternary/simd128.h"
// Lanes first, then what is written for them.
#include "ternary/blocks_vector.h"
#include "ternary/decoder_vector.h"
#include "ternary/floats.h"
#include "ternary/rows_vector.h"

namespace wf {

const FloatKernels kNeonFloats{float_bytes, arrange_floats, matmul_blocks, matmul_rows, rms_norm, rope, store, attention, activate, dot, accumulate};

}  // namespace wf
