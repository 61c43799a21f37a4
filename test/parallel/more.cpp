// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// What exchanges promise beyond values: choices that are ragged, budgets that are too small, rounded partial sums, training
/// steps, failures.
#include <doctest/doctest.h>

#include <map>

#include "support/ranked_layer.hpp"

using namespace fastmoe;

namespace {

/// A gate of a user's: each token takes the experts whose logits are positive, from none to all of them.
struct positive_gate {
    int64_t experts = 0;
    int64_t k = 0; // ragged

    template <class Real>
    struct state {
        fastmoe::routing<Real> routing;
    };
    template <class Real>
    state<Real> reserve(arena& memory, int64_t tokens) const
    {
        routing<Real> r{tokens, experts, 0, memory.vector<int32_t>(tokens * experts), memory.vector<Real>(tokens * experts), {}};
        r.first = memory.vector<int32_t>(tokens + 1);
        return {r};
    }
    template <class Executor, class T, class C, class State>
    void route(Executor&, const gate_input<T>& in, const C&, const State& s, arena& scratch) const
    {
        if (scratch.measuring()) return;
        auto& r = s.routing;
        auto* first = const_cast<int32_t*>(r.first.data_handle());
        int32_t c = 0;
        for (int64_t t = 0; t < r.tokens; ++t) {
            first[t] = c;
            for (int64_t e = experts - 1; e >= 0; --e)
                if (in.logits(t, e) > 0) {
                    r.experts(c) = static_cast<int32_t>(e);
                    r.weights(c++) = in.logits(t, e);
                }
        }
        first[r.tokens] = c;
        for (; c < r.experts.extent(0); ++c) r.experts(c) = -1, r.weights(c) = 0;
    }
    template <class Executor, class T, class C, class State, class Real>
    void backward(Executor&, const gate_input<T>&, const C&, const State& s, vector_view<const Real> dweights, Real,
                  matrix_view<Real> dlogits, arena& scratch) const
    {
        if (scratch.measuring()) return;
        const auto& r = s.routing;
        for (int64_t i = 0; i < r.tokens * experts; ++i) dlogits.data_handle()[i] = 0;
        for (int64_t t = 0; t < r.tokens; ++t)
            for (int64_t c = r.first(t); c < r.first(t + 1); ++c) dlogits(t, r.experts(c)) = dweights(c);
    }
};

/// What a step of a layer gives on each rank, joined: y, dx, and the experts' gradients by global number.
template <class T>
struct step_results {
    std::vector<T> y, dx;
    std::map<int64_t, std::vector<T>> up, down;
};

/// Runs a step on R ranks with the weights that one seed gives.
template <class T, class Gate, class Expert, class Make>
step_results<T> step(const Gate& gate, const Expert& expert, const std::vector<int64_t>& cuts, const std::vector<T>& x,
                     const std::vector<T>& dy, const Make& make)
{
    step_results<T> out;
    const int64_t width = expert.width;
    out.y.resize(x.size());
    out.dx.resize(x.size());
    std::mutex mutex;
    run_ranks(static_cast<int>(cuts.size()) - 1, [&](const threads& c) {
        host_executor ex({.threads = 1});
        const moe_layer layer{gate, expert, make(c)};
        const auto w = random_weights<T>(ex, layer, 7);
        const auto g = zero_weights<T>(ex, layer);
        const int64_t first = cuts[c.rank()], own = cuts[c.rank() + 1] - first;
        const matrix_view<const T> x_own(x.data() + first * width, own, width), dy_own(dy.data() + first * width, own, width);
        const matrix_view<T> y(out.y.data() + first * width, own, width), dx(out.dx.data() + first * width, own, width);
        const auto saved = layer.forward(ex, x_own, w.view(), y);
        layer.backward(ex, saved, dy_own, w.view(), dx, g.view());
        const std::lock_guard lock(mutex);
        const auto take = [&](const weight_view<T>& v, int64_t l) {
            return std::vector<T>(v.base(l), v.base(l) + v.out * v.in);
        };
        const auto place = detail::placed(layer.communicator, gate.experts);
        for (int64_t l = 0; l < place.local_experts(); ++l) {
            out.up[place.expert(l)] = take(g.view().expert.up, l);
            out.down[place.expert(l)] = take(g.view().expert.down, l);
        }
    });
    return out;
}

const auto plain = [](const threads& c) { return c; };
constexpr mlp<swiglu> small_expert{.width = 10, .hidden = 6};

template <class T>
void check_same(const step_results<T>& found, const step_results<T>& should)
{
    CHECK(support::close(found.y, support::widened(as_vector(should.y)), {.length = 64}));
    CHECK(support::close(found.dx, support::widened(as_vector(should.dx)), {.length = 64}));
    REQUIRE_EQ(found.up.size(), should.up.size());
    for (const auto& [e, values] : should.up)
        CHECK(support::close(found.up.at(e), support::widened(as_vector(values)), {.length = 64, .magnitude = 10}));
    for (const auto& [e, values] : should.down)
        CHECK(support::close(found.down.at(e), support::widened(as_vector(values)), {.length = 64, .magnitude = 10}));
}

} // namespace

