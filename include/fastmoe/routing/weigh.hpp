// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// What a token's choices weigh, and the gradient of that: the same for choices that a score has picked and for those
/// that an assignment has given. Second half of a gate, forward and backward.
///
///     weight[k] = scale * value(chosen k) / divisor     the sum over the chosen, over all, or 1, as the policies say
///
/// With v the chosen values, d the divisor and g the gradient of the weights before capacity, times scale:
///
///     dv[e] = ([e = chosen k] g[k] - (<g, v> / d) dd / dv[e]) / d      dd / dv is 1 in a sum, (v / d)^(p-1) in a p-norm
///     dl[e] = row.slope dv[e]
///
/// A choice that was dropped afterwards is constant. Rescaled weights are w[k] S / R, with S the sum of the magnitudes of
/// all that were chosen and R that of the kept; with m = <g, v> / R over the kept, their g[k] becomes
///
///     (g[k] - m) S / R + m                 and m for those that were dropped
///
/// No sum is inverted before it meets a value that it bounds, so sums that are subnormal do no harm.
#pragma once

#include <fastmoe/exec/executor.hpp>
#include <fastmoe/routing/routing.hpp>
#include <fastmoe/routing/divisor.hpp>

namespace fastmoe::inline FASTMOE_ABI {

namespace verbs {
struct weigh;
struct weigh_backward;
} // namespace verbs

namespace detail {

/// Lets a policy refuse a shape that it cannot serve, by a member validate(experts, k).
template <class Policy>
void check_policy(const Policy& policy, int64_t experts, int64_t k)
{
    if constexpr (requires { policy.validate(experts, k); }) policy.validate(experts, k);
}

/// Refuses what a team has no scratch for, before anything is written.
inline void expects_team_room(int64_t bytes, const char* argument, int64_t value)
{
    expects(bytes <= team_scratch_bytes, argument, value, "less: a team would need ", bytes, " bytes of scratch and has ",
            team_scratch_bytes);
}

/// What a team needs to turn the gradients of up to `most` weights into those of logits.
template <class Real>
constexpr int64_t weigh_scratch_bytes(int64_t most) noexcept
{
    return 2 * most * static_cast<int64_t>(sizeof(Real)) + 128;
}

/// K choices of every token.
struct fixed_choices {
    int64_t k;

