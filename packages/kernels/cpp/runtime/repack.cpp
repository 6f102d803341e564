#include "runtime/repack.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstring>
#include <memory>
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

// The scale of every group of 128 columns of a matrix, and whether the group has a code other than zero.
struct Scales {
  int64_t rows = 0, groups = 0;
  std::vector<float> of;
  std::vector<uint8_t> live;

  Scales() = default;
  Scales(int64_t rows_, int64_t groups_, float all = 0.0F, bool all_live = false)
      : rows(rows_), groups(groups_), of(static_cast<size_t>(rows_ * groups_), all), live(of.size(), all_live ? 1 : 0) {}

  float& at(int64_t row, int64_t group) { return of[static_cast<size_t>(row * groups + group)]; }
  uint8_t& live_at(int64_t row, int64_t group) { return live[static_cast<size_t>(row * groups + group)]; }
};

// The scales, float16, of a ternary type's blocks: of all types but I2_S, whose tensors have one, float32.
class BlockScales {
 public:
  explicit BlockScales(const Tensor& tensor)
      : bytes_(size_of(tensor.type)->bytes),
        first_(reinterpret_cast<const uint8_t*>(tensor.data.data()) + (tensor.type == Type::q2_0 ? 0 : bytes_ - 2)) {}

  uint16_t operator[](int64_t block) const {
    uint16_t bits;
    std::memcpy(&bits, first_ + block * bytes_, sizeof bits);
    return bits;
  }

 private:
  int64_t bytes_;
  const uint8_t* first_;
};

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

constexpr int64_t kPiece = 1 << 18;  // weights that a thread packs before it asks for more

// Panels whose rows together have kPiece weights.
int64_t panels_of_piece(const TernaryMatrix& view) { return std::max<int64_t>(1, kPiece / (kPanelRows * view.columns)); }

// Chooses the coarsest granularity that says the same, and writes its scales. What scale a group of zeros has says nothing. Returns
// whether all are finite.
bool coarsen(Scales& scales, OwnedMatrix& out) {
  TernaryMatrix& view = out.view;
  std::vector<float> firsts(static_cast<size_t>(scales.rows), kNoScale);  // that is not of zeros, of each row
  std::vector<uint8_t> live(firsts.size());
  std::atomic<bool> finite{true}, by_row{true};
  in_pieces(scales.rows, panels_of_piece(view) * kPanelRows, [&](int64_t begin, int64_t end) {
    bool all = true, same = true;
    for (int64_t row = begin; row < end; ++row) {
      float& first = firsts[static_cast<size_t>(row)];
      bool found = false;
      for (int64_t group = 0; group < scales.groups; ++group) {
        const float scale = scales.at(row, group);
        all &= std::isfinite(scale);
        if (!scales.live_at(row, group)) continue;
        if (!found) first = scale;
        found = true;
        same &= scale == first;
      }
      live[static_cast<size_t>(row)] = found;
    }
    if (!all) finite.store(false);
    if (!same) by_row.store(false);
  });
  if (!finite.load()) return false;
  float one = kNoScale;
  bool by_tensor = by_row.load(), any = false;
  for (size_t row = 0; row < firsts.size(); ++row) {
    if (!live[row]) continue;
    if (!any) one = firsts[row];
    any = true;
    by_tensor = by_tensor && firsts[row] == one;
  }
  if (by_tensor) {
    view.granularity = Granularity::tensor;
    out.scales = allocate<float>(1);
    out.scales[0] = one;
  } else if (by_row.load()) {
    view.granularity = Granularity::row;
    out.scales = allocate<float>(scales.rows);
    std::copy(firsts.begin(), firsts.end(), out.scales.get());
  } else {
    view.granularity = Granularity::group;
    out.scales = allocate<float>(view.panels() * scales.groups * kPanelRows);
    in_pieces(view.panels(), panels_of_piece(view), [&](int64_t begin, int64_t end) {
      float* to = out.scales.get() + begin * scales.groups * kPanelRows;
      for (int64_t panel = begin; panel < end; ++panel) {
        for (int64_t group = 0; group < scales.groups; ++group) {
          for (int64_t row = panel * kPanelRows; row < (panel + 1) * kPanelRows; ++row) {
            *to++ = row < scales.rows && scales.live_at(row, group) ? scales.at(row, group) : 0.0F;
          }
        }
      }
    });
  }
  view.scales = out.scales.get();
  return true;
}

