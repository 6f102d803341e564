// NEON, which every 64-bit Arm processor has.
#include "ternary/simd128.h"
// Lanes first, then what is written for them.
#include "ternary/blocks_vector.h"
#include "ternary/decoder_vector.h"
#include "ternary/floats.h"

namespace wf {

const FloatKernels kNeonFloats{matmul_blocks, rms_norm, rope, attention, activate, dot, accumulate};

}  // namespace wf
