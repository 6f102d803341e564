// Compares every instruction set that this processor has with the scalar reference, and every layout with ours: `ternary_check [names]`.
//
// With names ("scalar,neon") it fails where other sets are available. Prints what it compared; exits 1 at the first difference.
// Buffers have exactly the size that the kernels may touch, so that AddressSanitizer sees a read or write beyond it.
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "ternary/floats.h"
#include "ternary/formats.h"
#include "ternary/half.h"
#include "ternary/low_rank.h"
#include "ternary/pool.h"
#include "ternary/product.h"
#include "ternary/ternary.h"

namespace {

using wf::ceil_div;
using wf::Granularity;

std::mt19937 generator(1);

int uniform(int low, int high) { return std::uniform_int_distribution<int>(low, high)(generator); }

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "FAILED: %s\n", what.c_str());
  std::exit(1);
}

struct Free {
  void operator()(void* pointer) const { std::free(pointer); }
};

// A packed matrix of the exact size that the layout needs.
struct Matrix {
  std::unique_ptr<uint8_t, Free> codes;
  std::vector<int8_t> weights;
  std::vector<float> scales;
  wf::TernaryMatrix view{};

  Matrix(std::vector<int8_t> values, int64_t rows, int64_t columns, Granularity granularity) : weights(std::move(values)) {
    view = {nullptr, nullptr, rows, columns, granularity};
    codes.reset(static_cast<uint8_t*>(std::aligned_alloc(64, static_cast<size_t>(view.bytes()))));
    if (!wf::pack(weights.data(), rows, columns, codes.get())) fail("pack refuses ternary codes");
    const int64_t count = granularity == Granularity::tensor ? 1
                          : granularity == Granularity::row  ? rows
                                                             : view.panels() * view.groups() * wf::kPanelRows;
    for (int64_t i = 0; i < count; ++i) scales.push_back(static_cast<float>(uniform(1, 1000)) * 1e-3F);
    view.codes = codes.get();
    view.scales = scales.data();
  }
};

struct Quantized {
  std::vector<int8_t> codes;
  std::vector<float> scales;
  std::vector<int32_t> sums;
  wf::Activations view{};

  Quantized(const wf::Kernels& isa, const std::vector<float>& x, int64_t tokens, int64_t columns) {
    const int64_t stride = ceil_div(columns, 64) * 64, groups = ceil_div(columns, wf::kGroup);
    codes.assign(static_cast<size_t>(tokens * stride), 99);
    scales.assign(static_cast<size_t>(tokens), -1.0F);
    sums.assign(static_cast<size_t>(tokens * groups), -1);
    for (int64_t t = 0; t < tokens; ++t) {
      // A token of its own size: a read beyond its end would be seen.
      const std::vector<float> token(x.begin() + t * columns, x.begin() + (t + 1) * columns);
      if (!isa.quantize(token.data(), columns, stride, codes.data() + t * stride, scales.data() + t, sums.data() + t * groups)) {
        fail("quantize refuses finite activations");
      }
    }
    view = {codes.data(), scales.data(), sums.data(), tokens, stride};
  }
};

bool equal(const Quantized& a, const Quantized& b) {
  return a.codes == b.codes && a.sums == b.sums &&
         std::memcmp(a.scales.data(), b.scales.data(), a.scales.size() * sizeof(float)) == 0;
}

// Outputs of the panels [begin, end) in an array that is wider than the rows and filled with a mark.
template <typename T, typename Product>
std::vector<T> outputs(const Matrix& w, const Quantized& x, int64_t begin, int64_t end, Product product) {
  const int64_t stride = w.view.rows + 3;
  std::vector<T> y(static_cast<size_t>((x.view.tokens - 1) * stride + w.view.rows), T{-7777777});
  product(w.view, x.view, begin, end, y.data(), stride);
  return y;
}

