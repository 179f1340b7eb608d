// SPDX-License-Identifier: Apache-2.0
#include "cpu/search/codebook_cache.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <list>
#include <mutex>
#include <vector>

#include "cpu/common/elements.h"
#include "cpu/common/simd.h"

namespace genperf {
namespace {

constexpr int64_t kRunBytes = 64 << 10;  // bytes per hash

struct Hash {
  uint64_t low = 0, high = 0;
  bool operator==(const Hash&) const = default;
};

struct Content {
  Hash hash;
  double largest = 0;
};

uint64_t mixed(uint64_t h) {
  h = (h ^ h >> 32) * 0xd6e8feb86659fd93u;
  h = (h ^ h >> 32) * 0xd6e8feb86659fd93u;
  return h ^ h >> 32;
}

// Two independent sums of products of the words with keys that change with every word. A change of
// the content goes undetected with probability 2^-128.
class Hasher {
 public:
  explicit Hasher(uint64_t seed) {
    uint64_t keys[2][kWords];
    for (int i = 0; i < kWords; ++i) {
      keys[0][i] = mixed(seed * 2 * kWords + i + 1);
      keys[1][i] = mixed(~(seed * 2 * kWords + kWords + i));
    }
    std::memcpy(key_, keys, sizeof(keys));
  }

  void add(const void* data, int64_t bytes) {
    const char* p = static_cast<const char*>(data);
    for (; bytes >= int64_t(sizeof(Words)); bytes -= sizeof(Words), p += sizeof(Words)) {
      Words words;
      std::memcpy(&words, p, sizeof(words));
      add(words);
    }
    if (bytes > 0) {
      Words words{};
      std::memcpy(&words, p, bytes);
      add(words);
    }
  }

  Hash hash() const {
    Hash result;
    for (int i = 0; i < kWords; ++i) {
      result.low = mixed(result.low ^ sum_[0][i]);
      result.high = mixed(result.high ^ sum_[1][i]);
    }
    return result;
  }

 private:
  static constexpr int kWords = kLanes / 2;
  using Words = SimdPairs::U;

  // Of each word, in one instruction. GCC knows none for (t & 0xffffffff) * (t >> 32), and on
  // aarch64 multiplies one word at a time.
  static Words product_of_halves(Words t) {
#if defined(__AVX512F__)
    return Words(_mm512_maskz_mul_epu32(0xff, __m512i(t), __m512i(t >> 32)));
#elif defined(__AVX2__)
    return Words(_mm256_mul_epu32(__m256i(t), __m256i(t >> 32)));
#elif defined(__SSE2__)
    return Words(_mm_mul_epu32(__m128i(t), __m128i(t >> 32)));
#elif defined(__aarch64__)
    return Words(vmull_u32(vmovn_u64(uint64x2_t(t)), vshrn_n_u64(uint64x2_t(t), 32)));
#else
    return (t & 0xffffffffu) * (t >> 32);
#endif
  }

  void add(Words words) {
    for (int i = 0; i < 2; ++i) {
      const Words t = words ^ key_[i];
      sum_[i] += words + product_of_halves(t);
      key_[i] += 0x9e3779b97f4a7c15u;
    }
  }

