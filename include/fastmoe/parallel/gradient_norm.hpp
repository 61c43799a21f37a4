// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The norm of all gradients over all ranks, clipping by it, and whether all are finite: what an optimizer asks before a
/// step, answered alike on every rank, so that all of them step or none.
#pragma once

#include <cmath>

#include <fastmoe/exec/scratch.hpp>
#include <fastmoe/parallel/agreement.hpp>

namespace fastmoe::inline FASTMOE_ABI {

namespace detail {

/// Elements whose squares are summed on their own: the cut follows from the shape alone.
inline constexpr int64_t norm_block = 16384;

constexpr int64_t norm_blocks(int64_t count) noexcept { return (count + norm_block - 1) / norm_block; }

/// The sum of the squares of a block, in double.
template <class G>
struct block_squares {
    using vectorized = void;
    const G* gradient; // (N)
    double* sums;      // (blocks)
    int64_t count, first; ///< N, and the block that sums(0) is of

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t b) const
    {
        const int64_t begin = (first + b) * norm_block, n = count - begin < norm_block ? count - begin : norm_block;
        const G* g = gradient + begin;
        const auto square = [=](int64_t i) {
            const auto v = static_cast<double>(static_cast<accumulate_t<G>>(g[i]));
            return v * v;
        };
        const double sum = team.reduce(n, 0.0, [](double a, double c) { return a + c; }, square);
        if (team.lane() == 0) sums[b] = sum;
    }
};

/// Whether a block holds Inf or NaN: 1 or 0.
template <class G>
struct block_not_finite {
    using vectorized = void;
    const G* gradient; // (N)
    int64_t* found;    // (blocks)
    int64_t count;

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t b) const
    {
        const int64_t begin = b * norm_block, n = count - begin < norm_block ? count - begin : norm_block;
        const G* g = gradient + begin;
        const auto bad = [=](int64_t i) {
            const auto v = static_cast<accumulate_t<G>>(g[i]);
            return static_cast<int64_t>(!(v - v == accumulate_t<G>(0)));
        };
        const int64_t any = team.reduce(n, int64_t{0}, [](int64_t a, int64_t c) { return a | c; }, bad);
        if (team.lane() == 0) found[b] = any;
    }
};

/// The sum of what the blocks have, in one fixed order.
template <class Real>
struct add_blocks {
    using vectorized = void;
    const Real* sums; // (blocks)
    Real* total;      // (1)
    int64_t blocks;

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t) const
    {
        const Real* own = sums;
        const Real sum = team.reduce(blocks, Real(0), [](Real a, Real b) { return a + b; }, [=](int64_t i) { return own[i]; });
        if (team.lane() == 0) *total = sum;
    }
};

template <class G>
struct scale_elements {
    using vectorized = void;
    G* gradient; // (N)
    accumulate_t<G> scale;

    FASTMOE_HOST_DEVICE void operator()(int64_t i) const
    {
        gradient[i] = static_cast<G>(static_cast<accumulate_t<G>>(gradient[i]) * scale);
    }
};

/// Blocks [begin, end) of a gradient.
struct block_share {
    int64_t begin, end;

    static block_share of(int64_t blocks, int rank, int ranks) noexcept
    {
        const int64_t each = (blocks + ranks - 1) / ranks, from = rank * each, begin = from < blocks ? from : blocks;
        return {begin, blocks - begin < each ? blocks : begin + each};
    }
};

/// Sums over blocks with a functor for each, over gradients and then over ranks; every rank gets the total.
/// @param share   block_share of a parameter: which of its blocks this rank adds
/// @param launch  launch(parameter, share, partial (blocks)) writes a number a block
template <class Real, class Executor, class World, class Share, class Launch>
Real sum_over_blocks(Executor& ex, vector_view<const parameter_view> parameters, const World& world, const Share& share,
                     const Launch& launch, arena& scratch)
{
    static_assert(sums_over_ranks<World, Executor, Real>, "the communicator lacks sums; see communicator.hpp");
    const arena::scope lent(scratch);
    int64_t blocks = 0;
    for (int64_t i = 0; i < parameters.extent(0); ++i) {
        const block_share s = share(parameters(i));
        blocks += s.end - s.begin;
    }
    const vector_view<Real> partial = scratch.vector<Real>(blocks), total = scratch.vector<Real>(1);
    Real out{};
    if (scratch.measuring()) return out;
    for (int64_t i = 0, at = 0; i < parameters.extent(0); ++i) {
        const block_share s = share(parameters(i));
        if (s.begin == s.end) continue;
        launch(parameters(i), s, slice(partial, at, s.end - s.begin));
        at += s.end - s.begin;
    }
    fastmoe::for_each_row(ex, 1, add_blocks<Real>{partial.data_handle(), total.data_handle(), blocks}, {.width = blocks});
    if (world.size() > 1) world.all_reduce(ex, total);
    read_back(ex, vector_view<const Real>(total), &out);
    return out;
}

