// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The inner loops of the router's losses: sums over blocks of tokens, then over blocks, then the values and slopes. Part
/// of balance.hpp.
#pragma once

#include <fastmoe/ops/bucket.hpp>
#include <fastmoe/routing/block_sums.hpp>
#include <fastmoe/routing/score.hpp>

namespace fastmoe::inline FASTMOE_ABI::detail {

/// Blocks of tokens whose sums are taken on their own; none crosses the end of a sequence. Cut by the shape alone.
struct sequence_blocks {
    int64_t length; ///< tokens of a sequence
    int64_t size;   ///< tokens of a block
    int64_t each;   ///< blocks of a sequence
    int64_t count;  ///< blocks in all

    /// For a host's threads, or for a device's warps.
    template <class Executor>
    static constexpr sequence_blocks of(int64_t tokens, int64_t sequences) noexcept
    {
        constexpr int64_t most = has_readable_memory<Executor> ? 512 : 2048, least = has_readable_memory<Executor> ? 64 : 16;
        const int64_t length = sequences > 0 ? tokens / sequences : 0;
        const int64_t even = tokens / most > least ? (tokens + most - 1) / most : least;
        const int64_t size = even < length ? even : length;
        const int64_t each = length > 0 ? (length + size - 1) / size : 0;
        return {length, size, each, each * sequences};
    }
    FASTMOE_HOST_DEVICE constexpr int64_t begin(int64_t b) const noexcept { return b / each * length + b % each * size; }
    FASTMOE_HOST_DEVICE constexpr int64_t end(int64_t b) const noexcept
    {
        const int64_t full = begin(b) + size, last = (b / each + 1) * length;
        return full < last ? full : last;
    }
};

/// Rows of a softmax, whose values serve both losses.
template <class Row>
concept has_log_sum_exp = requires(const Row& row) { row.log_sum_exp(row.peak); };

/// Sums of a block of tokens: p by expert and the squares for z; choices by expert and the tokens that count.
template <class Real, class Score>
struct router_sums {
    using vectorized = void;
    matrix_view<const Real> logits; // (T,E)
    const std::uint8_t* mask;       // (T), or null
    const int32_t* chosen;          // (T,K)
    Real* values;                   // (blocks,E)    of the token at hand
    Real* sums;                     // (blocks,E+1)
    int32_t* counts;                // (blocks,E+1)
    Score score;
    sequence_blocks blocks;
    int64_t k, counted; ///< of the K choices of a token, the first `counted` count
    bool with_z;
    fault_recorder faults;

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t b) const
    {
        const int64_t experts = logits.extent(1), end = blocks.end(b);
        Real* sum = sums + b * (experts + 1);
        int32_t* count = counts + b * (experts + 1);
        team.for_each(experts + 1, [=](int64_t e) { sum[e] = Real(0); });
        team.for_each(experts + 1, [=](int64_t e) { count[e] = 0; });
        team.sync();
        Real squares = 0;
        for (int64_t t = blocks.begin(b); t < end; ++t) {
            if (mask && mask[t] == 0) continue;
            squares += add_token(team, t, values + b * experts, sum);
            if constexpr (is_single_lane<Team>) count_choices(t, count);
        }
        if (team.lane() == 0) sum[experts] = squares;
        if constexpr (!is_single_lane<Team>) count_together(team, blocks.begin(b), end, count);
    }

    /// All choices of the block, by all lanes.
    template <class Team>
    FASTMOE_HOST_DEVICE void count_together(Team& team, int64_t begin, int64_t end, int32_t* count) const
    {
        const int64_t experts = logits.extent(1);
        const auto& self = *this;
        int32_t* own = bucket_room{experts}.of(team, count);
        if (own != count) team.for_each(experts, [=](int64_t e) { own[e] = 0; });
        team.sync();
        team.tally(
            (end - begin) * counted, own,
            [&self, begin](int64_t i) {
                const int64_t t = begin + i / self.counted, c = t * self.k + i % self.counted;
                return self.mask && self.mask[t] == 0 ? -1 : self.expert_of(c);
            },
            [](int64_t, int32_t) {});
        if (own != count) team.for_each(experts, [=](int64_t e) { count[e] = own[e]; });
        const int32_t tokens = team.reduce(
            end - begin, int32_t{0}, adds{}, [&self, begin](int64_t i) { return int32_t{!self.mask || self.mask[begin + i] != 0}; });
        if (team.lane() == 0) count[experts] = tokens;
    }
    /// -1 for none; recorded if it is out of range.
    FASTMOE_HOST_DEVICE int32_t expert_of(int64_t c) const
    {
        const int32_t e = chosen[c];
        if (e >= 0 && e < static_cast<int32_t>(logits.extent(1))) return e;
        if (e != -1) faults.record(fault_kind::expert_out_of_range, c, e);
        return -1;
    }

    FASTMOE_HOST_DEVICE void count_choices(int64_t t, int32_t* count) const
    {
        ++count[logits.extent(1)];
        for (int64_t c = t * k; c < t * k + counted; ++c) {
            const int32_t e = expert_of(c);
            if (e >= 0) ++count[e];
        }
    }

