// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// A router as one would write it first: std::partial_sort of every token's experts, softmax over the chosen, a push_back
/// into the list of each chosen expert. One thread.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

namespace baselines {

class partial_sort_router {
public:
    partial_sort_router(std::int64_t experts, std::int64_t k)
        : k_(k), order_(static_cast<std::size_t>(experts)), lists_(static_cast<std::size_t>(experts))
    {
    }

    /// Lists keep their memory from call to call.
    /// @param logits   (T,E)
    /// @param chosen   overwritten, best first                  // (T,K)
    /// @param weights  overwritten: softmax over the chosen     // (T,K)
    void operator()(std::int64_t tokens, const float* logits, std::int32_t* chosen, float* weights)
    {
        const auto experts = static_cast<std::int64_t>(lists_.size());
        for (auto& list : lists_) list.clear();
        for (std::int64_t t = 0; t < tokens; ++t) {
            const float* l = logits + t * experts;
            std::iota(order_.begin(), order_.end(), 0);
            std::partial_sort(order_.begin(), order_.begin() + k_, order_.end(), [l](std::int32_t a, std::int32_t b) {
                return l[a] > l[b] || (l[a] == l[b] && a < b);
            });
            float sum = 0;
            for (std::int64_t j = 0; j < k_; ++j) sum += weights[t * k_ + j] = std::exp(l[order_[j]] - l[order_[0]]);
            for (std::int64_t j = 0; j < k_; ++j) {
                weights[t * k_ + j] /= sum;
                chosen[t * k_ + j] = order_[j];
                lists_[order_[j]].push_back(static_cast<std::int32_t>(t * k_ + j));
            }
        }
    }

    /// The choices of each expert, in order.
    const std::vector<std::vector<std::int32_t>>& lists() const { return lists_; }

private:
    std::int64_t k_;
    std::vector<std::int32_t> order_;              // (E)
    std::vector<std::vector<std::int32_t>> lists_; // (E)
};

} // namespace baselines
