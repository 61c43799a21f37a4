// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Takes times on this machine: steps of an expert-parallel layer, the products of an expert, and messages. What is measured
/// takes turns, round after round. Of the rounds the quarter counts in which other programs took the least from this one, by
/// its processor time, and of those the median.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include <time.h>

#include <fastmoe/comm/communicator.hpp>

#include "loads.hpp"
#include "moe_setup.hpp"
#include "race.hpp"

namespace scaling {

namespace fm = fastmoe;
using bench::spread;
using std::int64_t;

/// One round: seconds, and processor time of this process for each of them.
struct sample {
    double seconds, busy;
};

/// A clock of both.
class stopwatch {
public:
    sample read() const
    {
        const double seconds = bench::now() - wall_;
        return {seconds, (processor() - used_) / seconds};
    }

private:
    static double processor()
    {
        timespec t;
        clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
        return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
    }
    double wall_ = bench::now(), used_ = processor();
};

/// Median and quartiles of the least disturbed quarter.
inline spread undisturbed(std::vector<sample> rounds)
{
    std::sort(rounds.begin(), rounds.end(), [](const sample& a, const sample& b) { return a.busy > b.busy; });
    rounds.resize((rounds.size() + 3) / 4);
    std::vector<double> seconds;
    for (const sample& s : rounds) seconds.push_back(s.seconds);
    return bench::spread_of(std::move(seconds));
}

/// One rank's part of a layer whose experts all ranks share, with all that its steps need.
template <class Communicator>
class layer_on_rank {
public:
    using gate_type = fm::top_k_gate<fm::softmax_score>;
    using expert_type = fm::mlp<fm::gelu>;

    layer_on_rank(fm::host_executor& on, const Communicator& c, const shape& s)
        : ex_(on), shape_(s), layer_{gate_type{.experts = s.experts, .k = s.k}, expert_type{.width = s.width, .hidden = s.hidden}, c},
          weights_(fm::random_weights<float>(on, layer_, 1)), gradients_(fm::zero_weights<float>(on, layer_)),
          x_(bench::random_buffer<float>(on, s.tokens * s.width, 11 + static_cast<std::uint32_t>(c.rank()))),
          dy_(bench::random_buffer<float>(on, s.tokens * s.width, 1011 + static_cast<std::uint32_t>(c.rank()))),
          y_(on, s.tokens * s.width), dx_(on, s.tokens * s.width),
          space_(on, layer_.template forward_bytes<float>(on, s.tokens, s.width) +
                         layer_.template backward_bytes<float>(on, s.tokens, s.width))
    {
    }

    void step()
    {
        fm::arena a(space_.view());
        const auto saved = layer_.forward(ex_, rows(x_), weights_.view(), rows(y_), a);
        layer_.backward(ex_, saved, rows(dy_), weights_.view(), rows(dx_), gradients_.view(), a);
    }

    /// What the busiest rank has of this step, from the routing itself. Called by all ranks.
    load count()
    {
        const int64_t choices = shape_.tokens * shape_.k;
        std::vector<std::int32_t> own(static_cast<std::size_t>(choices));
        std::vector<std::int32_t> all(own.size() * static_cast<std::size_t>(layer_.communicator.size()));
        {
            fm::arena a(space_.view());
            const auto saved = layer_.forward(ex_, rows(x_), weights_.view(), rows(y_), a);
            for (int64_t c = 0; c < choices; ++c) own[static_cast<std::size_t>(c)] = saved.routing().experts(c);
        }
        layer_.communicator.all_gather(ex_, fm::as_vector(own), fm::as_vector(all));
        load_counter counter(layer_.communicator.size(), shape_.experts);
        for (int64_t t = 0; t < shape_.tokens * layer_.communicator.size(); ++t)
            counter.add(static_cast<int>(t / shape_.tokens), all.data() + t * shape_.k, shape_.k);
        return counter.busiest();
    }

private:
    fm::matrix_view<float> rows(bench::memory<float>& m) { return m.matrix(shape_.tokens, shape_.width); }