    /// Adds the token's p to sum; returns its square for z.
    template <class Team>
    FASTMOE_HOST_DEVICE Real add_token(Team& team, int64_t t, Real* value, Real* sum) const
    {
        const int64_t experts = logits.extent(1);
        const Real* l = logits.data_handle() + t * experts;
        const auto row = score.row(team, l, experts);
        if (row.empty()) return Real(0);
        team.for_each(experts, [=](int64_t e) { value[e] = row.value(l[e]); });
        team.sync();
        const Real total = team.reduce(experts, Real(0), adds{}, [=](int64_t e) { return value[e]; });
        if (total > Real(0)) team.for_each(experts, [=](int64_t e) { sum[e] += value[e] / total; });
        team.sync();
        if (!with_z) return Real(0);
        Real z;
        if constexpr (has_log_sum_exp<decltype(row)>) {
            z = row.log_sum_exp(total);
        } else {
            const auto soft = softmax_score{}.row(team, l, experts);
            z = soft.log_sum_exp(sum_of_values(team, soft, l, experts));
        }
        return z * z;
    }
};

/// Adds the blocks of each sequence.
template <class Real>
struct add_sequence_blocks {
    using vectorized = void;
    const Real* from; // (blocks,W)
    double* to;       // (Q,stride)
    int64_t each, width, stride;
    int64_t columns; ///< of a task

    FASTMOE_HOST_DEVICE constexpr int64_t parts() const noexcept { return (width + columns - 1) / columns; }

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t task) const
    {
        const int64_t q = task / parts(), begin = task % parts() * columns;
        total_columns(team, from + q * each * width + begin, each, width, width - begin < columns ? width - begin : columns,
                   to + q * stride + begin);
    }
};

/// What sums over tokens have become: choices by expert, tokens, then p by expert, and the squares for z.
struct loss_totals {
    const double* counts; // (E+1)
    const double* sums;   // (E+1)

    FASTMOE_HOST_DEVICE static constexpr loss_totals of(const double* totals, int64_t q, int64_t experts) noexcept
    {
        const double* own = totals + q * 2 * (experts + 1);
        return {own, own + experts + 1};
    }
};

/// slopes[e] = d balance / d p_te = coefficient E f_e / T, and both losses, of one batch. With `accumulated`, f is that of
/// all that was added to it, this call's counts included.
template <class Real>
struct batch_losses {
    const double* totals; // (2E+2)
    int64_t* accumulated; // (E+1), or null
    Real* losses;         // (2)
    Real* slopes;         // (E+1)
    int64_t experts, k;
    double balance, z;

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t) const
    {
        const int64_t n = experts;
        const loss_totals all = loss_totals::of(totals, 0, n);
        int64_t* added = accumulated;
        if (added) team.for_each(n + 1, [=](int64_t e) { added[e] += static_cast<int64_t>(all.counts[e]); });
        team.sync();
        const auto count = [=](int64_t e) { return added ? static_cast<double>(added[e]) : all.counts[e]; };
        const double tokens = all.counts[n], choices = static_cast<double>(k) * count(n);
        const double each = choices > 0 && tokens > 0 ? balance * static_cast<double>(n) / (choices * tokens) : 0;
        Real* slope = slopes;
        team.for_each(n, [=](int64_t e) { slope[e] = static_cast<Real>(each * count(e)); });
        const double loss = team.reduce(n, 0.0, adds{}, [=](int64_t e) { return each * count(e) * all.sums[e]; });
        if (team.lane() != 0) return;
        slope[n] = static_cast<Real>(tokens > 0 ? 2 * z / tokens : 0);
        losses[0] = static_cast<Real>(loss);
        losses[1] = static_cast<Real>(tokens > 0 ? z * all.sums[n] / tokens : 0);
    }
};

/// E sum_e f_e P_e of a sequence, and whether it has a token that counts.
struct sequence_share {
    const double* totals; // (Q,2E+2)
    double* shares;       // (Q,2)
    int64_t experts, k;

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t q) const
    {
        const int64_t n = experts;
        const loss_totals own = loss_totals::of(totals, q, n);
        const double tokens = own.counts[n], choices = static_cast<double>(k) * tokens;
        const double each = choices > 0 ? static_cast<double>(n) / (choices * tokens) : 0;
        const double share = team.reduce(n, 0.0, adds{}, [=](int64_t e) { return each * own.counts[e] * own.sums[e]; });
        if (team.lane() != 0) return;
        shares[2 * q] = share;
        shares[2 * q + 1] = tokens > 0;
    }
};

/// Adds over a rank's sequences: shares, sequences, tokens, squares.
struct add_sequences {
    const double* totals; // (Q,2E+2)
    const double* shares; // (Q,2)
    double* sums;         // (4)
    int64_t experts, sequences;

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t i) const
    {
        const int64_t n = experts, stride = 2 * (n + 1);
        const double* from = i < 2 ? shares + i : totals + (i == 2 ? n : 2 * n + 1);
        const int64_t step = i < 2 ? 2 : stride;
        const double sum = team.reduce(sequences, 0.0, adds{}, [=](int64_t q) { return from[q * step]; });
        if (team.lane() == 0) sums[i] = sum;
    }
};

