// Every 64-bit Arm processor: products of 8 bits summed in 16.
#include "ternary/arm.h"

namespace wf {

const Kernels kNeon{Isa::neon, quantize, Arm<NeonTile>::matmul, Arm<NeonTile>::matmul_integer};

}  // namespace wf
