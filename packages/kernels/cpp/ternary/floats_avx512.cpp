// AVX-512.
#include "ternary/simd512.h"
// Lanes first, then what is written for them.
#include "ternary/blocks_vector.h"
#include "ternary/decoder_vector.h"
#include "ternary/floats.h"
#include "ternary/rows_vector.h"

namespace wf {

const FloatKernels kAvx512Floats{matmul_blocks, matmul_rows, rms_norm, rope, store, attention, activate, dot, accumulate};

}  // namespace wf
