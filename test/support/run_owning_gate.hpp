// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// One gate with parameters of its own, forward and backward, with everything poisoned first and workspaces of exactly
/// the size asked for.
#pragma once

#include <utility>

#include "run_gate.hpp"
#include "scratch.hpp"

namespace support {

/// What a gate is given besides its parameters. Element type of x: Real.
template <class Real>
struct owning_input {
    std::int64_t tokens = 0, width = 0;
    std::vector<Real> x = {};        // (T,D)
    std::vector<Real> logits = {};   // (T,E), or empty for a gate that reads none
    std::vector<Real> dweights = {}; // (T*K)
    fastmoe::gate_mode mode = fastmoe::gate_mode::training;
    std::vector<std::uint8_t> mask = {};
    double loss_scale = 1;
    gate_extras extras = {};
};

/// Runs route, and in training backward and parameter_gradients.
template <class Real, class Gate, class Executor>
struct owning_gate_run {
    static constexpr double start = 0.25; ///< what dx holds before it is added to
    std::vector<std::int32_t> experts;
    std::vector<Real> weights, losses, dlogits, dx;

    template <class Parameters, class Communicator = fastmoe::self>
    owning_gate_run(Executor& ex, const Gate& gate, const owning_input<Real>& given, const Parameters& own,
                    const Parameters& gradients, fastmoe::write_mode mode = fastmoe::write_mode::overwrite,
                    const Communicator& communicator = {})
    {
        namespace fm = fastmoe;
        using views = typename Gate::template parameters<const Real>;
        constexpr bool reads = fm::gate_reads_logits<Gate>;
        const std::int64_t columns = reads ? gate.experts : 0, rows = reads ? given.tokens : 0;
        const auto in_x = upload(ex, given.x), in_logits = upload(ex, given.logits);
        const auto in_dweights = upload(ex, given.dweights);
        const auto in_mask = upload(ex, given.mask);
        const auto in_random = upload(ex, given.extras.seed_and_step);
        fm::gate_input<Real> in;
        in.x = fm::matrix_view<const Real>(in_x.data(), given.tokens, given.width);
        in.logits = fm::matrix_view<const Real>(in_logits.data(), rows, columns);
        in.mask = in_mask.view();
        in.mode = given.mode;
        in.random = given.extras.seed_and_step.empty() ? nullptr : in_random.data();
        in.first_token = given.extras.first_token;

        fm::arena measure;
        fm::reserve_gate<Real>(gate, measure, given.tokens);
        fm::buffer<std::byte, Executor> kept(ex, measure.bytes());
        poison(kept.view());
        fm::arena memory(kept.view());
        const auto state = fm::reserve_gate<Real>(gate, memory, given.tokens);
        exactly(ex, [&](fm::arena& scratch) { gate.route(ex, in, views(own), communicator, state, scratch); });
        experts = download(ex, state.routing.experts);
        weights = download(ex, state.routing.weights);
        losses = download(ex, state.losses);
        if (given.mode != fm::gate_mode::training) return;
        fm::buffer<Real, Executor> out(ex, rows * columns);
        poison(out.view());
        auto into = upload(ex, std::vector<Real>(given.x.size(), Real(start)));
        exactly(ex, [&](fm::arena& scratch) {
            gate.backward(ex, in, views(own), communicator, state, in_dweights.view(), Real(given.loss_scale),
                          fm::matrix_view<Real>(out.data(), rows, columns), into.matrix(given.tokens, given.width), scratch);
        });
        dlogits = download(ex, out.view());
        dx = download(ex, into.view());
        exactly(ex, [&](fm::arena& scratch) { gate.parameter_gradients(ex, in, state, gradients, mode, scratch); });
        ex.synchronize();
    }

private:
    template <class F>
    static void exactly(Executor& ex, F f)
    {
        fastmoe::arena measure;
        f(measure);
        CHECK_EQ(measure.used(), 0);
        workspace memory(ex, measure.bytes());
        f(memory.arena());
        CHECK_EQ(memory.arena().used(), 0);
    }
};
template <class Real, class Gate, class Executor, class... More>
owning_gate_run(Executor&, const Gate&, const owning_input<Real>&, const More&...) -> owning_gate_run<Real, Gate, Executor>;

} // namespace support
