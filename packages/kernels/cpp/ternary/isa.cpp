#ifdef WF_X86
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

#include <cstring>
#include <iterator>

#if defined(__aarch64__)
#include <sys/auxv.h>
#endif

#include "ternary/ternary.h"

namespace wf {
namespace {

constexpr const char* kNames[] = {"scalar", "avx2", "avxvnni", "avx512", "amx", "neon", "dotprod", "i8mm"};

#if defined(__aarch64__)
// What Linux, and so Android, says of the processor; the bits' names are missing in older headers.
bool has_dotprod() { return (getauxval(AT_HWCAP) >> 20 & 1) != 0; }              // HWCAP_ASIMDDP
bool has_i8mm() { return has_dotprod() && (getauxval(AT_HWCAP2) >> 13 & 1) != 0; }  // HWCAP2_I8MM
#endif

#ifdef WF_X86
// Linux keeps tiles, 8 KiB of a thread's state, only for processes that ask for it.
bool may_use_tiles() {
#ifdef __linux__
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// Asked of the processor itself: `__builtin_cpu_supports` is always false where zig is the compiler, and names differ between others.
struct X86 {
  bool avx2 = false, avxvnni = false, avx512 = false, amx = false;

  X86() {
    const auto bit = [](unsigned value, int at) { return (value >> at & 1) != 0; };
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (__get_cpuid(1, &a, &b, &c, &d) == 0 || !bit(c, 27)) return;  // no xgetbv
    const bool with_floats = bit(c, 12) && bit(c, 29);  // FMA and F16C, which came before AVX2 in all but a few processors
    unsigned kept = 0, upper = 0;  // the registers that the operating system keeps when it switches threads
    __asm__("xgetbv" : "=a"(kept), "=d"(upper) : "c"(0));
    if ((kept & 0x6) != 0x6 || __get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return;
    avx2 = with_floats && bit(b, 5);
    avx512 = avx2 && (kept & 0xe0) == 0xe0 && bit(b, 16) && bit(b, 30) && bit(b, 31) && bit(c, 11);  // F, BW, VL, VNNI
    amx = avx512 && (kept & 0x60000) == 0x60000 && bit(d, 24) && bit(d, 25) && may_use_tiles();  // TILE, INT8
    avxvnni = avx2 && __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && bit(a, 4);
  }
};

const X86& x86() {
  static const X86 found;
  return found;
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
    case Isa::avx2:
      return x86().avx2 ? &kAvx2 : nullptr;
    case Isa::avxvnni:
      return x86().avxvnni ? &kAvxVnni : nullptr;
    case Isa::avx512:
      return x86().avx512 ? &kAvx512 : nullptr;
    case Isa::amx:
      return x86().amx ? &kAmx : nullptr;
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