void compare(const wf::Kernels& isa, const Matrix& w, const Quantized& x, int64_t begin, int64_t end) {
  const std::string where = std::string(wf::name_of(isa.isa)) + ": rows " + std::to_string(w.view.rows) + ", columns " +
                            std::to_string(w.view.columns) + ", tokens " + std::to_string(x.view.tokens) + ", granularity " +
                            std::to_string(static_cast<int>(w.view.granularity)) + ", panels " + std::to_string(begin) + " to " +
                            std::to_string(end);
  if (outputs<int32_t>(w, x, begin, end, isa.matmul_integer) != outputs<int32_t>(w, x, begin, end, wf::kScalar.matmul_integer)) {
    fail("integers of " + where);
  }
  const auto expected = outputs<float>(w, x, begin, end, wf::kScalar.matmul), got = outputs<float>(w, x, begin, end, isa.matmul);
  float most = 0.0F;
  for (const float y : expected) most = std::fmax(most, y == -7777777.0F ? 0.0F : std::fabs(y));
  // Sums over groups may be of another order; everything else is the same operations on the same integers.
  const float tolerance = w.view.granularity == Granularity::group ? 1e-6F * most : 0.0F;
  for (size_t i = 0; i < got.size(); ++i) {
    if (!(std::fabs(got[i] - expected[i]) <= tolerance)) fail("floats of " + where);
  }
}

std::vector<int8_t> random_codes(int64_t count) {
  std::vector<int8_t> codes(static_cast<size_t>(count));
  for (auto& code : codes) code = static_cast<int8_t>(uniform(-1, 1));
  return codes;
}

void every_width(const wf::Kernels& isa) {
  for (int64_t columns = 1; columns <= 600; ++columns) {
    const int64_t rows = 2 * uniform(0, columns % 8 ? 15 : 80) + 1, tokens = columns % 17 + 1;
    const auto granularity = static_cast<Granularity>(columns % 3);
    const Matrix w(random_codes(rows * columns), rows, columns, granularity);
    std::vector<int8_t> back(w.weights.size());
    wf::unpack(w.view.codes, rows, columns, back.data());
    if (back != w.weights) fail("unpack at " + std::to_string(columns) + " columns");
    std::vector<float> values(static_cast<size_t>(tokens * columns));
    // Multiples of a half meet the rounding's ties, and the rest its ordinary cases.
    for (auto& value : values) value = columns % 2 ? static_cast<float>(uniform(-254, 254)) * 0.5F : std::normal_distribution<float>()(generator);
    if (columns % 2) values[0] = 127.0F;
    const Quantized x(wf::kScalar, values, tokens, columns);
    if (!equal(x, Quantized(isa, values, tokens, columns))) fail("quantize at " + std::to_string(columns) + " columns");
    compare(isa, w, x, 0, w.view.panels());
    const int64_t begin = uniform(0, static_cast<int>(w.view.panels()));
    compare(isa, w, x, begin, uniform(static_cast<int>(begin), static_cast<int>(w.view.panels())));
  }
}

// Several tiles of tokens, of panels and of columns, none of which come out even.
void many_tokens(const wf::Kernels& isa) {
  for (const auto& [rows, columns, tokens] : {std::array<int64_t, 3>{77, 200, 31}, {530, 320, 40}, {47, 8'300, 33}, {33, 17'000, 12}, {20, 70, 700}}) {
    for (const auto granularity : {Granularity::tensor, Granularity::row, Granularity::group}) {
      const Matrix w(random_codes(rows * columns), rows, columns, granularity);
      std::vector<float> values(static_cast<size_t>(tokens * columns));
      for (auto& value : values) value = std::normal_distribution<float>()(generator);
      compare(isa, w, Quantized(wf::kScalar, values, tokens, columns), 0, w.view.panels());
      compare(isa, w, Quantized(wf::kScalar, values, tokens, columns), 1, w.view.panels());
    }
  }
}

// The largest sums: all weights of one sign, all activations +-127. From 2.1 million columns on, a sum of codes that are masked and
// not shifted passes 2^31 if it is not taken apart.
void largest_sums(const wf::Kernels& isa, int64_t rows, int64_t columns, int64_t tokens) {
  for (const int sign : {-1, 1}) {
    for (const auto granularity : {Granularity::tensor, Granularity::group}) {
      const Matrix w(std::vector<int8_t>(static_cast<size_t>(rows * columns), static_cast<int8_t>(sign)), rows, columns, granularity);
      std::vector<float> values(static_cast<size_t>(tokens * columns), 1.0F);
      for (int64_t i = 0; i < columns; ++i) values[i] = -1.0F;
      const Quantized x(wf::kScalar, values, tokens, columns);
      const auto y = outputs<int32_t>(w, x, 0, w.view.panels(), isa.matmul_integer);
      for (int64_t t = 0; t < tokens; ++t) {
        if (y[t * (rows + 3)] != (t == 0 ? -sign : sign) * 127 * columns) fail("the sum of " + std::to_string(columns));
      }
      compare(isa, w, x, 0, w.view.panels());
    }
  }
}

