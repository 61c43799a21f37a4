// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// A random routing with its plan, in the memory of an executor: what the tests of transfer and experts start from.
#pragma once

#include <vector>

#include <fastmoe/routing/plan.hpp>

#include "executors.hpp"
#include "scratch.hpp"

namespace support {

/// T tokens with up to K choices among E experts each. Experts in `idle` are never chosen.
template <class Executor, class T>
class routed {
public:
    using real = fastmoe::accumulate_t<T>;

    struct shape {
        std::int64_t tokens, experts, k;
        bool ragged = false;
        std::int64_t alignment = 1;
        double dropped = 0.1;
        bool skewed = false; ///< all tokens choose expert 0 first
    };

    routed(Executor& ex, random& r, const shape& s) : ids_(), memory_(ex, 0)
    {
        first_.push_back(0);
        for (std::int64_t t = 0; t < s.tokens; ++t) {
            auto order = r.permutation(s.experts);
            if (s.skewed)
                for (auto& e : order)
                    if (e == 0) std::swap(e, order[0]);
            const std::int64_t n = s.ragged ? r.integer(0, s.k) : s.k;
            for (std::int64_t j = 0; j < n; ++j) {
                const bool drop = r.coin(s.dropped);
                ids_.push_back(drop ? -1 : order[j]);
                weights_.push_back(drop ? real(0) : real(static_cast<float>(r.uniform(0.05, 1))));
            }
            first_.push_back(static_cast<std::int32_t>(ids_.size()));
        }
        const auto choices = static_cast<std::int64_t>(ids_.size());
        fastmoe::arena measure;
        build(ex, s, choices, measure);
        memory_ = fastmoe::buffer<std::byte, Executor>(ex, measure.bytes());
        fastmoe::arena memory(memory_.view());
        build(ex, s, choices, memory);
        ex.synchronize(); // tests read the plan
    }

    fastmoe::routing<real> route;
    fastmoe::plan plan;
    const std::vector<std::int32_t>& ids() const { return ids_; }
    const std::vector<std::int32_t>& first() const { return first_; }
    const std::vector<real>& weights() const { return weights_; }

private:
    void build(Executor& ex, const shape& s, std::int64_t choices, fastmoe::arena& memory)
    {
        const auto experts = memory.vector<std::int32_t>(choices);
        const auto weights = memory.vector<real>(choices);
        const auto first = memory.vector<std::int32_t>(s.tokens + 1);
        if (!memory.measuring()) {
            for (std::int64_t c = 0; c < choices; ++c) experts(c) = ids_[c], weights(c) = weights_[c];
            for (std::int64_t t = 0; t <= s.tokens; ++t) first(t) = first_[t];
        }
        route = {s.tokens, s.experts, s.ragged ? 0 : s.k, experts, weights, {}};
        if (s.ragged) route.first = first;
        plan = reserve_plan(memory, s.tokens, choices, s.experts, s.alignment);
        make_plan(ex, route, plan, memory);
    }

    std::vector<std::int32_t> ids_, first_;
    std::vector<real> weights_;
    fastmoe::buffer<std::byte, Executor> memory_;
};

} // namespace support
