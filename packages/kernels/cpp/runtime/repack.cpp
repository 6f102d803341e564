#include "runtime/repack.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstring>
#include <memory>
#include <optional>
#include <vector>

#include "runtime/numbers.h"
#include "ternary/formats.h"
#include "ternary/half.h"
#include "ternary/parallel.h"

namespace wf {
namespace {

constexpr float kNoScale = 1e-5F;  // of a matrix of zeros

// Packs a row of codes, padded with 1 to whole blocks, into its place.
void pack_row(const uint8_t* codes, int64_t blocks, uint8_t* first_block, int64_t row) {
  for (int64_t block = 0; block < blocks; ++block, codes += kBlockColumns) {
    uint32_t planes[4];
    std::memcpy(planes, codes, sizeof planes);
    const uint32_t packed = planes[0] | planes[1] << 2 | planes[2] << 4 | planes[3] << 6;
    std::memcpy(first_block + block * kBlockBytes + row * 4, &packed, sizeof packed);
  }
}

// A matrix while its rows are read: the scale of every group of 128 columns, and whether the group has a code other than zero.
struct Scales {
  int64_t rows, groups;
  std::vector<float> of;
  std::vector<uint8_t> live;

  Scales(int64_t rows_, int64_t groups_)
      : rows(rows_), groups(groups_), of(static_cast<size_t>(rows_ * groups_)), live(static_cast<size_t>(rows_ * groups_)) {}

