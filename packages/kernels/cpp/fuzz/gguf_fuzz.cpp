// A libFuzzer target: whatever bytes are read as a GGUF file, nothing crashes, overflows or reads beyond them, in the reader, in the
// loader of models, and in a step of what it lets through. See fuzz.sh.
#include <cstddef>
#include <cstdint>
#include <vector>

#include "runtime/decoder.h"
#include "runtime/gguf.h"
#include "runtime/model.h"
#include "runtime/numbers.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto file = wf::Gguf::parse(std::as_bytes(std::span(data, size)));
  if (!file) return 0;
  for (const auto& [name, tensor] : file->tensors()) {
    std::vector<float> row(static_cast<size_t>(tensor.columns()));
    wf::float_row(tensor, 0, row.data());
    wf::float_row(tensor, tensor.rows() - 1, row.data());
  }
  const auto model = wf::load_model(*file);
  if (!model) return 0;
  wf::DecoderOptions options;
  options.context = 2;
  const auto decoder = wf::Decoder::create(*model, options);
  if (!decoder) return 0;
  const std::vector<int32_t> tokens = {0, static_cast<int32_t>((*model)->vocabulary - 1)};
  std::vector<float> logits(2 * static_cast<size_t>((*model)->vocabulary));
  const wf::Sequence sequence{0, tokens};
  (void)(*decoder)->step({&sequence, 1}, wf::Rows::all, logits.data());
  return 0;
}
