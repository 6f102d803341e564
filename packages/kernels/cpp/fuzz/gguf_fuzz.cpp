// A libFuzzer target: whatever bytes are read as a GGUF file, nothing crashes, overflows or reads beyond them. See fuzz.sh.
#include <cstddef>
#include <cstdint>
#include <vector>

#include "runtime/gguf.h"
#include "runtime/numbers.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto file = wf::Gguf::parse(std::as_bytes(std::span(data, size)));
  if (!file) return 0;
  for (const auto& [name, tensor] : file->tensors()) {
    std::vector<float> row(static_cast<size_t>(tensor.columns()));
    wf::float_row(tensor, 0, row.data());
    wf::float_row(tensor, tensor.rows() - 1, row.data());
  }
  return 0;
}