void not_finite(const wf::Kernels& isa) {
  for (const float bad : {std::nanf(""), -std::nanf(""), HUGE_VALF, -HUGE_VALF}) {
    for (const int64_t columns : {1, 7, 64, 131}) {
      std::vector<float> x(static_cast<size_t>(columns), 0.5F);
      x[static_cast<size_t>(uniform(0, static_cast<int>(columns) - 1))] = bad;
      std::vector<int8_t> codes(192, 99);
      float scale = -1.0F;
      int32_t sums[2] = {-1, -1};
      if (isa.quantize(x.data(), columns, 192, codes.data(), &scale, sums)) fail("quantize takes what is not finite");
      if (codes != std::vector<int8_t>(192, 99) || scale != -1.0F || sums[0] != -1) fail("quantize writes before it refuses");
    }
  }
}

// Every layout there and back, in buffers of the exact size, and refused where a code is not ternary.
void formats() {
  for (int i = 0; i <= static_cast<int>(wf::Format::q2_0); ++i) {
    const auto format = static_cast<wf::Format>(i);
    for (const int64_t rows : {1, 4, 15, 16, 20, 64, 100}) {
      for (const int64_t columns : {1, 15, 64, 100, 128, 192, 256, 384, 512, 1280}) {
        const int64_t bytes = wf::format_bytes(format, rows, columns);
        if (bytes < 0) continue;
        const std::string where = " format " + std::to_string(i) + ", " + std::to_string(rows) + " x " + std::to_string(columns);
        const Matrix w(random_codes(rows * columns), rows, columns, Granularity::tensor);
        std::vector<uint8_t> other(static_cast<size_t>(bytes), 0);
        wf::unpack_to(format, w.view.codes, rows, columns, other.data());
        Matrix back(std::vector<int8_t>(w.weights.size(), 1), rows, columns, Granularity::tensor);
        if (!wf::pack_from(format, other.data(), rows, columns, back.codes.get())) fail("what was written is refused:" + where);
        if (std::memcmp(back.view.codes, w.view.codes, static_cast<size_t>(w.view.bytes())) != 0) fail("another matrix:" + where);
        if (format == wf::Format::tq1_0) continue;  // whose every byte is digits
        // Anywhere but in a scale: blocks of q2_0 begin with one, those of tq2_0 end with one.
        const bool neighbours = format == wf::Format::q2_0, planes = format == wf::Format::tq2_0;
        const int64_t block = neighbours ? 18 : planes ? 66 : bytes, codes = block - (neighbours || planes ? 2 : 0);
        for (int round = 0; round < 20; ++round) {
          const int64_t in_block = uniform(0, static_cast<int>(codes - 1)) + (neighbours ? 2 : 0);
          uint8_t& byte = other[static_cast<size_t>(uniform(0, static_cast<int>(bytes / block - 1)) * block + in_block)];
          const uint8_t before = byte;
          byte = format == wf::Format::codes ? 2 : static_cast<uint8_t>(byte | 3 << 2 * uniform(0, 3));
          if (wf::pack_from(format, other.data(), rows, columns, back.codes.get())) fail("no ternary code is taken:" + where);
          byte = before;
        }
      }
    }
  }
}

std::vector<float> normal(int64_t count) {
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = std::normal_distribution<float>()(generator);
  return values;
}

void near(const std::vector<float>& got, const std::vector<float>& expected, float bound, const std::string& what) {
  float largest = 0.0F;
  for (const float value : expected) largest = std::fmax(largest, std::fabs(value));
  for (size_t i = 0; i < got.size(); ++i) {
    if (!(std::fabs(got[i] - expected[i]) <= bound * largest)) fail(what + " at " + std::to_string(i));
  }
}

