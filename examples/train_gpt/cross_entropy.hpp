// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Cross entropy of the next byte, in nats, with its gradient in the same pass.
#pragma once

#include "train_gpt/team_math.hpp"

namespace train_gpt {

namespace detail {

template <class T, class Real>
struct cross_entropy {
    using vectorized = void;
    int64_t vocabulary;
    const Real* logits;     // (T,V)
    const int32_t* targets; // (T)
    Real scale;
    Real* losses; // (T)
    T* dlogits;   // (T,V), or null: no gradient is wanted

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t t) const
    {
        const Real* z = logits + t * vocabulary;
        const Real top = team.reduce(vocabulary, lowest<Real>, larger{}, [z](int64_t v) { return z[v]; });
        const Real total =
            team.reduce(vocabulary, Real(0), plus{}, [z, top](int64_t v) { return fm::math::exp(z[v] - top); });
        const Real lse = top + fm::math::log(total);
        const int64_t target = targets[t];
        if (team.lane() == 0) losses[t] = lse - z[target];
        if (!dlogits) return;
        T* d = dlogits + t * vocabulary;
        const Real s = scale;
        team.for_each(vocabulary, [=](int64_t v) { d[v] = T(s * fm::math::exp(z[v] - lse)); });
        team.sync();
        if (team.lane() == 0) d[target] = T(s * (fm::math::exp(z[target] - lse) - Real(1)));
    }
};

template <class Real>
struct mean_of {
    using vectorized = void;
    const Real* values; // (N)
    int64_t count, divisor;
    Real* out; // (1)

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t) const
    {
        const Real* v = values;
        const Real total = team.reduce(count, Real(0), plus{}, [v](int64_t i) { return v[i]; });
        if (team.lane() == 0) out[0] = total / Real(divisor);
    }
};

} // namespace detail

/// loss = sum over tokens of -log softmax(logits)[target], divided by a number of tokens: these, or those of all ranks that
/// have some of a batch, so that ranks' losses and gradients add up to the joined batch's.
/// @param targets  in [0, V)                                              // (T)
/// @param losses   overwritten: each token's                              // (T)
/// @param loss     overwritten                                            // (1)
/// @param dlogits  overwritten with the gradient of loss, unless without memory  // (T,V)
/// @param mean_over  0: the tokens that are here
template <class T, class Executor, class Real = accumulate_t<T>>
void cross_entropy(Executor& ex, matrix_view<const type_identity_t<Real>> logits, vector_view<const int32_t> targets,
                   vector_view<type_identity_t<Real>> losses, vector_view<type_identity_t<Real>> loss,
                   matrix_view<T> dlogits, int64_t mean_over = 0)
{
    const int64_t tokens = logits.extent(0), vocabulary = logits.extent(1), divisor = mean_over > 0 ? mean_over : tokens;
    fm::expects_shape(targets, "targets (T)", tokens);
    fm::expects_shape(losses, "losses (T)", tokens);
    fm::expects_shape(loss, "loss (1)", 1);
    fm::for_each_row(ex, tokens,
                     detail::cross_entropy<T, Real>{vocabulary, logits.data_handle(), targets.data_handle(),
                                                    Real(1) / Real(divisor), losses.data_handle(),
                                                    dlogits.data_handle()},
                     {.width = 4 * vocabulary});
    fm::for_each_row(ex, 1, detail::mean_of<Real>{losses.data_handle(), tokens, divisor, loss.data_handle()},
                     {.width = tokens});
}

} // namespace train_gpt