TEST_CASE("ragged choices travel: none of a token's, one, or all experts")
{
    FASTMOE_SEEDED(rng, 531);
    const positive_gate gate{.experts = 7};
    const auto x = support::normal_vector<double>(rng, 40 * 10), dy = support::normal_vector<double>(rng, 40 * 10);
    const auto one = step<double>(gate, small_expert, {0, 40}, x, dy, plain);
    for (const int ranks : {2, 3, 5}) {
        const auto cuts = ranked::random_cuts(rng, ranks, 40);
        check_same(step<double>(gate, small_expert, cuts, x, dy, plain), one);
        check_same(step<double>(gate, small_expert, cuts, x, dy,
                                [](const threads& c) { return expert_parallel{c, c, round_robin_placement{}, gathered_exchange<>{}}; }),
                   one);
    }
    run_ranks(2, [&](const threads& c) {
        host_executor ex({.threads = 1});
        const moe_layer layer{gate, small_expert, expert_parallel{c, c, block_placement{}, padded_exchange<>{.rows_per_rank = 9}}};
        const auto w = random_weights<float>(ex, layer, 1);
        std::vector<float> in(20), out(20);
        const auto text = support::message_of<invalid_argument>(
            [&] { layer.infer(ex, as_matrix(in, 2, 10), w.view(), as_matrix(out, 2, 10)); });
        CHECK(support::has(text, "routing is ragged; expected K choices for every token"));
    });
}

