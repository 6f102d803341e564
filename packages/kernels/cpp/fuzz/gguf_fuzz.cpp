// A libFuzzer target over the C API: whatever bytes are opened as a GGUF file and whatever is asked of the engine, nothing crashes,
// overflows, or reads beyond its bytes, and what fails leaves the slots as they were. See fuzz.sh.
//
// The last kTrailer bytes of an input are no part of the file: they choose the options and the calls.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "capi/wf_engine.h"

namespace {

constexpr size_t kTrailer = 24;
constexpr int64_t kMostNumbers = 1 << 20;  // of results

void demand(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "does not hold: %s (%s)\n", what, wf_error_text());
  std::abort();
}

// A call's outcome: success, or a refusal that has one sentence.
bool good(wf_status status) {
  demand(status != WF_INTERNAL, "no call fails for a reason that nobody knows");
  if (status == WF_OK) return true;
  const std::string text = wf_error_text();
  demand(!text.empty() && text.find('\n') == std::string::npos, "an error is one sentence");
  return false;
}

class Caller {
 public:
  Caller(wf_engine* engine, const uint8_t* choices, size_t count) : engine_(engine), choices_(choices), count_(count) {
    demand(wf_about(engine, &info_) == WF_OK, "an engine can be asked about itself");
    expected_.resize(static_cast<size_t>(info_.slots));
  }

  void run() {
    while (count_ > 0) {
      switch (next() % 8) {
        case 0:
          cut();
          break;
        case 1:
          copy();
          break;
        case 2:
          wf_cancel(engine_);
          cancelled_ = true;
          break;
        case 3:
          text();
          break;
        default:
          step();
      }
      for (int64_t slot = 0; slot < info_.slots; ++slot) {
        int64_t length = -1;
        demand(wf_length(engine_, slot, &length) == WF_OK && length == expected_[static_cast<size_t>(slot)], "slots are as the calls left them");
      }
    }
  }

 private:
  int64_t next() { return count_ > 0 ? (--count_, *choices_++) : 0; }
  int64_t slot() { return next() % (info_.slots + 1); }  // one too many: there is no such slot

  void cut() {
    const int64_t at = slot(), length = next() % 4;
    if (good(wf_truncate(engine_, at, length))) expected_[static_cast<size_t>(at)] = length;
  }

  void copy() {
    const int64_t from = slot(), to = slot(), length = next() % 4;
    if (good(wf_copy(engine_, from, to, length))) expected_[static_cast<size_t>(to)] = length;
  }

  // A tokenizer that gives as many tokens as it was told to, or an error.
  static int64_t tokens_of(void* context, const char*, int32_t* tokens, int64_t capacity) {
    const int64_t wanted = *static_cast<const int64_t*>(context);
    for (int64_t i = 0; i < std::min(wanted, capacity); ++i) tokens[i] = static_cast<int32_t>(i);
    return wanted;
  }

  void text() {
    const int64_t at = slot();
    int64_t wanted = next() % 8 - 1, count = 0;
    const wf_status status = wf_step_text(engine_, at, "text", tokens_of, &wanted, nullptr, &count);
    demand(status != WF_CANCELLED || cancelled_, "nothing is cancelled that nobody cancelled");
    if (status == WF_OK || status == WF_CANCELLED || status == WF_NOT_FINITE) cancelled_ = false;
    if (good(status)) expected_[static_cast<size_t>(at)] += count;
  }

  void step() {
    const int64_t how = next(), rows = how % 4 == 3 ? 2 : how % 4;
    const int32_t tokens[] = {0, static_cast<int32_t>(info_.vocabulary - 1), static_cast<int32_t>(next()), 1, 2, 3, 4, 5};
    std::vector<wf_sequence> sequences;
    int64_t results = 0;
    for (int64_t i = 0; i < 1 + how / 4 % 3; ++i) {
      const int64_t shape = next();
      sequences.push_back({shape % (info_.slots + 1), tokens + shape / 64, 1 + shape / 8 % 5, static_cast<int32_t>(shape / 128)});
      results += rows == WF_ROWS_ALL ? sequences.back().count : rows;
    }
    if (results * (info_.vocabulary + info_.width) > kMostNumbers) return;
    std::vector<float> logits(static_cast<size_t>(results * info_.vocabulary)), hidden(static_cast<size_t>(results * info_.width));
    float* states = how % 4 == 3 ? hidden.data() : nullptr;
    const wf_status status = wf_step(engine_, sequences.data(), static_cast<int64_t>(sequences.size()), static_cast<int32_t>(rows), logits.data(), states);
    demand(status != WF_CANCELLED || cancelled_, "nothing is cancelled that nobody cancelled");
    if (status == WF_OK || status == WF_CANCELLED || status == WF_NOT_FINITE) cancelled_ = false;
    if (!good(status)) return;
    for (const wf_sequence& sequence : sequences) expected_[static_cast<size_t>(sequence.slot)] += sequence.count;
    if (results > 0) {
      const wf_sampler sampler{static_cast<float>(how) / 100, how % 7, 0.9F, 3};
      int64_t token = -1;
      demand(wf_sample(logits.data(), info_.vocabulary, &sampler, 1, &token) == WF_OK && token >= 0 && token < info_.vocabulary,
             "a token can be drawn from logits");
      demand(wf_log_probabilities(logits.data(), results, info_.vocabulary) == WF_OK, "logits have probabilities");
    }
  }

  wf_engine* engine_;
  const uint8_t* choices_;
  size_t count_;
  wf_info info_{};
  std::vector<int64_t> expected_;  // lengths
  bool cancelled_ = false;
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size < kTrailer) return -1;
  size -= kTrailer;
  const uint8_t* choices = data + size;
  static const int file = memfd_create("fuzz", 0);
  static const std::string path = "/proc/self/fd/" + std::to_string(file);
  demand(ftruncate(file, 0) == 0 && pwrite(file, data, size, 0) == static_cast<ssize_t>(size), "the input can be written");
  static const char* isa = std::getenv("WF_FUZZ_ISA");  // the fuzzer's build has the scalar kernels alone
  const wf_options options{choices[0] % 5, choices[1] % 12, choices[2] % 4, isa == nullptr ? "scalar" : isa};
  wf_engine* engine = nullptr;
  if (good(wf_open(path.c_str(), &options, &engine))) {
    Caller(engine, choices + 3, kTrailer - 3).run();
  } else {
    demand(engine == nullptr, "what cannot be opened gives no engine");
  }
  wf_close(engine);
  return 0;
}

#ifdef WF_FUZZ_MAIN
// Without libFuzzer: gguf_fuzz COUNT FILE ... runs each file, and COUNT damaged copies of it.
#include <fstream>
#include <iterator>
#include <random>

int main(int count, char** arguments) {
  std::mt19937_64 random(1);
  for (int i = 2; i < count; ++i) {
    std::ifstream file(arguments[i], std::ios::binary);
    const std::string data{std::istreambuf_iterator<char>(file), {}};
    demand(data.size() > kTrailer, "a file of the corpus can be read");
    for (long copy = 0; copy <= std::atol(arguments[1]); ++copy) {
      std::string damaged = data;
      for (size_t at = data.size() - kTrailer; copy > 0 && at < data.size(); ++at) damaged[at] = static_cast<char>(random());
      for (uint64_t bytes = copy == 0 ? 0 : random() % 4; bytes > 0; --bytes) damaged[random() % std::min<size_t>(2000, data.size())] ^= static_cast<char>(1 << random() % 8);
      LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t*>(damaged.data()), damaged.size());
    }
  }
  std::puts("ok");
  return 0;
}
#endif