    FASTMOE_HOST_DEVICE constexpr int64_t begin(int64_t t) const noexcept { return t * k; }
    FASTMOE_HOST_DEVICE constexpr int64_t end(int64_t t) const noexcept { return (t + 1) * k; }
};

/// The quotient first: the inverse of a subnormal divisor is infinite.
template <class Real>
FASTMOE_HOST_DEVICE constexpr Real weight_of(Real value, Real divisor, Real scale) noexcept
{
    return value / divisor * scale;
}

/// What rescaling after a drop did to a token's weights.
template <class Real>
struct growth {
    bool any;             ///< whether they grew
    Real all, kept, mean; ///< S, R and m at the top of this file
};

/// Turns n chosen values into weights, in place. All zeros stay zeros.
/// @param n  choices of the token, dropped ones included with value 0
template <class Team, class Weigh, class Row, class Real>
FASTMOE_HOST_DEVICE void divide_values(Team& team, const Weigh& weigh, const Row& row, const Real* logits, int64_t experts,
                                       Real* values, int64_t n, Real scale)
{
    team.sync();
    const Real divisor = division_of(team, weigh, row, logits, experts, values, n).divisor;
    team.sync(); // every lane has read the values
    team.for_each(n, [=](int64_t j) { values[j] = weight_of(values[j], divisor, scale); });
}

/// Weighs choices that are given.
template <class Real, class Score, class Weigh>
struct weigh_given {
    using vectorized = void;
    matrix_view<const Real> logits; // (T,E)
    routing<Real> route;            // experts are read, weights written
    Score score;
    Weigh weigh;
    Real scale;

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t t) const
    {
        const int64_t begin = route.begin(t), n = route.end(t) - begin, all = route.total_experts;
        const int32_t* ids = route.experts.data_handle() + begin;
        Real* weight = route.weights.data_handle() + begin;
        const int32_t any = team.reduce(n, int32_t{-1}, greater_of{}, [=](int64_t j) { return ids[j]; });
        if (any < 0) {
            team.for_each(n, [=](int64_t j) { weight[j] = Real(0); });
            return;
        }
        const Real* l = logits.data_handle() + t * all;
        const auto row = score.row(team, l, all);
        team.for_each(n, [=](int64_t j) { weight[j] = ids[j] >= 0 ? row.value(l[ids[j]]) : Real(0); });
        divide_values(team, weigh, row, l, all, weight, n, scale);
    }
};

/// The gradient of a token's weights as they were before a choice was dropped, times scale.
/// @param stays     -1 where a choice was dropped                                               // (n)
/// @param given     the gradient of what is left; of a dropped choice not read                  // (n)
/// @param rescaled  whether what is left has grown to the sum that was
/// @param value     the weights before, up to a factor that the token shares                    // (n)
/// @param gradient  overwritten; lanes see their own elements until the next sync               // (n)
template <class Team, class Real>
FASTMOE_HOST_DEVICE void read_gradient(Team& team, int64_t n, const int32_t* stays, const Real* given, Real scale,
                                       bool rescaled, const Real* value, Real* gradient)
{
    team.for_each(n, [=](int64_t j) { gradient[j] = stays[j] >= 0 ? scale * given[j] : Real(0); });
    if (!rescaled) return;
    team.sync();
    const auto left = [=](int64_t j) { return stays[j] >= 0 ? value[j] : Real(0); };
    const Real sum = team.reduce(n, Real(0), adds{}, [=](int64_t j) { return value[j]; });
    const Real rest = team.reduce(n, Real(0), adds{}, left);
    const Real dot = team.reduce(n, Real(0), adds{}, [=](int64_t j) { return gradient[j] * value[j]; });
    team.sync();
    if (!(rest > Real(0))) return;
    team.for_each(n, [=](int64_t j) {
        const Real own = stays[j] >= 0 ? sum * ((gradient[j] - dot / rest) / rest) : Real(0); // sum / rest may overflow
        gradient[j] = own + dot / rest;
    });
}

/// See the top of this file.
template <class Real, class Score, class Weigh, class Range>
struct weigh_row_backward {
    using vectorized = void;
    using real = Real;
    matrix_view<const Real> logits; // (T,E)
    const int32_t* chosen;          // (C)    before anything was dropped
    const int32_t* kept;            // (C)    after it
    const Real* dweights;           // (C)
    Real* dlogits;                  // (T,E)
    Range range;
    Score score;
    Weigh weigh;
    Real scale;
    bool rescaled;

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t t) const
    {
        const int64_t all = logits.extent(1), begin = range.begin(t), n = range.end(t) - begin;
        const int32_t* ids = chosen + begin;
        Real* out = dlogits + t * all;
        const int32_t any = team.reduce(n, int32_t{-1}, greater_of{}, [=](int64_t j) { return ids[j]; });
        if (any < 0) { // a dropped token, or a masked one
            team.for_each(all, [=](int64_t e) { out[e] = Real(0); });
            return;
        }
        Real* value = team.template scratch<Real>(n);
        Real* gradient = team.template scratch<Real>(n);
        const Real* l = logits.data_handle() + t * all;
        const auto row = score.row(team, l, all);
        team.for_each(n, [=](int64_t j) { value[j] = ids[j] >= 0 ? row.value(l[ids[j]]) : Real(0); });
        read_gradient(team, begin, n, gradient);
        team.sync();
        const auto by = division_of(team, weigh, row, l, all, value, n);
        const Real divisor = by.divisor;
        const growth<Real> grown = growth_of(team, begin, n, value, gradient, divisor);
        const int32_t* stays = kept + begin;
        const Real inverse = grown.any ? grown.all / divisor : Real(0); // S / d
        Real common = 0;
        if (by.of_all != Real(0) || by.of_chosen != Real(0))
            common = grown.any ? grown.mean * inverse : team.reduce(n, Real(0), adds{}, [=](int64_t j) {
                return gradient[j] * (value[j] / divisor);
            });
        const Real shared = common * by.of_all;
        if (by.of_all != Real(0))
            team.for_each(all, [=](int64_t e) { out[e] = -shared * (row.slope(l[e], row.value(l[e])) / divisor); });
        else team.for_each(all, [=](int64_t e) { out[e] = Real(0); });
        team.sync();
        team.for_each(n, [=](int64_t j) {
            const int64_t e = ids[j];
            if (e < 0) return;
            const Real slope = row.slope(l[e], value[j]), mean = value[j] < Real(0) ? -grown.mean : grown.mean;
            const Real moved = common * (by.of_all + by.slope(value[j]));
            const Real own = (slope / divisor) * ((grown.any ? mean : gradient[j]) - moved);
            out[e] = grown.any && stays[j] >= 0 ? own + (slope / grown.kept) * inverse * (gradient[j] - mean) : own;
        });
    }

