// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Experts of different types behind one gate: the first n0 ids belong to the first, the next n1 to the second, and so on.
#pragma once

#include <fastmoe/exec/scratch.hpp>
#include <fastmoe/expert/expert.hpp>
#include <fastmoe/expert/initialize.hpp>
#include <fastmoe/expert/weighed_rows.hpp>

namespace fastmoe::inline FASTMOE_ABI {

/// `count` experts of one type.
template <states_weighing Expert>
struct several {
    Expert expert;
    int64_t count = 0;
};
template <class Expert>
several(Expert, int64_t) -> several<Expert>;

/// Two sets of views side by side.
template <class First, class Second>
struct both {
    First first;
    Second second;

    template <class A, class B>
        requires(std::convertible_to<First, A> && std::convertible_to<Second, B>)
    operator both<A, B>() const
    {
        return {first, second};
    }
};

namespace detail {

/// The part of an input that belongs to experts [first, first + count).
template <class T>
expert_input<T> part_of(const expert_input<T>& in, int64_t first, int64_t count)
{
    auto part = in;
    part.groups.counts = slice(in.groups.counts, first, count);
    part.groups.offsets = slice(in.groups.offsets, first, count + 1);
    return part;
}

} // namespace detail

/// Two types of experts behind one gate; either may be a pair again. Each type runs its own grouped GEMMs over its own
/// experts' rows of the same buffers. Weights, saved state and gradients are pairs.
///
/// A type that does not apply the routing weights may stand beside one that does: the pair then keeps its outputs, takes the
/// weights' gradient from them, and asks it for model_width(). How many rows go to which type is known to the executor
/// alone, so each type keeps room for all S rows: a pair keeps the sum of what its types would keep on their own.
template <states_weighing First, states_weighing Second>
struct expert_pair {
    several<First> first;
    several<Second> second;

    static constexpr bool applies_weights = First::applies_weights || Second::applies_weights;
    template <class T>
    using weights = both<typename First::template weights<T>, typename Second::template weights<T>>;

    int64_t model_width() const noexcept { return first.expert.model_width(); }
    /// @throws invalid_argument if the experts disagree, or only one of two kinds would be weighted
    bool weighs_output() const
    {
        const bool one = first.expert.weighs_output(), other = second.expert.weighs_output();
        expects(one == other, "weighs_output() of the first expert", one, "that of the second, ", other);
        if constexpr (First::applies_weights != Second::applies_weights)
            expects(one, "weighs_output()", one, "true where an expert does not apply the weights itself");
        return one;
    }

    template <class T>
    weights<T> reserve_weights(arena& memory, int64_t experts) const
    {
        expects(experts == first.count + second.count, "experts", experts, "the pair's ", first.count + second.count);
        auto a = first.expert.template reserve_weights<T>(memory, first.count);
        return {a, second.expert.template reserve_weights<T>(memory, second.count)};
    }
    template <class Executor, class T>
    void initialize(Executor& ex, const weights<T>& w, std::uint64_t seed) const
    {
        first.expert.initialize(ex, w.first, seed_of_part(seed, 0));
        second.expert.initialize(ex, w.second, seed_of_part(seed, 1));
    }
    template <class T>
    auto reserve_saved(arena& memory, int64_t slots) const
    {
        auto a = part(first.expert).template reserve_saved<T>(memory, slots);
        auto b = part(second.expert).template reserve_saved<T>(memory, slots);
        return both<decltype(a), decltype(b)>{a, b};
    }
    template <class T>
    auto reserve_pending(arena& memory, int64_t slots) const
    {
        auto a = part(first.expert).template reserve_pending<T>(memory, slots);
        auto b = part(second.expert).template reserve_pending<T>(memory, slots);
        return both<decltype(a), decltype(b)>{a, b};
    }

    /// @throws invalid_argument unless the views fit both types, and these agree; only types that check are asked
    template <class A, class B>
    void check_weights(const both<A, B>& w, int64_t experts, int64_t width, weight_role role) const
    {
        expects(experts == first.count + second.count, "experts", experts, "the pair's ", first.count + second.count);
        (void)weighs_output();
        detail::check_weights(first.expert, w.first, first.count, width, role);
        detail::check_weights(second.expert, w.second, second.count, width, role);
    }
    template <class Executor, class A, class B>
    void check_pointers(const both<A, B>& gradients) const
    {
        detail::check_pointers<Executor>(first.expert, gradients.first);
        detail::check_pointers<Executor>(second.expert, gradients.second);
    }

