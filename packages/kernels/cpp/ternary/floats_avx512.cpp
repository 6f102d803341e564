// AVX-512, and AVX-512 with AMX, whose tiles only products of blocks use.
#include "ternary/simd512.h"
// Lanes first, then what is written for them.
#include "ternary/blocks_digits.h"
#include "ternary/decoder_vector.h"
#include "ternary/floats.h"
#include "ternary/rows_vector.h"

namespace wf {

const FloatKernels kAvx512Floats{digit_bytes, arrange_digits, matmul_digits, matmul_rows, rms_norm,  rope,
                                 store,       attention,      activate,      dot,         accumulate};
const FloatKernels kAmxFloats{digit_bytes, arrange_digits, matmul_digits_in_tiles, matmul_rows, rms_norm,  rope,
                              store,       attention,      activate,               dot,         accumulate};

}  // namespace wf
