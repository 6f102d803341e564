#ifdef WF_X86
#include <cpuid.h>
#endif

#include <cstring>
#include <iterator>

#if defined(__aarch64__)
#include <sys/auxv.h>
#endif

#include "ternary/ternary.h"

namespace wf {
namespace {

constexpr const char* kNames[] = {"scalar", "avx2", "avxvnni", "avx512", "neon", "dotprod", "i8mm"};

#if defined(__aarch64__)
// What Linux, and so Android, says of the processor; the bits' names are missing in older headers.
bool has_dotprod() { return (getauxval(AT_HWCAP) >> 20 & 1) != 0; }              // HWCAP_ASIMDDP
bool has_i8mm() { return has_dotprod() && (getauxval(AT_HWCAP2) >> 13 & 1) != 0; }  // HWCAP2_I8MM
#endif

#ifdef WF_X86
// Compilers disagree on the name for `__builtin_cpu_supports`.
bool has_avxvnni() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a >> 4 & 1) != 0;
}
#endif

}  // namespace

const char* name_of(Isa isa) {
  const auto i = static_cast<size_t>(isa);
  return i < std::size(kNames) ? kNames[i] : nullptr;
}

const Kernels* kernels_of(Isa isa) {
  switch (isa) {
    case Isa::scalar:
      return &kScalar;
#ifdef WF_X86
    // These ask the operating system too, whether it keeps the wide registers.
    case Isa::avx2:
      __builtin_cpu_init();
      return __builtin_cpu_supports("avx2") ? &kAvx2 : nullptr;
    case Isa::avxvnni:
      __builtin_cpu_init();
      return __builtin_cpu_supports("avx2") && has_avxvnni() ? &kAvxVnni : nullptr;
    case Isa::avx512:
      __builtin_cpu_init();
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                     __builtin_cpu_supports("avx512vnni")
                 ? &kAvx512
                 : nullptr;
#endif
#if defined(__aarch64__)
    case Isa::neon:
      return &kNeon;
    case Isa::dotprod:
      return has_dotprod() ? &kDotprod : nullptr;
    case Isa::i8mm:
      return has_i8mm() ? &kI8mm : nullptr;
#endif
    default:
      return nullptr;
  }
}

bool available(Isa isa) { return kernels_of(isa) != nullptr; }

Isa best_isa() {
  for (int i = static_cast<int>(std::size(kNames)) - 1; i > 0; --i) {
    if (available(static_cast<Isa>(i))) return static_cast<Isa>(i);
  }
  return Isa::scalar;
}

const Kernels* kernels_named(const char* name) {
  for (int i = 0; i < static_cast<int>(std::size(kNames)); ++i) {
    if (std::strcmp(kNames[i], name) == 0) return kernels_of(static_cast<Isa>(i));
  }
  return nullptr;
}

}  // namespace wf
