// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// A gate of your own: one function for inference, two for training. This one sends every token to the expert that its id
/// names (a hash layer, Roller et al. 2021) and learns how much of it to take: w = sigmoid(l).
#include <fastmoe/moe.hpp>

#include <cstdio>
#include <vector>

namespace fm = fastmoe;

// [gate]
template <class Real>
struct choose_by_id {
    fm::matrix_view<const Real> logits;           // (T,E)
    fm::vector_view<const fm::int32_t> token_ids; // (T)
    fm::routing<Real> out;                        // one choice a token

    FASTMOE_HOST_DEVICE void operator()(fm::int64_t t) const
    {
        const auto e = static_cast<fm::int32_t>(token_ids(t) % out.total_experts);
        out.experts(t) = e;
        out.weights(t) = fm::math::sigmoid(logits(t, e));
    }
};

template <class Real>
struct choose_by_id_backward {
    fm::routing<Real> chosen;
    fm::vector_view<const Real> dweights; // (T)
    fm::matrix_view<Real> dlogits;        // (T,E)

    FASTMOE_HOST_DEVICE void operator()(fm::int64_t t) const
    {
        const Real w = chosen.weights(t);
        for (fm::int64_t e = 0; e < dlogits.extent(1); ++e)
            dlogits(t, e) = e == chosen.experts(t) ? dweights(t) * w * (Real(1) - w) : Real(0);
    }
};

struct hash_gate {
    fm::int64_t experts = 0, k = 1;

    template <class Executor, class T, class Communicator, class State>
    void route(Executor& ex, const fm::gate_input<T>& in, const Communicator&, const State& state, fm::arena& scratch) const
    {
        if (scratch.measuring()) return; // asked only how much scratch this takes: none
        fm::expects_shape(in.token_ids, "token_ids (T)", in.x.extent(0));
        using Real = fm::accumulate_t<T>;
        fm::for_each(ex, in.x.extent(0), choose_by_id<Real>{in.logits, in.token_ids, state.routing});
    }

    template <class Executor, class T, class Communicator, class State, class Real>
    void backward(Executor& ex, const fm::gate_input<T>& in, const Communicator&, const State& state,
                  fm::vector_view<const Real> dweights, Real /*loss_scale*/, fm::matrix_view<Real> dlogits,
                  fm::arena& scratch) const
    {
        if (scratch.measuring()) return;
        fm::for_each(ex, in.x.extent(0), choose_by_id_backward<Real>{state.routing, dweights, dlogits});
    }
};
// [gate]

int main()
{
    constexpr int tokens = 64, width = 32;
    fm::host_executor ex;
    fm::moe_layer layer{hash_gate{.experts = 4}, fm::mlp<fm::gelu>{.width = width, .hidden = 64}, fm::self{}};
    auto weights = fm::random_weights<float>(ex, layer, 1);
    auto gradients = fm::zero_weights<float>(ex, layer);

    std::vector<float> x(tokens * width, 0.5f), y(x.size()), dy(x.size(), 1.0f), dx(x.size());
    std::vector<fm::int32_t> ids(tokens);
    for (int t = 0; t < tokens; ++t) ids[t] = t * t;
    const auto matrix = [](auto& v) { return fm::as_matrix(v, tokens, width); };

    auto saved = layer.forward(ex, matrix(x), weights.view(), matrix(y), {.token_ids = fm::as_vector(ids)});
    layer.backward(ex, saved, matrix(dy), weights.view(), matrix(dx), gradients.view());

    std::printf("tokens an expert:");
    for (fm::int64_t e = 0; e < 4; ++e) std::printf(" %d", saved.plan().counts(e));
    std::printf("\n");
    // Squares are 0 or 1 modulo 4.
    return saved.plan().counts(0) == 32 && saved.plan().counts(1) == 32 ? 0 : 1;
}
