// Element i of a lies at byte a0 + sum_k i_k * s_k, element j of b at b0 + sum_k j_k * t_k, with each index less than
// its size. They overlap if the two numbers differ by less than an element: a linear equation in bounded integers.
// Counting b's indices from the far end makes all coefficients positive. The search goes from the largest coefficient
// to the smallest and prunes by what the remaining terms can reach. (The problem, and why it is hard in general:
// NumPy's may_share_memory.)
//
// Two elements of one tensor coincide if the differences of their indices, not all 0, add up to an offset of 0: the
// search fixes a dimension whose difference is at least 1, and the others' differences may have either sign.
#include "binding/overlap.h"

#include <algorithm>
#include <vector>

namespace masked_softmax {
namespace {

struct Term {
  int64_t coefficient;  // bytes
  int64_t largest;      // the index runs from 0 to here
};

int64_t append_terms(const at::Tensor& tensor, std::vector<Term>& terms) {
  int64_t span = 0;
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    const Term term{tensor.stride(d) * tensor.element_size(), tensor.size(d) - 1};
    if (term.coefficient != 0 && term.largest != 0) {
      terms.push_back(term);
      span += term.coefficient * term.largest;
    }
  }
  return span;
}

class Search {
 public:
  explicit Search(std::vector<Term> terms) : terms_(std::move(terms)), reach_(terms_.size() + 1, 0) {
    std::sort(terms_.begin(), terms_.end(), [](const Term& a, const Term& b) { return a.coefficient > b.coefficient; });
    for (size_t k = terms_.size(); k-- > 0;) {
      reach_[k] = reach_[k + 1] + terms_[k].coefficient * terms_[k].largest;
    }
  }

  // Whether the terms from k on can sum to a number in [low, high].
  bool reaches(int64_t low, int64_t high, size_t k = 0) {
    if (high < 0 || low > reach_[k]) {
      return false;
    }
    if (low <= 0) {
      return true;
    }
    if (--budget_ < 0) {
      return true;
    }
    const Term& term = terms_[k];
    const int64_t missing = low - reach_[k + 1];
    const int64_t first = missing <= 0 ? 0 : (missing + term.coefficient - 1) / term.coefficient;
    const int64_t last = std::min(term.largest, high / term.coefficient);
    for (int64_t index = first; index <= last; ++index) {
      if (reaches(low - index * term.coefficient, high - index * term.coefficient, k + 1)) {
        return true;
      }
    }
    return false;
  }

 private:
  std::vector<Term> terms_;
  std::vector<int64_t> reach_;
  int64_t budget_ = 100000;
};

}  // namespace

bool shares_elements(const at::Tensor& a, const at::Tensor& b) {
  if (a.numel() == 0 || b.numel() == 0) {
    return false;
  }
  std::vector<Term> terms;
  append_terms(a, terms);
  const int64_t b_span = append_terms(b, terms);
  const int64_t distance =
      static_cast<const char*>(b.const_data_ptr()) + b_span - static_cast<const char*>(a.const_data_ptr());
  return Search(std::move(terms)).reaches(distance - a.element_size() + 1, distance + b.element_size() - 1);
}

bool shares_own_elements(const at::Tensor& tensor) {
  if (tensor.numel() == 0) {
    return false;
  }
  for (int64_t differing = 0; differing < tensor.dim(); ++differing) {
    if (tensor.size(differing) == 1) {
      continue;
    }
    if (tensor.stride(differing) == 0) {
      return true;
    }
    std::vector<Term> terms;
    int64_t distance = 0;
    for (int64_t d = 0; d < tensor.dim(); ++d) {
      const int64_t largest = tensor.size(d) - 1;
      const int64_t stride = tensor.stride(d);
      if (stride != 0 && largest != 0) {
        distance += stride * (d == differing ? -1 : largest);
        terms.push_back({stride, d == differing ? largest - 1 : 2 * largest});
      }
    }
    if (Search(std::move(terms)).reaches(distance, distance)) {
      return true;
    }
  }
  return false;
}

}  // namespace masked_softmax
