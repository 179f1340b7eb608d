// SPDX-License-Identifier: Apache-2.0
#include "cpu/search/code_tree.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/common/elements.h"

namespace genperf {
namespace {

constexpr int64_t kSample = 32;            // codes that tell where a part is widest
constexpr int64_t kSequentialSplits = 16;  // parts from which on threads split alone

// A code with the component that it is sorted by: bits in the order of floats, then its index.
using Item = uint64_t;

Item item_of(float value, uint32_t code) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  bits ^= uint32_t(int32_t(bits) >> 31) | 0x80000000u;
  return Item{bits} << 32 | code;
}

// The box of codes that were added.
class Box {
 public:
  Box() {
    std::fill_n(lower_, kParts, Part{} + INFINITY);
    std::fill_n(upper_, kParts, Part{} - INFINITY);
  }

  [[gnu::always_inline]] void add(const float* row) {
#pragma GCC unroll 2
    for (int i = 0; i < kParts; ++i) {
      Part value;
      std::memcpy(&value, row + i * kWidth, sizeof(value));
      lower_[i] = value < lower_[i] ? value : lower_[i];
      upper_[i] = value > upper_[i] ? value : upper_[i];
    }
  }

  float lower(int64_t d) const { return lower_[d / kWidth][d % kWidth]; }
  float upper(int64_t d) const { return upper_[d / kWidth][d % kWidth]; }
  float width(int64_t d) const { return upper(d) - lower(d); }

 private:
  // GCC compares vectors that are wider than those of the processor one number at a time.
  static constexpr int kWidth = std::min<int>(kLanes, kMaxTreeDim), kParts = kMaxTreeDim / kWidth;
  using Part = float __attribute__((vector_size(kWidth * sizeof(float))));

  Part lower_[kParts], upper_[kParts];
};

// How many of the items are smaller.
inline int rank_of(Item item, const Item* items, int64_t count) {
  int rank = 0;
  for (int64_t i = 0; i < count; ++i)
    rank += items[i] < item;
  return rank;
}

// Moves the items that `is_left` selects before the others, and returns how many they are. There is
// no branch that depends on the items.
template <class F>
int64_t partition(Item* items, int64_t count, Item* scratch, const F& is_left) {
  int64_t left = 0, right = count - 1;
  for (int64_t i = 0; i < count; ++i) {
    const Item item = items[i];
    const bool goes_left = is_left(item);
    scratch[left] = item;
    scratch[right] = item;
    left += goes_left;
    right -= !goes_left;
  }
  std::copy_n(scratch, count, items);
  return left;
}

// Moves the `rank` smallest of the items, which differ, before the others: std::nth_element, whose
// branches take four times as long.
void select(Item* items, int64_t rank, int64_t count, Item* scratch) {
  constexpr int64_t kPivots = 16, kSmall = 32;
  constexpr int kMostPasses = 16;
  for (int pass = 0; count > kSmall; ++pass) {
    Item pivots[kPivots], pivot = 0;
    for (int64_t i = 0; i < kPivots; ++i)
      pivots[i] = items[i * count / kPivots];
    for (const Item item : pivots)
      if (rank_of(item, pivots, kPivots) == rank * kPivots / count)
        pivot = item;
    const int64_t left = partition(items, count, scratch, [=](Item item) { return item < pivot; });
    if (left == 0 || pass == kMostPasses)  // the pivots are not like the items
      return std::nth_element(items, items + rank, items + count);
    if (left == rank)
      return;
    if (rank < left) {
      count = left;
    } else {
      items += left;
      rank -= left;
      count -= left;
    }
  }
  Item copy[kSmall];
  std::copy_n(items, count, copy);
  partition(items, count, scratch, [&](Item item) { return rank_of(item, copy, count) < rank; });
}

struct Part {
  Item* begin;
  Item* end;
  int64_t size() const { return end - begin; }
};

// Splits codes at their median along the component in which they are widest.
class Splitter {
 public:
  // `scratch` has room for the items, which begin at `items`.
  Splitter(const float* rows, int64_t dim, const Item* items, Item* scratch)
      : rows_(rows), dim_(dim), items_(items), scratch_(scratch) {}

  // The first of the second part, which begins a leaf, or a branch if there are several.
  Item* split(Part part) const {
    const int64_t size = part.size(), unit = size > kLeaf * kBranch ? kLeaf * kBranch : kLeaf;
    const int64_t d = widest(part);
    for (Item* item = part.begin; item < part.end; ++item) {
      const uint32_t code = uint32_t(*item);
      *item = item_of(rows_[code * kMaxTreeDim + d], code);
    }
    Item* const middle = part.begin + ((size + unit - 1) / unit + 1) / 2 * unit;
    select(part.begin, middle - part.begin, size, scratch_ + (part.begin - items_));
    return middle;
  }

  void split_to_leaves(Part part) const {
    if (part.size() <= kLeaf)
      return;
    Item* const middle = split(part);
    split_to_leaves({part.begin, middle});
    split_to_leaves({middle, part.end});
  }

