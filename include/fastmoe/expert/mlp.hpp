// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The expert of a Transformer: two matrices with an activation between them, gated or not.
#pragma once

#include <concepts>

#include <fastmoe/exec/scratch.hpp>
#include <fastmoe/expert/initialize.hpp>
#include <fastmoe/expert/mlp_rows.hpp>
#include <fastmoe/gemm/portable.hpp>
#include <fastmoe/ops/rows.hpp>

namespace fastmoe::inline FASTMOE_ABI {

/// H' is 2H for a gated activation and H otherwise.
/// @tparam View  of a matrix for each expert: what the GEMM policy reads
template <class T, class View = weight_view<T>>
struct mlp_weights {
    View up;                   // (E,H',D)
    View down;                 // (E,D,H)
    matrix_view<T> up_bias;    // (E,H')  without memory: none
    matrix_view<T> down_bias;  // (E,D)   without memory: none

    template <std::same_as<const T> U, class Read>
        requires std::convertible_to<const View&, Read>
    operator mlp_weights<U, Read>() const noexcept
    {
        return {up, down, up_bias, down_bias};
    }
};

/// What the forward pass of an mlp keeps: the pre-activation and nothing else.
template <class T>
struct mlp_saved {
    matrix_view<T> pre; // (S,H')
};

/// What the backward pass leaves for the weight gradients.
template <class T>
struct mlp_pending {
    matrix_view<T> dpre;       // (S,H')  gradient of the pre-activation
    matrix_view<T> activation; // (S,H)   weighted, recomputed
};

/// y = act(x W1^T + b1) W2^T + b2 with the routing weight where `weigh` says. Keeps the pre-activation only; its backward
/// recomputes the activation, and takes the weight's gradient from <dy W2, activation>, so no output is kept.
template <activation Activation = swiglu, states_abilities Gemm = gemm::portable>
struct mlp {
    int64_t width = 0;  ///< D
    int64_t hidden = 0; ///< H
    bool biases = false;
    weigh_at weigh = weigh_at::output;
    gated_layout layout = gated_layout::concatenated;
    Activation activation = {};
    Gemm gemm = {};

    static constexpr bool applies_weights = true;
    /// D, for those who size a layer by its expert.
    int64_t model_width() const noexcept { return width; }
    template <class T>
    using weights = mlp_weights<T, weights_of_gemm<Gemm, T>>;

    /// Whether combine() is to apply the routing weights.
    bool weighs_output() const noexcept { return weigh == weigh_at::output; }
    /// H': columns of the pre-activation.
    int64_t up_width() const noexcept { return Activation::gated ? 2 * hidden : hidden; }

    template <class T>
    weights<T> reserve_weights(arena& memory, int64_t experts) const
    {
        expects(width >= 0 && width <= detail::most_width, "mlp.width", width, "0 to ", detail::most_width);
        expects(hidden >= 0 && hidden <= detail::most_width, "mlp.hidden", hidden, "0 to ", detail::most_width);
        weights<T> w{};
        w.up = reserve_matrices<T>(memory, experts, up_width(), width);
        w.down = reserve_matrices<T>(memory, experts, width, hidden);
        if (biases) w.up_bias = memory.matrix<T>(experts, up_width());
        if (biases) w.down_bias = memory.matrix<T>(experts, width);
        return w;
    }
    /// Uniform in +-1/sqrt(fan in); biases zero. For numbers see fill_uniform().
    /// @param slices  into which the experts' hidden width is cut, of which this mlp is one
    template <class Executor, class T>
    void initialize(Executor& ex, const mlp_weights<T>& w, std::uint64_t seed, vector_view<const int32_t> numbers = {},
                    int slices = 1) const
    {
        fill_uniform(ex, w.up, seed, 0, numbers);
        fill_uniform(ex, w.down, seed, 1, numbers, hidden * slices);
        fill_zero(ex, w.up_bias);
        fill_zero(ex, w.down_bias);
    }
    template <class T>
    mlp_saved<T> reserve_saved(arena& memory, int64_t slots) const
    {
        return {memory.matrix<T>(slots, up_width())};
    }
    template <class T>
    mlp_pending<T> reserve_pending(arena& memory, int64_t slots) const
    {
        return {memory.matrix<T>(slots, up_width()), memory.matrix<T>(slots, hidden)};
    }

    /// Where ranks hold slices of the hidden width, each is an mlp with that hidden width, and the output's bias is the first
    /// slice's alone: others do not add theirs, and its gradient there is zero.
    template <class T, class View>
    mlp_weights<T, View> later_slice(mlp_weights<T, View> w) const noexcept
    {
        w.down_bias = {};
        return w;
    }
    template <class Executor, class T>
    void clear_left_to_first_slice(Executor& ex, const mlp_weights<T>& gradients) const
    {
        fill_zero(ex, gradients.down_bias);
    }

