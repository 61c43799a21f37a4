// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// A model whose gradients are known: every token adds a known number to every element of the parameters that it meets. Over
/// a grid of R ranks, some of whose experts have replicas, and for the joined batch in double.
#pragma once

#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include <fastmoe/comm/threads.hpp>
#include <fastmoe/exec/host_executor.hpp>
#include <fastmoe/parallel/gradients.hpp>

#include "support/compare.hpp"
#include "support/random.hpp"

namespace scene {

namespace fm = fastmoe;
using fm::int64_t;
using fm::parameter_tag;

/// Ranks in rows of `columns`: a row is an expert-parallel group, a column a data-parallel one.
struct grid {
    int ranks, columns;

    int rows() const { return ranks / columns; }
    int column(int rank) const { return rank % columns; }
    int row(int rank) const { return rank / columns; }
    /// Who has the same experts.
    fm::threads data_of(const fm::threads& world) const { return world.split(column(world.rank()), world.rank()); }
};

/// All grids of so many ranks.
inline std::vector<grid> grids(int ranks)
{
    std::vector<grid> out;
    for (int columns = 1; columns <= ranks; ++columns)
        if (ranks % columns == 0) out.push_back({ranks, columns});
    return out;
}

/// Tokens of each rank, very unequal; the first and last of their ids in the joined batch.
struct tokens {
    std::vector<int64_t> cuts{0};

    tokens(support::random& rng, int ranks)
    {
        for (int r = 0; r < ranks; ++r)
            cuts.push_back(cuts.back() + (rng.coin(0.2) ? 0 : rng.coin(0.3) ? rng.integer(1, 3) : rng.integer(20, 60)));
        if (cuts.back() == 0) cuts.back() = 5;
    }
    explicit tokens(const std::vector<int64_t>& counts)
    {
        for (int64_t n : counts) cuts.push_back(cuts.back() + n);
    }
    int64_t all() const { return cuts.back(); }
    int64_t count(int rank) const { return cuts[rank + 1] - cuts[rank]; }
};

struct member {
    parameter_tag tag;
    fm::scalar_type type; ///< of the gradient
    int64_t count;
    int64_t id; ///< of a parameter of the whole model
};

/// What token t adds to element i of a parameter: a third of the tokens do not meet an expert.
inline double part(std::uint64_t seed, const member& m, int64_t t, int64_t i)
{
    support::random choice(seed ^ static_cast<std::uint64_t>(m.id * 1'000'003 + t));
    if (m.tag != parameter_tag::world && choice.coin(0.33)) return 0;
    support::random value(choice.bits() + static_cast<std::uint64_t>(i) * 0x2545f4914f6cdd1du);
    return value.uniform(-1, 1);
}

/// Sums over tokens [begin, end), and of the absolute values.
struct sums {
    std::vector<double> value, magnitude;
    sums(std::uint64_t seed, const member& m, int64_t begin, int64_t end) : value(m.count), magnitude(m.count)
    {
        for (int64_t t = begin; t < end; ++t)
            for (int64_t i = 0; i < m.count; ++i) {
                const double c = part(seed, m, t, i);
                value[i] += c;
                magnitude[i] += std::fabs(c);
            }
    }
};

/// The parameters of rank r: a few dense ones, and experts of its column that exist once a row, with replicas if there are
/// rows, without if there is one.
inline std::vector<member> members_of(std::uint64_t seed, grid g, int rank)
{
    support::random rng(seed + 77);
    std::vector<member> out;
    int64_t id = 0;
    const auto type = [&] { return static_cast<fm::scalar_type>(rng.integer(0, 3)); };
    for (int i = 0; i < 6; ++i) out.push_back({parameter_tag::world, type(), rng.integer(0, 40), id++});
    for (int column = 0; column < g.columns; ++column)
        for (int i = 0; i < 4; ++i) {
            const member m{g.rows() > 1 ? parameter_tag::data : parameter_tag::none, type(), rng.integer(1, 50), id++};
            if (column == g.column(rank)) out.push_back(m);
        }
    // In an order that mixes tags; the same on all ranks, which all have as many of each.
    const auto order = rng.permutation(static_cast<int64_t>(out.size()));
    std::vector<member> mixed;
    for (int i : order) mixed.push_back(out[i]);
    return mixed;
}

/// A rank's gradients before synchronization, rounded to their types.
class gradients {
public:
    gradients(std::uint64_t seed, grid g, const tokens& all, int rank, const std::vector<member>& list) : list_(list)
    {
        const int first = g.row(rank) * g.columns;
        for (const member& m : list_) {
            // An expert sees the tokens of its row, all else the rank's own.
            const bool dense = m.tag == parameter_tag::world;
            const sums own(seed, m, all.cuts[dense ? rank : first], all.cuts[dense ? rank + 1 : first + g.columns]);
            memory_.emplace_back(m.count * 8 + 8);
            fm::with_scalar_type(m.type, [&](auto zero) {
                using G = decltype(zero);
                auto* to = reinterpret_cast<G*>(memory_.back().data());
                for (int64_t i = 0; i < m.count; ++i) to[i] = support::narrow<G>(own.value[i]);
            });
        }
    }

    std::vector<fm::parameter_view> views()
    {
        std::vector<fm::parameter_view> out;
        for (std::size_t i = 0; i < list_.size(); ++i)
            out.push_back({list_[i].tag, list_[i].type, list_[i].type, list_[i].count, nullptr, memory_[i].data()});
        return out;
    }
    std::vector<double> widened(std::size_t i) const
    {
        std::vector<double> out;
        fm::with_scalar_type(list_[i].type, [&](auto zero) {
            using G = decltype(zero);
            const auto* from = reinterpret_cast<const G*>(memory_[i].data());
            for (int64_t j = 0; j < list_[i].count; ++j) out.push_back(static_cast<double>(from[j]));
        });
        return out;
    }
    const std::vector<std::vector<std::byte>>& bytes() const { return memory_; }
    const std::vector<member>& list() const { return list_; }

private:
    std::vector<member> list_;
    std::vector<std::vector<std::byte>> memory_;
};

/// Every gradient is that of the joined batch, within what its own roundings and sums may cost.
inline std::string compare(std::uint64_t seed, grid g, const tokens& all, const gradients& after, double divisor = 1)
{
    std::string out;
    for (std::size_t p = 0; p < after.list().size(); ++p) {
        const member& m = after.list()[p];
        sums joined(seed, m, 0, all.all());
        for (auto* v : {&joined.value, &joined.magnitude})
            for (double& x : *v) x /= divisor;
        fm::with_scalar_type(m.type, [&](auto zero) {
            using G = decltype(zero);
            std::vector<G> got;
            for (double v : after.widened(p)) got.push_back(support::narrow<G>(v));
            // One rounding on each rank, one of the sum, one of the division.
            const support::tolerance tol{.length = double(g.ranks + 2), .roundings = double(g.ranks + 2),
                                         .magnitudes = &joined.magnitude};
            const auto verdict = support::close(got, joined.value, tol);
            if (!verdict) out += "parameter " + std::to_string(m.id) + ": " + verdict.text + "; ";
        });
    }
    return out;
}

} // namespace scene
