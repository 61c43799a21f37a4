// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The inner loops of quantile balancing: thresholds of every token and expert, their quantiles, and the bias that follows.
/// Part of bias_update.hpp.
#pragma once

#include <fastmoe/routing/balance.hpp>
#include <fastmoe/routing/rank_threshold.hpp>
#include <fastmoe/routing/weigh.hpp>

namespace fastmoe::inline FASTMOE_ABI::detail {

/// The score that has a key; the least key is of none.
template <class Real>
FASTMOE_HOST_DEVICE constexpr Real score_of_key(order_key<Real> key) noexcept
{
    return ::cuda::std::bit_cast<Real>(key ^ ((key >> (sizeof(Real) * 8 - 1)) & ~no_key<order_key<Real>>));
}

template <class Real>
constexpr int64_t threshold_scratch_bytes(int64_t experts) noexcept
{
    return 2 * experts * static_cast<int64_t>(sizeof(Real)) + 128;
}

/// keys(e,t) orders s_te - alpha_t, so that the greatest is the smallest alpha_t - s_te; no_key for a token that does not
/// count.
template <class Real, class Score>
struct write_thresholds {
    using vectorized = void;
    using key = order_key<Real>;
    matrix_view<const Real> logits; // (T,E)
    const std::uint8_t* mask;       // (T), or null
    const float* bias;              // (E)
    key* keys;                      // (E,T)
    Score score;
    int64_t k;

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t t) const
    {
        const int64_t experts = logits.extent(1), tokens = logits.extent(0);
        const Real* l = logits.data_handle() + t * experts;
        const float* b = bias;
        key* out = keys + t;
        Real* value = team.template scratch<Real>(experts);
        key* order = team.template scratch<key>(experts);
        const bool open = !mask || mask[t] != 0;
        if (open) {
            const auto row = score.row(team, l, experts);
            if (!row.empty()) {
                team.for_each(experts, [=](int64_t e) { value[e] = row.value(l[e]); });
                team.sync();
                Real total = 1;
                if constexpr (std::remove_cvref_t<decltype(row)>::sums_to_one)
                    total = team.reduce(experts, Real(0), adds{}, [=](int64_t e) { return value[e]; });
                team.for_each(experts, [=](int64_t e) { order[e] = ordered(value[e] / total + static_cast<Real>(b[e])); });
                team.sync();
                const Real alpha = score_of_key<Real>(kth_greatest(team, order, experts, k + 1));
                team.for_each(experts, [=](int64_t e) { out[e * tokens] = ordered(value[e] / total - alpha); });
                return;
            }
        }
        team.for_each(experts, [=](int64_t e) { out[e * tokens] = no_key<key>; });
    }
};

/// The tokens that count.
template <class Key>
struct count_thresholds {
    const Key* keys;  // (E,T)
    int64_t* counted; // (1)
    int64_t tokens;

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t) const
    {
        const Key* first = keys;
        const int64_t n = team.reduce(
            tokens, int64_t{0}, adds{}, [=](int64_t t) { return static_cast<int64_t>(first[t] != no_key<Key>); });
        if (team.lane() == 0) *counted = n;
    }
};

struct columns_of {
    int64_t* offsets; // (E)
    int32_t* counts;  // (E)
    int64_t tokens;

    FASTMOE_HOST_DEVICE void operator()(int64_t e) const
    {
        offsets[e] = e * tokens;
        counts[e] = static_cast<int32_t>(tokens);
    }
};

/// How many of n tokens an expert is to get: at least one, if there are any.
FASTMOE_HOST_DEVICE constexpr int64_t fair_share(int64_t n, int64_t k, int64_t experts) noexcept
{
    return (n * k + experts - 1) / experts;
}

struct share_of {
    int64_t* counted; // (2)  tokens of all ranks; the share, written
    int64_t k, experts;

    FASTMOE_HOST_DEVICE void operator()(int64_t) const { counted[1] = fair_share(counted[0], k, experts); }
};