    /// @throws invalid_argument unless the views are of this expert's shape
    template <class T, class View>
    void check_weights(const mlp_weights<T, View>& w, int64_t experts, int64_t columns, weight_role role) const
    {
        const bool given = role == weight_role::weights;
        expects(columns == width, "x (T,D)", columns, "mlp.width = ", width, " columns");
        detail::expects_views(w.up, given ? "weights.up (E,H',D)" : "gradients.up (E,H',D)", experts, up_width(), width);
        detail::expects_views(w.down, given ? "weights.down (E,D,H)" : "gradients.down (E,D,H)", experts, width, hidden);
        if (!given) detail::expects_apart(detail::matrices_of(w.up), "gradients.up (E,H',D)");
        if (!given) detail::expects_apart(detail::matrices_of(w.down), "gradients.down (E,D,H)");
        if (w.up_bias.data_handle())
            expects_shape(w.up_bias, given ? "weights.up_bias (E,H')" : "gradients.up_bias (E,H')", experts, up_width());
        if (w.down_bias.data_handle())
            expects_shape(w.down_bias, given ? "weights.down_bias (E,D)" : "gradients.down_bias (E,D)", experts, width);
    }
    /// @throws invalid_argument for gradients that are held apart and not all there
    template <class Executor, class T, class View>
    void check_pointers(const mlp_weights<T, View>& gradients) const
    {
        detail::expects_pointers<Executor>(detail::matrices_of(gradients.up), "gradients.up (E,H',D)");
        detail::expects_pointers<Executor>(detail::matrices_of(gradients.down), "gradients.down (E,D,H)");
    }

    /// @param y  overwritten for the rows of every expert, padding untouched. Carries the routing weight unless it is
    ///           to be applied on the output, which is combine()'s work    // (S,D)
    /// @throws invalid_argument if shapes disagree, out_of_memory; nothing is written then
    template <class Executor, class T>
    void forward(Executor& ex, const expert_input<T>& in, const weights<const T>& w, const mlp_saved<T>& saved,
                 matrix_view<T> y, arena& scratch) const
    {
        run_forward(ex, in, w, saved, true, y, scratch);
    }

    /// The same, and nothing kept: a policy that activates in registers does not even write the pre-activation.
    template <class Executor, class T>
    void infer(Executor& ex, const expert_input<T>& in, const weights<const T>& w, matrix_view<T> y,
               arena& scratch) const
    {
        const arena::scope lent(scratch);
        run_forward(ex, in, w, reserve_saved<T>(scratch, in.groups.slots), false, y, scratch);
    }

    /// @param dy        gradient of the combined output, by token; not weighted      // (S,D)
    /// @param pending   overwritten                                                  // see mlp_pending
    /// @param dx        overwritten for the rows of every expert, padding untouched   // (S,D)
    /// @param dweights  written for the choices that have a row, the others untouched  // (C)
    /// @throws as forward
    template <class Executor, class T>
    void backward(Executor& ex, const expert_input<T>& in, const weights<const T>& w, const mlp_saved<T>& saved,
                  const indexed_rows<T>& dy, const mlp_pending<T>& pending, matrix_view<T> dx,
                  vector_view<accumulate_t<T>> dweights, arena& scratch) const
    {
        static_assert(multiplies_rows<Gemm, Executor, T>, "the GEMM lacks what an expert asks; see grouped_gemm.hpp");
        if (!scratch.measuring()) {
            expects_rows(in, saved);
            expects_gradient(in, dy, pending);
            check_weights(w, in.groups.experts(), in.x.extent(1), weight_role::weights);
            expects_shape(dx, "dx (S,D)", in.groups.slots, width);
            expects_shape(dweights, "dweights (C)", in.weights.extent(0));
        }
        detail::with_scratch(scratch, [&](arena& memory) {
            gemm.dgrad(ex, in.groups, dy, w.down, pending.activation,
                       detail::activate_backward<Activation, T>{saved.pre, pending.activation, pending.dpre, dy,
                                                                w.down_bias, dweights, columns(), in, weigh,
                                                                activation},
                       memory);
            const plain_rows<T> dpre{pending.dpre};
            if (weigh == weigh_at::input)
                gemm.dgrad(ex, in.groups, dpre, w.up, dx, detail::unweigh_input<T>{dx, dweights, in}, memory);
            else gemm.dgrad(ex, in.groups, dpre, w.up, dx, no_epilogue{}, memory);
        });
    }

