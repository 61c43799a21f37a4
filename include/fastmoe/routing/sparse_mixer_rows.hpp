// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The rows of a sparse_mixer_gate: to choose, to sample, to weigh, and back. Parts of sparse_mixer_gate.hpp, where the
/// formulas stand.
#pragma once

#include <fastmoe/exec/random.hpp>
#include <fastmoe/routing/select.hpp>
#include <fastmoe/routing/weigh.hpp>

namespace fastmoe::inline FASTMOE_ABI::detail {

/// One round: the experts that are left compete with the greatest of them.
template <class Real>
struct mixer_round {
    Real top;   // the greatest logit left; -Inf: nobody is left who could weigh something
    Real reach; // 2 eps

    /// e^(l - top), or 0 where a logit is out of reach. NaN is not: so 0 / 0, and a top of +Inf, whose
    /// limit is that the +Inf share.
    FASTMOE_HOST_DEVICE Real value(Real l) const noexcept
    {
        const Real distance = l - top, size = l < Real(0) ? -l : l;
        const Real away = (top - l) / (size > top ? size : top);
        const Real power = distance < Real(0) ? math::exp(distance) : (l == top ? Real(1) : Real(0));
        return away > reach || top == -infinity<Real> ? Real(0) : power;
    }
};

/// place[e] = the round in which e is taken, or K.
template <class Team>
FASTMOE_HOST_DEVICE void write_places(Team& team, const int32_t* ids, int64_t k, int64_t experts, int32_t* place)
{
    const auto never = static_cast<int32_t>(k);
    team.for_each(experts, [=](int64_t e) { place[e] = never; });
    team.sync();
    team.for_each(k, [=](int64_t j) {
        if (ids[j] >= 0) place[ids[j]] = static_cast<int32_t>(j);
    });
    team.sync();
}

/// What forward and backward both need of a token: its rounds and their weights.
template <class Real>
struct mixer_token {
    const Real* logits;   // (E)
    const int32_t* ids;   // (K)  as chosen, before capacity
    const int32_t* place; // (E)
    int64_t experts;
    Real reach;
    bool sampled;         // the chosen need not be the greatest

    template <class Team>
    FASTMOE_HOST_DEVICE mixer_round<Real> round(Team& team, int64_t j) const
    {
        constexpr Real least = -infinity<Real>;
        const Real *l = logits, own = logits[ids[j]];
        if (!sampled) return {own == own ? own : least, reach};
        const int32_t* taken = place;
        const Real top = team.reduce(experts, least, greater_of{}, [=](int64_t e) {
            return taken[e] >= j && l[e] == l[e] ? l[e] : least;
        });
        return {top, reach};
    }
    template <class Team>
    FASTMOE_HOST_DEVICE Real sum(Team& team, const mixer_round<Real>& r, int64_t j) const
    {
        const Real* l = logits;
        const int32_t* taken = place;
        const Real total =
            team.reduce(experts, Real(0), adds{}, [=](int64_t e) { return taken[e] >= j ? r.value(l[e]) : Real(0); });
        return total > Real(0) ? total : Real(1);
    }
};

/// The coin of Heun's third-order method: what a sampled choice that is not the greatest weighs of its probability.
struct mixer_coin {
    random_source random; // of the noise stream
    int64_t k, first_token;