TEST_CASE("a budget that is too small drops the last tokens' choices on that rank, forward and backward, and counts them")
{
    FASTMOE_SEEDED(rng, 532);
    const top_k_gate<> gate{.experts = 4, .k = 2};
    const int64_t tokens = 30, width = 10, budget = 9;
    const auto x = support::normal_vector<double>(rng, tokens * width), dy = support::normal_vector<double>(rng, tokens * width);
    int64_t lost = 0;
    run_ranks(2, [&](const threads& c) {
        host_executor ex({.threads = 1});
        const moe_layer layer{gate, small_expert, expert_parallel{c, c, block_placement{}, padded_exchange<>{.rows_per_rank = budget}}};
        const auto w = random_weights<double>(ex, layer, 7);
        const auto g = zero_weights<double>(ex, layer);
        const int64_t first = c.rank() * 15;
        const matrix_view<const double> in(x.data() + first * width, 15, width), d(dy.data() + first * width, 15, width);
        std::vector<double> y(15 * width), dx(15 * width);
        const auto saved = layer.forward(ex, in, w.view(), as_matrix(y, 15, width));
        layer.backward(ex, saved, d, w.view(), as_matrix(dx, 15, width), g.view());
        // By hand: the choices that have no place are dropped, and one rank does the rest.
        const moe_layer whole{gate, small_expert, self{}};
        const auto all = random_weights<double>(ex, whole, 7);
        const auto& route = saved.routing();
        std::vector<int32_t> experts(30);
        std::vector<int64_t> sent(2);
        int64_t overflow = 0;
        for (int64_t t = 0; t < 15; ++t)
            for (int64_t owner = 0; owner < 2; ++owner) {
                const auto is_there = [&](int64_t i) { return route.experts(2 * t + i) / 2 == owner; };
                if (!is_there(0) && !is_there(1)) continue;
                const bool fits = ++sent[owner] <= budget;
                overflow += !fits;
                for (int64_t i = 0; i < 2; ++i)
                    if (is_there(i)) experts[2 * t + i] = fits ? route.experts(2 * t + i) : -1;
            }
        auto kept = route;
        kept.experts = as_vector(experts);
        support::workspace memory(ex, 1 << 18);
        const auto slots = reserve_plan(memory, 15, 30, 4);
        make_plan(ex, kept, slots, memory);
        std::vector<double> rows(30 * width), expected(15 * width), dweights(30), drows(30 * width), dx_expected(15 * width);
        const expert_input<double> input{{in, slots.token_of}, slots.groups(), route.weights, slots.choice_of};
        const mlp_weights<const double> whole_weights(all.view().expert);
        const auto pre = small_expert.reserve_saved<double>(memory.arena(), 30);
        const auto pending = small_expert.reserve_pending<double>(memory.arena(), 30);
        small_expert.forward(ex, input, whole_weights, pre, as_matrix(rows, 30, width), memory);
        combine(ex, as_matrix(rows, 30, width), kept, slots, as_matrix(expected, 15, width));
        CHECK(support::close(y, expected, {.length = 64, .magnitude = 4}));
        const indexed_rows<double> dy_rows{d, slots.token_of};
        small_expert.backward(ex, input, whole_weights, pre, dy_rows, pending, as_matrix(drows, 30, width), as_vector(dweights), memory);
        combine_unweighted(ex, as_matrix(drows, 30, width), kept, slots, as_matrix(dx_expected, 15, width));
        std::vector<double> dlogits(15 * 4);
        whole.gate.backward(ex, saved.parts().gate_view(gate_mode::training), self{}, saved.parts().gate, vector_view<const double>(as_vector(dweights)),
                            1.0, as_matrix(dlogits, 15, 4), memory.arena());
        for (int64_t t = 0; t < 15; ++t)
            for (int64_t j = 0; j < width; ++j)
                for (int64_t e = 0; e < 4; ++e) dx_expected[t * width + j] += dlogits[t * 4 + e] * w.view().gate(e, j);
        CHECK(support::close(dx, dx_expected, {.length = 128, .magnitude = 4}));
        CHECK_EQ(saved.exchange().overflow(0), overflow);
        std::vector<int64_t> sum{overflow};
        c.all_reduce(ex, as_vector(sum));
        if (c.rank() == 0) lost = sum[0];
    });
    CHECK_GT(lost, 0);
}

TEST_CASE("partial sums that travel rounded are off by one rounding for each rank, and no more")
{
    FASTMOE_SEEDED(rng, 533);
    const top_k_gate<> gate{.experts = 6, .k = 3};
    const auto x = support::normal_vector<bfloat16>(rng, 300), dy = support::normal_vector<bfloat16>(rng, 300);
    const std::vector<int64_t> cuts{0, 9, 21, 30};
    const auto exact = step<bfloat16>(gate, small_expert, cuts, x, dy, plain);
    const auto rounded = step<bfloat16>(gate, small_expert, cuts, x, dy, [](const threads& c) {
        return expert_parallel{c, c, block_placement{}, exact_exchange<rounded_partials>{}};
    });
    int64_t differ = 0;
    double most = 0;
    for (const auto v : exact.y) most = std::max(most, std::fabs(double(v)));
    for (std::size_t i = 0; i < exact.y.size(); ++i) {
        differ += double(exact.y[i]) != double(rounded.y[i]);
        CHECK_LE(std::fabs(double(exact.y[i]) - double(rounded.y[i])), 4 * 2 * support::roundoff<bfloat16> * most);
    }
    CHECK_GT(differ, 0);
    CHECK_LT(differ, 200);
}