// Reads and packs the rows of a float type; returns what is wrong.
const char* pack_floats(const Tensor& tensor, const TernaryMatrix& view, uint8_t* out, Scales& scales) {
  const int64_t blocks = view.blocks();
  std::atomic<const char*> wrong{nullptr};
  in_pieces(view.panels(), panels_of_piece(view), [&](int64_t begin, int64_t end) {
    std::vector<uint8_t> codes(static_cast<size_t>(blocks * kBlockColumns), 1);
    std::vector<float> floats(static_cast<size_t>(view.columns));
    for (int64_t row = begin * kPanelRows; row < end * kPanelRows && wrong.load(std::memory_order_relaxed) == nullptr; ++row) {
      if (row >= view.rows) {  // those that fill up the last panel
        std::fill(codes.begin(), codes.end(), uint8_t{1});
      } else if (const char* why = read_floats(tensor, row, codes.data(), floats.data(), scales)) {
        wrong.store(why);
      }
      pack_row(codes.data(), blocks, out + row / kPanelRows * blocks * kBlockBytes, row % kPanelRows);
    }
  });
  return wrong.load();
}

enum class Codes { bad, of_one_scale, of_more };

// Packs the codes of a ternary type, and tells whether its blocks have one scale.
Codes pack_codes(const Tensor& tensor, const TernaryMatrix& view, uint8_t* out) {
  const auto* data = reinterpret_cast<const uint8_t*>(tensor.data.data());
  const Format format = format_of(tensor.type);
  const int64_t row_bytes = format_bytes(format, 1, view.columns), row_blocks = view.columns / size_of(tensor.type)->block;
  const BlockScales scales(tensor);
  std::atomic<bool> good{true}, one{true};
  in_pieces(view.panels(), panels_of_piece(view), [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kPanelRows, last = std::min(end * kPanelRows, view.rows);
    if (!pack_from(format, data + first * row_bytes, last - first, view.columns, out + begin * view.blocks() * kBlockBytes)) good.store(false);
    if (tensor.type == Type::i2_s) return;
    bool same = true;
    for (int64_t block = first * row_blocks; block < last * row_blocks; ++block) same &= scales[block] == scales[0];
    if (!same) one.store(false);
  });
  return !good.load() ? Codes::bad : one.load() ? Codes::of_one_scale : Codes::of_more;
}

// The scales of blocks that differ; whether a group is zero, the packed codes say. Returns what is wrong.
const char* read_scales(const Tensor& tensor, const TernaryMatrix& view, Scales& scales) {
  constexpr uint32_t kZeros = 0x55555555;
  const int64_t block = size_of(tensor.type)->block, step = std::min(block, kGroup), row_blocks = view.columns / block;
  const BlockScales of(tensor);
  std::atomic<bool> good{true};
  in_pieces(view.panels(), panels_of_piece(view), [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      const uint8_t* codes = view.codes + panel * view.blocks() * kBlockBytes;
      for (int64_t first = 0; first < view.columns; first += step) {
        uint32_t others[kPanelRows] = {};
        for (const uint8_t* last = codes + step / kBlockColumns * kBlockBytes; codes < last; codes += kBlockBytes) {
          uint32_t words[kPanelRows];
          std::memcpy(words, codes, sizeof words);
          for (int64_t r = 0; r < kPanelRows; ++r) others[r] |= words[r] ^ kZeros;
        }
        const int64_t group = first / kGroup;
        for (int64_t row = panel * kPanelRows; row < std::min((panel + 1) * kPanelRows, view.rows); ++row) {
          const float scale = half_to_float(of[row * row_blocks + first / block]);
          const bool live = others[row % kPanelRows] != 0;
          if (!scales.live_at(row, group)) {
            if (live || first % kGroup == 0) scales.at(row, group) = scale;
            scales.live_at(row, group) = live;
          } else if (live && scales.at(row, group) != scale) {
            good.store(false);
          }
        }
      }
    }
  });
  return good.load() ? nullptr : "has scales that differ among 128 neighbours, which no layer here has";
}

// The one scale of a ternary type.
float only_scale(const Tensor& tensor) {
  if (tensor.type != Type::i2_s) return half_to_float(BlockScales(tensor)[0]);
  float scale;
  std::memcpy(&scale, tensor.data.data() + tensor.data.size() - kI2sTail, sizeof scale);
  return scale;
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

  const Tensor* extra = file.tensor(stem + "scale");
  Scales scales;
  if (is_ternary(tensor.type)) {
    const Codes codes = pack_codes(tensor, view, made->codes.get());
    if (codes == Codes::bad) return fail("weight", "holds a code outside -1, 0 and 1");
    if (codes == Codes::of_one_scale) {
      const bool one = extra == nullptr || extra->elements() == 1;  // also of the result
      scales = Scales(one ? 1 : view.rows, one ? 1 : view.groups(), only_scale(tensor), true);
    } else {
      scales = Scales(view.rows, view.groups());
      if (const char* why = read_scales(tensor, view, scales)) return fail("weight", why);
    }
  } else {
    scales = Scales(view.rows, view.groups());
    if (const char* why = pack_floats(tensor, view, made->codes.get(), scales)) return fail("weight", why);
  }
  if (extra != nullptr) {
    if (const char* why = apply(*extra, scales)) return fail("scale", why);
  }
  if (!coarsen(scales, *made)) return fail("weight", "has scales that are no numbers");
  return SharedMatrix(std::move(made));
}

}  // namespace wf
