#include <cstring>
#include <iterator>

#include "ternary/ternary.h"

namespace wf {
namespace {

constexpr const char* kNames[] = {"scalar", "avx2", "avx512", "avx512vbmi", "neon", "dotprod", "i8mm"};

}  // namespace

const char* name_of(Isa isa) { return kNames[static_cast<int>(isa)]; }

const Kernels* kernels_of(Isa isa) {
  switch (isa) {
    case Isa::scalar:
      return &kScalar;
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
