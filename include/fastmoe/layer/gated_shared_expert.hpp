// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// A shared expert whose output every token weighs by a gate of one row: sigmoid(x . g) expert(x), as Qwen2-MoE has it.
/// Beside the routed layer; its output is added to y, its input gradient to dx.
#pragma once

#include <fastmoe/core/math.hpp>
#include <fastmoe/layer/shared_expert.hpp>
#include <fastmoe/routing/project.hpp>

namespace fastmoe::inline FASTMOE_ABI {

/// The weights of a gated shared expert, or their gradients.
template <class T, class Expert>
struct gated_shared_weights {
    matrix_view<T> gate;                           // (1,D)
    typename Expert::template weights<T> expert{}; //        see the expert

    template <std::same_as<const T> U>
    operator gated_shared_weights<U, Expert>() const noexcept
    {
        return {gate, expert};
    }
};

namespace detail {

template <class Real>
struct sigmoid_in_place {
    using vectorized = void;
    Real* values;

    FASTMOE_HOST_DEVICE void operator()(int64_t i) const { values[i] = math::sigmoid(values[i]); }
};

/// d logit = d s * s (1 - s), over d s.
template <class Real>
struct sigmoid_backward_in_place {
    using vectorized = void;
    const Real* values;
    Real* gradients;

    FASTMOE_HOST_DEVICE void operator()(int64_t i) const { gradients[i] *= values[i] * (Real(1) - values[i]); }
};

/// to(t) += weight(t) * from(t), rounded once.
template <class T>
struct add_weighted_row {
    using vectorized = void;
    using real = accumulate_t<T>;
    matrix_view<const T> from;       // (T,D)
    matrix_view<T> to;               // (T,D)
    vector_view<const real> weights; // (T)

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t t) const
    {
        const int64_t width = to.extent(1);
        const T* source = from.data_handle() + t * width;
        T* target = to.data_handle() + t * width;
        const real w = weights(t);
        team.for_each(width, [=](int64_t d) { target[d] = T(real(target[d]) + w * real(source[d])); });
    }
};

} // namespace detail

/// Any expert that applies weights, as a shared one with a gate of its own.
///
///     layer.forward(ex, x, w.routed, y, memory);
///     auto kept = shared.forward(ex, x, w.shared, y, memory);      // y += sigmoid(x . g) expert(x)
///
/// Its rows are rounded to T before the gate's value multiplies them, and so is the sum with what y or dx holds.
template <states_weighing Expert>
struct gated_shared_expert {
    static_assert(Expert::applies_weights, "a gated shared expert needs the gradient of its weight from its expert");
    Expert expert;

    template <class T>
    using weights = gated_shared_weights<T, Expert>;

    /// y += sigmoid(x . g) expert(x).
    /// @param x        tokens                     // (T,D)
    /// @param y        added to; may be x         // (T,D)
    /// @param scratch  taken and given back; on a measuring arena only counted
    /// @throws invalid_argument if shapes disagree, out_of_memory; y is not written then
    template <executor Executor, class T>
    void infer(Executor& ex, type_identity_t<matrix_view<const T>> x, const type_identity_t<weights<const T>>& w,
               matrix_view<T> y, arena& scratch) const
    {
        static_assert(expert_policy<Expert, Executor, T>, "the expert lacks what inference asks; see expert.hpp");
        if (!scratch.measuring()) expects_call(x, w, y);
        detail::with_scratch(scratch, [&](arena& memory) {
            const auto kept = reserve<T>(ex, x, w, memory);
            const auto rows = memory.matrix<T>(x.extent(0), x.extent(1));
            expert.infer(ex, kept.in, w.expert, rows, memory);
            add(ex, kept, rows, y, memory);
        });
    }

    /// The same; the result holds views into `memory`, what lies behind it is given back.
    /// @param y  added to; not x, which backward() reads        // (T,D)
    /// @throws as infer
    template <executor Executor, class T>
    shared_parts<T, Expert> forward(Executor& ex, type_identity_t<matrix_view<const T>> x,
                                    const type_identity_t<weights<const T>>& w, matrix_view<T> y, arena& memory) const
    {
        static_assert(trainable_expert<Expert, Executor, T>, "the expert lacks what training asks; see expert.hpp");
        if (memory.measuring()) return pass<T>(ex, x, w, y, memory);
        expects_call(x, w, y);
        detail::expects_apart(y, "y (T,D)", x, "x (T,D), which backward() reads");
        arena needed;
        pass<T>(ex, x, w, y, needed);
        memory.require(needed.bytes());
        return pass<T>(ex, x, w, y, memory);
    }

