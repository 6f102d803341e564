// GGUF's types become ours four rows at a time, the two bits of a weight moving inside registers: what opening a file waits for.
//
// Everything else goes through the panels by chunks of 256 columns, which every format's block divides: a row's chunk becomes 256 bytes
// of codes 0..2, and these become 16 blocks' words of that row, or the other way round. All of it stays in the first-level cache.
#include <algorithm>
#include <array>
#include <bit>
#include <cstring>

#include "ternary/formats.h"
#include "ternary/ternary.h"
#include "ternary/words.h"

namespace wf {
namespace {

static_assert(std::endian::native == std::endian::little);

constexpr int64_t kChunk = 256;
constexpr uint8_t kZero = 1;  // the code of the weight 0

// Codes of one row's columns [first, first + count), written to a matrix in another format, and of the first two read from it.
// `count` is kChunk, or what is left at the row's end; `first` is a multiple of kChunk.
template <Format>
struct Rows;

template <>
struct Rows<Format::codes> {
  int64_t rows, columns;

  void read(const uint8_t* data, int64_t row, int64_t first, int64_t count, uint8_t* codes) const {
    data += row * columns + first;
    for (int64_t i = 0; i < count; ++i) codes[i] = static_cast<uint8_t>(data[i] + 1);
  }
  void write(const uint8_t* codes, int64_t row, int64_t first, int64_t count, uint8_t* data) const {
    data += row * columns + first;
    for (int64_t i = 0; i < count; ++i) data[i] = static_cast<uint8_t>(codes[i] - 1);
  }
};

template <>
struct Rows<Format::hf> {
  int64_t rows, columns;

  void read(const uint8_t* data, int64_t row, int64_t first, int64_t count, uint8_t* codes) const {
    const int shift = static_cast<int>(row / (rows / 4) * 2);
    data += row % (rows / 4) * columns + first;
    for (int64_t i = 0; i < count; ++i) codes[i] = data[i] >> shift & 3;
  }
  void write(const uint8_t* codes, int64_t row, int64_t first, int64_t count, uint8_t* data) const {
    const int shift = static_cast<int>(row / (rows / 4) * 2);
    data += row % (rows / 4) * columns + first;
    const auto keep = static_cast<uint8_t>(~(3 << shift));
    for (int64_t i = 0; i < count; ++i) data[i] = static_cast<uint8_t>((data[i] & keep) | codes[i] << shift);
  }
};

// Two bits a code in blocks along a row: byte j of a part of kBytes holds the codes j, j + kBytes, ... in planes of kShifts.
template <int kBlock, int kBlockSize, int kOffset, int kBytes, bool kDescending>
struct Planes {
  int64_t rows, columns;

  void write(const uint8_t* codes, int64_t row, int64_t first, int64_t count, uint8_t* data) const {
    data += row * (columns / kBlock * kBlockSize) + first / kBlock * kBlockSize;
    for (int64_t done = 0; done < count; done += kBlock, data += kBlockSize) {
      for (int part = 0; part < kBlock; part += 4 * kBytes) {
        const uint8_t* u = codes + done + part;
        for (int j = 0; j < kBytes; ++j) {
          const int up = u[j] | u[kBytes + j] << 2 | u[2 * kBytes + j] << 4 | u[3 * kBytes + j] << 6;
          const int down = u[j] << 6 | u[kBytes + j] << 4 | u[2 * kBytes + j] << 2 | u[3 * kBytes + j];
          data[kOffset + part / 4 + j] = static_cast<uint8_t>(kDescending ? down : up);
        }
      }
    }
  }
};

template <>
struct Rows<Format::i2_s> : Planes<128, 32, 0, 32, true> {};
template <>
struct Rows<Format::tq2_0> : Planes<256, 66, 0, 32, false> {};

// Q2_0's neighbours share a byte.
template <>
struct Rows<Format::q2_0> {
  int64_t rows, columns;