  Words key_[2], sum_[2] = {};
};

// Largest absolute value of the finite elements.
template <class C>
double largest_of(const C* p, int64_t count) {
  if constexpr (std::is_same_v<C, double>) {
    double largest = 0;
    for (int64_t i = 0; i < count; ++i)
      largest = std::isfinite(p[i]) ? std::max(largest, std::abs(p[i])) : largest;
    return largest;
  } else {
    UVec largest_bits{};  // the bits of magnitudes are ordered like the magnitudes
    const auto add = [&](Vec v) {
      const UVec magnitude = UVec(v) & 0x7fffffffu;
      const UVec finite = magnitude < 0x7f800000u ? magnitude : UVec{};
      largest_bits = finite > largest_bits ? finite : largest_bits;
    };
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes)
      add(load(p + i));
    if (i < count)
      add(read(p + i, 1, int(count - i)));
    float largest = 0;
    for (int lane = 0; lane < kLanes; ++lane)
      largest = std::max(largest, Vec(largest_bits)[lane]);
    return largest;
  }
}

template <class C>
Content content_of(const Codes<C>& codebook) {
  const int64_t row_bytes = codebook.dim * sizeof(C);
  const int64_t codes_per_run = std::max<int64_t>(1, kRunBytes / row_bytes);
  const int64_t runs = (codebook.count + codes_per_run - 1) / codes_per_run;
  std::vector<Content> found(runs);
  const bool gapless = codebook.code_stride == codebook.dim;
  torch::stable::parallel_for(0, runs, 1, [&](int64_t begin, int64_t end) {
    for (int64_t run = begin; run < end; ++run) {
      const int64_t first = run * codes_per_run;
      const int64_t last = std::min(first + codes_per_run, codebook.count);
      Hasher hasher(run);
      Content& content = found[run];
      const int64_t step = gapless ? last - first : 1;
      for (int64_t k = first; k < last; k += step) {
        const C* codes = codebook.data + k * codebook.code_stride;
        hasher.add(codes, step * row_bytes);
        content.largest = std::max(content.largest, largest_of(codes, step * codebook.dim));
      }
      content.hash = hasher.hash();
    }
  });
  Content total;
  Hasher hasher(~uint64_t{0});
  for (const Content& content : found) {
    hasher.add(&content.hash, sizeof(Hash));
    total.largest = std::max(total.largest, content.largest);
  }
  total.hash = hasher.hash();
  return total;
}

// The codebook's memory and layout. A packed panel depends on these and on the content.
struct Key {
  const void* data;
  int64_t count, dim, code_stride;
  size_t element;
  const void* type;  // distinguishes bfloat16 from float16
  bool cosine;
  Packing packing;
  bool operator==(const Key&) const = default;
};

struct Entry {
  Key key;
  Hash hash;
  std::shared_ptr<CodePanel> panel;
};

std::mutex mutex;
std::list<Entry> entries;  // most recently used first

template <class C>
constexpr char kType = 0;

}  // namespace

template <class C>
double largest_component(const Codes<C>& codebook) {
  return content_of(codebook).largest;
}

template <class C>
std::shared_ptr<const CodePanel> packed_codebook(const Codes<C>& codebook,
                                                 bool cosine,
                                                 Packing packing) {
  const Key key{codebook.data, codebook.count, codebook.dim, codebook.code_stride,
                sizeof(C),     &kType<C>,      cosine,       packing};
  const Content content = content_of(codebook);
  std::shared_ptr<CodePanel> panel;
  {
    const std::lock_guard lock(mutex);
    const auto entry =
        std::find_if(entries.begin(), entries.end(), [&](const Entry& e) { return e.key == key; });
    if (entry != entries.end()) {
      if (entry->hash == content.hash) {
        entries.splice(entries.begin(), entries, entry);
        return entry->panel;
      }
      entries.erase(entry);
    }
  }
  panel = std::make_shared<CodePanel>(
      prepare_panel(codebook, content.largest, codebook.count, cosine, packing));
  pack_panel(*panel, codebook, 0);
  const std::lock_guard lock(mutex);
  entries.push_front({key, content.hash, panel});
  int64_t bytes = 0;
  for (auto entry = entries.begin(); entry != entries.end();) {
    bytes += entry->panel->bytes();
    entry = bytes > kCacheBytes ? entries.erase(entry) : std::next(entry);
  }
  return panel;
}

void forget_codebooks() {
  const std::lock_guard lock(mutex);
  entries.clear();
}

#define INSTANTIATE(C)                                   \
  template double largest_component<C>(const Codes<C>&); \
  template std::shared_ptr<const CodePanel> packed_codebook<C>(const Codes<C>&, bool, Packing);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(torch::headeronly::BFloat16)
INSTANTIATE(torch::headeronly::Half)
#undef INSTANTIATE

}  // namespace genperf

STABLE_TORCH_LIBRARY_IMPL(genperf, CompositeExplicitAutograd, m) {
  m.impl("forget_codebooks", TORCH_BOX(&genperf::forget_codebooks));
}