template <class Executor, class World, class Data>
double norm(Executor& ex, vector_view<const parameter_view> parameters, const World& world, const Data& data,
            std::uint64_t option, arena& scratch)
{
    const auto facts = [&](parameter_tag tag) {
        parameter_facts out = parameter_facts::of(parameters, tag, parameter_side::gradient);
        out.add(option);
        return out;
    };
    expects_agreement(ex, world, data, facts(parameter_tag::world), facts(parameter_tag::data), scratch);
    const auto share = [&](const parameter_view& p) {
        const int64_t blocks = norm_blocks(p.count);
        if (p.tag == parameter_tag::world) return block_share::of(blocks, world.rank(), world.size());
        if (p.tag == parameter_tag::data) return block_share::of(blocks, data.rank(), data.size());
        return block_share{0, blocks};
    };
    const auto launch = [&](const parameter_view& p, block_share s, vector_view<double> partial) {
        with_scalar_type(p.gradient_type, [&](auto zero) {
            using G = decltype(zero);
            const block_squares<G> squares{static_cast<const G*>(p.gradient), partial.data_handle(), p.count, s.begin};
            fastmoe::for_each_row(ex, s.end - s.begin, squares, {.width = norm_block});
        });
    };
    return std::sqrt(sum_over_blocks<double>(ex, parameters, world, share, launch, scratch));
}

} // namespace detail

/// The L2 norm of the model's gradient: each parameter counts once, however many ranks hold it, so R ranks get what one
/// would. Gradients must have been synchronized: ranks that hold the same one add different parts of it. A slice of an
/// expert is a parameter of its own. Squares are summed in double, in an order that follows from shapes and ranks: the same
/// bits on all ranks and for any number of threads. Inf or NaN if a gradient holds one. Waits for the executor.
/// Arguments and errors as of synchronize_gradients(); an arena without storage gives 0.
template <executor Executor, counts_ranks World, counts_ranks Data>
double gradient_norm(Executor& ex, vector_view<const parameter_view> parameters, const World& world, const Data& data,
                     arena& scratch)
{
    if (!scratch.measuring()) detail::expects_parameters(parameters, detail::parameter_side::gradient);
    double out = 0;
    detail::with_scratch(scratch, [&](arena& memory) { out = detail::norm(ex, parameters, world, data, 0, memory); });
    return out;
}
/// The same with memory of the executor.
template <executor Executor, counts_ranks World, counts_ranks Data>
double gradient_norm(Executor& ex, vector_view<const parameter_view> parameters, const World& world, const Data& data)
{
    return detail::with_own_scratch(ex, [&](arena& scratch) { return gradient_norm(ex, parameters, world, data, scratch); });
}

/// Scales all gradients by max_norm / (norm + 1e-6) if their norm is greater than max_norm, and returns the norm that they
/// had. A norm that is Inf or NaN scales nothing, on no rank: skip the step then.
/// @param max_norm  greater than 0; the same on all ranks
/// @throws as gradient_norm()
template <executor Executor, counts_ranks World, counts_ranks Data>
double clip_gradients(Executor& ex, vector_view<const parameter_view> parameters, const World& world, const Data& data,
                      double max_norm, arena& scratch)
{
    expects(max_norm > 0, "max_norm", max_norm, "greater than 0");
    if (!scratch.measuring()) detail::expects_parameters(parameters, detail::parameter_side::gradient);
    double out = 0;
    const auto option = ::cuda::std::bit_cast<std::uint64_t>(max_norm);
    detail::with_scratch(scratch, [&](arena& memory) { out = detail::norm(ex, parameters, world, data, option, memory); });
    if (scratch.measuring() || !(out > max_norm) || !std::isfinite(out)) return out;
    for (int64_t i = 0; i < parameters.extent(0); ++i)
        with_scalar_type(parameters(i).gradient_type, [&](auto zero) {
            using G = decltype(zero);
            const auto scale = static_cast<accumulate_t<G>>(max_norm / (out + 1e-6));
            fastmoe::for_each(ex, parameters(i).count,
                              detail::scale_elements<G>{static_cast<G*>(parameters(i).gradient), scale});
        });
    return out;
}
/// The same with memory of the executor.
template <executor Executor, counts_ranks World, counts_ranks Data>
double clip_gradients(Executor& ex, vector_view<const parameter_view> parameters, const World& world, const Data& data,
                      double max_norm)
{
    return detail::with_own_scratch(
        ex, [&](arena& scratch) { return clip_gradients(ex, parameters, world, data, max_norm, scratch); });
}

/// Whether no gradient on any rank holds Inf or NaN: the same answer on all ranks, from one sum of an integer over ranks,
/// so that none skips a step which others take. Before or after synchronization; ranks' lists may differ here. Waits for
/// the executor. Collective over world.
/// @throws invalid_argument if a gradient has no memory, out_of_memory if the workspace is too small, comm_error if a peer
///         failed
template <executor Executor, counts_ranks World>
bool all_finite(Executor& ex, vector_view<const parameter_view> parameters, const World& world, arena& scratch)
{
    if (!scratch.measuring()) detail::expects_parameters(parameters, detail::parameter_side::gradient);
    const auto share = [](const parameter_view& p) { return detail::block_share{0, detail::norm_blocks(p.count)}; };
    const auto launch = [&](const parameter_view& p, detail::block_share s, vector_view<int64_t> found) {
        with_scalar_type(p.gradient_type, [&](auto zero) {
            using G = decltype(zero);
            const detail::block_not_finite<G> bad{static_cast<const G*>(p.gradient), found.data_handle(), p.count};
            fastmoe::for_each_row(ex, s.end, bad, {.width = detail::norm_block});
        });
    };
    int64_t blocks = 0;
    detail::with_scratch(scratch, [&](arena& memory) {
        blocks = detail::sum_over_blocks<int64_t>(ex, parameters, world, share, launch, memory);
    });
    return blocks == 0;
}
/// The same with memory of the executor.
template <executor Executor, counts_ranks World>
bool all_finite(Executor& ex, vector_view<const parameter_view> parameters, const World& world)
{
    return detail::with_own_scratch(ex, [&](arena& scratch) { return all_finite(ex, parameters, world, scratch); });
}

} // namespace fastmoe::inline FASTMOE_ABI
