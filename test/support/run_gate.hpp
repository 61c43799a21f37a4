// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// One gate, forward and backward, with everything poisoned first and a workspace of exactly the size asked for.
#pragma once

#include <doctest/doctest.h>

#include <vector>

#include <fastmoe/comm/self.hpp>
#include <fastmoe/routing/gate.hpp>

#include "executors.hpp"
#include "poison.hpp"
#include "warps.hpp"

/// The executors with the two types that logits come in; teams of a GPU's shape in float, and where there is a GPU its own.
#if defined(FASTMOE_TEST_CUDA)
#define FASTMOE_LOGIT_CELLS                                                                                           \
    ::support::cell<::fastmoe::host_executor, double>, ::support::cell<::fastmoe::cuda_executor, double>,             \
        ::support::cell<::fastmoe::cuda_executor, float>
#else
#define FASTMOE_LOGIT_CELLS                                                                                           \
    ::support::cell<::fastmoe::host_executor, double>, ::support::cell<::fastmoe::host_executor, float>,              \
        ::support::cell<::support::lanes, double>, ::support::cell<::support::warps_or_lanes, float>,                 \
        ::support::cell<::support::late, float>
#endif

namespace support {

/// What a gate may look at besides logits and mask.
struct gate_extras {
    std::vector<std::int32_t> token_ids = {};
    std::vector<std::uint64_t> seed_and_step = {};
    std::int64_t first_token = 0;
};

/// For gates without parameters of their own.
template <class Real, class Gate, class Executor>
struct gate_run {
    std::vector<std::int32_t> experts, first; // (C), (T+1) if ragged
    std::vector<Real> weights, losses, dlogits;

    template <class Communicator = fastmoe::self>
    gate_run(Executor& ex, const Gate& gate, std::int64_t tokens, const std::vector<Real>& logits,
             const std::vector<Real>& dweights, fastmoe::gate_mode mode = fastmoe::gate_mode::training,
             const std::vector<std::uint8_t>& mask = {}, double loss_scale = 1, const gate_extras& extras = {},
             const Communicator& communicator = {})
    {
        namespace fm = fastmoe;
        const auto in_logits = upload(ex, logits);
        const auto in_dweights = upload(ex, dweights);
        const auto in_mask = upload(ex, mask);
        const auto in_ids = upload(ex, extras.token_ids);
        const auto in_random = upload(ex, extras.seed_and_step);
        fm::gate_input<Real> in;
        in.logits = fm::matrix_view<const Real>(in_logits.data(), tokens, gate.experts);
        in.mask = in_mask.view();
        in.token_ids = in_ids.view();
        in.mode = mode;
        in.random = extras.seed_and_step.empty() ? nullptr : in_random.data();
        in.first_token = extras.first_token;

        fm::arena measure;
        const auto shape = fm::reserve_gate<Real>(gate, measure, tokens);
        fm::arena query;
        gate.route(ex, in, communicator, shape, query);
        if (mode == fm::gate_mode::training)
            gate.backward(ex, in, communicator, shape, {}, Real(1), fm::matrix_view<Real>(nullptr, tokens, gate.experts), query);
        fm::buffer<std::byte, Executor> kept(ex, measure.bytes()), lent(ex, query.bytes());
        poison(kept.view());
        poison(lent.view());
        fm::arena memory(kept.view()), scratch(lent.view());
        const auto state = fm::reserve_gate<Real>(gate, memory, tokens);

        gate.route(ex, in, communicator, state, scratch);
        experts = download(ex, state.routing.experts);
        first = download(ex, state.routing.first);
        weights = download(ex, state.routing.weights);
        losses = download(ex, state.losses);
        CHECK_EQ(scratch.used(), 0);
        if (mode != fm::gate_mode::training) return;
        fm::buffer<Real, Executor> out(ex, tokens * gate.experts);
        poison(out.view());
        gate.backward(ex, in, communicator, state, in_dweights.view(), Real(loss_scale), out.matrix(tokens, gate.experts),
                      scratch);
        dlogits = download(ex, out.view());
        CHECK_EQ(scratch.used(), 0);
    }
};
template <class Executor, class Gate, class Real, class... More>
gate_run(Executor&, const Gate&, std::int64_t, const std::vector<Real>&, const More&...) -> gate_run<Real, Gate, Executor>;

} // namespace support
