// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The training program's source is written over the executor: on teams of four lanes it takes the steps that it takes on
/// the host, and a checkpoint of one is one of the other; ranks with memory that only they touch train what one rank does.
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include <doctest/doctest.h>

#include <fastmoe/comm/staged.hpp>
#include <fastmoe/comm/threads.hpp>
#include <fastmoe/gemm/portable.hpp>

#include <fastmoe/gemm/block_products.hpp>

#include "support/executors.hpp"
#include "support/fiber_blocks.hpp"
#include "support/queued.hpp"
#include "support/temporary_folder.hpp"
#include "train_gpt/rank_team.hpp"
#include "train_gpt/trainer.hpp"

namespace {

using namespace train_gpt;

run_config tiny(const std::string& text)
{
    run_config c;
    c.model = {.context = 8, .width = 8, .layers = 2, .heads = 2, .experts = 3, .k = 2, .hidden = 5, .balance = 0.3};
    c.batch = 2;
    c.steps = 6;
    c.warmup = 2;
    c.learning_rate = 1e-2;
    c.text = text;
    return c;
}

void write_text(support::random& draw, const std::string& folder)
{
    for (const char* name : {"/a.txt", "/b.txt"}) {
        std::ofstream out(folder + name);
        for (int i = 0; i < 400; ++i) out << static_cast<char>('a' + draw.integer(0, 9));
    }
}

template <class Executor, class T = double>
using trainer_on = trainer<T, Executor, fm::gemm::portable>;

template <class Executor, class T>
auto parameters_of(Executor& ex, trainer_on<Executor, T>& t)
{
    return to_host(ex, t.model().parameters());
}

template <class Real>
double distance(const std::vector<Real>& a, const std::vector<Real>& b)
{
    REQUIRE(a.size() == b.size());
    double worst = 0;
    for (std::size_t i = 0; i < a.size(); ++i) worst = std::max(worst, std::abs(double(a[i]) - double(b[i])));
    return worst;
}

/// The tests' queue with blocks, and with copies as CUDA has them.
struct device : support::fiber_blocks<support::queued> {
    struct bytes {
        void* to;
        const void* from;
        int64_t n;
        void operator()(int64_t) const { std::memcpy(to, from, static_cast<std::size_t>(n)); }
    };
    void copy(void* to, const void* from, int64_t n) { for_each(1, bytes{to, from, n}); }
};
static_assert(copies_both_ways<device>);

/// What a run over ranks shows.
struct history {
    std::vector<log_row> rows;
    double validation = 0;
};

/// Three steps of R ranks, each with a device of its own, whose communicator moves host memory; the last one from a checkpoint
/// that they have written. What rank 0 sees.
template <class T>
history train_staged(int ranks, const run_config& config, const corpus& text, const rank_options& how, const std::string& folder)
{
    history out;
    std::filesystem::create_directories(folder);
    fm::run_ranks(ranks, [&](const fm::threads& c) {
        static fm::host_memory heap;
        device gpu;
        static_assert(fm::exchanges_known_blocks<any_ranks<device>, device, fm::int64_t>, "counts are read twice");
        const rank_team<device> team(any_ranks<device>(fm::staged(c, 1 << 16, heap)), how);
        using trainer_type = trainer<T, device, fm::gemm::portable, rank_team<device>>;
        history seen;
        {
            trainer_type first(gpu, config, text, team);
            for (int step = 0; step < 2; ++step) seen.rows.push_back(first.step());
            first.save(folder);
        }
        trainer_type second(gpu, config, text, team);
        second.load(saved_run(folder));
        seen.rows.push_back(second.step());
        seen.validation = second.validate(3).loss;
        if (team.speaks()) out = std::move(seen);
    });
    return out;
}

} // namespace

