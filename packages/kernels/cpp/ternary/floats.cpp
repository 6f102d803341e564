#include "ternary/floats.h"

namespace wf {

const FloatKernels& float_kernels(Isa isa) {
#ifdef WF_X86
  // AVX2 came with the other two in all but a few processors.
  if (isa == Isa::avx2 || isa == Isa::avxvnni) {
    return __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") ? kAvx2Floats : kScalarFloats;
  }
  if (isa == Isa::avx512) return kAvx512Floats;
#else
  static_cast<void>(isa);
#endif
  return kScalarFloats;
}

}  // namespace wf