// Matrices of blocks, rows beyond the last not written.
void blocks(const wf::FloatKernels& isa) {
  for (int i = 0; i <= static_cast<int>(wf::BlockType::q4_1); ++i) {
    for (const auto& [rows, count, tokens] : {std::array<int64_t, 3>{1, 1, 1}, {16, 2, 2}, {150, 1, 1}, {131, 2, 5}, {33, 1, 13}, {70, 3, 47}}) {
      wf::BlockMatrix w{nullptr, rows, 0, static_cast<wf::BlockType>(i)};
      w.columns = count * w.block_columns();
      std::vector<uint8_t> raw(static_cast<size_t>(rows * wf::row_bytes(w.type, w.columns)));
      for (uint8_t& byte : raw) byte = static_cast<uint8_t>(uniform(0, 255)) & 0xb3;  // f16 of at most 2^-2 or so
      const std::unique_ptr<uint8_t, Free> data(static_cast<uint8_t*>(std::aligned_alloc(64, static_cast<size_t>(ceil_div(w.bytes(), 64) * 64))));
      wf::pack_blocks(w.type, raw.data(), rows, w.columns, data.get());
      w.data = data.get();
      const std::vector<float> x = normal(tokens * w.columns);
      std::vector<float> got(static_cast<size_t>(tokens * rows)), expected = got, alone = got;
      const auto multiply = [&](const wf::FloatKernels& kernels, int64_t first, int64_t count, float* y) {
        const auto bytes = static_cast<size_t>(kernels.arranged_bytes(w, count));
        const std::unique_ptr<uint8_t, Free> arranged(static_cast<uint8_t*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64)));
        kernels.arrange(w, x.data() + first * w.columns, count, arranged.get());
        kernels.matmul_blocks(w, {arranged.get(), count}, 0, w.panels(), y, rows);
      };
      multiply(isa, 0, tokens, got.data());
      multiply(wf::kScalarFloats, 0, tokens, expected.data());
      for (int64_t row = 0; row < rows; ++row) {
        std::vector<float> weights(static_cast<size_t>(w.columns));
        wf::unpack_row(w, row, weights.data());
        for (int64_t t = 0; t < tokens; ++t) {
          double squares = 0.0;  // of the terms: what a sum may happen to cancel
          for (int64_t c = 0; c < w.columns; ++c) squares += std::pow(static_cast<double>(weights[c]) * static_cast<double>(x[t * w.columns + c]), 2);
          const double difference = std::fabs(got[t * rows + row] - expected[t * rows + row]);
          if (!(difference <= 2e-6 * std::sqrt(squares))) fail("blocks of type " + std::to_string(i) + " at row " + std::to_string(row));
        }
      }
      for (int64_t t = 0; t < tokens; ++t) multiply(isa, t, 1, alone.data() + t * rows);
      if (alone != got) fail("blocks of one token, of type " + std::to_string(i));
    }
  }
}

// Rows of floats; a token's results are the same whatever comes with it.
void rows(const wf::FloatKernels& isa) {
  for (const auto type : {wf::RowType::f32, wf::RowType::f16, wf::RowType::bf16}) {
    for (const int64_t columns : {1, 7, 64, 579}) {
      constexpr int64_t kRows = 11, kTokens = 7;
      std::vector<float> weights = normal(kRows * columns);
      std::vector<uint16_t> bits;
      for (const float value : weights) {
        uint32_t whole;
        std::memcpy(&whole, &value, 4);
        bits.push_back(type == wf::RowType::f16 ? wf::float_to_half(value) : static_cast<uint16_t>(whole >> 16));
      }
      const auto* data = type == wf::RowType::f32 ? reinterpret_cast<const uint8_t*>(weights.data()) : reinterpret_cast<const uint8_t*>(bits.data());
      const std::vector<float> x = normal(kTokens * columns);
      std::vector<float> got(kRows * kTokens), expected = got, alone = got;
      isa.matmul_rows(type, data, kRows, columns, x.data(), kTokens, got.data(), kRows);
      wf::kScalarFloats.matmul_rows(type, data, kRows, columns, x.data(), kTokens, expected.data(), kRows);
      near(got, expected, 2e-6F, "rows of type " + std::to_string(static_cast<int>(type)));
      for (int64_t t = 0; t < kTokens; ++t) isa.matmul_rows(type, data, kRows, columns, x.data() + t * columns, 1, alone.data() + t * kRows, kRows);
      if (alone != got) fail("rows of one token");
    }
  }
}

