// What no kernel is there for: the float arithmetic that few models need.
#pragma once

#include <cstdint>

namespace wf {

// The block Hadamard rotation of `bitnet_arch.hadamard`, in place: blocks of the largest power of two that divides `count`.
void rotate(float* x, int64_t count);

// Turns neighbours (2i, 2i + 1) of each of `heads` vectors of `width` numbers by angles. cos and sin are [width / 2].
void rope_neighbours(float* x, const float* cos, const float* sin, int64_t heads, int64_t width);

}  // namespace wf
