// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The router from scores to plan against std::partial_sort and push_back on one thread: T 16384, E 128, K 8. Choices,
/// weights and the order within each expert are compared before anything is timed.

#include <string>

#include <fastmoe/comm/self.hpp>
#include <fastmoe/routing/plan.hpp>
#include <fastmoe/routing/top_k_gate.hpp>

#include "baselines/partial_sort.hpp"
#include "inputs.hpp"
#include "race.hpp"

namespace {

using namespace bench;

constexpr int64_t tokens = 16384, experts = 128, k = 8;

/// The library's router: logits in, routing and plan out.
class router {
public:
    explicit router(int threads) : ex_({.threads = threads})
    {
        kept_ = workspace_for(ex_, [&](fm::arena& a) { reserve(a); });
        fm::arena keep(kept_.view());
        reserve(keep);
        scratch_ = workspace_for(ex_, [&](fm::arena& a) {
            route({}, a);
            plan(a);
        });
    }
    void operator()(fm::matrix_view<const float> logits)
    {
        fm::arena a(scratch_.view());
        route(logits, a);
        plan(a);
    }
    void route(fm::matrix_view<const float> logits)
    {
        fm::arena a(scratch_.view());
        route(logits, a);
    }
    void plan()
    {
        fm::arena a(scratch_.view());
        plan(a);
    }
    const fm::routing<float>& routing() const { return state_.routing; }
    const fm::plan& result() const { return plan_; }

private:
    void reserve(fm::arena& a)
    {
        state_ = gate_.reserve<float>(a, tokens);
        plan_ = fm::reserve_plan(a, tokens, tokens * k, experts);
    }
    void route(fm::matrix_view<const float> logits, fm::arena& a)
    {
        gate_.route(ex_, fm::gate_input<float>{{}, logits, {}, {}, fm::gate_mode::training, nullptr}, fm::self{}, state_, a);
    }
    void plan(fm::arena& a) { fm::make_plan(ex_, state_.routing, plan_, a); }

    fm::host_executor ex_;
    fm::top_k_gate<fm::softmax_score> gate_{.experts = experts, .k = k};
    fm::top_k_state<float> state_;
    fm::plan plan_;
    memory<std::byte> kept_, scratch_;
};

/// Refuses a router that chooses, weighs or orders otherwise.
void compare(const std::string& who, const router& ours, const baselines::partial_sort_router& theirs,
             const std::vector<int32_t>& chosen, const std::vector<float>& weights)
{
    int64_t other = 0;
    for (int64_t c = 0; c < tokens * k; ++c) other += ours.routing().experts(c) != chosen[c];
    for (int64_t e = 0; e < experts; ++e) {
        const auto& list = theirs.lists()[e];
        other += ours.result().counts(e) != static_cast<int32_t>(list.size());
        for (int64_t i = 0; i < std::ssize(list); ++i)
            other += ours.result().choice_of(ours.result().offsets(e) + i) != list[i];
    }
    same(who + ": choices or their order", static_cast<double>(other), 0);
    same(who + ": weights", difference(ours.routing().weights.data_handle(), weights.data(), tokens * k), 1e-5);
}

standing hold()
{
    fm::host_executor ex;
    const auto logits = random_buffer<float>(ex, tokens * experts, 1, 4.0f);
    const fm::matrix_view<const float> scores(logits.data(), tokens, experts);
    router one(1), two(2);
    baselines::partial_sort_router plain(experts, k);
    std::vector<int32_t> chosen(tokens * k);
    std::vector<float> weights(tokens * k);
    plain(tokens, logits.data(), chosen.data(), weights.data());
    one(scores);
    two(scores);
    compare("one thread", one, plain, chosen, weights);
    compare("two threads", two, plain, chosen, weights);

    race r;
    const int theirs = r.add([&] { plain(tokens, logits.data(), chosen.data(), weights.data()); });
    const int on_one = r.add([&] { one(scores); }), on_two = r.add([&] { two(scores); });
    const int gate = r.add([&] { one.route(scores); }), plan = r.add([&] { one.plan(); });
    r.run(budget(4));
    const auto each = [](double seconds) { return 1e9 * seconds / tokens; };
    const std::string prefix = "router, scores to plan, T 16384, E 128, K 8: ";
    return {{{.text = prefix + "std::partial_sort on 1 thread / ours on 2",
              .ratio = r.ratio(theirs, on_two),
              .kind = target::at_least,
              .value = 5,
              .seconds_a_call = r.time(on_two).middle,
              .also = {{"ns_a_token", each(r.time(on_two).middle)},
                       {"partial_sort_ns_a_token", each(r.time(theirs).middle)}}},
             {.text = prefix + "std::partial_sort on 1 thread / ours on 1",
              .ratio = r.ratio(theirs, on_one),
              .seconds_a_call = r.time(on_one).middle,
              .also = {{"ns_a_token", each(r.time(on_one).middle)}}},
             {.text = prefix + "choosing and weighing, share of ours on 1",
              .ratio = r.ratio(gate, on_one),
              .seconds_a_call = r.time(gate).middle,
              .also = {{"ns_a_token", each(r.time(gate).middle)}}},
             {.text = prefix + "plan, share of ours on 1",
              .ratio = r.ratio(plan, on_one),
              .seconds_a_call = r.time(plan).middle,
              .also = {{"ns_a_token", each(r.time(plan).middle)}}}},
            r.rounds()};
}

} // namespace

int main(int argc, char** argv)
{
    register_lines({"router/two_threads", "router/one_thread", "router/choose", "router/plan"}, hold);
    return run_all(argc, argv);
}