  void write(const uint8_t* codes, int64_t row, int64_t first, int64_t count, uint8_t* data) const {
    data += row * (columns / 64 * 18) + first / 64 * 18;
    for (int64_t i = 0; i < count; i += 64, data += 18) {
      for (int j = 0; j < 16; ++j) {
        uint32_t four;
        std::memcpy(&four, codes + i + 4 * j, 4);
        data[2 + j] = static_cast<uint8_t>(four | four >> 6 | four >> 12 | four >> 18);
      }
    }
  }
};

// A byte holds base-3 digits, the most significant first, as a fraction of 256 rounded up: times 3, a digit is what leaves the byte.
template <>
struct Rows<Format::tq1_0> {
  int64_t rows, columns;

  struct Part {
    int digits, bytes;
  };
  static constexpr std::array<Part, 3> kParts{{{5, 32}, {5, 16}, {4, 4}}};
  static constexpr auto kFractions = [] {
    std::array<uint8_t, 243> fractions{};
    for (int value = 0; value < 243; ++value) fractions[value] = static_cast<uint8_t>((value * 256 + 242) / 243);
    return fractions;
  }();

  void write(const uint8_t* codes, int64_t row, int64_t first, int64_t count, uint8_t* data) const {
    data += row * (columns / 256 * 54) + first / 256 * 54;
    for (int64_t i = 0; i < count; i += 256, data += 2) {
      for (const auto [digits, bytes] : kParts) {
        std::array<uint8_t, 32> values{};
        for (int digit = 0; digit < digits; ++digit, codes += bytes) {
          for (int j = 0; j < bytes; ++j) values[j] = static_cast<uint8_t>(values[j] * 3 + codes[j]);
        }
        for (int j = 0; j < bytes; ++j) data[j] = kFractions[digits == 5 ? values[j] : 3 * values[j]];
        data += bytes;
      }
    }
  }
};

// A bit for every code of 3, which no weight has.
Words not_ternary(Words words) { return words & words >> 1 & 0x55555555U; }

// A block of a GGUF type: how many columns and bytes it has, a byte that stands for zeros, and `pack`, by which the blocks of four rows
// become words in blocks of ours. It returns bits where a code is not ternary.
template <Format>
struct Block;

// Byte j of 32 holds the columns j, j + 32, j + 64, j + 96, and in ours byte j of a word j, j + 4, j + 8, j + 12.
template <int kHalves, bool kDescending>
Words pack_planes(const uint8_t* const (&rows)[4], uint8_t* out) {
  Words bad{};
  for (int part = 0; part < 2 * kHalves; ++part) {
    Words words[4];
    load_words(rows, 16 * part, words);
    for (const Words& four : words) bad |= not_ternary(four);
    transpose_pairs(words);
    for (int pair = 0; pair < 4; ++pair) {
      const int plane = kDescending ? 3 - pair : pair, block = part / 2 * 8 + plane * 2 + part % 2;
      std::memcpy(out + block * kBlockBytes, &words[pair], sizeof words[pair]);
    }
  }
  return bad;
}

template <>
struct Block<Format::i2_s> {
  static constexpr int64_t kColumns = 128, kBytes = 32;
  static constexpr uint8_t kZeros = 0x55;

  static Words pack(const uint8_t* const (&rows)[4], uint8_t* out) { return pack_planes<1, true>(rows, out); }
};

template <>
struct Block<Format::tq2_0> {
  static constexpr int64_t kColumns = 256, kBytes = 66;
  static constexpr uint8_t kZeros = 0x55;

  static Words pack(const uint8_t* const (&rows)[4], uint8_t* out) { return pack_planes<2, false>(rows, out); }
};

// Neighbours share a byte: pair k of a word's byte q becomes pair q of its byte k.
template <>
struct Block<Format::q2_0> {
  static constexpr int64_t kColumns = 64, kBytes = 18;
  static constexpr uint8_t kZeros = 0x55;

  static Words pack(const uint8_t* const (&rows)[4], uint8_t* out) {
    Words words[4], bad{};
    load_words(rows, 2, words);
    for (int block = 0; block < 4; ++block) {
      Words& four = words[block];
      bad |= not_ternary(four);
      Words other = (four ^ four >> 6) & 0x00cc00ccU;
      four ^= other ^ other << 6;
      other = (four ^ four >> 12) & 0x0000f0f0U;
      four ^= other ^ other << 12;
      std::memcpy(out + block * kBlockBytes, &four, sizeof four);
    }
    return bad;
  }
};

// Bytes of five base-3 digits, 32 and then 16 of them, and four bytes of four digits.
template <>
struct Block<Format::tq1_0> {
  static constexpr int64_t kColumns = 256, kBytes = 54;
  static constexpr uint8_t kZeros = 128;  // half of 256: ones for ever