    /// With s = sigmoid(x . g): d(x . g) = <dy, expert(x)> s (1 - s).
    /// @param dy         gradient of y                          // (T,D)
    /// @param dx         added to; neither dy nor x             // (T,D)
    /// @param gradients  overwritten or added to; T or a wider type
    /// @throws invalid_argument if shapes disagree or dx shares memory with dy or x, out_of_memory; nothing is written then
    template <executor Executor, class T, class G>
    void backward(Executor& ex, const shared_parts<T, Expert>& kept, type_identity_t<matrix_view<const T>> dy,
                  const type_identity_t<weights<const T>>& w, type_identity_t<matrix_view<T>> dx,
                  const gated_shared_weights<G, Expert>& gradients, write_mode mode, arena& scratch) const
    {
        static_assert(trainable_expert<Expert, Executor, T>, "the expert lacks what training asks; see expert.hpp");
        using real = accumulate_t<T>;
        const auto& x = kept.in.x.data;
        const int64_t tokens = dy.extent(0), width = dy.extent(1);
        if (!scratch.measuring()) {
            expects_shape(dy, "dy (T,D)", x.extent(0), x.extent(1));
            expects_shape(dx, "dx (T,D)", x.extent(0), x.extent(1));
            detail::expects_apart(dx, "dx (T,D)", dy, "dy (T,D), which the weight gradients read");
            detail::expects_apart(dx, "dx (T,D)", x, "x (T,D), which the weight gradients read");
            expects_shape(w.gate, "weights.gate (1,D)", 1, width);
            expects_shape(gradients.gate, "gradients.gate (1,D)", 1, width);
            detail::check_weights(expert, w.expert, 1, width, weight_role::weights);
            detail::check_weights(expert, gradients.expert, 1, width, weight_role::gradients);
            detail::check_pointers<Executor>(expert, gradients.expert);
        }
        detail::with_scratch(scratch, [&](arena& memory) {
            const indexed_rows<T> dy_rows{dy, kept.numbers};
            const auto pending = expert.template reserve_pending<T>(memory, tokens);
            const auto dweights = memory.vector<real>(tokens);
            const auto drows = memory.matrix<T>(tokens, width);
            const matrix_view<real> dlogits(dweights.data_handle(), tokens, 1);
            expert.backward(ex, kept.in, w.expert, kept.expert, dy_rows, pending, drows, dweights, memory);
            expert.weight_gradients(ex, kept.in, kept.expert, dy_rows, pending, gradients.expert, mode, memory);
            if (!memory.measuring()) {
                fastmoe::for_each(ex, tokens * width, detail::add_to<T>{drows.data_handle(), dx.data_handle()});
                fastmoe::for_each(
                    ex, tokens,
                    detail::sigmoid_backward_in_place<real>{kept.weights.data_handle(), dweights.data_handle()});
            }
            project_input_backward(ex, dlogits, w.gate, dx, write_mode::accumulate, memory);
            project_weights_backward(ex, dlogits, x, gradients.gate, {}, mode, memory);
        });
    }

private:
    template <class T>
    void expects_call(matrix_view<const T> x, const weights<const T>& w, matrix_view<T> y) const
    {
        expects_shape(x, "x (T,D)", y.extent(0), y.extent(1));
        expects_shape(y, "y (T,D)", x.extent(0), x.extent(1));
        expects_shape(w.gate, "weights.gate (1,D)", 1, x.extent(1));
        detail::check_weights(expert, w.expert, 1, x.extent(1), weight_role::weights);
    }

    template <class T, class Executor>
    shared_parts<T, Expert> pass(Executor& ex, matrix_view<const T> x, const weights<const T>& w, matrix_view<T> y,
                                 arena& memory) const
    {
        detail::kept_scope all(memory);
        auto kept = reserve<T>(ex, x, w, memory);
        kept.expert = expert.template reserve_saved<T>(memory, x.extent(0));
        const arena::scope lent(memory);
        const auto rows = memory.matrix<T>(x.extent(0), x.extent(1));
        expert.forward(ex, kept.in, w.expert, kept.expert, rows, memory);
        add(ex, kept, rows, y, memory);
        all.keep();
        return kept;
    }

    /// All tokens as one group, with the gate's values as weights.
    template <class T, class Executor>
    static shared_parts<T, Expert> reserve(Executor& ex, matrix_view<const T> x, const weights<const T>& w, arena& memory)
    {
        using real = accumulate_t<T>;
        const int64_t tokens = x.extent(0);
        const auto kept = detail::reserve_shared<T, Expert>(ex, x, memory);
        project(ex, x, w.gate, vector_view<const real>(), matrix_view<real>(kept.weights.data_handle(), tokens, 1), memory);
        if (!memory.measuring()) fastmoe::for_each(ex, tokens, detail::sigmoid_in_place<real>{kept.weights.data_handle()});
        return kept;
    }

    template <class T, class Executor>
    void add(Executor& ex, const shared_parts<T, Expert>& kept, matrix_view<T> rows, matrix_view<T> y, const arena& memory) const
    {
        if (memory.measuring()) return;
        if (expert.weighs_output())
            fastmoe::for_each_row(ex, rows.extent(0), detail::add_weighted_row<T>{rows, y, kept.in.weights},
                                  {.width = rows.extent(1)});
        else fastmoe::for_each(ex, y.extent(0) * y.extent(1), detail::add_to<T>{rows.data_handle(), y.data_handle()});
    }
};

template <class Expert>
gated_shared_expert(Expert) -> gated_shared_expert<Expert>;

} // namespace fastmoe::inline FASTMOE_ABI
