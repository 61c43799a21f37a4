// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Balance without a loss: the bias that a score is chosen by moves once a global batch, by the sign of what an expert
/// lacks, or to the quantile that would have balanced the batch. No gradient flows through it.
#pragma once

#include <fastmoe/comm/communicator.hpp>
#include <fastmoe/routing/balance.hpp>
#include <fastmoe/routing/quantile.hpp>

namespace fastmoe::inline FASTMOE_ABI {

/// What is taken from every update of a bias.
enum class bias_center : std::uint8_t {
    nothing, ///< DeepSeek-V3
    mean,    ///< the mean of the updates, so that the sum of the bias stays (torchtitan)
};

/// b_e += rate * sign(mean c - c_e) (DeepSeek-V3, sec. 2.1.2; Wang et al. 2024, algorithm 1).
struct bias_update {
    double rate = 1e-3;
    bias_center center = bias_center::nothing;
};

namespace verbs {
struct update_bias;
struct balance_quantiles;
} // namespace verbs

namespace detail {

/// mean c - c_e has the sign of the sum of c minus E c_e, in integers.
struct move_bias {
    const int64_t* counts; // (E)
    float* bias;           // (E)
    int64_t experts;
    double rate;
    bool centered;

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t) const
    {
        const int64_t* c = counts;
        const int64_t n = experts, all = team.reduce(n, int64_t{0}, adds{}, [=](int64_t e) { return c[e]; });
        const auto sign = [=](int64_t e) {
            return static_cast<int64_t>(all > n * c[e]) - static_cast<int64_t>(all < n * c[e]);
        };
        const int64_t ups = team.reduce(n, int64_t{0}, adds{}, sign);
        const double step = rate, mean = centered ? static_cast<double>(ups) / static_cast<double>(n) : 0;
        float* b = bias;
        team.for_each(n, [=](int64_t e) {
            b[e] = static_cast<float>(static_cast<double>(b[e]) + step * (static_cast<double>(sign(e)) - mean));
        });
    }
};

} // namespace detail

template <class Executor>
struct implementation<verbs::update_bias, Executor> {
    static void run(Executor& ex, const bias_update& how, vector_view<const int64_t> counts, vector_view<float> bias)
    {
        fastmoe::for_each_row(ex, 1,
                              detail::move_bias{counts.data_handle(), bias.data_handle(), bias.extent(0), how.rate,
                                                how.center == bias_center::mean},
                              {.width = bias.extent(0)});
    }
};

template <class Executor>
struct implementation<verbs::balance_quantiles, Executor> {
    template <class Real, class Score, class Communicator>
    static void exact(Executor& ex, const Score& score, const gate_logits<Real>& in, int64_t k, const Communicator& c,
                      vector_view<float> bias, arena& scratch)
    {
        using key = detail::order_key<Real>;
        const int64_t tokens = in.logits.extent(0), experts = bias.extent(0);
        const auto keys = scratch.matrix<key>(experts, tokens);
        const auto offsets = scratch.vector<int64_t>(experts);
        const auto counts = scratch.vector<int32_t>(experts);
        const auto least = scratch.vector<key>(experts);
        const auto counted = scratch.vector<int64_t>(2); // tokens, and how many of them an expert is to get
        const bool live = !scratch.measuring();
        if (live) {
            fastmoe::for_each_row(
                ex, tokens,
                detail::write_thresholds<Real, Score>{in.logits, pointer_or_null(in.mask), bias.data_handle(),
                                                      keys.data_handle(), score, k},
                {.width = 8 * experts, .scratch_bytes = detail::threshold_scratch_bytes<Real>(experts)});
            fastmoe::for_each_row(ex, 1,
                                  detail::count_thresholds<key>{keys.data_handle(), counted.data_handle(), tokens},
                                  {.width = tokens});
            c.all_reduce(ex, slice(counted, 0, 1));
            fastmoe::for_each(ex, experts, detail::columns_of{offsets.data_handle(), counts.data_handle(), tokens});
            fastmoe::for_each(ex, 1, detail::share_of{counted.data_handle(), k, experts});
        }
        const int64_t* share = live ? counted.data_handle() + 1 : nullptr;
        const detail::grouped_keys<key> columns{keys.data_handle(), offsets.data_handle(), counts.data_handle(), experts};
        detail::kth_over_ranks(ex, columns, share, c, least, tokens, scratch);
        if (live)
            fastmoe::for_each_row(ex, 1,
                                  detail::set_bias<Real>{least.data_handle(), share, bias.data_handle(), experts},
                                  {.width = experts});
    }

    template <class Real, class Score>
    static void count(Executor& ex, const Score& score, const gate_logits<Real>& in, int64_t k,
                      vector_view<const float> bias, matrix_view<int64_t> histogram, arena& scratch)
    {
        using key = detail::order_key<Real>;
        const int64_t tokens = in.logits.extent(0), experts = bias.extent(0);
        const auto keys = scratch.matrix<key>(experts, tokens);
        const auto range = scratch.vector<double>(2);
        if (scratch.measuring()) return;
        fastmoe::for_each_row(ex, tokens,
                              detail::write_thresholds<Real, Score>{in.logits, pointer_or_null(in.mask),
                                                                    bias.data_handle(), keys.data_handle(), score, k},
                              {.width = 8 * experts, .scratch_bytes = detail::threshold_scratch_bytes<Real>(experts)});
        fastmoe::for_each_row(ex, 1, detail::range_of_bias{bias.data_handle(), range.data_handle(), experts},
                              {.width = experts});
        fastmoe::for_each_row(ex, experts,
                              detail::count_bins<Real>{keys.data_handle(), range.data_handle(), histogram.data_handle(),
                                                       tokens, histogram.extent(1)},
                              {.width = 4 * tokens});
    }

