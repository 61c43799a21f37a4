// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// One call for routers of every kind, with parameters of their own or without, over a batch or a part of it.
#pragma once

#include <fastmoe/routing/cosine_gate.hpp>
#include <fastmoe/routing/noisy_gate.hpp>

#include "run_owning_gate.hpp"

namespace support {

/// Everything that a router may be given.
template <class Real>
struct router_batch {
    static constexpr std::int64_t width = 5, inner = 6; // D, and that of a cosine gate's projection
    std::int64_t tokens, experts, k;
    std::vector<Real> logits, x, dweights, noise, projection, embeddings, temperature;
    gate_extras extras;

    router_batch(random& rng, std::int64_t t, std::int64_t e, std::int64_t choices) : tokens(t), experts(e), k(choices)
    {
        logits = normal_vector<Real>(rng, t * e);
        x = normal_vector<Real>(rng, t * width);
        dweights = normal_vector<Real>(rng, t * k);
        noise = normal_vector<Real>(rng, e * width, 0.5);
        projection = normal_vector<Real>(rng, inner * width);
        embeddings = normal_vector<Real>(rng, e * inner);
        temperature = {Real(1)};
        extras = {.seed_and_step = {rng.bits(), 5}, .first_token = rng.integer(0, 1000)};
    }
    /// Tokens [from, from + n), which know their numbers.
    router_batch part(std::int64_t from, std::int64_t n) const
    {
        router_batch p = *this;
        const auto cut = [&](std::vector<Real>& v, std::int64_t size) {
            v = std::vector<Real>(v.begin() + from * size, v.begin() + (from + n) * size);
        };
        p.tokens = n;
        cut(p.logits, experts);
        cut(p.x, width);
        cut(p.dweights, k);
        p.extras.first_token += from;
        return p;
    }
    owning_input<Real> input(bool with_logits) const
    {
        return {.tokens = tokens, .width = width, .x = x, .logits = with_logits ? logits : std::vector<Real>(),
                .dweights = dweights, .extras = extras};
    }
};

/// What comes out of both passes.
template <class Real>
struct router_outcome {
    std::vector<std::int32_t> experts;
    std::vector<std::vector<Real>> by_token; // weights, and gradients of what belongs to tokens
    std::vector<Real> losses, gradients;     // and gradients of parameters

    const std::vector<Real>& weights() const { return by_token.front(); }
    std::vector<Real> numbers() const
    {
        std::vector<Real> all = losses;
        all.insert(all.end(), gradients.begin(), gradients.end());
        for (const auto& v : by_token) all.insert(all.end(), v.begin(), v.end());
        return all;
    }
};

/// A gate without parameters.
template <class Real, class Executor, class Gate, class Communicator = fastmoe::self>
router_outcome<Real> run_router(Executor& ex, const Gate& gate, const router_batch<Real>& b, const Communicator& c = {})
{
    const std::vector<std::uint8_t> open;
    const gate_run r(ex, gate, b.tokens, b.logits, b.dweights, fastmoe::gate_mode::training, open, 1.0, b.extras, c);
    return {r.experts, {r.weights, r.dlogits}, r.losses, {}};
}

template <class Real, class Executor, class Communicator = fastmoe::self>
router_outcome<Real> run_router(Executor& ex, const fastmoe::noisy_gate& gate, const router_batch<Real>& b,
                                const Communicator& c = {})
{
    auto own = upload(ex, b.noise), gradient = upload(ex, b.noise);
    const auto views = [&](auto& of) { return fastmoe::noisy_parameters<Real>{of.matrix(b.experts, b.width)}; };
    const owning_gate_run r(ex, gate, b.input(true), views(own), views(gradient), fastmoe::write_mode::overwrite, c);
    return {r.experts, {r.weights, r.dlogits, r.dx}, r.losses, download(ex, gradient.view())};
}

template <class Real, class Executor, class Select, class Weigh, class Communicator = fastmoe::self>
router_outcome<Real> run_router(Executor& ex, const fastmoe::cosine_gate<Select, Weigh>& gate, const router_batch<Real>& b,
                                const Communicator& c = {})
{
    struct room {
        fastmoe::buffer<Real, Executor> projection, embeddings, temperature;
        fastmoe::cosine_parameters<Real> views(const router_batch<Real>& of)
        {
            return {projection.matrix(of.inner, of.width), {}, embeddings.matrix(of.experts, of.inner), temperature.view()};
        }
    };
    const auto make = [&] { return room{upload(ex, b.projection), upload(ex, b.embeddings), upload(ex, b.temperature)}; };
    auto own = make(), gradient = make();
    const owning_gate_run r(ex, gate, b.input(false), own.views(b), gradient.views(b), fastmoe::write_mode::overwrite, c);
    router_outcome<Real> out{r.experts, {r.weights, r.dx}, r.losses, download(ex, gradient.projection.view())};
    for (const auto& more : {download(ex, gradient.embeddings.view()), download(ex, gradient.temperature.view())})
        out.gradients.insert(out.gradients.end(), more.begin(), more.end());
    return out;
}

} // namespace support
