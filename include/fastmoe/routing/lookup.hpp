// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Assignments that no logit decides: by a table of token ids, and by chance.
#pragma once

#include <fastmoe/exec/random.hpp>
#include <fastmoe/routing/assigned_gate.hpp>

namespace fastmoe::inline FASTMOE_ABI {

namespace detail {

/// Row token_ids(t) of the table. What is out of range, token or expert, is recorded, and dropped.
struct look_up {
    vector_view<const int32_t> token_ids; // (T)
    const std::uint8_t* mask;             // (T), or null
    matrix_view<const int32_t> table;     // (V,K)
    vector_view<int32_t> experts;         // (T*K)
    int64_t total;
    fault_recorder faults;

    FASTMOE_HOST_DEVICE void operator()(int64_t t) const
    {
        const int64_t k = table.extent(1), id = token_ids(t);
        const bool open = !mask || mask[t] != 0, known = id >= 0 && id < table.extent(0);
        if (open && !known) faults.record(fault_kind::token_out_of_range, t, token_ids(t));
        for (int64_t j = 0; j < k; ++j) {
            const int32_t e = open && known ? table(id, j) : -1;
            const bool inside = e >= -1 && e < total;
            if (!inside) faults.record(fault_kind::table_out_of_range, id * k + j, e);
            experts(t * k + j) = inside ? e : -1;
        }
    }
};

/// K different experts of E, uniformly, by Floyd's algorithm (Bentley and Floyd 1987): the j-th draw is uniform on
/// [0, E-K+j], and E-K+j itself where that id was drawn before.
struct draw_experts {
    random_source random;
    const std::uint8_t* mask;     // (T), or null
    vector_view<int32_t> experts; // (T*K)
    int64_t total, k, first_token;

    FASTMOE_HOST_DEVICE void operator()(int64_t t) const
    {
        int32_t* ids = experts.data_handle() + t * k;
        for (int64_t j = 0; j < k; ++j) {
            const auto most = static_cast<std::uint64_t>(total - k + j);
            // 64 bits times the range, the high word: biased by less than E / 2^64.
            const random_words w = random.words(static_cast<std::uint64_t>((first_token + t) * k + j));
            const std::uint64_t high = w.word[0], low = w.word[1], range = most + 1;
            const auto drawn = static_cast<int32_t>((high * range + (low * range >> 32)) >> 32);
            bool before = false;
            for (int64_t i = 0; i < j; ++i) before |= ids[i] == drawn;
            ids[j] = before ? static_cast<int32_t>(most) : drawn;
        }
        if (mask && mask[t] == 0)
            for (int64_t j = 0; j < k; ++j) ids[j] = -1;
    }
};

} // namespace detail

/// The experts of a token are a row of a table, by the token's id (Roller et al. 2021). Needs gate_input::token_ids.
struct hash_table {
    static constexpr bool reads_logits = false;
    static constexpr bool ragged = false;
    matrix_view<const int32_t> table; // (V,K)  memory of the executor; -1: none

    /// @throws invalid_argument if the table has another width; an id outside of it, token or expert, is a fault
    void validate(int64_t, int64_t k) const { expects_shape(table, "assignment.table (V,K)", table.extent(0), k); }

    template <class Executor, class T, class Communicator, class Real>
    void assign(Executor& ex, const gate_input<T>& in, const Communicator&, const assignment<Real>& to, arena& scratch) const
    {
        if (scratch.measuring()) return;
        expects_shape(in.token_ids, "token_ids (T)", to.tokens);
        fastmoe::for_each(
            ex, to.tokens,
            detail::look_up{in.token_ids, pointer_or_null(in.mask), table, to.experts, to.total_experts, ex.faults()});
        ex.deliver_faults();
    }
};

/// K different experts for every token, drawn anew in every step: a baseline. Needs gate_input::random.
struct random_experts {
    static constexpr bool reads_logits = false;
    static constexpr bool ragged = false;

    template <class Executor, class T, class Communicator, class Real>
    void assign(Executor& ex, const gate_input<T>& in, const Communicator&, const assignment<Real>& to, arena& scratch) const
    {
        if (scratch.measuring()) return;
        expects(in.random != nullptr, "random", "a null pointer", "seed and step");
        expects(in.first_token >= 0, "first_token", in.first_token, "zero or more");
        fastmoe::for_each(ex, to.tokens,
                          detail::draw_experts{{in.random, random_stream::choice},
                                               pointer_or_null(in.mask),
                                               to.experts,
                                               to.total_experts,
                                               to.k,
                                               in.first_token});
    }
};

/// Every weight is 1: `hash_gate{.experts = 64, .assignment = {table}}`.
using hash_gate = assigned_gate<hash_table, constant_score, raw_scores>;

/// Every weight is 1/K.
using random_gate = assigned_gate<random_experts, constant_score, renormalize>;

} // namespace fastmoe::inline FASTMOE_ABI
