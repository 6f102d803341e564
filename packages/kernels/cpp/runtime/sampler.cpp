#include "runtime/sampler.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace wf {
namespace {

// SplitMix64 (Steele, Lea and Flood, 2014): the number behind a counter.
uint64_t mixed(uint64_t counter) {
  uint64_t z = counter * 0x9e3779b97f4a7c15ULL + 0x9e3779b97f4a7c15ULL;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ULL;
  z = (z ^ z >> 27) * 0x94d049bb133111ebULL;
  return z ^ z >> 31;
}

double uniform(uint64_t seed, uint64_t index) { return static_cast<double>(mixed(mixed(seed) ^ mixed(~index)) >> 11) * 0x1p-53; }

}  // namespace

Result<int64_t> sample(const float* logits, int64_t count, const SamplerOptions& options, uint64_t index) {
  if (!(options.temperature >= 0 && std::isfinite(options.temperature))) {
    return Error{Kind::argument, "the temperature must be a number of at least 0"};
  }
  if (options.top_k < 0) return Error{Kind::argument, "top_k must be at least 0, which stands for all tokens"};
  if (!(options.top_p > 0 && options.top_p <= 1)) return Error{Kind::argument, "top_p must be above 0 and at most 1"};
  if (count < 1) return Error{Kind::argument, "there are no logits to choose from"};
  if (std::any_of(logits, logits + count, [](float logit) { return std::isnan(logit); })) {
    return Error{Kind::number, "a logit is no number"};
  }
  const float largest = *std::max_element(logits, logits + count);
  if (options.temperature == 0 || !std::isfinite(largest)) return std::max_element(logits, logits + count) - logits;

  // Candidates, in an order that depends on the logits alone.
  std::vector<int64_t> order(static_cast<size_t>(count));
  std::iota(order.begin(), order.end(), 0);
  const auto before = [&](int64_t a, int64_t b) { return logits[a] != logits[b] ? logits[a] > logits[b] : a < b; };
  if (options.top_k > 0 && options.top_k < count) {
    std::nth_element(order.begin(), order.begin() + options.top_k - 1, order.end(), before);
    order.resize(static_cast<size_t>(options.top_k));
  }
  if (options.top_p < 1 || options.top_k > 0) std::sort(order.begin(), order.end(), before);
  std::vector<double> until(order.size());  // cumulated weights
  double sum = 0;
  for (size_t i = 0; i < order.size(); ++i) {
    sum += std::exp((static_cast<double>(logits[order[i]]) - static_cast<double>(largest)) / static_cast<double>(options.temperature));
    until[i] = sum;
  }
  if (options.top_p < 1) {
    const auto last = std::lower_bound(until.begin(), until.end(), static_cast<double>(options.top_p) * sum);
    if (last != until.end()) until.erase(last + 1, until.end());
  }
  const auto drawn = std::upper_bound(until.begin(), until.end(), uniform(options.seed, index) * until.back());
  return order[static_cast<size_t>(std::min<int64_t>(drawn - until.begin(), static_cast<int64_t>(until.size()) - 1))];
}

std::optional<Error> log_probabilities(float* logits, int64_t rows, int64_t count) {
  float* end = logits + rows * count;
  if (!std::all_of(logits, end, [](float logit) { return std::isfinite(logit); })) {
    return Error{Kind::number, "a logit is not finite"};
  }
  for (float* row = logits; row < end; row += count) {
    const auto largest = static_cast<double>(*std::max_element(row, row + count));
    double sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += std::exp(static_cast<double>(row[i]) - largest);
    const double shift = largest + std::log(sum);
    for (int64_t i = 0; i < count; ++i) row[i] = static_cast<float>(static_cast<double>(row[i]) - shift);
  }
  return {};
}

}  // namespace wf
