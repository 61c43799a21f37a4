// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// R ranks as groups that share the experts, and replicas of these groups: expert parallelism times data parallelism.
#pragma once

#include <fastmoe/parallel/expert_parallel.hpp>

#include "train_gpt/any_ranks.hpp"
#include "train_gpt/chosen_exchange.hpp"
#include "train_gpt/ranks.hpp"

namespace train_gpt {

/// A rank of R: member rank mod M of group rank / M. The r-th members of all groups hold the same experts.
template <class Executor>
class rank_team {
    using ranks_type = any_ranks<Executor>;

public:
    static constexpr bool many = true;
    using parallel_type = fm::expert_parallel<ranks_type, ranks_type, fm::block_placement, chosen_exchange>;

    /// Collective: two splits of the world.
    rank_team(const ranks_type& world, const rank_options& o)
        : world_(world),
          options_((o.check(world.size()), o)),
          experts_(o.expert_parallel == 0 ? world.size() : o.expert_parallel),
          group_(world.split(world.rank() / experts_, world.rank())),
          data_(world.split(world.rank() % experts_, world.rank()))
    {
    }

    int rank() const noexcept { return world_.rank(); }
    int size() const noexcept { return world_.size(); }
    /// Whether this rank prints, logs and reports.
    bool speaks() const noexcept { return rank() == 0; }
    int expert_parallel() const noexcept { return experts_; }

    const ranks_type& world() const noexcept { return world_; }
    const ranks_type& group() const noexcept { return group_; }
    /// The ranks that hold the same experts.
    const ranks_type& data() const noexcept { return data_; }
    /// What its layers take for their communicator.
    /// @param tokens  the most that a rank has in a call
    parallel_type parallel(int64_t tokens) const
    {
        const int64_t budget = (tokens + options_.chunks - 1) / options_.chunks; // of a chunk
        return {group_, world_, {}, {options_.exchange, budget}, 1, fm::received_rows::keep, options_.chunks};
    }
    /// The same ranks for a model whose MLP all of them hold. Collective.
    rank_team without_experts() const { return {world_, {.expert_parallel = 1}}; }

    /// values = their sum over all ranks.                                               // (N)
    template <class T>
    void sum(Executor& ex, vector_view<T> values) const
    {
        world_.all_reduce(ex, values);
    }

    /// The number that rank 0 has. Collective.
    int from_first(Executor& ex, int number) const
    {
        fm::buffer<int32_t, Executor> shared(ex, 1);
        to_executor<Executor, int32_t>(ex, &number, shared.view());
        world_.broadcast(ex, shared.view(), 0);
        return to_host(ex, shared.view())[0];
    }

    /// What the ranks know of signals, and whether rank 0 has reason to stop, becomes what all know. Collective.
    step_end agree(Executor& ex, bool stops) const
    {
        const int caught = caught_signal;
        const int signals[] = {SIGINT, SIGTERM, SIGUSR1};
        int64_t facts[4] = {caught == SIGINT, caught == SIGTERM, caught == SIGUSR1, speaks() && stops};
        fm::buffer<int64_t, Executor> shared(ex, 4);
        to_executor<Executor, int64_t>(ex, facts, shared.view());
        world_.all_reduce(ex, shared.view());
        const auto all = to_host(ex, shared.view());
        step_end out;
        for (int i = 0; i < 3; ++i)
            if (all[static_cast<std::size_t>(i)] > 0) out.signal = signals[i];
        out.stops = out.signal != 0 || all[3] > 0;
        return out;
    }

private:
    ranks_type world_;
    rank_options options_;
    int experts_;
    ranks_type group_, data_;
};

} // namespace train_gpt
