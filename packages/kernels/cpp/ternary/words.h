// Four rows of a file's tensor at a time on their way to panels of ours, where words of sixteen rows lie side by side. Plain vectors, which
// compilers turn into those of whatever processor it is: bits move inside registers, and memory is the limit.
#pragma once

#include <cstdint>
#include <cstring>

namespace wf {

// Four bytes of each of four rows.
using Words = uint32_t __attribute__((vector_size(16)));
using Bytes = uint8_t __attribute__((vector_size(16)));

// Sixteen bytes of four rows: words[q] holds each row's bytes 4q to 4q + 3.
inline void load_words(const uint8_t* const (&rows)[4], int64_t at, Words (&words)[4]) {
  Words row[4];
  for (int r = 0; r < 4; ++r) std::memcpy(&row[r], rows[r] + at, sizeof row[r]);
  const Words low01 = __builtin_shufflevector(row[0], row[1], 0, 4, 1, 5), high01 = __builtin_shufflevector(row[0], row[1], 2, 6, 3, 7);
  const Words low23 = __builtin_shufflevector(row[2], row[3], 0, 4, 1, 5), high23 = __builtin_shufflevector(row[2], row[3], 2, 6, 3, 7);
  words[0] = __builtin_shufflevector(low01, low23, 0, 1, 4, 5);
  words[1] = __builtin_shufflevector(low01, low23, 2, 3, 6, 7);
  words[2] = __builtin_shufflevector(high01, high23, 0, 1, 4, 5);
  words[3] = __builtin_shufflevector(high01, high23, 2, 3, 6, 7);
}

// Exchanges the bits of `b` that `mask` has with those of `a` that lie `shift` above them.
inline void exchange(Words& a, Words& b, int shift, uint32_t mask) {
  const Words other = ((a >> shift) ^ b) & mask;
  b ^= other;
  a ^= other << shift;
}

// Pairs of bits of four words change places with words: pair k of word q becomes pair q of word k, in every byte.
inline void transpose_pairs(Words (&words)[4]) {
  exchange(words[0], words[1], 2, 0x33333333U);
  exchange(words[2], words[3], 2, 0x33333333U);
  exchange(words[0], words[2], 4, 0x0f0f0f0fU);
  exchange(words[1], words[3], 4, 0x0f0f0f0fU);
}

}  // namespace wf