 private:
  int64_t widest(Part part) const {
    const int64_t step = (part.size() + kSample - 1) / kSample;
    Box box;
    for (int64_t i = 0; i < part.size(); i += step)
      box.add(rows_ + int64_t(uint32_t(part.begin[i])) * kMaxTreeDim);
    int64_t widest = 0;
    for (int64_t d = 1; d < dim_; ++d)
      if (box.width(d) > box.width(widest))
        widest = d;
    return widest;
  }

  const float* rows_;  // [K, kMaxTreeDim]
  const int64_t dim_;
  const Item* items_;
  Item* const scratch_;
};

}  // namespace

template <class C>
CodeTree::CodeTree(const Codes<C>& codebook) : dim_(codebook.dim) {
  const int64_t dim = dim_;
  Buffer<float> rows(codebook.count * kMaxTreeDim);
  std::vector<Item> items;
  items.reserve(codebook.count);
  for (int64_t k = 0; k < codebook.count; ++k) {
    const C* code = codebook.data + k * codebook.code_stride;
    float* row = rows.get() + k * kMaxTreeDim;
    bool finite = true;
    for (int64_t d = 0; d < kMaxTreeDim; ++d) {
      row[d] = d < dim ? float(code[d * codebook.stride]) : 0;
      finite &= std::isfinite(row[d]);
    }
    if (finite)
      items.push_back(Item(k));
  }
  const int64_t count = int64_t(items.size());
  leaves_ = (count + kLeaf - 1) / kLeaf;
  branches_ = (leaves_ + kBranch - 1) / kBranch;
  branch_groups_ = (branches_ + kBranch - 1) / kBranch;
  codes_ = Buffer<int32_t>(leaves_ * kLeaf);
  values_ = Buffer<float>(leaves_ * dim * kLeaf);
  leaf_boxes_ = Buffer<float>(branches_ * 2 * dim * kBranch);
  branch_boxes_ = Buffer<float>(branch_groups_ * 2 * dim * kBranch);

  const Buffer<Item> scratch(count);
  const Splitter splitter(rows.get(), dim, items.data(), scratch.get());
  std::vector<Part> parts{{items.data(), items.data() + count}};
  while (int64_t(parts.size()) < kSequentialSplits && parts[0].size() > kLeaf) {
    std::vector<Part> halves(2 * parts.size());
    torch::stable::parallel_for(0, int64_t(parts.size()), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const Part part = parts[i];
        Item* const middle = part.size() > kLeaf ? splitter.split(part) : part.end;
        halves[2 * i] = {part.begin, middle};
        halves[2 * i + 1] = {middle, part.end};
      }
    });
    parts = std::move(halves);
  }
  torch::stable::parallel_for(0, int64_t(parts.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      splitter.split_to_leaves(parts[i]);
  });

  // Padding lies at infinity.
  std::fill_n(branch_boxes_.get(), branch_groups_ * 2 * dim * kBranch, INFINITY);
  torch::stable::parallel_for(0, branches_, 1, [&](int64_t begin, int64_t end) {
    for (int64_t branch = begin; branch < end; ++branch) {
      float* const boxes = leaf_boxes_.get() + branch * 2 * dim * kBranch;
      float* const outer =
          branch_boxes_.get() + branch / kBranch * 2 * dim * kBranch + branch % kBranch;
      std::fill_n(boxes, 2 * dim * kBranch, INFINITY);
      for (int64_t d = 0; d < dim; ++d)
        outer[(dim + d) * kBranch] = -INFINITY;
      const int64_t first = branch * kBranch, last = std::min(first + kBranch, leaves_);
      for (int64_t leaf = first; leaf < last; ++leaf) {
        const int size = int(std::min<int64_t>(kLeaf, count - leaf * kLeaf));
        float* const values = values_.get() + leaf * dim * kLeaf;
        for (int i = 0; i < kLeaf; ++i)
          codes_[leaf * kLeaf + i] = i < size ? int32_t(uint32_t(items[leaf * kLeaf + i])) : -1;
        Box box;
        std::fill_n(values, dim * kLeaf, INFINITY);
        for (int i = 0; i < size; ++i) {
          const float* row = rows.get() + int64_t(codes_[leaf * kLeaf + i]) * kMaxTreeDim;
          box.add(row);
          for (int64_t d = 0; d < dim; ++d)
            values[d * kLeaf + i] = row[d];
        }
        for (int64_t d = 0; d < dim; ++d) {
          const float lower = box.lower(d), upper = box.upper(d);
          boxes[d * kBranch + leaf - first] = lower;
          boxes[(dim + d) * kBranch + leaf - first] = upper;
          outer[d * kBranch] = std::min(outer[d * kBranch], lower);
          outer[(dim + d) * kBranch] = std::max(outer[(dim + d) * kBranch], upper);
        }
      }
    }
  });
}

#define INSTANTIATE(C) template CodeTree::CodeTree(const Codes<C>&);
INSTANTIATE(float)
INSTANTIATE(BFloat16)
INSTANTIATE(Half)
#undef INSTANTIATE

}  // namespace genperf
