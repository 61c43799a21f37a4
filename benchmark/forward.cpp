// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// All of a forward pass that is not a product: the share of gate, plan, gather, activation and combine. Taken as the
/// time of forward() less the time of its two grouped products alone, over the same groups, from rows that lie in order
/// and without an epilogue. Each verb is timed alone, too. T 4096, D 512, H 2048, K 2, GELU.

#include <memory>

#include <fastmoe/gemm/onednn.hpp>
#include <fastmoe/transfer/combine.hpp>
#include <fastmoe/transfer/dispatch.hpp>

#include "moe_setup.hpp"
#include "race.hpp"

namespace {

using namespace bench;

/// The activation over all rows, as an epilogue would run it but with rows from memory.
template <class T>
struct activate_all {
    using vectorized = void;
    const T* u;
    T* a;
    int64_t hidden;

    template <class Team>
    void operator()(Team& team, int64_t s) const
    {
        fm::detail::activate_row<fm::gelu, float>(team, {}, u + s * hidden, a + s * hidden, hidden,
                                                  fm::detail::gated_columns{1, hidden}, 1.0f);
    }
};

template <class T>
standing hold(int64_t experts, double goal)
{
    using Gemm = fm::gemm::onednn;
    fm::host_executor ex;
    const shape s{4096, 512, 2048, experts, 2};
    moe_setup<T, Gemm> moe(ex, s);
    mlp_products<T, Gemm> products(ex, experts, s.choices(), s.width, s.hidden);

    // The routing and the plan of this input, kept for the verbs that are timed alone.
    fm::arena measure;
    const auto reserve = [&](fm::arena& a) {
        struct parts {
            fm::matrix_view<float> logits;
            fm::gate_state_of<typename moe_setup<T, Gemm>::gate_type, T> gate;
            fm::plan plan;
        } p;
        p.logits = a.matrix<float>(s.tokens, experts);
        p.gate = fm::reserve_gate<float>(moe.layer.gate, a, s.tokens);
        p.plan = fm::reserve_plan(a, s.tokens, s.choices(), experts);
        return p;
    };
    reserve(measure);
    memory<std::byte> kept(ex, measure.bytes()), scratch(ex, int64_t{64} << 20);
    fm::arena keep(kept.view());
    const auto p = reserve(keep);
    const fm::matrix_view<const T> x = moe.x();
    const auto gate = [&] {
        fm::arena a(scratch.view());
        fm::project(ex, x, fm::matrix_view<const T>(moe.weights.view().gate), fm::vector_view<const T>{}, p.logits, a);
        moe.layer.gate.route(ex, fm::gate_input<T>{x, p.logits, {}, {}, fm::gate_mode::training, nullptr}, fm::self{}, p.gate,
                             a);
    };
    const auto plan = [&] {
        fm::arena a(scratch.view());
        fm::make_plan(ex, p.gate.routing, p.plan, a);
    };
    gate();
    plan();
    const auto groups = p.plan.groups();
    auto rows = random_buffer<T>(ex, s.choices() * s.width, 9);
    auto u = random_buffer<T>(ex, s.choices() * s.hidden, 10, 3.0f);
    memory<T> a(ex, s.choices() * s.hidden);

    race r;
    const int forward = r.add([&] { moe.forward(); });
    const int gemms = r.add([&] { products.forward(groups); });
    const int verbs[] = {
        r.add(gate),
        r.add(plan),
        r.add([&] { fm::dispatch(ex, x, p.plan, rows.matrix(s.choices(), s.width)); }),
        r.add([&] {
            fm::for_each_row(ex, s.choices(), activate_all<T>{u.data(), a.data(), s.hidden}, {.width = s.hidden});
        }),
        r.add([&] { fm::combine(ex, rows.matrix(s.choices(), s.width), p.gate.routing, p.plan, moe.y()); }),
    };
    const char* const names[] = {"gate (logits, softmax, top-k)", "plan", "gather (as a copy)", "activation", "combine"};
    r.run(budget(6));

    const std::string prefix = std::string("forward, ") + type_name<T>() + ", E " + std::to_string(experts) + ": ";
    standing out{{}, r.rounds()};
    out.claims.push_back({.text = prefix + "share of all that is not a product",
                          .ratio = r.over_rounds([=](auto t) { return 1 - t(gemms) / t(forward); }),
                          .kind = target::at_most,
                          .value = goal,
                          .seconds_a_call = r.time(forward).middle,
                          .also = {{"products_ms", 1e3 * r.time(gemms).middle}}});
    for (int i = 0; i < 5; ++i)
        out.claims.push_back({.text = prefix + names[i] + " alone / forward",
                              .ratio = r.ratio(verbs[i], forward),
                              .seconds_a_call = r.time(verbs[i]).middle});
    return out;
}

template <class T>
void add(double goal)
{
    for (int64_t experts : {4, 16, 64}) {
        const std::string prefix = std::string("forward/") + type_name<T>() + "/experts:" + std::to_string(experts) + "/";
        register_lines({prefix + "rest", prefix + "gate", prefix + "plan", prefix + "gather", prefix + "activation",
                        prefix + "combine"},
                       [=] { return hold<T>(experts, goal); });
    }
}

} // namespace

int main(int argc, char** argv)
{
    add<float>(0.08);
    add<fm::bfloat16>(0.10);
    return run_all(argc, argv);
}
