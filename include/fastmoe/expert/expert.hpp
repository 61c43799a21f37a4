// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The expert concept: what a layer asks of the networks behind the gate. One object stands for all experts of a layer.
#pragma once

#include <concepts>
#include <cstdint>
#include <utility>

#include <fastmoe/gemm/grouped_gemm.hpp>

namespace fastmoe::inline FASTMOE_ABI {

/// What an expert is given: rows in expert order, as a view through the plan, and the routing weights of the rows.
template <class T>
struct expert_input {
    using real = accumulate_t<T>;

    indexed_rows<T> x;                    // (S,D)  row of slot s is x.row(s); null for padding
    row_groups groups;                    //        rows of each expert
    vector_view<const real> weights;      // (C)    routing weights
    vector_view<const int32_t> choice_of; // (S)    -1: padding

    FASTMOE_HOST_DEVICE real weight(int64_t s) const noexcept
    {
        const int64_t c = choice_of(s);
        return c < 0 ? real(0) : weights(c);
    }
};

/// Names the type of its weights: a struct of views, templated on the element type, that converts from T to const T.
template <class Expert, class T>
concept names_weights = requires {
    typename Expert::template weights<T>;
    typename Expert::template weights<const T>;
};

/// Gives the views of its weights from an arena: `reserve_weights<T>(arena&, experts)`.
template <class Expert, class T>
concept reserves_weights = requires(const Expert& e, arena& memory, int64_t n) { e.template reserve_weights<T>(memory, n); };

/// Says what it keeps for its backward: `reserve_saved<T>(arena&, slots)`.
template <class Expert, class T>
concept declares_saved = requires(const Expert& e, arena& memory, int64_t n) { e.template reserve_saved<T>(memory, n); };

/// The types of what an expert keeps from forward to backward, and from backward to its weight gradients.
template <class Expert, class T>
using saved_of = decltype(std::declval<const Expert&>().template reserve_saved<T>(std::declval<arena&>(), int64_t{}));
template <class Expert, class T>
using pending_of = decltype(std::declval<const Expert&>().template reserve_pending<T>(std::declval<arena&>(), int64_t{}));

/// States whether its backward yields the gradient of the routing weights (`applies_weights`; if not, the layer keeps the
/// outputs and takes it from them), and whether combine() is to apply them (`weighs_output()`).
template <class Expert>
concept states_weighing = requires(const Expert& e) {
    { Expert::applies_weights } -> std::convertible_to<bool>;
    { e.weighs_output() } -> std::convertible_to<bool>;
};

/// y[s] = expert e(s) of x[s]: forward keeps `saved`, infer keeps nothing.
template <class Expert, class Executor, class T>
concept runs_forward = requires(const Expert& e, Executor& ex, const expert_input<T>& in,
                                const typename Expert::template weights<const T>& w,
                                const saved_of<Expert, T>& saved,
                                matrix_view<T> y, arena& scratch) {
    e.forward(ex, in, w, saved, y, scratch);
    e.infer(ex, in, w, y, scratch);
};

/// backward: dx rows, and dweights (C) if it applies the weights; what its weight gradients need goes to `pending`.
/// weight_gradients: later, from saved and pending.
template <class Expert, class Executor, class T>
concept runs_backward = requires(const Expert& e, Executor& ex, const expert_input<T>& in,
                                 const typename Expert::template weights<const T>& w,
                                 const saved_of<Expert, T>& saved,
                                 const pending_of<Expert, T>& pending,
                                 indexed_rows<T> dy, matrix_view<T> dx, vector_view<accumulate_t<T>> dweights,
                                 const typename Expert::template weights<T>& gradients, arena& scratch) {
    e.backward(ex, in, w, saved, dy, pending, dx, dweights, scratch);
    e.weight_gradients(ex, in, saved, dy, pending, gradients, write_mode::overwrite, scratch);
};

/// All of it. `dy` is the gradient of the combined output, by token, for an expert that applies the weights; of its own
/// rows, already weighted, for one that does not.
template <class Expert, class Executor, class T>
concept expert_policy = names_weights<Expert, T> && reserves_weights<Expert, T> && declares_saved<Expert, T> && states_weighing<Expert> &&
                        runs_forward<Expert, Executor, T>;

template <class Expert, class Executor, class T>
concept trainable_expert = expert_policy<Expert, Executor, T> && runs_backward<Expert, Executor, T>;

/// Whose views a check is about: the weights, or the gradients of them.
enum class weight_role : std::uint8_t { weights, gradients };

/// Optional: `check_weights(views, experts, width, role)` throws unless the views fit the expert. With it a layer refuses
/// what does not fit before it writes anything; without, the expert does so when it is their turn.
template <class Expert, class Views>
concept checks_weights = requires(const Expert& e, const Views& w, int64_t experts, int64_t width) {
    e.check_weights(w, experts, width, weight_role::weights);
};

/// Optional: `check_pointers<Executor>(views)` throws where matrices of gradients that are held apart have pointers that are
/// not memory, as far as the host can read them. With it a layer refuses them before it writes anything, too.
template <class Expert, class Executor, class Views>
concept checks_pointers = requires(const Expert& e, const Views& w) { e.template check_pointers<Executor>(w); };

namespace detail {

inline constexpr int64_t most_width = int64_t{1} << 30; ///< of D and H: their products with E are numbers of 64 bits

template <class Executor, class Expert, class Views>
void check_pointers(const Expert& expert, const Views& gradients)
{
    if constexpr (checks_pointers<Expert, Executor, Views>) expert.template check_pointers<Executor>(gradients);
}
template <class Expert, class Views>
void check_weights(const Expert& expert, const Views& w, int64_t experts, int64_t width, weight_role role)
{
    if constexpr (checks_weights<Expert, Views>) expert.check_weights(w, experts, width, role);
}

/// What the library's experts ask of their input.
template <class T>
void expects_expert_input(const expert_input<T>& in, int64_t width)
{
    const auto& g = in.groups;
    expects_shape(g.counts, "groups.counts (E)", g.experts());
    expects_shape(g.offsets, "groups.offsets (E+1)", g.experts() + 1);
    expects_shape(in.x.data, "x (T,D)", in.x.data.extent(0), width);
    expects_shape(in.x.index, "x.index (S)", g.slots);
    expects_shape(in.choice_of, "choice_of (S)", g.slots);
    expects_shape(in.weights, "weights (C)", in.weights.extent(0));
}

/// The same of the gradient that they are given.
template <class T>
void expects_expert_gradient(const indexed_rows<T>& dy, int64_t slots, int64_t width)
{
    expects_shape(dy.data, "dy (T,D)", dy.data.extent(0), width);
    expects_shape(dy.index, "dy.index (S)", slots);
}

} // namespace detail

/// What an expert keeps that recomputes all from its input.
struct nothing_saved {};

} // namespace fastmoe::inline FASTMOE_ABI