    /// The gradient of the weights that are left, times scale; 0 for the dropped.
    template <class Team>
    FASTMOE_HOST_DEVICE void read_gradient(Team& team, int64_t begin, int64_t n, Real* gradient) const
    {
        const int32_t* stays = kept + begin;
        const Real* given = dweights + begin;
        const Real factor = scale;
        team.for_each(n, [=](int64_t j) { gradient[j] = stays[j] >= 0 ? factor * given[j] : Real(0); });
    }

    /// Weights grew if one was dropped and what is left is not all 0, as the forward pass computed it.
    template <class Team>
    FASTMOE_HOST_DEVICE growth<Real> growth_of(Team& team, int64_t begin, int64_t n, const Real* value,
                                               const Real* gradient, Real divisor) const
    {
        if (!rescaled) return {};
        const int32_t *ids = chosen + begin, *stays = kept + begin;
        const Real factor = scale;
        const auto size = [=](int64_t j) { return value[j] < Real(0) ? -value[j] : value[j]; };
        const int32_t lost = team.reduce(
            n, int32_t{0}, greater_of{}, [=](int64_t j) { return static_cast<int32_t>(ids[j] >= 0 && stays[j] < 0); });
        const int32_t left = team.reduce(n, int32_t{0}, greater_of{}, [=](int64_t j) {
            return static_cast<int32_t>(stays[j] >= 0 && weight_of(value[j], divisor, factor) != Real(0));
        });
        if (lost == 0 || left == 0) return {};
        const Real sum = team.reduce(n, Real(0), adds{}, size);
        const Real rest = team.reduce(n, Real(0), adds{}, [=](int64_t j) { return stays[j] >= 0 ? size(j) : Real(0); });
        const Real mean = team.reduce(n, Real(0), adds{}, [=](int64_t j) {
            return stays[j] >= 0 ? gradient[j] * (value[j] / rest) : Real(0);
        });
        return {true, sum, rest, mean};
    }
};

} // namespace detail

template <class Executor>
struct implementation<verbs::weigh, Executor> {
    template <class Functor>
    static void run(Executor& ex, const Functor& f)
    {
        fastmoe::for_each_row(ex, f.route.tokens, f, {.width = f.route.total_experts});
    }
};

template <class Executor>
struct implementation<verbs::weigh_backward, Executor> {
    template <class Functor>
    static void run(Executor& ex, const Functor& f, int64_t most)
    {
        const int64_t bytes = detail::weigh_scratch_bytes<typename Functor::real>(most);
        fastmoe::for_each_row(ex, f.logits.extent(0), f, {.width = 2 * f.logits.extent(1), .scratch_bytes = bytes});
    }
};

namespace detail {

/// weights of given choices; a choice of -1 weighs 0.
/// @param logits  (T,E)
/// @param route   experts are read, weights overwritten
template <class Executor, class Real, class Score, class Weigh>
void weigh(Executor& ex, const Score& score, const Weigh& policy, double scale, matrix_view<const Real> logits,
           const routing<Real>& route)
{
    implementation<verbs::weigh, Executor>::run(
        ex, weigh_given<Real, Score, Weigh>{logits, route, score, policy, static_cast<Real>(scale)});
}

/// dlogits = the gradient of <dweights, weights>.
/// @param chosen    before anything was dropped                                                 // (C)
/// @param kept      after it; -1 where a choice was                                             // (C)
/// @param rescaled  whether the weights of the kept have grown to the sum that was
/// @param dlogits   overwritten                                                                 // (T,E)
/// @param most      the most choices that a token can have
template <class Executor, class Real, class Score, class Weigh, class Range>
void weigh_backward(Executor& ex, const Score& score, const Weigh& policy, double scale, matrix_view<const Real> logits,
                    const Range& range, vector_view<const int32_t> chosen, vector_view<const int32_t> kept, bool rescaled,
                    type_identity_t<vector_view<const Real>> dweights, type_identity_t<matrix_view<Real>> dlogits,
                    int64_t most)
{
    using row = weigh_row_backward<Real, Score, Weigh, Range>;
    implementation<verbs::weigh_backward, Executor>::run(
        ex,
        row{logits, chosen.data_handle(), kept.data_handle(), dweights.data_handle(), dlogits.data_handle(), range, score,
            policy, static_cast<Real>(scale), rescaled},
        most);
}

} // namespace detail

} // namespace fastmoe::inline FASTMOE_ABI
