// What the processor can do at best, measured by loops that do nothing else: what the benchmarks hold the kernels against.
#pragma once

#include <cstdint>

namespace wf {

// Reads memory aligned to 64 bytes once, in eight streams, with the widest registers. `bytes`: a multiple of 64. The value is of no use.
uint64_t roofline_read(const uint8_t* memory, int64_t bytes);

// Runs at least `count` of the widest integer dot-product instructions that do not wait for each other.
// Returns how many multiplications and additions of bytes they were, 0 where there is no such instruction.
int64_t roofline_dot(int64_t count);

// The same of instructions that multiply whole tiles (AMX).
int64_t roofline_tiles(int64_t count);

}  // namespace wf