void decoder(const wf::FloatKernels& isa) {
  for (const int64_t columns : {1, 3, 16, 70, 576}) {
    const std::vector<float> x = normal(columns), weight = normal(columns);
    std::vector<float> got(x.size()), expected(x.size());
    isa.rms_norm(x.data(), weight.data(), columns, 1e-5F, got.data());
    wf::kScalarFloats.rms_norm(x.data(), weight.data(), columns, 1e-5F, expected.data());
    near(got, expected, 1e-6F, "rms_norm");
    for (const auto kind : {wf::Activation::silu, wf::Activation::relu2, wf::Activation::gelu_tanh}) {
      got = x;
      got.push_back(1.0F);  // so that tolerance has a measure where all others are almost zero
      for (size_t i = 0; i < x.size(); i += 5) got[i] = x[i] * 40.0F;  // where exponentials end
      expected = got;
      isa.activate(kind, got.data(), weight.data(), columns);
      wf::kScalarFloats.activate(kind, expected.data(), weight.data(), columns);
      near(got, expected, 2e-6F, "activation " + std::to_string(static_cast<int>(kind)));
    }
    const float product = isa.dot(x.data(), weight.data(), columns), other = wf::kScalarFloats.dot(x.data(), weight.data(), columns);
    if (!(std::fabs(product - other) <= 1e-6F * static_cast<float>(columns))) fail("dot");
    got = expected = x;
    isa.accumulate(got.data(), weight.data(), columns);
    wf::kScalarFloats.accumulate(expected.data(), weight.data(), columns);
    near(got, expected, 0.0F, "accumulate");
    if (columns < 2) continue;
    got = expected = x;
    const std::vector<float> cos = normal(columns / 2), sin = normal(columns / 2);
    isa.rope(got.data(), cos.data(), sin.data(), 1, columns, columns / 2);
    wf::kScalarFloats.rope(expected.data(), cos.data(), sin.data(), 1, columns, columns / 2);
    near(got, expected, 1e-6F, "rope");
  }
  for (const int64_t dim : {4, 20, 64}) {
    for (const auto type : {wf::KvType::f32, wf::KvType::f16, wf::KvType::int8}) {
      constexpr int64_t kPositions = 131, kHeads = 2, kQueries = 7;
      const size_t elements = static_cast<size_t>(kHeads * kPositions * dim);
      std::vector<float> keys(elements), values(elements);  // room for the widest type
      std::vector<float> key_scales(kHeads * kPositions), value_scales(kHeads * kPositions);
      const wf::KvCache cache{type, kHeads, kPositions, dim, keys.data(), values.data(), key_scales.data(), value_scales.data()};
      for (int64_t position = 0; position < kPositions; ++position) {
        for (int64_t head = 0; head < kHeads; ++head) {
          const std::vector<float> key = normal(dim), value = normal(dim);
          isa.store(cache, head, position, key.data(), value.data());
          std::vector<float> own_keys(elements), own_values(elements), own_key_scales(key_scales.size()), own_value_scales(value_scales.size());
          const wf::KvCache own{type, kHeads, kPositions, dim, own_keys.data(), own_values.data(), own_key_scales.data(), own_value_scales.data()};
          wf::store_kv(own, head, position, key.data(), value.data());
          const size_t size = static_cast<size_t>(dim * wf::bytes_of(type)), at = static_cast<size_t>(cache.row(head, position)) * size;
          const auto same = [&](const std::vector<float>& a, const std::vector<float>& b) {
            return std::memcmp(reinterpret_cast<const char*>(a.data()) + at, reinterpret_cast<const char*>(b.data()) + at, size) == 0;
          };
          if (!same(keys, own_keys) || !same(values, own_values)) fail("kept keys and values");
          const auto row = static_cast<size_t>(cache.row(head, position));
          if (key_scales[row] != own_key_scales[row] || value_scales[row] != own_value_scales[row]) fail("scales of keys and values");
          if ((key_scales[row] > 0 && value_scales[row] > 0) != (type == wf::KvType::int8)) fail("scales that there are");
        }
      }
      const std::vector<float> q = normal(kQueries * dim);
      for (const auto& [first, last] : {std::array<int64_t, 2>{0, 131}, {0, 1}, {50, 114}, {5, 70}, {9, 9}}) {
        std::vector<float> got(q.size()), expected(q.size());
        isa.attention(cache, 1, q.data(), kQueries, first, last, 0.3F, got.data());
        wf::kScalarFloats.attention(cache, 1, q.data(), kQueries, first, last, 0.3F, expected.data());
        near(got, expected, 2e-6F, "attention");
      }
    }
  }
}

