// Arm with `smmla`: Cortex-A510 and X2 (2021), Neoverse V1 and what came after. One token is a memory-bound `sdot`.
#include "ternary/arm.h"

namespace wf {

const Kernels kI8mm{Isa::i8mm, quantize, Arm<MatrixTile>::matmul, Arm<MatrixTile>::matmul_integer};

}  // namespace wf
