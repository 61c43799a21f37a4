// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// How every number here is taken: contenders run in turn, round after round, in one process; a ratio is formed inside
/// each round and the median of the rounds is reported with its quartiles. Noise that lasts longer than a round cancels.
#pragma once

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <time.h>

#include <benchmark/benchmark.h>

namespace bench {

using seconds = std::chrono::duration<double>;

/// The median and the quartiles of a sample.
struct spread {
    double low = 0, middle = 0, high = 0;
};

inline spread spread_of(std::vector<double> sample)
{
    std::sort(sample.begin(), sample.end());
    const auto at = [&](double q) {
        const double where = q * static_cast<double>(sample.size() - 1);
        const auto i = static_cast<std::size_t>(where);
        const double rest = where - static_cast<double>(i);
        return i + 1 < sample.size() ? sample[i] * (1 - rest) + sample[i + 1] * rest : sample[i];
    };
    return {at(0.25), at(0.5), at(0.75)};
}

/// Seconds that a race may take. FASTMOE_BENCH_SECONDS scales all races: the default is 1.
inline double budget(double usual)
{
    const char* text = std::getenv("FASTMOE_BENCH_SECONDS");
    const double scale = text ? std::atof(text) : 1.0;
    return scale > 0 ? usual * scale : usual;
}

/// Whether FASTMOE_BENCH_CLOCK=cpu asks for the process's processor time instead of wall time. It hides idle threads, so it
/// proves no claim; on a machine that others use at the same time it shows where a lost ratio comes from.
inline bool processor_clock()
{
    const char* text = std::getenv("FASTMOE_BENCH_CLOCK");
    return text && std::string(text) == "cpu";
}

/// Seconds.
inline double now()
{
    static const clockid_t clock = processor_clock() ? CLOCK_PROCESS_CPUTIME_ID : CLOCK_MONOTONIC;
    timespec t;
    clock_gettime(clock, &t);
    return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

/// Contenders that take turns.
class race {
public:
    /// Returns the number by which the contender is asked for.
    int add(std::function<void()> body)
    {
        lanes_.push_back({std::move(body), 1, {}});
        return static_cast<int>(lanes_.size()) - 1;
    }

    /// Runs rounds until `limit` seconds have passed and at least `least` rounds are done. Every round starts with
    /// another contender and every second one runs backwards, so that nobody always follows the same neighbour. A
    /// contender faster than `slice` seconds is repeated inside its turn.
    void run(double limit, int least = 9, double slice = 0.002)
    {
        for (auto& lane : lanes_) {
            lane.body(); // first touches, primitives that are created once
            const double once = timed(lane);
            lane.repeats = once < slice ? static_cast<int>(std::ceil(slice / std::max(once, 1e-7))) : 1;
        }
        const auto begin = std::chrono::steady_clock::now();
        const int n = static_cast<int>(lanes_.size());
        for (int round = 0; round < least || seconds(std::chrono::steady_clock::now() - begin).count() < limit; ++round)
            for (int i = 0; i < n; ++i) {
                const int turn = round % 2 == 0 ? i : n - 1 - i;
                auto& lane = lanes_[static_cast<std::size_t>((turn + round / 2) % n)];
                lane.times.push_back(timed(lane));
            }
    }

    int rounds() const { return static_cast<int>(lanes_.front().times.size()); }
    /// Seconds a call.
    spread time(int i) const { return spread_of(lanes_[static_cast<std::size_t>(i)].times); }
    /// f(times of one round, as a function of the contender), over the rounds.
    template <class F>
    spread over_rounds(F f) const
    {
        std::vector<double> sample;
        for (std::size_t r = 0; r < lanes_.front().times.size(); ++r)
            sample.push_back(f([&](int i) { return lanes_[static_cast<std::size_t>(i)].times[r]; }));
        return spread_of(std::move(sample));
    }
    /// time(a) / time(b).
    spread ratio(int a, int b) const
    {
        return over_rounds([=](auto t) { return t(a) / t(b); });
    }

private:
    struct lane {
        std::function<void()> body;
        int repeats;
        std::vector<double> times;
    };

    static double timed(const lane& l)
    {
        const double begin = now();
        for (int i = 0; i < l.repeats; ++i) l.body();
        return (now() - begin) / l.repeats;
    }

    std::vector<lane> lanes_;
};

enum class target : unsigned char { none, at_least, at_most };

/// One line of the table: what was measured, against what, and what it should be.
struct claim {
    std::string text;             ///< what the ratio is
    spread ratio;                 ///< as measured
    target kind = target::none;   ///< none: a line for information
    double value = 0;             ///< the target
    double seconds_a_call = 0;    ///< the reported time of the benchmark
    std::map<std::string, double> also = {}; ///< further counters
};

/// Puts a claim into the running benchmark's counters, where the table finds it.
inline void report(benchmark::State& state, const claim& c, int rounds)
{
    state.SetLabel(processor_clock() ? c.text + " (processor time)" : c.text);
    state.counters["ratio"] = c.ratio.middle;
    state.counters["ratio_low"] = c.ratio.low;
    state.counters["ratio_high"] = c.ratio.high;
    state.counters["rounds"] = rounds;
    if (c.kind == target::at_least) state.counters["at_least"] = c.value;
    if (c.kind == target::at_most) state.counters["at_most"] = c.value;
    for (const auto& [name, value] : c.also) state.counters[name] = value;
}

/// Several benchmarks that are lines of one race: the first that runs holds it, the others read the result.
template <class Result>
class shared_race {
public:
    explicit shared_race(std::function<Result()> hold) : state_(std::make_shared<cell>(cell{std::move(hold), nullptr})) {}

    const Result& result() const
    {
        if (!state_->result) state_->result = std::make_unique<Result>(state_->hold());
        return *state_->result;
    }

private:
    struct cell {
        std::function<Result()> hold;
        std::unique_ptr<Result> result;
    };
    std::shared_ptr<cell> state_;
};

/// What a race leaves behind for its lines.
struct standing {
    std::vector<claim> claims;
    int rounds = 0;
};

/// Registers one benchmark a name; benchmark i reports claim i of the race.
inline void register_lines(const std::vector<std::string>& names, std::function<standing()> hold)
{
    const shared_race<standing> shared(std::move(hold));
    for (std::size_t i = 0; i < names.size(); ++i)
        benchmark::RegisterBenchmark(names[i].c_str(), [shared, i](benchmark::State& state) {
            const standing* s = nullptr;
            try {
                s = &shared.result();
            } catch (const std::exception& e) {
                state.SkipWithError(e.what());
                return;
            }
            for (auto _ : state) state.SetIterationTime(s->claims.at(i).seconds_a_call);
            report(state, s->claims[i], s->rounds);
        })->Iterations(1)->UseManualTime()->Unit(benchmark::kMillisecond);
}

/// The main() of every benchmark program, after its lines are registered.
inline int run_all(int argc, char** argv)
{
    benchmark::Initialize(&argc, argv);
    if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
    benchmark::RunSpecifiedBenchmarks();
    benchmark::Shutdown();
    return 0;
}

} // namespace bench
