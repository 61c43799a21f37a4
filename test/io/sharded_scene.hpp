// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// A model for checkpoint tests: its every element is known, and ranks hold it by any placement, whole or in slices.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include <fastmoe/comm/threads.hpp>
#include <fastmoe/exec/host_executor.hpp>
#include <fastmoe/io/sharded_checkpoint.hpp>

#include "support/random.hpp"

namespace scene {

namespace fm = fastmoe;
namespace io = fastmoe::io;
using fm::int64_t;

inline constexpr int64_t experts = 6, width = 5, hidden = 12;

/// What stands at element i of an expert's tensor, or of a dense one (expert -1), in a model of a generation.
inline float element(int generation, int tensor, int64_t expert, int64_t i)
{
    support::random r(static_cast<std::uint64_t>((generation * 31 + tensor) * 1'000'003 + expert * 7919 + i));
    return static_cast<float>(r.uniform(-1, 1));
}

/// Which experts a rank has, and the part of their hidden width.
struct holding {
    std::vector<int32_t> ids;
    int64_t begin = 0, end = hidden;
    bool cut = false; ///< whether it is called a slice even if it is all

    int64_t extent() const { return end - begin; }
};

/// Experts dealt to R ranks at random, some ranks with none; with more cuts than one, an expert's hidden width is cut at random
/// places over as many ranks.
inline std::vector<holding> placement(support::random& rng, int ranks, int cuts)
{
    std::vector<holding> out(ranks);
    const int groups = ranks / cuts;
    for (int g = 0; g < groups; ++g) {
        std::vector<int64_t> at{0, hidden};
        // At an end now and then: a rank whose slice is empty, and one that has all.
        for (int i = 1; i < cuts; ++i) at.push_back(rng.coin(0.2) ? 0 : rng.coin(0.2) ? hidden : rng.integer(1, hidden - 1));
        std::sort(at.begin(), at.end());
        for (int i = 0; i < cuts; ++i) out[g * cuts + i] = {{}, at[i], at[i + 1], rng.coin()};
    }
    for (int32_t e : rng.permutation(experts)) {
        const auto g = static_cast<int>(rng.integer(0, groups - 1));
        for (int i = 0; i < cuts; ++i) out[g * cuts + i].ids.push_back(e);
    }
    return out;
}

/// A rank's memory: a gate, and of its experts up (H,D) and down (D,H) with a moment each; down and its moment are bfloat16
/// and double. `up` is cut along axis 0, `down` along axis 1.
class rank_memory {
public:
    explicit rank_memory(holding h) : h_(std::move(h))
    {
        const auto local = static_cast<int64_t>(h_.ids.size());
        gate_.assign(experts * width, -9.f);
        up_.assign(local * h_.extent() * width, -9.f);
        up_m_ = up_;
        down_.assign(up_.size(), fm::bfloat16(-9.f));
        down_v_.assign(up_.size(), -9.0);
    }

    std::vector<io::checkpoint_entry> entries()
    {
        const auto local = static_cast<int64_t>(h_.ids.size());
        const auto ids = fm::as_vector(h_.ids);
        const bool cut = h_.cut || h_.extent() < hidden;
        const io::expert_slice up{0, h_.begin, cut ? hidden : -1}, down{1, h_.begin, cut ? hidden : -1};
        const auto cube = [&](auto& v, int64_t rows, int64_t cols) {
            return fm::tensor_view<std::remove_reference_t<decltype(v[0])>, 3>(v.data(), local, rows, cols);
        };
        return {io::replicated_entry("gate", fm::as_matrix(gate_, experts, width)),
                io::replicated_entry("steps", fm::tensor_view<int64_t, 0>(&steps_)),
                io::expert_entry("up", cube(up_, h_.extent(), width), ids, up),
                io::expert_entry("up/m", cube(up_m_, h_.extent(), width), ids, up),
                io::expert_entry("down", cube(down_, width, h_.extent()), ids, down),
                io::expert_entry("down/v", cube(down_v_, width, h_.extent()), ids, down)};
    }

    /// f(element, tensor, expert, place in the whole tensor) for every element.
    template <class F>
    void visit(const F& f)
    {
        for (int64_t i = 0; i < experts * width; ++i) f(gate_[i], 0, int64_t{-1}, i);
        for (std::size_t e = 0; e < h_.ids.size(); ++e)
            for (int64_t h = h_.begin; h < h_.end; ++h)
                for (int64_t d = 0; d < width; ++d) {
                    const int64_t block = static_cast<int64_t>(e) * h_.extent() * width;
                    const int64_t up = block + (h - h_.begin) * width + d, down = block + d * h_.extent() + h - h_.begin;
                    const int64_t whole_up = h * width + d, whole_down = d * hidden + h;
                    f(up_[up], 1, int64_t{h_.ids[e]}, whole_up);
                    f(up_m_[up], 2, int64_t{h_.ids[e]}, whole_up);
                    f(down_[down], 3, int64_t{h_.ids[e]}, whole_down);
                    f(down_v_[down], 4, int64_t{h_.ids[e]}, whole_down);
                }
    }
    void fill(int generation)
    {
        steps_ = generation;
        visit([&](auto& v, int tensor, int64_t e, int64_t i) {
            v = static_cast<std::remove_reference_t<decltype(v)>>(element(generation, tensor, e, i));
        });
    }
    /// How many elements are not those of a generation.
    int64_t wrong(int generation)
    {
        int64_t n = steps_ != generation;
        visit([&](auto& v, int tensor, int64_t e, int64_t i) {
            const auto wanted = static_cast<std::remove_reference_t<decltype(v)>>(element(generation, tensor, e, i));
            n += std::memcmp(&v, &wanted, sizeof v) != 0;
        });
        return n;
    }

private:
    holding h_;
    int64_t steps_ = -9;
    std::vector<float> gate_, up_, up_m_;
    std::vector<fm::bfloat16> down_;
    std::vector<double> down_v_;
};

/// All ranks save a generation.
inline void save(const std::string& path, const std::vector<holding>& ranks, int generation)
{
    fm::run_ranks(static_cast<int>(ranks.size()), [&](const fm::threads& c) {
        fm::host_executor ex({.threads = 1});
        rank_memory own(ranks[c.rank()]);
        own.fill(generation);
        io::save_sharded_checkpoint(ex, path, own.entries(), c,
                                    {.step = generation, .text = "generation " + std::to_string(generation)});
    });
}

/// Loads on all ranks; how many elements are not those of the generation that the checkpoint says it is, which comes back.
inline int64_t load(const std::string& path, const std::vector<holding>& ranks, int64_t& generation)
{
    int64_t wrong = 0;
    for (const holding& h : ranks) {
        io::sharded_checkpoint from(path);
        generation = from.step();
        rank_memory own(h);
        own.visit([](auto& v, int, int64_t, int64_t) { v = static_cast<std::remove_reference_t<decltype(v)>>(-9.f); });
        from.load(own.entries());
        wrong += own.wrong(static_cast<int>(from.step()));
        wrong += from.text() != "generation " + std::to_string(from.step());
    }
    return wrong;
}

} // namespace scene