TEST_CASE("moves are adjoint: <what ranks received, r> is <x, what came back of r>, summed over ranks")
{
    FASTMOE_SEEDED(rng, 534);
    const int64_t width = 5, experts = 6;
    const auto check = [&](const auto& exchange) {
        double left = 0, right = 0;
        std::mutex mutex;
        const auto seed = rng.integer(0, 1 << 20);
        run_ranks(3, [&](const threads& c) {
            support::random own(static_cast<std::uint64_t>(seed) + c.rank());
            host_executor ex({.threads = 1});
            const int64_t tokens = 4 + 3 * c.rank();
            support::workspace memory(ex, 1 << 20);
            auto route = reserve_routing<double>(memory.arena(), tokens, experts, 2);
            for (int64_t t = 0; t < tokens; ++t) {
                const auto a = static_cast<int32_t>(own.integer(0, experts - 1));
                route.experts(2 * t) = a;
                route.experts(2 * t + 1) = own.coin(0.2) ? -1 : (a + 1 + static_cast<int32_t>(own.integer(0, 4))) % 6;
                route.weights(2 * t) = route.weights(2 * t + 1) = 1;
            }
            const placed_experts<block_placement> place{{}, experts, 3, 1, c.rank()};
            auto state = exchange.template reserve<double>(memory.arena(), route, place);
            exchange.announce(ex, c, route, place, state, memory.arena());
            const int64_t m = exchange.sizes(state).rows;
            const auto integers = [&](int64_t n) {
                std::vector<double> v(n);
                for (double& e : v) e = double(own.integer(-9, 9));
                return v;
            };
            const auto x = integers(tokens * width), r = integers(m * width);
            std::vector<double> rows(m * width), back(tokens * width);
            exchange.send_rows(ex, c, state, matrix_view<const double>(x.data(), tokens, width), as_matrix(rows, m, width), memory.arena());
            auto partial = r;
            const auto lists = exchange.template bring_rows_back<double>(ex, c, route, state, as_matrix(partial, m, width), memory.arena());
            detail::sum_returned(ex, lists, as_matrix(back, tokens, width));
            const std::lock_guard lock(mutex);
            for (std::size_t i = 0; i < rows.size(); ++i) left += rows[i] * r[i];
            for (std::size_t i = 0; i < x.size(); ++i) right += x[i] * back[i];
        });
        CHECK_EQ(left, right);
        CHECK_NE(left, 0);
    };
    check(exact_exchange<>{});
    check(padded_exchange<>{.rows_per_rank = 4});
    check(gathered_exchange<>{});
}

