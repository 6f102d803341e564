// Reads every file given, and files that differ from it: cut off at every byte of the header, each byte of the header changed, and
// `rounds` of random damage. Nothing may crash, and a sanitizer finds nothing. Prints "ok".
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

#include "runtime/gguf.h"
#include "runtime/numbers.h"
#include "ternary/half.h"

namespace {

void check(bool good, const std::string& what) {
  if (good) return;
  std::fprintf(stderr, "failed: %s\n", what.c_str());
  std::exit(1);
}

// A copy at its very size, so that a sanitizer sees a read beyond it.
bool read(const std::vector<char>& data) {
  const std::vector<char> exact(data.begin(), data.end());
  const auto file = wf::Gguf::parse(std::as_bytes(std::span(exact)));
  if (!file) {
    check(!file.error().text.empty(), "an error says what is wrong");
    return false;
  }
  for (const auto& [name, tensor] : file->tensors()) {
    std::vector<float> row(static_cast<size_t>(tensor.columns()));
    wf::float_row(tensor, 0, row.data());
    wf::float_row(tensor, tensor.rows() - 1, row.data());
  }
  return true;
}

void damage(const std::vector<char>& good, size_t header, int rounds) {
  for (size_t end = 0; end < header; ++end) check(!read({good.begin(), good.begin() + static_cast<long>(end)}), "a cut file is refused");
  std::vector<char> changed = good;
  for (size_t at = 0; at < header; ++at) {
    for (const char value : {'\0', '\1', '\x7f', '\xff', static_cast<char>(good[at] ^ 1)}) {
      changed[at] = value;
      read(changed);
    }
    changed[at] = good[at];
  }
  std::mt19937_64 random(7);
  for (int round = 0; round < rounds; ++round) {
    changed = good;
    for (int edits = 1 + static_cast<int>(random() % 4); edits > 0; --edits) {
      const uint64_t numbers[] = {0, 1, 31, 1U << 31, ~0U, 1ULL << 63, ~0ULL, good.size(), random()};
      const uint64_t number = numbers[random() % std::size(numbers)];
      const size_t at = random() % (header - 8), size = random() % 2 ? 8 : 4;
      std::memcpy(changed.data() + at, &number, size);
    }
    read(changed);
  }
}

void halves_are_exact() {
  for (uint32_t half = 0; half < 0x10000; ++half) {
    const float value = wf::half_to_float(static_cast<uint16_t>(half));
    const bool is_nan = (half & 0x7c00) == 0x7c00 && (half & 0x3ff) != 0;
    check(std::isnan(value) == is_nan, "NaN stays NaN");
    if (is_nan) continue;
    const int exponent = static_cast<int>(half >> 10 & 31);
    const double fraction = half & 0x3ff;
    double expected = exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25);
    if (exponent == 31) expected = HUGE_VAL;
    check(static_cast<double>(std::fabs(value)) == expected && std::signbit(value) == (half >> 15 != 0), "halves become floats");
    check(wf::float_to_half(value) == half, "and halves again");
    if (exponent == 31) continue;
    const float next = wf::half_to_float(static_cast<uint16_t>(half + 1));
    if (std::isinf(next)) continue;
    const float middle = (value + next) / 2;
    check(wf::float_to_half(middle) == half + (half & 1), "ties go to even");
    check(wf::float_to_half(std::nextafter(middle, next)) == half + 1, "what is above a tie goes up");
    check(wf::float_to_half(std::nextafter(middle, value)) == half, "what is below goes down");
  }
}

}  // namespace

int main(int argc, char** argv) {
  halves_are_exact();
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 0;
  for (int i = 2; i < argc; ++i) {
    std::ifstream stream(argv[i], std::ios::binary);
    const std::vector<char> good{std::istreambuf_iterator<char>(stream), {}};
    check(read(good), std::string(argv[i]) + " is read");
    // What lies before the first tensor's data: the largest prefix that says nothing of what comes.
    const auto file = wf::Gguf::parse(std::as_bytes(std::span(good)));
    size_t header = good.size();
    for (const auto& [name, tensor] : file->tensors()) {
      header = std::min(header, static_cast<size_t>(reinterpret_cast<const char*>(tensor.data.data()) - good.data()));
    }
    damage(good, header, rounds);
  }
  std::puts("ok");
  return 0;
}
