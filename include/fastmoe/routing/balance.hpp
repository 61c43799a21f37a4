// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The losses of a router: what keeps experts evenly used and logits small. Forward, and backward, which adds.
///
///     balance   coefficient * E * sum_e f_e P_e      f_e = c_e / (K T), P_e = mean_t p_te        (Fedus 2021, eq. 4-6)
///     z         coefficient * mean_t (log sum_e exp l_te)^2                                      (ST-MoE, eq. 5)
///
/// p_te = value(e) / (sum of values): the softmax, or s / sum s for other scores; 0 where all values have underflowed. c
/// counts choices before any is dropped for capacity, and has no gradient: it flows through P only. T, c and the means are
/// over all ranks' tokens, summed through the communicator, so that the sum of the ranks' gradients is the gradient of the
/// joined batch. Tokens that the mask takes out count nowhere; those without a finite or +Inf logit count in T and add 0.
/// A row with +Inf adds nothing to z.
#pragma once

#include <fastmoe/comm/communicator.hpp>
#include <fastmoe/routing/balance_sums.hpp>
#include <fastmoe/routing/gate.hpp>

namespace fastmoe::inline FASTMOE_ABI {

/// What c counts: all K choices of a token, so that f_e = c_e / (K T), or its first alone, f_e = c_e / T (GShard,
/// Lepikhin et al. 2020, algorithm 1).
enum class counted_choices : std::uint8_t { all, first };

/// The loss of Switch and GShard; 1 times the coefficient where experts are used evenly.
struct balance_loss {
    double coefficient = 0;
    /// Tokens of a sequence: the loss of each sequence, averaged over all ranks' sequences that have a token which counts
    /// (DeepSeek-V3, eq. 17-20). No sequence lies on two ranks. 0: the loss of the batch.
    int64_t sequence = 0;
    /// The loss of the global batch (Qwen3): every training route adds its counts c and, last, its tokens, of all ranks, and
    /// f is that of the sums. Memory of the executor, set to zero before the first microbatch; empty: f of this batch. To run
    /// a pass again, hand it a copy of the counts as they were before it.
    vector_view<int64_t> accumulated{}; // (E+1)

    counted_choices counts = counted_choices::all;

    /// How many sequences a rank's tokens are.
    /// @throws invalid_argument if sequences do not divide the tokens
    int64_t sequences(int64_t tokens) const
    {
        expects(sequence >= 0, "balance.sequence", sequence, "zero or more");
        if (sequence == 0) return 1;
        expects(tokens % sequence == 0, "balance.sequence", sequence, "a divisor of the ", tokens, " tokens");
        return tokens / sequence;
    }
};

/// The router z-loss.
struct z_loss {
    double coefficient = 0;
};

/// What the losses leave for their backward.
template <class Real>
struct router_losses {
    vector_view<Real> losses; // (2)      balance, z: times their coefficients
    vector_view<Real> slopes; // (Q*E+1)  by sequence: d balance / d p_te; then 2 coefficient / T of z
};

/// @param sequences  Q, see balance_loss::sequences
template <class Real>
router_losses<Real> reserve_router_losses(arena& memory, int64_t experts, int64_t sequences = 1)
{
    return {memory.vector<Real>(2), memory.vector<Real>(sequences * experts + 1)};
}

/// The part of a gate's input that losses read.
template <class Real>
struct gate_logits {
    matrix_view<const Real> logits;       // (T,E)
    vector_view<const std::uint8_t> mask; // (T), or empty

