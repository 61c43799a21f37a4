// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// How tokens spread over ranks: counted from choices, drawn at random, and expected.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cost_model.hpp"

namespace scaling {

/// Counts what each rank sends to each other, for blocks of E / R experts a rank.
class load_counter {
public:
    load_counter(int ranks, std::int64_t experts)
        : ranks_(ranks), here_(experts / ranks), choices_(static_cast<std::size_t>(ranks)), in_(choices_), out_(choices_),
          in_choices_(choices_), out_choices_(choices_), seen_(static_cast<std::size_t>(ranks), -1)
    {
    }

    /// A token of `rank` and its experts; -1 is none.
    template <class Id>
    void add(int rank, const Id* experts, std::int64_t k)
    {
        ++token_;
        for (std::int64_t i = 0; i < k; ++i) {
            if (experts[i] < 0) continue;
            const auto to = static_cast<std::size_t>(experts[i] / here_), from = static_cast<std::size_t>(rank);
            ++choices_[to];
            if (to == from) continue;
            ++in_choices_[to], ++out_choices_[from];
            if (seen_[to] == token_) continue;
            seen_[to] = token_;
            ++in_[to], ++out_[from];
        }
    }

    load busiest() const
    {
        const auto most = [](const std::vector<std::int64_t>& a, const std::vector<std::int64_t>& b) {
            return static_cast<double>(std::max(*std::max_element(a.begin(), a.end()), *std::max_element(b.begin(), b.end())));
        };
        load l{ranks_, most(choices_, choices_), 0, most(in_, out_), most(in_choices_, out_choices_)};
        l.choices_an_expert = l.choices / static_cast<double>(here_);
        return l;
    }
    /// Tokens that crossed, a token once for each rank, of all ranks.
    std::int64_t crossings() const
    {
        std::int64_t n = 0;
        for (const auto c : out_) n += c;
        return n;
    }

private:
    int ranks_;
    std::int64_t here_, token_ = 0;
    std::vector<std::int64_t> choices_, in_, out_, in_choices_, out_choices_, seen_;
};

/// Every token chooses k different experts of all, each with the same chance.
inline load_counter draw_choices(const shape& s, int ranks, std::uint64_t seed)
{
    load_counter out(ranks, s.experts);
    std::uint64_t state = seed;
    const auto next = [&state] { // splitmix64
        std::uint64_t z = (state += 0x9e3779b97f4a7c15u);
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
        return z ^ (z >> 31);
    };
    std::vector<std::int64_t> chosen(static_cast<std::size_t>(s.k));
    for (int r = 0; r < ranks; ++r)
        for (std::int64_t t = 0; t < s.tokens; ++t) {
            for (std::size_t i = 0; i < chosen.size(); ++i)
                do chosen[i] = static_cast<std::int64_t>(next() % static_cast<std::uint64_t>(s.experts));
                while (std::find(chosen.begin(), chosen.begin() + static_cast<std::ptrdiff_t>(i), chosen[i]) !=
                       chosen.begin() + static_cast<std::ptrdiff_t>(i));
            out.add(r, chosen.data(), s.k);
        }
    return out;
}

/// How many other ranks a token goes to, if k different experts are chosen with the same chance: each of R - 1 ranks with
/// E / R experts is missed with the chance that all k are among the others, C(E - E/R, k) / C(E, k).
inline double expected_crossings(int ranks, std::int64_t experts, std::int64_t k)
{
    const auto all = static_cast<double>(experts), here = all / ranks;
    double missed = 1;
    for (std::int64_t i = 0; i < k; ++i) missed *= std::max(0.0, all - here - static_cast<double>(i)) / (all - static_cast<double>(i));
    return (ranks - 1) * (1 - missed);
}

} // namespace scaling
