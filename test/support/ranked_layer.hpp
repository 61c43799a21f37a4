// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// A layer whose experts R ranks share, against the oracle on the joined batch: every rank runs forward, backward and infer on
/// its own tokens with poisoned outputs; what all of them wrote is put together and judged element by element.
///
///     const joined<Cell> batch(rng, gate, expert, tokens);
///     batch.check({.cuts = {0, 13, 13, 40}}, [](const auto& c) { return fm::expert_parallel{c, c, fm::round_robin_placement{}}; });
#pragma once

#include <numeric>
#include <optional>

#include "compare_layer.hpp"

namespace ranked {

using namespace fastmoe;
namespace oracle = support::reference;

/// How the batch and the experts are cut, and what else a run has.
struct division {
    std::vector<int64_t> cuts;  // (R+1)  rank r has tokens [cuts[r], cuts[r+1])
    int slices = 1;             ///< of the hidden width
    bool workspaces = false;    ///< the caller's, of exactly the bytes that the bound asks
    bool two_calls = false;     ///< weight gradients later
    double loss_scale = 0.5;

    int ranks() const { return static_cast<int>(cuts.size()) - 1; }
};

/// Cuts of `tokens` for R ranks, some of them empty.
inline std::vector<int64_t> random_cuts(support::random& r, int ranks, int64_t tokens)
{
    std::vector<int64_t> cuts{0, tokens};
    while (static_cast<int>(cuts.size()) < ranks + 1)
        cuts.push_back(r.coin(0.3) ? cuts[static_cast<std::size_t>(r.integer(0, int64_t(cuts.size()) - 1))] : r.integer(0, tokens));
    std::sort(cuts.begin(), cuts.end());
    return cuts;
}

/// What one rank wrote.
template <class T>
struct part {
    using real = accumulate_t<T>;
    std::vector<T> y, inferred, dx;
    std::vector<int32_t> chosen, experts; // (C)
    std::vector<real> weights, losses;
    oracle::numbers gate, gate_bias;
    std::vector<int32_t> counts;         // (L)  rows of each local expert
    std::vector<oracle::expert> gradients; // (L)  of its slice
    std::vector<int64_t> global;         // (L)
    int slice = 0;
    std::string damage;
};

/// Rows [first, first + n) of a matrix with `cols` columns.
inline oracle::numbers rows_between(const oracle::numbers& m, int64_t first, int64_t n, int64_t cols)
{
    return oracle::numbers(m.begin() + first * cols, m.begin() + (first + n) * cols);
}

/// Where slice s of n of a hidden width lies in an expert's matrices: f(full index, index in the slice) for every element.
template <class F>
void for_slice(const oracle::expert& full, int64_t width, int64_t hidden, int slices, int s, oracle::numbers oracle::expert::*member, F f)
{
    const int64_t h = hidden / slices, first = s * h;
    if (member == &oracle::expert::down)
        for (int64_t d = 0; d < width; ++d)
            for (int64_t j = 0; j < h; ++j) f(d * hidden + first + j, d * h + j);
    else if (member == &oracle::expert::down_bias)
        for (int64_t d = 0; d < int64_t((full.*member).size()); ++d) f(d, d);
    else {
        const int64_t cols = member == &oracle::expert::up ? width : 1;
        const int64_t halves = int64_t((full.*member).size()) / (hidden * cols); // 2 for gated ones, 0 without a bias
        for (int64_t half = 0; half < halves; ++half)
            for (int64_t j = 0; j < h; ++j)
                for (int64_t d = 0; d < cols; ++d) f((half * hidden + first + j) * cols + d, (half * h + j) * cols + d);
    }
}

inline constexpr oracle::numbers oracle::expert::*members[] = {&oracle::expert::up, &oracle::expert::down, &oracle::expert::up_bias,
                                                               &oracle::expert::down_bias};

/// A batch for all ranks, and the experts in whole.
template <class Cell, class Gate, class Expert>
struct joined {
    using T = typename Cell::type;
    using real = accumulate_t<T>;
    using Executor = typename Cell::executor;