  float& at(int64_t row, int64_t group) { return of[static_cast<size_t>(row * groups + group)]; }
  uint8_t& live_at(int64_t row, int64_t group) { return live[static_cast<size_t>(row * groups + group)]; }
};

// Of the types with a scale a block: I2_S has one for the tensor (only_scale).
const char* read_ternary(const Tensor& tensor, int64_t row, uint8_t* codes, float* block_scales, Scales& scales) {
  const int64_t columns = tensor.columns();
  ternary_row(tensor, row, codes, block_scales);
  if (*std::max_element(codes, codes + columns) > 2) return "holds a code outside -1, 0 and 1";
  const int64_t block = size_of(tensor.type)->block, step = std::min(block, kGroup);
  for (int64_t first = 0; first < columns; first += step) {
    const int64_t end = std::min(first + step, columns), group = first / kGroup;
    const bool live = std::any_of(codes + first, codes + end, [](uint8_t code) { return code != 1; });
    const float scale = block_scales[first / block];
    if (!scales.live_at(row, group)) {
      if (live || first % kGroup == 0) scales.at(row, group) = scale;
      scales.live_at(row, group) = live;
    } else if (live && scales.at(row, group) != scale) {
      return "has scales that differ among 128 neighbours, which no layer here has";
    }
  }
  return nullptr;
}

// The scale of a ternary type's blocks, if they all have the same one.
std::optional<float> only_scale(const Tensor& tensor) {
  const auto* data = reinterpret_cast<const uint8_t*>(tensor.data.data());
  const TypeSize& size = *size_of(tensor.type);
  if (tensor.type == Type::i2_s) {
    float scale;
    std::memcpy(&scale, data + tensor.data.size() - kI2sTail, sizeof scale);
    return scale;
  }
  const int64_t place = tensor.type == Type::q2_0 ? 0 : size.bytes - 2, blocks = tensor.elements() / size.block;
  uint16_t first, other;
  std::memcpy(&first, data + place, sizeof first);
  for (int64_t block = 1; block < blocks; ++block) {
    std::memcpy(&other, data + block * size.bytes + place, sizeof other);
    if (other != first) return std::nullopt;
  }
  return half_to_float(first);
}

Format format_of(Type type) {
  switch (type) {
    case Type::tq1_0:
      return Format::tq1_0;
    case Type::tq2_0:
      return Format::tq2_0;
    case Type::i2_s:
      return Format::i2_s;
    default:
      return Format::q2_0;
  }
}

constexpr const char* kNotTernary = "is not ternary: its weights have more than one magnitude among 128 neighbours";

// Numbers without their sign are ordered as their bits are: no float is made of what are only codes.
template <typename Bits>
const char* read_bits(const Tensor& tensor, int64_t row, uint8_t* codes, Scales& scales, Bits infinity) {
  constexpr Bits kMagnitude = static_cast<Bits>(~Bits{0}) >> 1;
  const int64_t columns = tensor.columns();
  const std::byte* bits = tensor.data.data() + row * columns * static_cast<int64_t>(sizeof(Bits));
  for (int64_t first = 0; first < columns; first += kGroup) {
    const int64_t count = std::min(kGroup, columns - first), group = first / kGroup;
    Bits of[kGroup] = {}, largest = 0, others = 0;
    std::memcpy(of, bits + first * static_cast<int64_t>(sizeof(Bits)), static_cast<size_t>(count) * sizeof(Bits));
    for (const Bits value : of) largest = std::max(largest, static_cast<Bits>(value & kMagnitude));
    for (const Bits value : of) others |= (value & kMagnitude) == 0 || (value & kMagnitude) == largest ? 0 : 1;
    if (others != 0 || largest > infinity) return kNotTernary;
    for (int64_t i = 0; i < count; ++i) codes[first + i] = (of[i] & kMagnitude) == 0 ? 1 : of[i] > kMagnitude ? 0 : 2;
    scales.live_at(row, group) = largest != 0;
    if constexpr (sizeof(Bits) == 4) {
      scales.at(row, group) = std::bit_cast<float>(largest);
    } else {
      scales.at(row, group) = tensor.type == Type::f16 ? half_to_float(largest) : std::bit_cast<float>(static_cast<uint32_t>(largest) << 16);
    }
  }
  return nullptr;
}

const char* read_floats(const Tensor& tensor, int64_t row, uint8_t* codes, float* values, Scales& scales) {
  if (tensor.type == Type::f32) return read_bits<uint32_t>(tensor, row, codes, scales, 0x7f800000U);
  if (tensor.type == Type::f16) return read_bits<uint16_t>(tensor, row, codes, scales, 0x7c00);
  if (tensor.type == Type::bf16) return read_bits<uint16_t>(tensor, row, codes, scales, 0x7f80);
  const int64_t columns = tensor.columns();
  float_row(tensor, row, values);
  for (int64_t first = 0; first < columns; first += kGroup) {
    const int64_t end = std::min(first + kGroup, columns), group = first / kGroup;
    float largest = 0;
    for (int64_t i = first; i < end; ++i) largest = std::max(largest, std::fabs(values[i]));
    for (int64_t i = first; i < end; ++i) {
      if (values[i] != 0 && std::fabs(values[i]) != largest) return kNotTernary;  // also NaN
      codes[i] = static_cast<uint8_t>(values[i] == 0 ? 1 : values[i] > 0 ? 2 : 0);
    }
    scales.at(row, group) = largest;
    scales.live_at(row, group) = largest != 0;
  }
  return nullptr;
}

// Multiplies by a tensor of scales.
const char* apply(const Tensor& extra, Scales& scales) {
  const bool one = extra.elements() == 1;
  const int64_t wide = extra.columns();
  const bool fits = extra.shape.size() == 2 && extra.shape[0] == scales.rows && (wide == 1 || wide == scales.groups);
  if (!one && !fits) return "has a shape that does not fit its matrix";
  std::vector<float> factors(static_cast<size_t>(wide));
  for (int64_t row = 0; row < scales.rows; ++row) {
    if (row == 0 || !one) float_row(extra, row, factors.data());
    for (int64_t group = 0; group < scales.groups; ++group) scales.at(row, group) *= factors[static_cast<size_t>(wide == 1 ? 0 : group)];
  }
  return nullptr;
}

// Chooses the coarsest granularity that says the same, and writes its scales. What scale a group of zeros has says nothing.
void coarsen(Scales& scales, OwnedMatrix& out) {
  bool by_row = true, by_tensor = true;
  float one = kNoScale;
  bool any = false;
  std::vector<float> firsts(static_cast<size_t>(scales.rows), kNoScale);
  for (int64_t row = 0; row < scales.rows; ++row) {
    bool found = false;
    float& first = firsts[static_cast<size_t>(row)];
    for (int64_t group = 0; group < scales.groups; ++group) {
      if (!scales.live_at(row, group)) continue;
      const float scale = scales.at(row, group);
      if (!found) first = scale;
      if (!any) one = scale;
      found = any = true;
      by_row = by_row && scale == first;
      by_tensor = by_tensor && scale == one;
    }
  }
  TernaryMatrix& view = out.view;
  if (by_tensor) {
    view.granularity = Granularity::tensor;
    out.scales = allocate<float>(1);
    out.scales[0] = one;
  } else if (by_row) {
    view.granularity = Granularity::row;
    out.scales = allocate<float>(scales.rows);
    std::copy(firsts.begin(), firsts.end(), out.scales.get());
  } else {
    view.granularity = Granularity::group;
    const int64_t count = view.panels() * scales.groups * kPanelRows;
    out.scales = allocate<float>(count);
    std::fill_n(out.scales.get(), count, 0.0F);
    for (int64_t row = 0; row < scales.rows; ++row) {
      for (int64_t group = 0; group < scales.groups; ++group) {
        if (!scales.live_at(row, group)) continue;
        out.scales[(row / kPanelRows * scales.groups + group) * kPanelRows + row % kPanelRows] = scales.at(row, group);
      }
    }
  }
  view.scales = out.scales.get();
}

constexpr int64_t kPiece = 1 << 20;  // weights that a thread packs before it asks for more

// Panels whose rows together have kPiece weights.
int64_t panels_of_piece(const TernaryMatrix& view) { return std::max<int64_t>(1, kPiece / (kPanelRows * view.columns)); }

// Reads and packs row by row, comparing scales; returns what is wrong.
const char* repack_rows(const Tensor& tensor, const TernaryMatrix& view, uint8_t* out, Scales& scales) {
  const int64_t blocks = view.blocks();
  const auto read = is_ternary(tensor.type) ? read_ternary : read_floats;
  std::atomic<const char*> wrong{nullptr};
  in_pieces(view.panels(), panels_of_piece(view), [&](int64_t begin, int64_t end) {
    std::vector<uint8_t> codes(static_cast<size_t>(blocks * kBlockColumns), 1);
    std::vector<float> floats(static_cast<size_t>(view.columns));
    for (int64_t row = begin * kPanelRows; row < end * kPanelRows && wrong.load(std::memory_order_relaxed) == nullptr; ++row) {
      if (row >= view.rows) {  // those that fill up the last panel
        std::fill(codes.begin(), codes.end(), uint8_t{1});
      } else if (const char* why = read(tensor, row, codes.data(), floats.data(), scales)) {
        wrong.store(why);
      }
      pack_row(codes.data(), blocks, out + row / kPanelRows * blocks * kBlockBytes, row % kPanelRows);
    }
  });
  return wrong.load();
}

// The same of a ternary type with one scale: nothing to compare, so that the packer that knows the type reads the codes.
bool repack_codes(const Tensor& tensor, const TernaryMatrix& view, uint8_t* out) {
  const auto* data = reinterpret_cast<const uint8_t*>(tensor.data.data());
  const Format format = format_of(tensor.type);
  const int64_t row_bytes = format_bytes(format, 1, view.columns);
  std::atomic<bool> good{true};
  in_pieces(view.panels(), panels_of_piece(view), [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kPanelRows, rows = std::min(end * kPanelRows, view.rows) - first;
    if (!pack_from(format, data + first * row_bytes, rows, view.columns, out + begin * view.blocks() * kBlockBytes)) good.store(false);
  });
  return good.load();
}

}  // namespace

Result<SharedMatrix> repack(const Gguf& file, const std::string& stem) {
  const Tensor& tensor = *file.tensor(stem + "weight");
  const auto fail = [&](const char* name, const char* why) { return Error{Kind::model, "tensor " + stem + name + " " + why}; };
  auto made = std::make_shared<OwnedMatrix>();
  TernaryMatrix& view = made->view;
  view = {nullptr, nullptr, tensor.rows(), tensor.columns(), Granularity::tensor};
  made->codes = allocate<uint8_t>(view.bytes());
  view.codes = made->codes.get();

  Scales scales(view.rows, view.groups());
  if (const auto scale = is_ternary(tensor.type) ? only_scale(tensor) : std::nullopt) {
    if (!repack_codes(tensor, view, made->codes.get())) return fail("weight", "holds a code outside -1, 0 and 1");
    std::fill(scales.of.begin(), scales.of.end(), *scale);
    std::fill(scales.live.begin(), scales.live.end(), uint8_t{1});
  } else if (const char* why = repack_rows(tensor, view, made->codes.get(), scales)) {
    return fail("weight", why);
  }
  if (const Tensor* extra = file.tensor(stem + "scale")) {
    if (const char* why = apply(*extra, scales)) return fail("scale", why);
  }
  for (const float scale : scales.of) {
    if (!std::isfinite(scale)) return fail("weight", "has scales that are no numbers");
  }
  coarsen(scales, *made);
  return SharedMatrix(std::move(made));
}

}  // namespace wf