TEST_CASE("six steps of a tiny model are the same on lanes as on the host, but for the order of sums")
{
    FASTMOE_SEEDED(draw, 801);
    const support::temporary_folder folder;
    write_text(draw, folder.path());
    const corpus text = read_corpus(folder.path(), 0);
    const run_config config = tiny(folder.path());
    auto host = support::column<fm::host_executor>::make();
    auto lanes = support::column<support::lanes>::make();
    trainer_on<fm::host_executor> one(host, config, text);
    trainer_on<support::lanes> other(lanes, config, text);
    const auto start = parameters_of<fm::host_executor, double>(host, one);
    CHECK(parameters_of<support::lanes, double>(lanes, other) == start);
    for (int step = 0; step < 3; ++step) {
        const log_row here = one.step(), there = other.step();
        // Sums of at most a few hundred terms in double; AdamW divides by the root of squares, which makes a difference of
        // 1e-16 in a gradient of 1e-8 one of 1e-8 in a step.
        CHECK(std::abs(here.loss - there.loss) < 1e-9);
        CHECK(std::abs(here.gradient_norm - there.gradient_norm) < 1e-8);
        CHECK(here.balance == there.balance);
    }
    CHECK(distance(parameters_of<fm::host_executor, double>(host, one), start) > 1e-3);
    CHECK(distance(parameters_of<fm::host_executor, double>(host, one), parameters_of<support::lanes, double>(lanes, other)) < 1e-7);

    other.save(folder / "checkpoint");
    one.load(saved_run(folder / "checkpoint"));
    CHECK(parameters_of<fm::host_executor, double>(host, one) == parameters_of<support::lanes, double>(lanes, other));
    while (!one.finished()) CHECK(std::abs(one.step().loss - other.step().loss) < 1e-9);
    CHECK(other.finished());
    CHECK(std::abs(one.validate(4).loss - other.validate(4).loss) < 1e-9);
}

TEST_CASE_TEMPLATE("a model is trained in memory that the host cannot touch, with the products of blocks", T, float, fm::bfloat16)
{
    FASTMOE_SEEDED(draw, 802);
    const support::temporary_folder folder;
    write_text(draw, folder.path());
    const corpus text = read_corpus(folder.path(), 0);
    const run_config config = tiny(folder.path());
    auto host = support::column<fm::host_executor>::make();
    device gpu;
    trainer_on<fm::host_executor, T> one(host, config, text);
    trainer_on<device, T> other(gpu, config, text);
    const auto start = parameters_of<fm::host_executor, T>(host, one);
    CHECK(distance(parameters_of<device, T>(gpu, other), start) == 0);
    const double bound = sizeof(T) == 2 ? 0.03 : 1e-4;
    for (int step = 0; step < 3; ++step) {
        const log_row here = one.step(), there = other.step();
        CHECK(std::abs(here.loss - there.loss) < bound);
        CHECK(std::abs(here.gradient_norm - there.gradient_norm) < bound * here.gradient_norm + 1e-6);
    }
    CHECK(distance(parameters_of<fm::host_executor, T>(host, one), start) > 1e-3);
    CHECK((gpu.products > 0) == (sizeof(T) == 2));
    other.save(folder / "checkpoint");
    one.load(saved_run(folder / "checkpoint"));
    CHECK(distance(parameters_of<fm::host_executor, T>(host, one), parameters_of<device, T>(gpu, other)) == 0);
    CHECK(std::abs(one.validate(4).loss - other.validate(4).loss) < bound);
}

TEST_CASE_TEMPLATE("ranks with devices of their own, between which only the host moves data, have the losses of one rank", T, float,
                   fm::bfloat16)
{
    FASTMOE_SEEDED(draw, 803);
    const support::temporary_folder folder;
    write_text(draw, folder.path());
    const corpus text = read_corpus(folder.path(), 0);
    const run_config config = tiny(folder.path());
    device gpu;
    trainer_on<device, T> one(gpu, config, text);
    std::vector<log_row> expected;
    for (int step = 0; step < 3; ++step) expected.push_back(one.step());
    const double validation = one.validate(3).loss;
    CHECK(expected.back().loss != expected.front().loss);
    const auto run = [&](int ranks, const rank_options& how) {
        CAPTURE(ranks);
        CAPTURE(static_cast<int>(how.exchange));
        CAPTURE(how.chunks);
        const history seen = train_staged<T>(ranks, config, text, how, folder / "parts");
        REQUIRE(seen.rows.size() == expected.size());
        // Sums in another order; in bfloat16 each of them may round to the neighbour, and so may what is routed by it.
        const double bound = sizeof(T) == 2 ? 0.03 : 1e-5;
        for (std::size_t i = 0; i < expected.size(); ++i) {
            CHECK(std::abs(seen.rows[i].loss - expected[i].loss) < bound);
            CHECK(std::abs(seen.rows[i].gradient_norm - expected[i].gradient_norm) < bound * expected[i].gradient_norm);
        }
        CHECK(std::abs(seen.validation - validation) < bound);
    };
    run(2, {});
    run(4, {.expert_parallel = 2}); // of two sequences: two ranks have none
    if (sizeof(T) == 2) return; // what the others add does not depend on it
    for (const auto exchange : {exchange_kind::padded, exchange_kind::gathered}) run(2, {.exchange = exchange});
    run(3, {.chunks = 2});
}
