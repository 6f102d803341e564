// Arm with `sdot`: Cortex-A55 and A76 (2018) and what came after.
#include "ternary/arm.h"

namespace wf {

const Kernels kDotprod{Isa::dotprod, quantize, Arm<DotTile>::matmul, Arm<DotTile>::matmul_integer};

}  // namespace wf