/// The slopes of a sequence; its first row also writes the losses, for no sequence as well.
template <class Real>
struct sequence_losses {
    const double* totals; // (Q,2E+2)
    const double* sums;   // (4)    over all ranks
    Real* losses;         // (2)
    Real* slopes;         // (Q*E+1)
    int64_t experts, sequences, k;
    double balance, z;

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t q) const
    {
        const int64_t n = experts;
        const double counted = sums[1], tokens = sums[2];
        if (q == 0 && team.lane() == 0) {
            slopes[sequences * n] = static_cast<Real>(tokens > 0 ? 2 * z / tokens : 0);
            losses[0] = static_cast<Real>(counted > 0 ? balance * sums[0] / counted : 0);
            losses[1] = static_cast<Real>(tokens > 0 ? z * sums[3] / tokens : 0);
        }
        if (q >= sequences) return;
        const loss_totals own = loss_totals::of(totals, q, n);
        const double here = own.counts[n], choices = static_cast<double>(k) * here * here * counted;
        const double each = choices > 0 ? balance * static_cast<double>(n) / choices : 0;
        Real* slope = slopes + q * n;
        team.for_each(n, [=](int64_t e) { slope[e] = static_cast<Real>(each * own.counts[e]); });
    }
};

/// With s = slopes: dl_e += row.slope (s_e - <s, p>) / (sum of values) + s_z lse softmax(l)_e, all times loss_scale.
template <class Real, class Score>
struct router_loss_gradient {
    using vectorized = void;
    matrix_view<const Real> logits; // (T,E)
    const std::uint8_t* mask;       // (T), or null
    const Real* slopes;             // (Q*E+1)
    Real* dlogits;                  // (T,E)
    Score score;
    Real scale;
    int64_t length, sequences;
    bool with_balance, with_z;

    /// Room for a row's values; 0 where a team has none, and each pass computes them anew.
    FASTMOE_HOST_DEVICE static constexpr int64_t scratch_bytes(int64_t experts) noexcept
    {
        const int64_t bytes = experts * static_cast<int64_t>(sizeof(Real)) + 64;
        return bytes <= team_scratch_bytes ? bytes : 0;
    }

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t t) const
    {
        if (mask && mask[t] == 0) return;
        const int64_t experts = logits.extent(1);
        const Real* l = logits.data_handle() + t * experts;
        Real* out = dlogits + t * experts;
        Real* held = scratch_bytes(experts) > 0 ? team.template scratch<Real>(experts) : nullptr;
        const auto row = score.row(team, l, experts);
        if constexpr (has_log_sum_exp<decltype(row)>) {
            add(team, row, t, l, out, held, with_balance, with_z);
        } else {
            if (with_balance) add(team, row, t, l, out, held, true, false);
            if (with_z) add(team, softmax_score{}.row(team, l, experts), t, l, out, held, false, true);
        }
    }

    template <class Team, class Row>
    FASTMOE_HOST_DEVICE void add(Team& team, const Row& row, int64_t t, const Real* l, Real* out, Real* held, bool balance,
                                 bool z) const
    {
        if (row.empty()) return;
        const int64_t experts = logits.extent(1);
        if (!held) return add_values(team, row, [row, l](int64_t e) { return row.value(l[e]); }, t, l, out, balance, z);
        team.for_each(experts, [=](int64_t e) { held[e] = row.value(l[e]); });
        team.sync();
        add_values(team, row, [held](int64_t e) { return held[e]; }, t, l, out, balance, z);
        team.sync(); // before the values are written again
    }

    template <class Team, class Row, class Values>
    FASTMOE_HOST_DEVICE void add_values(Team& team, const Row& row, const Values& value, int64_t t, const Real* l, Real* out,
                                        bool balance, bool z) const
    {
        const int64_t experts = logits.extent(1);
        const Real* s = slopes + t / length * experts;
        const Real total = team.reduce(experts, Real(0), adds{}, value), factor = scale;
        if (!(total > Real(0))) return;
        if (balance) {
            const Real dot = team.reduce(experts, Real(0), adds{}, [=](int64_t e) { return s[e] * value(e); });
            const Real mean = dot / total;
            team.for_each(experts, [=](int64_t e) {
                out[e] += row.slope(l[e], value(e)) / total * (factor * (s[e] - mean));
            });
        }
        if constexpr (has_log_sum_exp<Row>) {
            const Real zeta = z ? factor * slopes[sequences * experts] * row.log_sum_exp(total) : Real(0);
            if (z) team.for_each(experts, [=](int64_t e) { out[e] += zeta * (value(e) / total); });
        }
    }
};

} // namespace fastmoe::inline FASTMOE_ABI::detail