// A correction against sums in double precision, and the same bits as the scalar set's; y has exactly the rows.
void low_rank(const wf::Kernels& isa) {
  for (const auto type : {wf::AdapterType::f16, wf::AdapterType::i8, wf::AdapterType::f32}) {
    for (const auto& [rows, columns, rank, tokens] :
         {std::array<int64_t, 4>{1, 1, 1, 1}, {17, 5, 3, 3}, {33, 131, 20, 5}, {64, 48, 16, 9}}) {
      const auto count = static_cast<size_t>((rows + columns) * rank);
      std::vector<uint16_t> halves(count);
      std::vector<int8_t> bytes(count);
      const std::vector<float> floats = normal(static_cast<int64_t>(count));
      // Half-precision numbers of every size from the subnormal on: sign, exponent up to 2^0, fraction.
      for (auto& half : halves) half = static_cast<uint16_t>(uniform(0, 1) << 15 | uniform(0, 15) << 10 | uniform(0, 1023));
      for (auto& byte : bytes) byte = static_cast<int8_t>(uniform(-127, 127));
      const bool small = type == wf::AdapterType::i8;
      const std::vector<float> u_scales = normal(rank), v_scales = normal(rank), x = normal(tokens * columns);
      const auto number = [&](int64_t i) {
        return static_cast<double>(small ? static_cast<float>(bytes[i]) : type == wf::AdapterType::f32 ? floats[i] : wf::half_to_float(halves[i]));
      };
      const auto from = [&](int64_t first) {
        return small ? static_cast<const void*>(bytes.data() + first)
               : type == wf::AdapterType::f32 ? static_cast<const void*>(floats.data() + first)
                                              : halves.data() + first;
      };
      const wf::LowRank adapters(type, from(0), from(rows * rank), small ? u_scales.data() : nullptr, small ? v_scales.data() : nullptr, rows,
                                 columns, rank);
      const std::vector<float> before = normal(tokens * rows);
      std::vector<float> got = before, scalar = before;
      wf::add_low_rank(isa, adapters, x.data(), tokens, got.data());
      wf::add_low_rank(wf::kScalar, adapters, x.data(), tokens, scalar.data());
      for (int64_t t = 0; t < tokens; ++t) {
        for (int64_t row = 0; row < rows; ++row) {
          double sum = before[t * rows + row], size = std::fabs(sum);
          for (int64_t i = 0; i < rank; ++i) {
            double inner = 0, inner_size = 0;
            for (int64_t c = 0; c < columns; ++c) {
              const double term = number((rows + c) * rank + i) * static_cast<double>(x[t * columns + c]);
              inner += term;
              inner_size += std::fabs(term);
            }
            const double scale = small ? static_cast<double>(u_scales[i] * v_scales[i]) : 1.0;
            sum += number(row * rank + i) * scale * inner;
            size += std::fabs(number(row * rank + i) * scale) * inner_size;
          }
          const float value = got[t * rows + row];
          if (!(std::fabs(value - sum) <= 1e-5 * size)) fail("a low-rank correction of type " + std::to_string(static_cast<int>(type)));
          if (value != scalar[t * rows + row]) fail("a low-rank correction, against the scalar set's");
        }
      }
    }
  }
}