    template <class Communicator>
    static void from_histogram(Executor& ex, int64_t k, const Communicator& c, matrix_view<int64_t> histogram,
                               vector_view<float> bias, arena& scratch)
    {
        const int64_t experts = bias.extent(0), bins = histogram.extent(1);
        const auto range = scratch.vector<double>(2);
        const auto values = scratch.vector<double>(experts);
        if (scratch.measuring()) return;
        c.all_reduce(ex, vector_view<int64_t>(histogram.data_handle(), experts * bins));
        fastmoe::for_each_row(ex, 1, detail::range_of_bias{bias.data_handle(), range.data_handle(), experts},
                              {.width = experts});
        fastmoe::for_each(ex, experts,
                          detail::quantile_of_bins{histogram.data_handle(), range.data_handle(), values.data_handle(),
                                                   bins, k, experts});
        fastmoe::for_each_row(ex, 1, detail::center_bias{values.data_handle(), bias.data_handle(), experts},
                              {.width = experts});
    }
};

/// Moves the bias of a score by the sign of what each expert lacks.
/// @param counts  choices of each expert in the global batch, of all ranks and microbatches: count_choices,
///                then all_reduce                                                              // (E)
/// @param bias    added to                                                                     // (E)
/// @throws invalid_argument if the rate is negative or not finite, or shapes disagree
template <executor Executor>
void update_bias(Executor& ex, const bias_update& how, type_identity_t<vector_view<const int64_t>> counts,
                 vector_view<float> bias)
{
    expects(how.rate >= 0 && how.rate - how.rate == 0, "bias_update.rate", how.rate, "a finite number from 0 on");
    expects_shape(bias, "bias (E)", bias.extent(0));
    expects_shape(counts, "counts (E)", bias.extent(0));
    implementation<verbs::update_bias, Executor>::run(ex, how, counts, bias);
}

/// Sets the bias so that, had nothing else changed, each expert would have got the share K/E of the tokens (quantile
/// balancing): with alpha_t the (K+1)-th greatest s_te + b_e, b_e becomes the ceil(T K / E)-th smallest alpha_t - s_te over
/// all ranks' tokens, minus the mean over experts. Without tokens the bias stays. Masked tokens, and those without a finite
/// or +Inf logit, do not count.
/// @param score    its bias is not looked at: s is the score that weights are made of
/// @param bias     read and overwritten                                                        // (E)
/// @param scratch  taken and given back; on a measuring arena only counted
/// @throws invalid_argument if shapes disagree, if k is not 1 to E-1, or E is beyond a team's room; out_of_memory
template <executor Executor, class Real, class Score, class Communicator>
void balance_by_quantile(Executor& ex, const Score& score, const gate_logits<Real>& in, int64_t k, const Communicator& c,
                         vector_view<float> bias, arena& scratch)
{
    detail::expects_quantile<Real>(in, k, bias, scratch.measuring());
    const arena::scope lent(scratch);
    implementation<verbs::balance_quantiles, Executor>::exact(ex, score, in, k, c, bias, scratch);
}

/// The histogram form, step one, for every microbatch: counts alpha_t - s_te in equal bins over [min b - 1, max b + 1],
/// where scores between 0 and 1 put them. 1000 bins are customary.
/// @param bias       as the choice saw it                                                      // (E)
/// @param histogram  added to; set it to zero before the first microbatch                      // (E,bins)
/// @throws as balance_by_quantile
template <executor Executor, class Real, class Score>
void count_quantiles(Executor& ex, const Score& score, const gate_logits<Real>& in, int64_t k,
                     type_identity_t<vector_view<const float>> bias, matrix_view<int64_t> histogram, arena& scratch)
{
    detail::expects_quantile<Real>(in, k, bias, scratch.measuring());
    detail::expects_bins(histogram, bias.extent(0), scratch.measuring());
    const arena::scope lent(scratch);
    implementation<verbs::balance_quantiles, Executor>::count(ex, score, in, k, bias, histogram, scratch);
}

/// Step two, once a global batch: b_e becomes the middle of the bin in which the K/E quantile lies, minus the mean over
/// experts.
/// @param histogram  what count_quantiles added up with this bias; becomes the sum over the ranks  // (E,bins)
/// @param bias       read and overwritten                                                      // (E)
/// @throws as balance_by_quantile
template <executor Executor, class Communicator>
void balance_by_histogram(Executor& ex, int64_t k, const Communicator& c, matrix_view<int64_t> histogram,
                          vector_view<float> bias, arena& scratch)
{
    const int64_t experts = bias.extent(0);
    expects(k >= 1 && k < experts, "k", k, "1 to E - 1 = ", experts - 1);
    if (!scratch.measuring()) expects_shape(bias, "bias (E)", experts);
    detail::expects_bins(histogram, experts, scratch.measuring());
    const arena::scope lent(scratch);
    implementation<verbs::balance_quantiles, Executor>::from_histogram(ex, k, c, histogram, bias, scratch);
}

} // namespace fastmoe::inline FASTMOE_ABI