    template <class Real>
    FASTMOE_HOST_DEVICE Real factor(int64_t t, int64_t j) const
    {
        const auto u = random.uniform<double>(static_cast<std::uint64_t>((first_token + t) * k + j));
        return u < 0.75 ? Real(1) / Real(3) : Real(1);
    }
};

/// The factor of choice j of token t, uniform over the lanes: 1 for the greatest that is left, ties to the lower id.
template <class Team, class Real>
FASTMOE_HOST_DEVICE Real mixer_factor(Team& team, const mixer_token<Real>& token, const mixer_round<Real>& round,
                                      const mixer_coin& coin, int64_t t, int64_t j)
{
    if (!token.sampled) return Real(1);
    const auto lesser = [](int64_t a, int64_t b) { return b < a ? b : a; };
    const int64_t best = team.reduce(token.experts, token.experts, lesser, [=](int64_t e) {
        return token.place[e] >= j && token.logits[e] == round.top ? e : token.experts;
    });
    return best == token.ids[j] ? Real(1) : coin.factor<Real>(t, j);
}

/// The K greatest logits, best first.
template <class Real>
struct mixer_choose {
    matrix_view<const Real> logits; // (T,E)
    const std::uint8_t* mask;       // (T), or null
    int32_t* experts;               // (T,K)
    int64_t k;

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t t) const
    {
        const Real* l = logits.data_handle() + t * logits.extent(1);
        int32_t* ids = experts + t * k;
        if (!mask || mask[t] != 0) {
            top_k{}(team, plain_logits<Real>{l}, logits.extent(1), k, ids);
            if (l[ids[0]] > -infinity<Real>) return;
            team.sync(); // before the choice is taken back
        }
        team.for_each(k, [ids](int64_t j) { ids[j] = -1; });
    }
};

/// K experts, each drawn from the softmax of its round: the greatest of logit + Gumbel noise, in double.
template <class Real>
struct mixer_sample {
    matrix_view<const Real> logits; // (T,E)
    const std::uint8_t* mask;       // (T), or null
    int32_t* experts;               // (T,K)
    random_source random;           // of the choice stream
    int64_t k, first_token;
    Real reach;

    static constexpr int64_t scratch_bytes(int64_t experts) noexcept
    {
        return experts * static_cast<int64_t>(sizeof(double) + sizeof(int32_t)) + 128;
    }

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t t) const
    {
        constexpr Real least = -infinity<Real>;
        const int64_t all = logits.extent(1);
        const Real* l = logits.data_handle() + t * all;
        int32_t* ids = experts + t * k;
        double* keys = team.template scratch<double>(all);
        int32_t* taken = team.template scratch<int32_t>(all);
        if ((mask && mask[t] == 0) || !(greatest(team, l, all) > least)) {
            team.for_each(k, [ids](int64_t j) { ids[j] = -1; });
            return;
        }
        team.for_each(all, [taken](int64_t e) { taken[e] = 0; });
        team.sync();
        for (int64_t j = 0; j < k; ++j) {
            const Real top = team.reduce(all, least, greater_of{}, [=](int64_t e) {
                return taken[e] == 0 && l[e] == l[e] ? l[e] : least;
            });
            const mixer_round<Real> round{top, reach};
            const auto base = static_cast<std::uint64_t>(((first_token + t) * k + j) * all);
            const random_source source = random;
            team.for_each(all, [=](int64_t e) { keys[e] = key(source, base, round, l[e], e, taken[e] != 0); });
            team.sync();
            const double best = team.reduce(all, -infinity<double>, greater_of{}, [keys](int64_t e) { return keys[e]; });
            const auto lesser = [](int64_t a, int64_t b) { return b < a ? b : a; };
            const int64_t e = team.reduce(all, all, lesser, [=](int64_t i) { return keys[i] == best ? i : all; });
            if (team.lane() == 0) {
                ids[j] = static_cast<int32_t>(e);
                taken[e] = 1;
            }
            team.sync();
        }
    }

private:
    /// logit - top + noise. Far below all of that, where nothing weighs: -Inf before NaN; lower still, what was taken.
    FASTMOE_HOST_DEVICE static double key(const random_source& random, std::uint64_t base, const mixer_round<Real>& round,
                                          Real l, int64_t e, bool taken)
    {
        if (taken) return -infinity<double>;
        if (!(round.value(l) > Real(0))) return l != l ? -2e300 : (l == -infinity<Real> ? -1.5e300 : -1e300);
        const random_words w = random.words(base + static_cast<std::uint64_t>(e));
        const double u = (static_cast<double>(w.word[0]) + 0.5) * 2.3283064365386963e-10; // in (0, 1)
        const double above = l == round.top ? 0 : static_cast<double>(l) - static_cast<double>(round.top);
        return above - std::log(-std::log(u));
    }
};