// Products through the pool are those of one thread, whatever the number of threads: some sizes stay on the caller's, some do not.
void threads(const wf::Kernels& isa) {
  for (const auto& [rows, columns, tokens] : {std::array<int64_t, 3>{16, 64, 1}, {2100, 1000, 1}, {2003, 1000, 3}}) {
    auto owned = std::make_shared<wf::OwnedMatrix>();
    owned->view = {nullptr, nullptr, rows, columns, Granularity::row};
    owned->codes = wf::allocate<uint8_t>(owned->view.bytes());
    owned->scales = wf::allocate<float>(rows);
    if (!wf::pack(random_codes(rows * columns).data(), rows, columns, owned->codes.get())) fail("pack refuses ternary codes");
    for (int64_t i = 0; i < rows; ++i) owned->scales[i] = static_cast<float>(uniform(1, 1000)) * 1e-3F;
    owned->view.codes = owned->codes.get();
    owned->view.scales = owned->scales.get();
    const std::vector<float> x = normal(tokens * columns);
    std::vector<float> alone(static_cast<size_t>(tokens * rows));
    wf::set_threads(1);
    wf::multiply(isa, {owned}, x.data(), tokens, {alone.data()});
    for (const int count : {2, 4}) {
      wf::set_threads(count);
      for (int round = 0; round < 20; ++round) {
        std::vector<float> first(alone.size(), -1.0F), second(alone.size(), -1.0F);
        wf::multiply(isa, {owned, owned}, x.data(), tokens, {first.data(), second.data()});
        if (first != alone || second != alone) fail("products of " + std::to_string(count) + " threads");
      }
    }
  }
  // Low-rank corrections: cut into panels, or into tokens where panels are few.
  const auto corrections = [&](int64_t rows, int64_t columns, int64_t rank, int64_t tokens, const std::vector<int>& counts, int rounds) {
    const std::vector<float> numbers = normal((rows + columns) * rank), x = normal(tokens * columns), before = normal(tokens * rows);
    const auto adapters = std::make_shared<const wf::LowRank>(wf::AdapterType::f32, numbers.data(), numbers.data() + rows * rank, nullptr,
                                                              nullptr, rows, columns, rank);
    std::vector<float> alone = before;
    wf::add_low_rank(isa, *adapters, x.data(), tokens, alone.data());
    for (const int count : counts) {
      wf::set_threads(count);
      for (int round = 0; round < rounds; ++round) {
        std::vector<float> got = before;
        wf::add_low_rank(isa, adapters, x.data(), tokens, got.data());
        if (got != alone) fail("a low-rank correction of " + std::to_string(count) + " threads");
      }
    }
  };
  corrections(17, 131, 3, 2, {1, 2, 4}, 20);
  corrections(2003, 1001, 70, 1, {1, 2, 4}, 20);
  corrections(203, 1001, 5, 131, {1, 2, 4}, 20);
  corrections(3200, 16, 16, 700, {wf::kMostThreads}, 1);  // with more than half as many panels as a job may have chunks
  wf::set_threads(1);
}

}  // namespace

int main(int argc, char** argv) {
  formats();
  std::string names;
  for (int i = 0; wf::name_of(static_cast<wf::Isa>(i)) != nullptr; ++i) {
    const wf::Kernels* isa = wf::kernels_of(static_cast<wf::Isa>(i));
    if (isa == nullptr) continue;
    if (isa->isa != static_cast<wf::Isa>(i)) fail("a set under another's name");
    names += (names.empty() ? "" : ",") + std::string(wf::name_of(isa->isa));
    every_width(*isa);
    many_tokens(*isa);
    largest_sums(*isa, 17, 33, 3);
    largest_sums(*isa, 17, 33'000, 10);
    largest_sums(*isa, 17, 9'000, 40);
    largest_sums(*isa, 17, 140'000, 1);
    largest_sums(*isa, 1, 2'200'000, 1);
    not_finite(*isa);
    blocks(wf::float_kernels(isa->isa));
    rows(wf::float_kernels(isa->isa));
    decoder(wf::float_kernels(isa->isa));
    low_rank(*isa);
    threads(*isa);
  }
  std::printf("%s\n", names.c_str());
  if (argc > 1 && names != argv[1]) fail("expected the instruction sets " + std::string(argv[1]));
  return 0;
}