  // Takes the first digit off every byte and puts it below the codes that are there. Of 256 the second third begins at 86, the last at 171.
  static void next_digit(Words& bytes, Words& codes) {
    const auto rest = std::bit_cast<Bytes>(bytes), above = std::bit_cast<Bytes>(codes << 2);
    const Bytes one = Bytes{} + uint8_t{86}, two = Bytes{} + uint8_t{171};
    codes = std::bit_cast<Words>(above - std::bit_cast<Bytes>(rest >= one) - std::bit_cast<Bytes>(rest >= two));
    bytes = std::bit_cast<Words>(rest + rest + rest);
  }

  static Words pack(const uint8_t* const (&rows)[4], uint8_t* out) {
    for (int part = 0; part < 3; ++part) {
      Words words[4];
      load_words(rows, 16 * part, words);
      for (int digit = 0; digit < 5; ++digit) {
        Words codes{};
        for (int q = 3; q >= 0; --q) next_digit(words[q], codes);
        std::memcpy(out + (part < 2 ? 2 * digit + part : 10 + digit) * kBlockBytes, &codes, sizeof codes);
      }
    }
    Words last, codes{};
    for (int r = 0; r < 4; ++r) {
      uint32_t four;
      std::memcpy(&four, rows[r] + 48, sizeof four);
      last[r] = four;
    }
    for (int digit = 0; digit < 4; ++digit) {
      Words code{};
      next_digit(last, code);
      codes |= code << 2 * digit;
    }
    std::memcpy(out + 15 * kBlockBytes, &codes, sizeof codes);
    return Words{};  // all bytes are digits
  }
};

template <Format kFormat>
bool pack_gguf(const uint8_t* data, int64_t rows, int64_t columns, uint8_t* out) {
  using Of = Block<kFormat>;
  constexpr int64_t kOurs = Of::kColumns / kBlockColumns * kBlockBytes;  // bytes of our blocks that one becomes, of a whole panel
  const int64_t blocks = columns / Of::kColumns, row_bytes = blocks * Of::kBytes;
  uint8_t zeros[Of::kBytes];  // a row beyond the last
  std::memset(zeros, Of::kZeros, sizeof zeros);
  Words bad{};
  for (int64_t row = 0; row < rows; row += kPanelRows, out += blocks * kOurs) {
    for (int64_t quarter = 0; quarter < 4; ++quarter) {
      const int64_t first = row + 4 * quarter;
      for (int64_t block = 0; block < blocks; ++block) {
        const uint8_t* four[4];
        for (int64_t r = 0; r < 4; ++r) four[r] = first + r < rows ? data + (first + r) * row_bytes + block * Of::kBytes : zeros;
        bad |= Of::pack(four, out + block * kOurs + quarter * sizeof(Words));
      }
    }
  }
  return (bad[0] | bad[1] | bad[2] | bad[3]) == 0;
}

// Of the other layouts.
template <Format kFormat>
bool pack_rows(const uint8_t* data, int64_t rows, int64_t columns, uint8_t* out) {
  const Rows<kFormat> source{rows, columns};
  const int64_t blocks = ceil_div(columns, kBlockColumns);
  uint32_t bad = 0;
  for (int64_t row = 0; row < ceil_div(rows, kPanelRows) * kPanelRows; row += kPanelRows) {
    for (int64_t first = 0; first < columns; first += kChunk) {
      const int64_t count = std::min(kChunk, columns - first);
      for (int64_t r = 0; r < kPanelRows; ++r) {
        alignas(64) uint8_t codes[kChunk];
        if (count < kChunk || row + r >= rows) std::memset(codes, kZero, kChunk);
        if (row + r < rows) source.read(data, row + r, first, count, codes);
        uint8_t* words = out + (row / kPanelRows * blocks + first / kBlockColumns) * kBlockBytes + r * 4;
        for (int64_t block = 0; block < ceil_div(count, kBlockColumns); ++block) {
          uint32_t u[4];
          std::memcpy(u, codes + block * kBlockColumns, sizeof u);
          for (const uint32_t four : u) bad |= (four & 0xfcfcfcfcU) | (four & four >> 1 & 0x01010101U);
          const uint32_t word = u[0] | u[1] << 2 | u[2] << 4 | u[3] << 6;
          std::memcpy(words + block * kBlockBytes, &word, 4);
        }
      }
      if (bad != 0) return false;
    }
  }
  return true;
}

template <Format kFormat>
void unpack_rows(const uint8_t* packed, int64_t rows, int64_t columns, uint8_t* out) {
  const Rows<kFormat> target{rows, columns};
  const int64_t blocks = ceil_div(columns, kBlockColumns);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t first = 0; first < columns; first += kChunk) {
      const int64_t count = std::min(kChunk, columns - first);
      const uint8_t* words = packed + (row / kPanelRows * blocks + first / kBlockColumns) * kBlockBytes + row % kPanelRows * 4;
      alignas(64) uint8_t codes[kChunk];
      for (int64_t block = 0; block < ceil_div(count, kBlockColumns); ++block) {
        uint32_t word;
        std::memcpy(&word, words + block * kBlockBytes, 4);
        const uint32_t u[4] = {word & 0x03030303U, word >> 2 & 0x03030303U, word >> 4 & 0x03030303U, word >> 6 & 0x03030303U};
        std::memcpy(codes + block * kBlockColumns, u, sizeof u);
      }
      target.write(codes, row, first, count, out);
    }
  }
}

