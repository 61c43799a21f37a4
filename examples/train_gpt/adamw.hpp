// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// AdamW (Loshchilov and Hutter 2019) over one flat buffer, with gradients clipped by their global norm, and the
/// learning rate's schedule. The norm stays on the executor: a step never waits for the host.
#pragma once

#include "train_gpt/team_math.hpp"

namespace train_gpt {

struct adamw_options {
    double beta1 = 0.9, beta2 = 0.95, epsilon = 1e-8;
    double weight_decay = 0.1; ///< of matrices; gains, biases and embeddings of positions do not decay
    double clip = 1.0;         ///< largest norm of the whole gradient; 0 does not clip
};

/// Rises linearly over the warm-up, then falls on a cosine to a tenth at the last step (Loshchilov and Hutter 2017).
struct learning_rate_schedule {
    double peak = 3e-3;
    int64_t warmup = 0, steps = 1;
    double floor = 0.1; ///< share of the peak that is left at the end

    /// For step 0, 1, ... of `steps`.
    double at(int64_t step) const
    {
        if (step < warmup) return peak * double(step + 1) / double(warmup);
        const double span = double(steps - warmup > 1 ? steps - warmup - 1 : 1);
        const double done = double(step - warmup) / span;
        const double cosine = 0.5 * (1 + std::cos(3.14159265358979323846 * (done < 1 ? done : 1)));
        return peak * (floor + (1 - floor) * cosine);
    }
};

namespace detail {

inline constexpr int64_t norm_span = 4096; // elements a team squares; fixed, so that the sum is too

template <class Real>
struct squares_of_span {
    using vectorized = void;
    const Real* values; // (N)
    int64_t count;
    Real* partial; // (spans)

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t s) const
    {
        const Real* v = values + s * norm_span;
        const int64_t n = count - s * norm_span < norm_span ? count - s * norm_span : norm_span;
        const Real total = team.reduce(n, Real(0), plus{}, [v](int64_t i) { return v[i] * v[i]; });
        if (team.lane() == 0) partial[s] = total;
    }
};

template <class Real>
struct root_of_sum {
    const Real* partial; // (spans)
    int64_t count;
    Real* out; // (1)

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t) const
    {
        const Real* p = partial;
        const Real total = team.reduce(count, Real(0), plus{}, [p](int64_t i) { return p[i]; });
        if (team.lane() == 0) out[0] = std::sqrt(total);
    }
};

template <class Real>
struct adamw_update {
    using vectorized = void;
    Real *parameter, *first, *second; // (N)
    const Real* gradient;             // (N)
    const Real* norm;                 // (1)
    Real beta1, beta2, epsilon, rate, unbias1, unbias2, decay, clip;
    int64_t decayed;

    FASTMOE_HOST_DEVICE void operator()(int64_t i) const
    {
        const Real n = *norm;
        const Real shrink = clip > Real(0) && n > clip ? clip / n : Real(1);
        const Real g = gradient[i] * shrink;
        const Real m = beta1 * first[i] + (Real(1) - beta1) * g;
        const Real v = beta2 * second[i] + (Real(1) - beta2) * g * g;
        const Real step = m * unbias1 / (std::sqrt(v * unbias2) + epsilon);
        const Real p = parameter[i] - rate * (step + (i < decayed ? decay : Real(0)) * parameter[i]);
        first[i] = m;
        second[i] = v;
        parameter[i] = p;
    }
};

} // namespace detail

/// norm = the root of the sum of squares, in an order that no thread count changes.
/// @param norm     overwritten                                            // (1)
/// @param scratch  taken and given back; on a measuring arena only counted
template <class Real, class Executor>
void global_norm(Executor& ex, vector_view<const type_identity_t<Real>> values, vector_view<Real> norm,
                 fm::arena& scratch)
{
    const int64_t mark = scratch.used(), n = values.extent(0), spans = (n + detail::norm_span - 1) / detail::norm_span;
    const auto partial = scratch.vector<Real>(spans);
    if (!scratch.measuring()) {
        fm::for_each_row(ex, spans, detail::squares_of_span<Real>{values.data_handle(), n, partial.data_handle()},
                         {.width = detail::norm_span});
        fm::for_each_row(ex, 1, detail::root_of_sum<Real>{partial.data_handle(), spans, norm.data_handle()},
                         {.width = spans});
    }
    scratch.rewind(mark);
}

/// What AdamW keeps of every parameter.
template <class Real>
struct adamw_state {
    vector_view<Real> parameter; // (N)  the master copy
    vector_view<Real> first;     // (N)  mean of gradients
    vector_view<Real> second;    // (N)  mean of their squares
};

/// One step, the `step`-th counted from 0.
/// @param norm     of the gradient, from global_norm                      // (1)
/// @param decayed  elements [0, decayed) decay
/// @param state    updated
template <class Real, class Executor>
void adamw(Executor& ex, const adamw_options& o, double rate, int64_t step,
           vector_view<const type_identity_t<Real>> gradient, vector_view<const type_identity_t<Real>> norm,
           int64_t decayed, const adamw_state<Real>& state)
{
    const int64_t n = state.parameter.extent(0);
    fm::expects_shape(gradient, "gradient (N)", n);
    fm::expects_shape(norm, "norm (1)", 1);
    const double unbias1 = 1 / (1 - std::pow(o.beta1, double(step + 1)));
    const double unbias2 = 1 / (1 - std::pow(o.beta2, double(step + 1)));
    fm::for_each(ex, n,
                 detail::adamw_update<Real>{state.parameter.data_handle(), state.first.data_handle(),
                                            state.second.data_handle(), gradient.data_handle(), norm.data_handle(),
                                            Real(o.beta1), Real(o.beta2), Real(o.epsilon), Real(rate), Real(unbias1),
                                            Real(unbias2), Real(o.weight_decay), Real(o.clip), decayed});
}

} // namespace train_gpt