    /// Gradients of both matrices and biases, from what forward and backward kept.
    /// @param gradients  overwritten or added to; exact zeros for experts without rows. T or a wider type
    /// @throws as forward
    template <class Executor, class T, class G>
    void weight_gradients(Executor& ex, const expert_input<T>& in, const mlp_saved<T>&, const indexed_rows<T>& dy,
                          const mlp_pending<T>& pending, const mlp_weights<G>& gradients, write_mode mode,
                          arena& scratch) const
    {
        using real = accumulate_t<T>;
        static_assert(multiplies_weight_gradients<Gemm, Executor, T>,
                      "the GEMM lacks what an expert asks; see grouped_gemm.hpp");
        if (!scratch.measuring()) {
            detail::expects_expert_input(in, width);
            expects_gradient(in, dy, pending);
            check_weights(gradients, in.groups.experts(), in.x.extent(1), weight_role::gradients);
        }
        const auto& g = in.groups;
        const plain_rows<T> dpre{pending.dpre};
        detail::with_scratch(scratch, [&](arena& memory) {
            gemm.wgrad(ex, g, dy, plain_rows<T>{pending.activation}, gradients.down, mode, memory);
            with_input(ex, in, memory,
                       [&](const indexed_rows<T>& x) { gemm.wgrad(ex, g, dpre, x, gradients.up, mode, memory); });
        });
        if (scratch.measuring()) return;
        if (gradients.up_bias.data_handle())
            sum_groups(ex, dpre, g.counts, g.offsets, unit_scale<real>{}, gradients.up_bias, mode);
        if (gradients.down_bias.data_handle() && weigh == weigh_at::output)
            sum_groups(ex, dy, g.counts, g.offsets, detail::input_weight<T>{in}, gradients.down_bias, mode);
        else if (gradients.down_bias.data_handle())
            sum_groups(ex, dy, g.counts, g.offsets, unit_scale<real>{}, gradients.down_bias, mode);
    }

private:
    template <class Executor, class T>
    void run_forward(Executor& ex, const expert_input<T>& in, const weights<const T>& w, const mlp_saved<T>& saved, bool keeps_pre,
                     matrix_view<T> y, arena& scratch) const
    {
        static_assert(fastmoe::activation<Activation, accumulate_t<T>>,
                      "the activation serves float, and not the sums' type; see activate.hpp");
        static_assert(multiplies_rows<Gemm, Executor, T>, "the GEMM lacks what an expert asks; see grouped_gemm.hpp");
        if (!scratch.measuring()) {
            expects_rows(in, saved);
            check_weights(w, in.groups.experts(), in.x.extent(1), weight_role::weights);
            expects_shape(y, "y (S,D)", in.groups.slots, width);
        }
        detail::with_scratch(scratch, [&](arena& memory) {
            const auto a = memory.matrix<T>(in.groups.slots, hidden);
            with_input(ex, in, memory, [&](const indexed_rows<T>& x) {
                gemm.forward(ex, in.groups, x, w.up, w.up_bias, saved.pre,
                             detail::activate<Activation, T>{saved.pre, a, columns(), in, weigh == weigh_at::activation,
                                                              keeps_pre, activation},
                             memory);
            });
            gemm.forward(ex, in.groups, plain_rows<T>{a}, w.down, w.down_bias, y, no_epilogue{}, memory);
        });
    }
    template <class T>
    static weights_of_gemm<Gemm, T> reserve_matrices(arena& memory, int64_t experts, int64_t out, int64_t in)
    {
        if constexpr (requires { typename Gemm::template weights<T>; }) return Gemm::template reserve_weights<T>(memory, experts, out, in);
        else return stacked(tensor_view<T, 3>(memory.matrix<T>(experts * out, in).data_handle(), experts, out, in));
    }
    detail::gated_columns columns() const noexcept { return detail::gated_columns::of(layout, hidden); }

    template <class T>
    void expects_rows(const expert_input<T>& in, const mlp_saved<T>& saved) const
    {
        detail::expects_expert_input(in, width);
        expects_shape(saved.pre, "saved.pre (S,H')", in.groups.slots, up_width());
    }
    template <class T>
    void expects_gradient(const expert_input<T>& in, const indexed_rows<T>& dy, const mlp_pending<T>& pending) const
    {
        detail::expects_expert_gradient(dy, in.groups.slots, width);
        expects_shape(pending.dpre, "pending.dpre (S,H')", in.groups.slots, up_width());
        expects_shape(pending.activation, "pending.activation (S,H)", in.groups.slots, hidden);
    }

    /// f(x): the input rows, gathered by the GEMM, or weighted into a copy where the weight belongs on the input.
    template <class Executor, class T, class F>
    void with_input(Executor& ex, const expert_input<T>& in, arena& scratch, F f) const
    {
        if (weigh != weigh_at::input) return f(in.x);
        const arena::scope lent(scratch);
        const auto rows = scratch.matrix<T>(in.groups.slots, width);
        const auto same = scratch.vector<int32_t>(in.groups.slots);
        if (!scratch.measuring()) {
            using scale = detail::input_weight<T>;
            fastmoe::for_each_row(ex, in.groups.slots,
                                  detail::gather_rows<accumulate_t<T>, T, scale>{in.x, rows, scale{in}},
                                  {.width = width});
            fastmoe::for_each(ex, in.groups.slots, detail::count_up{same.data_handle()});
        }
        f(indexed_rows<T>{rows, same});
    }
};

} // namespace fastmoe::inline FASTMOE_ABI