TEST_CASE("three training steps end where one rank's end")
{
    FASTMOE_SEEDED(rng, 535);
    const top_k_gate<> gate{.experts = 4, .k = 2, .balance = {0.1}};
    const int64_t tokens = 24, width = 10;
    const auto x = support::normal_vector<double>(rng, 3 * tokens * width), target = support::normal_vector<double>(rng, 3 * tokens * width);
    const auto train = [&](const std::vector<int64_t>& cuts) {
        std::map<int64_t, std::vector<double>> ups;
        std::vector<double> router;
        std::mutex mutex;
        run_ranks(static_cast<int>(cuts.size()) - 1, [&](const threads& c) {
            host_executor ex({.threads = 1});
            const moe_layer layer{gate, small_expert, c};
            const auto w = random_weights<double>(ex, layer, 3);
            const auto g = zero_weights<double>(ex, layer);
            const int64_t first = cuts[c.rank()], own = cuts[c.rank() + 1] - first;
            std::vector<double> y(own * width), dy(own * width), dx(own * width);
            for (int64_t s = 0; s < 3; ++s) {
                const int64_t at = (s * tokens + first) * width;
                const auto saved = layer.forward(ex, matrix_view<const double>(x.data() + at, own, width), w.view(), as_matrix(y, own, width));
                for (int64_t i = 0; i < own * width; ++i) dy[i] = (y[i] - target[at + i]) / double(tokens * width); // of the global batch
                layer.backward(ex, saved, as_matrix(dy, own, width), w.view(), as_matrix(dx, own, width), g.view());
                c.all_reduce(ex, detail::flat(g.view().gate));
                const auto descend = [](auto to, auto from, int64_t n) {
                    for (int64_t i = 0; i < n; ++i) to[i] -= 5.0 * from[i];
                };
                descend(w.view().gate.data_handle(), g.view().gate.data_handle(), 4 * width);
                descend(w.view().expert.up.data, g.view().expert.up.data, layer.local_experts() * 12 * width);
                descend(w.view().expert.down.data, g.view().expert.down.data, layer.local_experts() * 6 * width);
            }
            const std::lock_guard lock(mutex);
            const auto place = detail::placed(c, 4);
            for (int64_t l = 0; l < place.local_experts(); ++l) {
                const auto& up = w.view().expert.up;
                ups[place.expert(l)] = std::vector<double>(up.base(l), up.base(l) + up.out * up.in);
            }
            if (c.rank() == 0) router.assign(w.view().gate.data_handle(), w.view().gate.data_handle() + 4 * width);
        });
        return std::pair{ups, router};
    };
    const auto one = train({0, 24});
    for (const auto& cuts : {std::vector<int64_t>{0, 10, 24}, {0, 3, 3, 17, 24}}) {
        const auto more = train(cuts);
        CHECK(support::close(more.second, one.second, {.length = 4096, .magnitude = 1}));
        for (const auto& [e, values] : one.first) CHECK(support::close(more.first.at(e), values, {.length = 4096, .magnitude = 1}));
    }
}

TEST_CASE("a rank that fails or disagrees is an exception on every other rank, for every exchange")
{
    const auto trouble = [](const auto& make, const auto& differ) {
        std::atomic<int> told{0};
        run_ranks(3, [&](const threads& c) {
            host_executor ex({.threads = 1});
            int64_t width = 10, k = 2;
            const int behaviour = differ(c.rank(), width, k);
            const moe_layer layer{top_k_gate<>{.experts = 3, .k = k}, mlp<>{.width = width, .hidden = 4}, make(c)};
            const auto w = random_weights<float>(ex, layer, 1);
            std::vector<float> x(4 * width), y(4 * width);
            if (behaviour == 1) return; // leaves
            try {
                layer.infer(ex, as_matrix(x, 4, width), w.view(), as_matrix(y, 4, width));
            } catch (const comm_error&) {
                ++told;
            }
        }, {.deadline = std::chrono::seconds(5)});
        return told.load();
    };
    const auto every = [&](const auto& differ, int expected) {
        CHECK_EQ(trouble(plain, differ), expected);
        CHECK_EQ(trouble([](const threads& c) { return expert_parallel{c, c, block_placement{}, padded_exchange<>{.rows_per_rank = 4}}; }, differ), expected);
        CHECK_EQ(trouble([](const threads& c) { return expert_parallel{c, c, block_placement{}, gathered_exchange<>{}}; }, differ), expected);
    };
    every([](int rank, int64_t&, int64_t&) { return rank == 1 ? 1 : 0; }, 2);
    every([](int rank, int64_t& width, int64_t&) { return width = rank == 2 ? 12 : 10, 0; }, 3);
}
