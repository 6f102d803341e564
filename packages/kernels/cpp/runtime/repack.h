// A file's ternary matrices, whatever type holds them, in the layout of the kernels.
#pragma once

#include <string>

#include "runtime/gguf.h"
#include "ternary/product.h"

namespace wf {

// Repacks a matrix of a ternary type, or of a float type whose values are ternary: among 128 neighbours of a row all that are not zero
// have one magnitude. A tensor `.scale` beside it ([1], [rows, 1] or [rows, groups]) multiplies. The scales become the coarsest that
// say the same, as in `bitnet_arch.gguf.ternary`.
//
// `stem` is the tensor's name without "weight" and with the dot before it; the shape was checked by the caller.
Result<SharedMatrix> repack(const Gguf& file, const std::string& stem);

}  // namespace wf