    fm::host_executor& ex_;
    shape shape_;
    fm::moe_layer<gate_type, expert_type, Communicator> layer_;
    fm::owned_weights<float, expert_type, fm::host_executor> weights_, gradients_;
    bench::memory<float> x_, dy_, y_, dx_;
    bench::memory<std::byte> space_;
};

/// A step as measured.
struct step_time {
    shape sizes;
    load busiest;
    std::vector<sample> rounds;
};

/// Adds `rounds` times of each shape to `out`, on this rank of c: from one barrier to the next, so that the slowest rank
/// counts. Rank 0's `out` is the result.
template <class Communicator>
void time_steps(const Communicator& c, const std::vector<shape>& shapes, int rounds, std::vector<step_time>& out)
{
    fm::host_executor ex({.threads = 1});
    std::vector<std::unique_ptr<layer_on_rank<Communicator>>> layers;
    out.resize(shapes.size());
    for (std::size_t i = 0; i < shapes.size(); ++i) {
        layers.push_back(std::make_unique<layer_on_rank<Communicator>>(ex, c, shapes[i]));
        out[i].sizes = shapes[i];
        out[i].busiest = layers[i]->count();
        layers[i]->step(); // first touches
    }
    for (int round = 0; round < rounds; ++round)
        for (std::size_t turn = 0; turn < shapes.size(); ++turn) {
            const std::size_t i = round % 2 == 0 ? turn : shapes.size() - 1 - turn;
            c.barrier(ex);
            const stopwatch clock;
            layers[i]->step();
            c.barrier(ex);
            out[i].rounds.push_back(clock.read());
        }
}

/// The grid of `throughput`: rows an expert and widths; hidden is four widths, and a rank has four experts.
inline const std::vector<double> throughput_rows{1, 4, 16, 64, 256}, throughput_widths{64, 128, 256, 512};

/// Adds `rounds` times of the six products of an expert's forward and backward to times[rows * widths + width], while the
/// ranks of c do so at the same time.
template <class Communicator>
void time_products(const Communicator& c, int rounds, std::vector<std::vector<sample>>& times)
{
    fm::host_executor ex({.threads = 1});
    constexpr int64_t experts = 4;
    times.resize(throughput_rows.size() * throughput_widths.size());
    for (std::size_t j = 0; j < throughput_widths.size(); ++j) {
        const auto width = static_cast<int64_t>(throughput_widths[j]);
        for (std::size_t i = 0; i < throughput_rows.size(); ++i) {
            const auto rows = static_cast<int64_t>(throughput_rows[i]);
            bench::mlp_products<float, fm::gemm::portable> products(ex, experts, experts * rows, width, 4 * width);
            const bench::even_groups groups(experts, rows);
            const int repeats = std::max(1, static_cast<int>(2000 / (rows * width / 64))); // a few milliseconds
            for (int round = -1; round < rounds; ++round) {
                c.barrier(ex);
                const stopwatch clock;
                for (int n = 0; n < repeats; ++n) {
                    products.forward(groups.view());
                    products.backward(groups.view());
                }
                c.barrier(ex);
                const sample all = clock.read();
                if (round >= 0) times[i * throughput_widths.size() + j].push_back({all.seconds / repeats, all.busy});
            }
        }
    }
}

/// The rates that those times are: three forward passes' worth of operations.
inline throughput throughput_of(const std::vector<std::vector<sample>>& times)
{
    throughput out{throughput_rows, throughput_widths, {}};
    for (std::size_t i = 0; i < throughput_rows.size(); ++i)
        for (std::size_t j = 0; j < throughput_widths.size(); ++j) {
            const double flops = 3 * 4 * 4 * throughput_rows[i] * throughput_widths[j] * 4 * throughput_widths[j];
            out.flops.push_back(flops / undisturbed(times[i * throughput_widths.size() + j]).middle);
        }
    return out;
}

/// The grid of the router's: experts and widths.
inline const std::vector<double> router_experts{4, 32, 256, 1024, 4096}, router_widths{64, 256, 512};
inline constexpr int64_t router_tokens = 256;

/// A router by itself: logits, choices, and their gradients back to input and weights.
class router_alone {
public:
    router_alone(fm::host_executor& on, int64_t experts, int64_t width)
        : ex_(on), experts_(experts), width_(width), gate_{.experts = experts, .k = 2},
          x_(bench::random_buffer<float>(on, router_tokens * width, 21)),
          w_(bench::random_buffer<float>(on, experts * width, 22, 0.1f)), dx_(on, router_tokens * width), dw_(on, experts * width),
          logits_(on, router_tokens * experts), dlogits_(on, router_tokens * experts),
          dweights_(bench::random_buffer<float>(on, router_tokens * 2, 23)),
          space_(bench::workspace_for(on, [&](fm::arena& a) { run(a); }))
    {
    }
    void step()
    {
        fm::arena a(space_.view());
        run(a);
    }

private:
    void run(fm::arena& a)
    {
        const fm::matrix_view<const float> x = x_.matrix(router_tokens, width_), w = w_.matrix(experts_, width_);
        const auto logits = logits_.matrix(router_tokens, experts_), dlogits = dlogits_.matrix(router_tokens, experts_);
        const fm::arena::scope lent(a);
        auto state = gate_.template reserve<float>(a, router_tokens);
        const fm::gate_input<float> in{{}, logits, {}, {}, fm::gate_mode::training, nullptr};
        fm::project(ex_, x, w, fm::vector_view<const float>{}, logits, a);
        gate_.route(ex_, in, fm::self{}, state, a);
        gate_.backward(ex_, in, fm::self{}, state, dweights_.view(), 1.f, dlogits, a);
        fm::project_input_backward(ex_, dlogits, w, dx_.matrix(router_tokens, width_), fm::write_mode::overwrite, a);
        fm::project_weights_backward(ex_, dlogits, x, dw_.matrix(experts_, width_), fm::vector_view<float>{},
                                     fm::write_mode::overwrite, a);
    }

