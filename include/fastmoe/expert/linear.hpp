// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// One matrix an expert: y = x W^T (+ b).
#pragma once

#include <concepts>

#include <fastmoe/expert/expert.hpp>
#include <fastmoe/expert/initialize.hpp>
#include <fastmoe/gemm/portable.hpp>

namespace fastmoe::inline FASTMOE_ABI {

template <class T>
struct linear_weights {
    weight_view<T> weight; // (E,out,in)
    matrix_view<T> bias;   // (E,out)  without memory: none

    template <std::same_as<const T> U>
    operator linear_weights<U>() const noexcept
    {
        return {weight, bias};
    }
};

/// y[s] = x[s] W[e(s)]^T + b[e(s)]. Keeps nothing: its backward reads x. Input and output width are the layer's.
/// @tparam Gemm  the grouped GEMM; see grouped_gemm.hpp
template <states_abilities Gemm = gemm::portable>
struct linear {
    int64_t width = 0; ///< D
    bool biases = false;
    Gemm gemm = {};

    static constexpr bool applies_weights = false;
    static constexpr bool weighs_output() noexcept { return true; }
    /// D, for those who size a layer by its expert.
    int64_t model_width() const noexcept { return width; }
    template <class T>
    using weights = linear_weights<T>;

    template <class T>
    linear_weights<T> reserve_weights(arena& memory, int64_t experts) const
    {
        expects(width >= 0 && width <= detail::most_width, "linear.width", width, "0 to ", detail::most_width);
        auto* w = memory.matrix<T>(experts * width, width).data_handle();
        return {stacked(tensor_view<T, 3>(w, experts, width, width)),
                biases ? memory.matrix<T>(experts, width) : matrix_view<T>{}};
    }
    /// Uniform in +-1/sqrt(D); biases zero. For numbers see fill_uniform().
    template <class Executor, class T>
    void initialize(Executor& ex, const linear_weights<T>& w, std::uint64_t seed, vector_view<const int32_t> numbers = {}) const
    {
        fill_uniform(ex, w.weight, seed, 0, numbers);
        fill_zero(ex, w.bias);
    }
    template <class T>
    nothing_saved reserve_saved(arena&, int64_t) const
    {
        return {};
    }
    template <class T>
    nothing_saved reserve_pending(arena&, int64_t) const
    {
        return {};
    }

    /// @throws invalid_argument unless the views are of this expert's shape
    template <class T>
    void check_weights(const linear_weights<T>& w, int64_t experts, int64_t columns, weight_role role) const
    {
        const bool given = role == weight_role::weights;
        expects(columns == width, "x (T,D)", columns, "linear.width = ", width, " columns");
        detail::expects_weights(w.weight, given ? "weights.weight (E,D,D)" : "gradients.weight (E,D,D)", experts, width,
                                width);
        if (!given) detail::expects_apart(w.weight, "gradients.weight (E,D,D)");
        if (w.bias.data_handle())
            expects_shape(w.bias, given ? "weights.bias (E,D)" : "gradients.bias (E,D)", experts, width);
    }
    /// @throws invalid_argument for gradients that are held apart and not all there
    template <class Executor, class T>
    void check_pointers(const linear_weights<T>& gradients) const
    {
        detail::expects_pointers<Executor>(gradients.weight, "gradients.weight (E,D,D)");
    }

    /// @param y  overwritten for the rows of every expert, padding untouched  // (S,D)
    /// @throws invalid_argument if shapes disagree, out_of_memory; nothing is written then
    template <class Executor, class T>
    void forward(Executor& ex, const expert_input<T>& in, const linear_weights<const T>& w, const nothing_saved&,
                 matrix_view<T> y, arena& scratch) const
    {
        static_assert(multiplies_rows<Gemm, Executor, T>, "the GEMM lacks what an expert asks; see grouped_gemm.hpp");
        static_assert(std::is_same_v<weights_of_gemm<Gemm, T>, weight_view<T>>, "linear reads weight_view alone; mlp reads what a policy names");
        if (!scratch.measuring()) {
            detail::expects_expert_input(in, width);
            check_weights(w, in.groups.experts(), in.x.extent(1), weight_role::weights);
            expects_shape(y, "y (S,D)", in.groups.slots, width);
        }
        gemm.forward(ex, in.groups, in.x, w.weight, w.bias, y, no_epilogue{}, scratch);
    }
    template <class Executor, class T>
    void infer(Executor& ex, const expert_input<T>& in, const linear_weights<const T>& w, matrix_view<T> y,
               arena& scratch) const
    {
        forward(ex, in, w, {}, y, scratch);
    }
    /// @param dy  gradient of the rows            // (S,D)
    /// @param dx  overwritten, padding untouched  // (S,D)
    /// @throws as forward
    template <class Executor, class T>
    void backward(Executor& ex, const expert_input<T>& in, const linear_weights<const T>& w, const nothing_saved&,
                  const indexed_rows<T>& dy, const nothing_saved&, matrix_view<T> dx, vector_view<accumulate_t<T>>,
                  arena& scratch) const
    {
        static_assert(multiplies_rows<Gemm, Executor, T>, "the GEMM lacks what an expert asks; see grouped_gemm.hpp");
        if (!scratch.measuring()) {
            detail::expects_expert_input(in, width);
            detail::expects_expert_gradient(dy, in.groups.slots, width);
            check_weights(w, in.groups.experts(), in.x.extent(1), weight_role::weights);
            expects_shape(dx, "dx (S,D)", in.groups.slots, width);
        }
        gemm.dgrad(ex, in.groups, dy, w.weight, dx, no_epilogue{}, scratch);
    }
    /// @param gradients  overwritten or added to; exact zeros for experts without rows. T or a wider type
    /// @throws as forward
    template <class Executor, class T, class G>
    void weight_gradients(Executor& ex, const expert_input<T>& in, const nothing_saved&, const indexed_rows<T>& dy,
                          const nothing_saved&, const linear_weights<G>& gradients, write_mode mode, arena& scratch) const
    {
        static_assert(multiplies_weight_gradients<Gemm, Executor, T>,
                      "the GEMM lacks what an expert asks; see grouped_gemm.hpp");
        if (!scratch.measuring()) {
            detail::expects_expert_input(in, width);
            detail::expects_expert_gradient(dy, in.groups.slots, width);
            check_weights(gradients, in.groups.experts(), in.x.extent(1), weight_role::gradients);
        }
        gemm.wgrad(ex, in.groups, dy, in.x, gradients.weight, mode, scratch);
        if (gradients.bias.data_handle() && !scratch.measuring())
            sum_groups(ex, dy, in.groups.counts, in.groups.offsets, unit_scale<accumulate_t<T>>{}, gradients.bias, mode);
    }
};

} // namespace fastmoe::inline FASTMOE_ABI