/// bias = values minus their mean, unless a value is not a number: then nothing was counted.
struct center_bias {
    const double* values; // (E)
    float* bias;          // (E)
    int64_t experts;

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t) const
    {
        const double* v = values;
        float* b = bias;
        const double mean =
            team.reduce(experts, 0.0, adds{}, [=](int64_t e) { return v[e]; }) / static_cast<double>(experts);
        if (mean == mean) team.for_each(experts, [=](int64_t e) { b[e] = static_cast<float>(v[e] - mean); });
    }
};

template <class Real>
struct set_bias {
    const order_key<Real>* least; // (E)
    const int64_t* share;         // (1)  0: no token counted
    float* bias;                  // (E)
    int64_t experts;

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t) const
    {
        if (*share == 0) return;
        const order_key<Real>* keys = least;
        float* b = bias;
        const auto value = [=](int64_t e) { return -static_cast<double>(score_of_key<Real>(keys[e])); };
        const double mean = team.reduce(experts, 0.0, adds{}, value) / static_cast<double>(experts);
        team.for_each(experts, [=](int64_t e) { b[e] = static_cast<float>(value(e) - mean); });
    }
};

/// [min b - 1, max b + 1].
struct range_of_bias {
    const float* bias; // (E)
    double* range;     // (2)
    int64_t experts;

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t) const
    {
        const float* b = bias;
        const double most = team.reduce(experts, -infinity<double>, greater_of{}, [=](int64_t e) { return double(b[e]); });
        const double least =
            -team.reduce(experts, -infinity<double>, greater_of{}, [=](int64_t e) { return -double(b[e]); });
        if (team.lane() != 0) return;
        range[0] = least - 1;
        range[1] = most + 1;
    }
};

/// Adds an expert's thresholds to its bins; those outside of the range to the first or the last.
template <class Real>
struct count_bins {
    const order_key<Real>* keys; // (E,T)
    const double* range;         // (2)
    int64_t* histogram;          // (E,bins)
    int64_t tokens, bins;

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t e) const
    {
        if (team.lane() != 0) return;
        const double scale = static_cast<double>(bins) / (range[1] - range[0]);
        for (int64_t t = 0; t < tokens; ++t) {
            const order_key<Real> key = keys[e * tokens + t];
            if (key == no_key<order_key<Real>>) continue;
            const double at = (-static_cast<double>(score_of_key<Real>(key)) - range[0]) * scale;
            const int64_t bin = at > 0 ? (at < static_cast<double>(bins) ? static_cast<int64_t>(at) : bins - 1) : 0;
            ++histogram[e * bins + bin];
        }
    }
};

/// The middle of the bin in which the share of an expert is reached; not a number if nothing was counted.
struct quantile_of_bins {
    const int64_t* histogram; // (E,bins)
    const double* range;      // (2)
    double* values;           // (E)
    int64_t bins, k, experts;

    FASTMOE_HOST_DEVICE void operator()(int64_t e) const
    {
        const int64_t* own = histogram + e * bins;
        int64_t all = 0, reached = 0, bin = 0;
        for (int64_t i = 0; i < bins; ++i) all += own[i];
        const int64_t share = fair_share(all, k, experts);
        for (; bin < bins - 1; ++bin) {
            reached += own[bin];
            if (reached >= share) break;
        }
        const double width = (range[1] - range[0]) / static_cast<double>(bins);
        values[e] = all > 0 ? range[0] + (static_cast<double>(bin) + 0.5) * width : not_a_number<double>;
    }
};

template <class Real, class B>
void expects_quantile(const gate_logits<Real>& in, int64_t k, vector_view<B> bias, bool measuring)
{
    const int64_t experts = bias.extent(0);
    expects(k >= 1 && k < experts, "k", k, "1 to E - 1 = ", experts - 1);
    expects_team_room(threshold_scratch_bytes<Real>(experts), "bias (E)", experts);
    if (measuring) return;
    in.expects_sane();
    expects_shape(in.logits, "logits (T,E)", in.logits.extent(0), experts);
    expects_shape(bias, "bias (E)", experts);
}

inline void expects_bins(matrix_view<int64_t> histogram, int64_t experts, bool measuring)
{
    const int64_t bins = histogram.extent(1);
    expects(bins >= 1, "histogram (E,bins)", bins, "1 bin or more");
    if (!measuring) expects_shape(histogram, "histogram (E,bins)", experts, bins);
}

} // namespace fastmoe::inline FASTMOE_ABI::detail