    template <class Executor, class T, class Saved>
    void forward(Executor& ex, const expert_input<T>& in, const weights<const T>& w, const Saved& saved, matrix_view<T> y,
                 arena& scratch) const
    {
        run(in, w, weight_role::weights, scratch, [&](const auto& a, const auto& b, arena& memory) {
            part(first.expert).forward(ex, a, w.first, saved.first, y, memory);
            part(second.expert).forward(ex, b, w.second, saved.second, y, memory);
        });
    }
    template <class Executor, class T>
    void infer(Executor& ex, const expert_input<T>& in, const weights<const T>& w, matrix_view<T> y, arena& scratch) const
    {
        run(in, w, weight_role::weights, scratch, [&](const auto& a, const auto& b, arena& memory) {
            first.expert.infer(ex, a, w.first, y, memory);
            second.expert.infer(ex, b, w.second, y, memory);
        });
    }
    template <class Executor, class T, class Saved, class Pending>
    void backward(Executor& ex, const expert_input<T>& in, const weights<const T>& w, const Saved& saved,
                  const indexed_rows<T>& dy, const Pending& pending, matrix_view<T> dx,
                  vector_view<accumulate_t<T>> dweights, arena& scratch) const
    {
        run(in, w, weight_role::weights, scratch, [&](const auto& a, const auto& b, arena& memory) {
            part(first.expert).backward(ex, a, w.first, saved.first, dy, pending.first, dx, dweights, memory);
            part(second.expert).backward(ex, b, w.second, saved.second, dy, pending.second, dx, dweights, memory);
        });
    }
    template <class Executor, class T, class Saved, class Pending, class A, class B>
    void weight_gradients(Executor& ex, const expert_input<T>& in, const Saved& saved, const indexed_rows<T>& dy,
                          const Pending& pending, const both<A, B>& gradients, write_mode mode, arena& scratch) const
    {
        run(in, gradients, weight_role::gradients, scratch, [&](const auto& a, const auto& b, arena& memory) {
            part(first.expert).weight_gradients(ex, a, saved.first, dy, pending.first, gradients.first, mode, memory);
            part(second.expert).weight_gradients(ex, b, saved.second, dy, pending.second, gradients.second, mode, memory);
        });
    }

private:
    /// An expert as the pair needs it.
    template <class Expert>
    static decltype(auto) part(const Expert& expert)
    {
        if constexpr (Expert::applies_weights == applies_weights) return (expert);
        else return detail::weighed_rows<Expert>{expert, expert.model_width()};
    }
    /// Checks the views and asks for the scratch of both types before either begins.
    template <class T, class Views, class Body>
    void run(const expert_input<T>& in, const Views& views, weight_role role, arena& scratch, const Body& body) const
    {
        const int64_t experts = in.groups.experts();
        expects(experts == first.count + second.count, "experts", experts, "the pair's ", first.count + second.count);
        if (!scratch.measuring()) check_weights(views, experts, in.x.extent(1), role);
        const auto a = detail::part_of(in, 0, first.count), b = detail::part_of(in, first.count, second.count);
        detail::with_scratch(scratch, [&](arena& memory) { body(a, b, memory); });
    }
};

/// Any number of types: `expert_tuple(several{a, 4}, several{b, 2}, several{c, 2})` nests pairs from the right.
template <class First, class Second>
expert_pair<First, Second> expert_tuple(several<First> first, several<Second> second)
{
    return {first, second};
}
template <class First, class Second, class... Rest>
    requires(sizeof...(Rest) > 0)
auto expert_tuple(several<First> first, several<Second> second, several<Rest>... rest)
{
    const int64_t others = second.count + (rest.count + ...);
    return expert_tuple(first, several{expert_tuple(second, rest...), others});
}

} // namespace fastmoe::inline FASTMOE_ABI