/// The weights of choices.
template <class Real>
struct mixer_weigh {
    using vectorized = void;
    matrix_view<const Real> logits; // (T,E)
    const int32_t* chosen;          // (T,K)
    int32_t* before;                // (T,K)  a copy for backward, or chosen itself
    Real* weights;                  // (T,K)
    mixer_coin coin;
    int64_t k;
    Real reach;
    bool sampled;

    static constexpr int64_t scratch_bytes(int64_t experts) noexcept
    {
        return experts * static_cast<int64_t>(sizeof(int32_t)) + 64;
    }

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t t) const
    {
        const int64_t all = logits.extent(1);
        const int32_t* ids = chosen + t * k;
        int32_t* copy = before + t * k;
        Real* weight = weights + t * k;
        int32_t* place = team.template scratch<int32_t>(all);
        if (copy != ids) team.for_each(k, [=](int64_t j) { copy[j] = ids[j]; });
        if (ids[0] < 0) {
            team.for_each(k, [weight](int64_t j) { weight[j] = Real(0); });
            return;
        }
        write_places(team, ids, k, all, place);
        const mixer_token<Real> token{logits.data_handle() + t * all, ids, place, all, reach, sampled};
        for (int64_t j = 0; j < k; ++j) {
            const auto round = token.round(team, j);
            const Real share = round.value(token.logits[ids[j]]) / token.sum(team, round, j);
            const Real factor = mixer_factor(team, token, round, coin, t, j);
            if (team.lane() == 0) weight[j] = factor * share;
        }
    }
};

/// With p the softmax of round j and m that of its choice: dl_e += g_j m (1[e is the choice] - p_e), for all that the
/// round had left and within reach.
template <class Real>
struct mixer_row_backward {
    using vectorized = void;
    matrix_view<const Real> logits; // (T,E)
    const int32_t* chosen;          // (T,K)  before capacity
    const int32_t* kept;            // (T,K)  after it
    const Real* dweights;           // (T,K)
    Real* dlogits;                  // (T,E)
    mixer_coin coin;
    int64_t k;
    Real reach;
    bool sampled, rescaled;

    static constexpr int64_t scratch_bytes(int64_t experts, int64_t k) noexcept
    {
        return experts * static_cast<int64_t>(sizeof(int32_t)) + 2 * k * static_cast<int64_t>(sizeof(Real)) + 192;
    }

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t t) const
    {
        const int64_t all = logits.extent(1);
        const int32_t* ids = chosen + t * k;
        Real* out = dlogits + t * all;
        int32_t* place = team.template scratch<int32_t>(all);
        Real* weight = team.template scratch<Real>(k);
        Real* gradient = team.template scratch<Real>(k);
        team.for_each(all, [out](int64_t e) { out[e] = Real(0); });
        if (ids[0] < 0) return;
        write_places(team, ids, k, all, place);
        const mixer_token<Real> token{logits.data_handle() + t * all, ids, place, all, reach, sampled};
        for (int64_t j = 0; rescaled && j < k; ++j) { // only a sum that was kept makes weights depend on each other
            const auto round = token.round(team, j);
            const Real share = round.value(token.logits[ids[j]]) / token.sum(team, round, j);
            const Real factor = mixer_factor(team, token, round, coin, t, j);
            if (team.lane() == 0) weight[j] = factor * share;
        }
        team.sync();
        read_gradient<Team, Real>(team, k, kept + t * k, dweights + t * k, Real(1), rescaled, weight, gradient);
        team.sync();
        for (int64_t j = 0; j < k; ++j) {
            const Real g = gradient[j];
            if (g == Real(0)) continue;
            const auto round = token.round(team, j);
            const Real sum = token.sum(team, round, j), own = g * round.value(token.logits[ids[j]]) / sum;
            const Real* l = token.logits;
            const Real each = own / sum;
            team.for_each(all, [=](int64_t e) { out[e] -= place[e] >= j ? each * round.value(l[e]) : Real(0); });
            team.sync();
            if (team.lane() == 0) out[ids[j]] += own;
            team.sync();
        }
    }
};

} // namespace fastmoe::inline FASTMOE_ABI::detail