    fm::host_executor& ex_;
    int64_t experts_, width_;
    fm::top_k_gate<fm::softmax_score> gate_;
    bench::memory<float> x_, w_, dx_, dw_, logits_, dlogits_, dweights_;
    bench::memory<std::byte> space_;
};

/// As time_products, of the router.
template <class Communicator>
void time_router(const Communicator& c, int rounds, std::vector<std::vector<sample>>& times)
{
    fm::host_executor ex({.threads = 1});
    times.resize(router_experts.size() * router_widths.size());
    for (std::size_t i = 0; i < times.size(); ++i) {
        router_alone router(ex, static_cast<int64_t>(router_experts[i / router_widths.size()]),
                            static_cast<int64_t>(router_widths[i % router_widths.size()]));
        for (int round = -1; round < rounds; ++round) {
            c.barrier(ex);
            const stopwatch clock;
            router.step();
            c.barrier(ex);
            if (round >= 0) times[i].push_back(clock.read());
        }
    }
}

inline throughput router_throughput_of(const std::vector<std::vector<sample>>& times)
{
    throughput out{router_experts, router_widths, {}};
    for (std::size_t i = 0; i < times.size(); ++i) {
        const double flops = 6.0 * router_tokens * router_experts[i / router_widths.size()] * router_widths[i % router_widths.size()];
        out.flops.push_back(flops / undisturbed(times[i]).middle);
    }
    return out;
}

inline const std::vector<double> message_bytes{64, 1024, 8192, 65536, 524288, 4194304};

/// Adds `rounds` times of an all_to_all_v with so many bytes for each other rank to times[i].
template <class Communicator>
void time_messages(const Communicator& c, int rounds, std::vector<std::vector<sample>>& times)
{
    fm::host_executor ex({.threads = 1});
    times.resize(message_bytes.size());
    const auto most = static_cast<int64_t>(message_bytes.back()) / 4;
    auto sent = bench::random_buffer<float>(ex, most * c.size(), 1);
    auto received = bench::random_buffer<float>(ex, most * c.size(), 2);
    for (int round = -1; round < rounds; ++round)
        for (std::size_t i = 0; i < message_bytes.size(); ++i) {
            const int64_t n = static_cast<int64_t>(message_bytes[i]) / 4;
            std::vector<int64_t> counts(static_cast<std::size_t>(c.size()), 1);
            counts[static_cast<std::size_t>(c.rank())] = 0; // the own block does not cross
            const fm::matrix_view<const float> from(sent.data(), c.size() - 1, n);
            const fm::matrix_view<float> to(received.data(), c.size() - 1, n);
            const int repeats = n > 65536 ? 2 : 20;
            c.barrier(ex);
            const stopwatch clock;
            for (int k = 0; k < repeats; ++k)
                c.all_to_all_v(ex, from, fm::as_vector(counts), to, fm::as_vector(counts));
            const sample all = clock.read();
            if (round >= 0) times[i].push_back({all.seconds / repeats, all.busy});
        }
}

} // namespace scaling