// Calls `with.template operator()<format>()`.
template <typename With>
auto dispatch(Format format, With with) {
  switch (format) {
    case Format::hf:
      return with.template operator()<Format::hf>();
    case Format::i2_s:
      return with.template operator()<Format::i2_s>();
    case Format::tq1_0:
      return with.template operator()<Format::tq1_0>();
    case Format::tq2_0:
      return with.template operator()<Format::tq2_0>();
    case Format::q2_0:
      return with.template operator()<Format::q2_0>();
    case Format::codes:
      break;
  }
  return with.template operator()<Format::codes>();
}

}  // namespace

int64_t format_bytes(Format format, int64_t rows, int64_t columns) {
  switch (format) {
    case Format::codes:
      return rows * columns;
    case Format::hf:
      return rows % 4 == 0 ? rows / 4 * columns : -1;
    case Format::i2_s:
      return columns % 128 == 0 ? rows * (columns / 128 * 32) : -1;
    case Format::tq1_0:
      return columns % 256 == 0 ? rows * (columns / 256 * 54) : -1;
    case Format::tq2_0:
      return columns % 256 == 0 ? rows * (columns / 256 * 66) : -1;
    case Format::q2_0:
      return columns % 64 == 0 ? rows * (columns / 64 * 18) : -1;
  }
  return -1;
}

bool pack_from(Format format, const uint8_t* data, int64_t rows, int64_t columns, uint8_t* out) {
  return dispatch(format, [&]<Format kFormat>() {
    if constexpr (kFormat == Format::codes || kFormat == Format::hf) {
      return pack_rows<kFormat>(data, rows, columns, out);
    } else {
      return pack_gguf<kFormat>(data, rows, columns, out);
    }
  });
}

void unpack_to(Format format, const uint8_t* codes, int64_t rows, int64_t columns, uint8_t* out) {
  dispatch(format, [&]<Format kFormat>() { unpack_rows<kFormat>(codes, rows, columns, out); });
}

bool pack(const int8_t* weights, int64_t rows, int64_t columns, uint8_t* out) {
  return pack_from(Format::codes, reinterpret_cast<const uint8_t*>(weights), rows, columns, out);
}

void unpack(const uint8_t* codes, int64_t rows, int64_t columns, int8_t* out) {
  unpack_to(Format::codes, codes, rows, columns, reinterpret_cast<uint8_t*>(out));
}

}  // namespace wf
