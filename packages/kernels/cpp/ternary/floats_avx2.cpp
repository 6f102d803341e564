// AVX2 with FMA and F16C.
#include "ternary/simd256.h"
// Lanes first, then what is written for them.
#include "ternary/blocks_vector.h"
#include "ternary/decoder_vector.h"
#include "ternary/floats.h"
#include "ternary/rows_vector.h"

namespace wf {

const FloatKernels kAvx2Floats{float_bytes, arrange_floats, matmul_blocks, matmul_rows, rms_norm, rope, store, attention, activate, dot, accumulate};

}  // namespace wf