    Gate gate;
    Expert expert;
    int64_t tokens, width;
    oracle::model model;
    oracle::numbers x, dy;
    std::vector<std::uint8_t> mask;

    joined(support::random& r, const Gate& g, const Expert& e, int64_t count, bool masked = false)
        : gate(g), expert(e), tokens(count), width(e.width),
          model(support::random_model<T, Executor>(r, e, e.width, g.experts, r.normals(g.experts, 0.3))),
          x(support::widened(support::normal_vector<T>(r, count * width))),
          dy(support::widened(support::normal_vector<T>(r, count * width)))
    {
        for (int64_t t = 0; masked && t < tokens; ++t) mask.push_back(r.coin(0.3) ? 0 : 1);
    }

    /// make(communicator): what the layer gets.
    template <class Make>
    std::vector<part<T>> run(const division& d, const Make& make) const
    {
        std::vector<part<T>> parts(static_cast<std::size_t>(d.ranks()));
        run_ranks(d.ranks(), [&](const threads& c) {
            Executor ex = support::executor_of_thread<Executor>();
            const auto parallel = make(c);
            const int64_t first = d.cuts[c.rank()], own = d.cuts[c.rank() + 1] - first;
            parts[c.rank()] = run_rank(ex, parallel, d, first, own);
        }, {.deadline = std::chrono::seconds(40)});
        return parts;
    }

    template <class Make>
    void check(const division& d, const Make& make) const
    {
        judge(d, run(d, make));
    }

    template <class Parallel>
    part<T> run_rank(Executor& ex, const Parallel& parallel, const division& d, int64_t first, int64_t own) const
    {
        Expert slice = expert;
        slice.hidden = expert.hidden / d.slices;
        const moe_layer<Gate, Expert, Parallel> layer{gate, slice, parallel};
        const auto place = detail::placed(parallel, gate.experts);
        if (place.slices != d.slices) throw std::logic_error("the division and the layer differ in slices");
        part<T> out;
        out.slice = place.slice();
        oracle::model here = model;
        here.experts.clear();
        for (int64_t l = 0; l < layer.local_experts(); ++l) {
            out.global.push_back(place.expert(l));
            here.experts.push_back(sliced(model.experts[out.global.back()], d.slices, out.slice));
        }
        support::layer_memory<T, Expert, Executor> w(ex, slice, here);
        support::layer_memory<real, Expert, Executor> g(ex, slice, support::poisoned(here));
        w.views.gate = w.gate.matrix(gate.experts, width);
        g.views.gate = g.gate.matrix(gate.experts, width);
        support::guarded<T> x_own(own, width, 1), y(own, width, 1), inferred(own, width), dy_own(own, width, 1), dx(own, width, 1);
        fill(x_own.view(), rows_between(x, first, own, width));
        fill(dy_own.view(), rows_between(dy, first, own, width));
        const std::vector<std::uint8_t> own_mask = mask.empty() ? mask : std::vector<std::uint8_t>(mask.begin() + first, mask.begin() + first + own);
        const auto in_mask = support::upload(ex, own_mask);
        const gate_options options{.mask = in_mask.view(), .first_token = first};
        const backward_options how{.loss_scale = d.loss_scale};
        if (d.workspaces) {
            const int64_t most = largest(d); // the bound holds while no rank has more tokens
            support::workspace kept(ex, layer.template forward_bytes<T>(ex, most, width, w.views));
            const auto saved = layer.forward(ex, x_own.view(), w.views, y.view(), kept.arena(), options);
            support::workspace lent(ex, layer.template backward_bytes<T>(ex, most, width, w.views, g.views));
            finish(ex, layer, saved, dy_own, w, dx, g, how, d, lent.arena());
            keep(ex, saved, out);
            support::workspace small(ex, layer.template infer_bytes<T>(ex, most, width, w.views));
            layer.infer(ex, x_own.view(), w.views, inferred.view(), small.arena(), options);
            CHECK_EQ(lent.arena().used(), 0);
            CHECK_EQ(small.arena().used(), 0);
        } else {
            const auto saved = layer.forward(ex, x_own.view(), w.views, y.view(), options);
            support::workspace lent(ex, 1 << 22);
            finish(ex, layer, saved, dy_own, w, dx, g, how, d, lent.arena());
            keep(ex, saved, out);
            layer.infer(ex, x_own.view(), w.views, inferred.view(), options);
        }
        ex.synchronize();
        out.y = support::download(ex, y.view());
        out.inferred = support::download(ex, inferred.view());
        out.dx = support::download(ex, dx.view());
        out.damage = y.damage() + dx.damage();
        out.gate = support::widened(g.views.gate);
        out.gate_bias = support::widened(g.gate_bias.view());
        for (auto& e : here.experts) out.gradients.push_back(e);
        for (auto member : members) {
            const auto all = g.experts.read(member);
            std::size_t at = 0;
            for (auto& e : out.gradients)
                for (double& v : e.*member) v = all.at(at++);
        }
        return out;
    }

