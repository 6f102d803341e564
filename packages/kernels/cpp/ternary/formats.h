// Other people's layouts of ternary codes, and int8 codes, to and from that of ternary.h.
#pragma once

#include <cstdint>

namespace wf {

// Codes are t + 1 except in `codes`. Scales inside blocks are not touched: `unpack_to` leaves their bytes as they are.
enum class Format : int {
  codes,  // int8 t, [rows, columns]
  hf,     // Hugging Face `bitnet`: byte (r, c) of [rows / 4, columns] holds rows r + p * rows / 4 in bits 2p, 2p + 1
  i2_s,   // bitnet.cpp: 128 weights in 32 bytes, byte j holding weights j, j + 32, j + 64, j + 96 from the highest bits down
  tq1_0,  // llama.cpp: 256 weights in 52 bytes of five (the last four: four) base-3 digits, then a scale in f16
  tq2_0,  // llama.cpp: 256 weights in 64 bytes, then a scale in f16
  q2_0,   // llama.cpp: a scale in f16, then 64 weights in 16 bytes
};

// Bytes of a matrix, or -1 where the format cannot have this shape. Of i2_s without the scale's tail.
int64_t format_bytes(Format format, int64_t rows, int64_t columns);

// To our layout. `out` holds a whole number of panels, aligned to 64 bytes. Returns false at a code that is not ternary.
bool pack_from(Format format, const uint8_t* data, int64_t rows, int64_t columns, uint8_t* out);

// From our layout.
void unpack_to(Format format, const uint8_t* codes, int64_t rows, int64_t columns, uint8_t* out);

}  // namespace wf