    void expects_sane() const
    {
        expects_shape(logits, "logits (T,E)", logits.extent(0), logits.extent(1));
        if (mask.extent(0) != 0) expects_shape(mask, "mask (T)", logits.extent(0));
    }
};

namespace verbs {
struct router_losses;
struct router_losses_backward;
} // namespace verbs

namespace detail {

inline void expects_coefficients(const balance_loss& balance, const z_loss& z)
{
    const auto sound = [](double c) { return c >= 0 && c < std::numeric_limits<double>::infinity(); };
    expects(sound(balance.coefficient), "balance.coefficient", balance.coefficient, "a finite number from 0 on");
    expects(sound(z.coefficient), "z.coefficient", z.coefficient, "a finite number from 0 on");
    expects(balance.sequence >= 0, "balance.sequence", balance.sequence, "zero or more");
    expects(balance.sequence == 0 || balance.accumulated.extent(0) == 0, "balance.sequence", balance.sequence,
            "0 where counts are accumulated over a global batch");
}

} // namespace detail

template <class Executor>
struct implementation<verbs::router_losses, Executor> {
    template <class Real, class Score, class Communicator>
    static void run(Executor& ex, const Score& score, const gate_logits<Real>& in, vector_view<const int32_t> chosen,
                    int64_t k, const balance_loss& balance, z_loss z, const Communicator& communicator,
                    const router_losses<Real>& out, arena& scratch)
    {
        const int64_t tokens = in.logits.extent(0), experts = in.logits.extent(1), width = experts + 1;
        const int64_t sequences = balance.sequences(tokens);
        const int64_t counted = balance.counts == counted_choices::first && k > 0 ? 1 : k;
        const auto blocks = detail::sequence_blocks::of<Executor>(tokens, sequences);
        const auto values = scratch.matrix<Real>(blocks.count, experts);
        const auto sums = scratch.matrix<Real>(blocks.count, width);
        const auto counts = scratch.matrix<int32_t>(blocks.count, width);
        const auto totals = scratch.vector<double>(sequences * 2 * width);
        const auto shares = scratch.vector<double>(balance.sequence ? 2 * sequences + 4 : 0);
        if (scratch.measuring()) return;
        fastmoe::for_each_row(ex, blocks.count,
                              detail::router_sums<Real, Score>{in.logits, pointer_or_null(in.mask),
                                                               chosen.data_handle(), values.data_handle(),
                                                               sums.data_handle(), counts.data_handle(), score, blocks,
                                                               k, counted, z.coefficient != 0, ex.faults()},
                              {.width = blocks.size * experts,
                               .scratch_bytes = detail::bucket_room{experts}.bytes(),
                               .in_turn = experts <= 1024});
        constexpr int64_t columns = detail::columns_of_team<Executor>;
        double* all = totals.data_handle();
        const detail::add_sequence_blocks<int32_t> add_counts{counts.data_handle(), all, blocks.each, width, 2 * width, columns};
        fastmoe::for_each_row(ex, sequences * add_counts.parts(), add_counts, {.width = columns * blocks.each});
        const detail::add_sequence_blocks<Real> add_sums{sums.data_handle(), all + width, blocks.each, width, 2 * width, columns};
        fastmoe::for_each_row(ex, sequences * add_sums.parts(), add_sums, {.width = columns * blocks.each});
        Real *losses = out.losses.data_handle(), *slopes = out.slopes.data_handle();
        if (balance.sequence == 0) {
            communicator.all_reduce(ex, totals);
            fastmoe::for_each_row(ex, 1,
                                  detail::batch_losses<Real>{all, pointer_or_null(balance.accumulated), losses, slopes,
                                                             experts, counted, balance.coefficient, z.coefficient},
                                  {.width = experts});
            return;
        }
        const auto together = slice(shares, 2 * sequences, 4);
        fastmoe::for_each_row(ex, sequences, detail::sequence_share{all, shares.data_handle(), experts, counted},
                              {.width = experts});
        fastmoe::for_each_row(
            ex, 4, detail::add_sequences{all, shares.data_handle(), together.data_handle(), experts, sequences},
            {.width = sequences});
        communicator.all_reduce(ex, together);
        fastmoe::for_each_row(ex, sequences > 0 ? sequences : 1,
                              detail::sequence_losses<Real>{all, together.data_handle(), losses, slopes, experts,
                                                            sequences, counted, balance.coefficient, z.coefficient},
                              {.width = experts});
    }
};

template <class Executor>
struct implementation<verbs::router_losses_backward, Executor> {
    template <class Real, class Score>
    static void run(Executor& ex, const Score& score, const gate_logits<Real>& in, const balance_loss& balance, z_loss z,
                    vector_view<const Real> slopes, Real loss_scale, matrix_view<Real> dlogits)
    {
        const int64_t tokens = in.logits.extent(0), experts = in.logits.extent(1);
        using gradient = detail::router_loss_gradient<Real, Score>;
        fastmoe::for_each_row(ex, tokens,
                              gradient{in.logits, pointer_or_null(in.mask), slopes.data_handle(), dlogits.data_handle(),
                                       score, loss_scale, balance.sequence ? balance.sequence : tokens,
                                       balance.sequences(tokens), balance.coefficient != 0, z.coefficient != 0},
                              {.width = 8 * experts, .scratch_bytes = gradient::scratch_bytes(experts)});
    }
};

/// Both losses of the router, and what their backward needs.
/// @param chosen  the choices before any is dropped for capacity; -1 counts for none, as does, recorded and thrown as
///                ex.deliver_faults() does, an id out of range; k may be 0                                  // (T*K)
/// @param c       sums over the ranks
/// @param out     overwritten: losses (2) and slopes (Q*E+1), from reserve_router_losses
/// @param scratch taken and given back; on a measuring arena only counted
/// @throws invalid_argument if shapes disagree or a coefficient is not a finite number from 0 on, out_of_memory
template <executor Executor, class Real, class Score, class Communicator>
void router_losses_forward(Executor& ex, const Score& score, const gate_logits<Real>& in,
                           type_identity_t<vector_view<const int32_t>> chosen, int64_t k, const balance_loss& balance,
                           z_loss z, const Communicator& c, const router_losses<Real>& out, arena& scratch)
{
    detail::expects_coefficients(balance, z);
    expects(k >= 0, "k", k, "zero or more");
    const int64_t tokens = in.logits.extent(0), experts = in.logits.extent(1), sequences = balance.sequences(tokens);
    if (balance.accumulated.extent(0) != 0) expects_shape(balance.accumulated, "balance.accumulated (E+1)", experts + 1);
    if (!scratch.measuring()) {
        in.expects_sane();
        expects_shape(chosen, "chosen (T*K)", tokens * k);
        expects_shape(out.losses, "losses (2)", 2);
        expects_shape(out.slopes, "slopes (Q*E+1)", sequences * experts + 1);
    }
    const arena::scope lent(scratch);
    implementation<verbs::router_losses, Executor>::run(ex, score, in, chosen, k, balance, z, c, out, scratch);
    if (!scratch.measuring()) ex.deliver_faults();
}

/// dlogits += loss_scale * the gradient of both losses.
/// @param slopes   what router_losses_forward left                                            // (Q*E+1)
/// @param dlogits  added to                                                                   // (T,E)
/// @throws invalid_argument if shapes disagree
template <executor Executor, class Real, class Score>
void router_losses_backward(Executor& ex, const Score& score, const type_identity_t<gate_logits<Real>>& in,
                            const balance_loss& balance, z_loss z, type_identity_t<vector_view<const Real>> slopes,
                            type_identity_t<Real> loss_scale, matrix_view<Real> dlogits)
{
    detail::expects_coefficients(balance, z);
    in.expects_sane();
    const int64_t tokens = in.logits.extent(0), experts = in.logits.extent(1);
    expects_shape(slopes, "slopes (Q*E+1)", balance.sequences(tokens) * experts + 1);
    expects_shape(dlogits, "dlogits (T,E)", tokens, experts);
    if (balance.coefficient == 0 && z.coefficient == 0) return;
    implementation<verbs::router_losses_backward, Executor>::run(ex, score, in, balance, z, slopes, loss_scale, dlogits);
}

} // namespace fastmoe::inline FASTMOE_ABI