    void judge(const division& d, const std::vector<part<T>>& parts) const
    {
        std::vector<T> y, inferred, dx;
        std::vector<real> weights;
        std::vector<int> chosen, experts;
        oracle::numbers dgate(model.gate.size()), dbias(model.gate_bias.size());
        std::vector<oracle::expert> gradients = support::poisoned(model.experts);
        std::vector<int64_t> counts(static_cast<std::size_t>(gate.experts));
        const auto append = [](auto& to, const auto& from) { to.insert(to.end(), from.begin(), from.end()); };
        for (const auto& p : parts) {
            append(y, p.y);
            append(inferred, p.inferred);
            append(dx, p.dx);
            append(weights, p.weights);
            append(chosen, p.chosen);
            append(experts, p.experts);
            for (std::size_t i = 0; i < dgate.size(); ++i) dgate[i] += p.gate[i];
            for (std::size_t i = 0; i < dbias.size(); ++i) dbias[i] += p.gate_bias[i];
            CHECK_EQ(p.damage, "");
            for (std::size_t l = 0; l < p.global.size(); ++l) {
                const int64_t e = p.global[l];
                if (p.slice == 0) counts[e] += p.counts[l];
                for (auto member : members)
                    for_slice(gradients[e], width, expert.hidden, d.slices, p.slice, member, [&](int64_t whole, int64_t cut) {
                        const double v = (p.gradients[l].*member)[cut];
                        if (member == &oracle::expert::down_bias && p.slice > 0) CHECK_EQ(v, 0); // the first slice's
                        else (gradients[e].*member)[whole] = v;
                    });
            }
        }
        CHECK(support::same_bits(inferred, y));
        // The oracle, of the live tokens.
        std::vector<int64_t> live;
        for (int64_t t = 0; t < tokens; ++t)
            if (mask.empty() || mask[t]) live.push_back(t);
        const auto n = static_cast<int64_t>(live.size());
        const auto xl = compare_layer::rows_of(x, live, width), dyl = compare_layer::rows_of(dy, live, width);
        std::vector<bool> kept;
        for (const int e : compare_layer::rows_of(experts, live, gate.k)) kept.push_back(e >= 0);
        const support::expected_routing<T> route(compare_layer::options_of(gate, tokens), support::expected_logits<T>(model, xl, n), n,
                                                 gate.experts, compare_layer::rows_of(chosen, live, gate.k), kept);
        CHECK_EQ(route.complaint(), "");
        if (gate.capacity.over == capacity_scope::all_ranks) CHECK_EQ(capacity_complaint(route), "");
        auto expected = support::expect_layer<T>(model, xl, route, dyl, d.loss_scale);
        const auto says = [](const char* name, const auto& found, const auto& should) {
            const auto verdict = support::within(found, should);
            CHECK_MESSAGE(verdict, name, ": ", verdict);
        };
        says("y", y, compare_layer::spread(expected.y, live, tokens, width));
        says("dx", dx, compare_layer::spread(expected.dx, live, tokens, width));
        for (std::size_t i = 0; i < 2 * parts.size(); ++i) { // each rank rounds its share, and the shares are added
            for (auto& s : expected.gate) s.add(support::bounded<real>(0));
            for (auto& s : expected.gate_bias) s.add(support::bounded<real>(0));
        }
        says("the router's gradient", dgate, totals(expected.gate));
        says("the router's bias gradient", dbias, totals(expected.gate_bias));
        using sums = support::expected_gradients<T>;
        const std::pair<oracle::numbers oracle::expert::*, typename sums::sums sums::*> pairs[] = {
            {&oracle::expert::up, &sums::up}, {&oracle::expert::down, &sums::down},
            {&oracle::expert::up_bias, &sums::up_bias}, {&oracle::expert::down_bias, &sums::down_bias}};
        for (const auto& [member, of] : pairs)
            says("an expert's gradient", support::narrowed<real>(oracle::stacked(gradients, member)), gathered(expected.experts, of));
        std::vector<support::bounded<real>> should;
        std::vector<int64_t> should_count(counts.size());
        for (const auto& c : route.choices) should.push_back(c.weight);
        for (const int e : experts)
            if (e >= 0) ++should_count[e];
        says("weights", weights, compare_layer::spread(should, live, tokens, gate.k));
        CHECK_EQ(counts, should_count);
        for (const auto& p : parts)
            says("losses, which every rank has in whole", p.losses, std::vector<support::bounded<real>>{route.balance_loss, route.z_loss});
    }

private:
    static int64_t largest(const division& d)
    {
        int64_t most = 0;
        for (int r = 0; r < d.ranks(); ++r) most = std::max(most, d.cuts[r + 1] - d.cuts[r]);
        return most;
    }
    static void fill(matrix_view<T> to, const oracle::numbers& from)
    {
        for (std::size_t i = 0; i < from.size(); ++i) to.data_handle()[i] = support::narrow<T>(from[i]);
    }
    oracle::expert sliced(const oracle::expert& full, int slices, int s) const
    {
        oracle::expert out = full;
        for (auto member : members) {
            const bool bias = member == &oracle::expert::down_bias;
            if (!bias) (out.*member).resize((full.*member).size() / slices);
            for_slice(full, width, expert.hidden, slices, s, member,
                      [&](int64_t whole, int64_t cut) { (out.*member)[cut] = (full.*member)[whole]; });
        }
        return out;
    }
    template <class Layer, class Saved, class Memory, class Gradients>
    static void finish(Executor& ex, const Layer& layer, const Saved& saved, support::guarded<T>& dy, const Memory& w,
                       support::guarded<T>& dx, Gradients& g, const backward_options& how, const division& d, arena& lent)
    {
        if (!d.two_calls) return layer.backward(ex, saved, dy.view(), w.views, dx.view(), g.views, lent, how);
        const arena::scope taken(lent);
        const auto pending = layer.backward_input(ex, saved, dy.view(), w.views, dx.view(), lent, how);
        layer.backward_weights(ex, saved, pending, g.views, lent, how);
    }
    template <class Saved>
    static void keep(Executor& ex, const Saved& saved, part<T>& out)
    {
        const auto& p = saved.parts();
        out.chosen = support::download(ex, p.gate.chosen);
        out.experts = support::download(ex, saved.routing().experts);
        out.weights = support::download(ex, saved.routing().weights);
        out.losses = support::download(ex, saved.losses());
        for (std::size_t i = 0; i < p.pieces.size(); ++i) {
            const auto some = support::download(ex, saved.plan(static_cast<int>(i)).counts);
            out.counts.resize(some.size());
            for (std::size_t e = 0; e < some.size(); ++e) out.counts[e] += some[e];
        }
    }
};

template <class Cell, class Gate, class Expert>
joined<Cell, Gate, Expert> join(support::random& r, const Gate& gate, const Expert& expert, int64_t tokens, bool masked = false)
{
    return {r, gate, expert, tokens, masked};
}

} // namespace ranked
