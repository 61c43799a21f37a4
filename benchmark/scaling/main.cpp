// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Weak scaling of an expert-parallel layer: measured where there are ranks, predicted where there are none, and what fits in
/// a rank's memory.
///
///     bench_scaling measure threads.json                              steps, products and messages on this machine
///     bench_scaling predict threads.json [mpi.json ...] [--svg=FILE]  the fit, its score, and up to 1,024 ranks
///     bench_scaling plan [--layers=60 ...]                            memory of a model on R ranks

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <thread>

#include <fastmoe/comm/threads.hpp>

#include "scaling/measure.hpp"
#include "scaling/plan_text.hpp"
#include "scaling/progress.hpp"
#include "scaling/tables.hpp"

namespace {

using namespace scaling;

point point_of(const std::string& over, const step_time& t)
{
    const spread s = undisturbed(t.rounds);
    return {over, t.sizes, t.busiest, s.low, s.middle, s.high, static_cast<int>(t.rounds.size())};
}

/// f(communicator) on each of R threads.
template <class F>
void on_threads(int ranks, F f)
{
    fm::run_ranks(ranks, [&](const fm::threads& c) { f(c); }, {.deadline = std::chrono::minutes(10)});
}

int measure(const std::string& file)
{
    constexpr int sessions = 4, rounds = 8;
    const std::vector<shape> shapes = drawn_shapes(36);
    measurements m;
    m.cores = static_cast<int>(std::thread::hardware_concurrency());
    m.processor = processor_name();
    std::map<int, std::vector<std::vector<sample>>> products, routers;
    std::map<int, std::vector<step_time>> steps, weak;
    std::vector<std::vector<sample>> messages;
    progress bar(sessions * 9);
    m.load_before = load_average();
    // All is taken in turns, session after session, so that what disturbs the machine for a while disturbs all alike.
    for (int session = 0; session < sessions; ++session) {
        for (const int ranks : {1, 2}) {
            bar.next("products, " + std::to_string(ranks) + " busy");
            on_threads(ranks, [&](const fm::threads& c) {
                std::vector<std::vector<sample>> mine;
                time_products(c, rounds, c.rank() == 0 ? products[ranks] : mine);
                std::vector<std::vector<sample>> own;
                time_router(c, rounds, c.rank() == 0 ? routers[ranks] : own);
            });
            bar.next("steps, R " + std::to_string(ranks));
            on_threads(ranks, [&](const fm::threads& c) {
                std::vector<step_time> mine;
                time_steps(c, shapes, rounds, c.rank() == 0 ? steps[ranks] : mine);
            });
        }
        bar.next("messages");
        on_threads(2, [&](const fm::threads& c) {
            std::vector<std::vector<sample>> mine;
            time_messages(c, rounds, c.rank() == 0 ? messages : mine);
        });
        for (const int ranks : {1, 2, 4, 8}) {
            bar.next("weak scaling, R " + std::to_string(ranks));
            on_threads(ranks, [&](const fm::threads& c) {
                std::vector<step_time> mine;
                time_steps(c, {weak_shape(ranks)}, rounds, c.rank() == 0 ? weak[ranks] : mine);
            });
        }
    }
    m.load_after = load_average();
    for (const auto& [ranks, times] : products)
        m.compute.push_back({ranks, throughput_of(times), router_throughput_of(routers[ranks])});
    link_times l{"threads", 2, message_bytes, {}};
    for (const auto& t : messages) l.seconds.push_back(undisturbed(t).middle);
    m.links.push_back(l);
    for (const auto& [ranks, times] : steps)
        for (const step_time& t : times) m.shapes.push_back(point_of("threads", t));
    for (const auto& [ranks, times] : weak) m.weak.push_back(point_of("threads", times[0]));
    write(file, m);
    return 0;
}

int predict(const std::vector<std::string>& files, const std::string& svg)
{
    measurements m;
    for (const auto& f : files) read(f, m);
    const predictions all = predict_all(m);
    std::fputs(all.text.c_str(), stdout);
    if (svg.empty()) return 0;
    fm::io::replace_file file(svg);
    file.write(all.svg);
    file.commit();
    return 0;
}

int usage()
{
    std::fputs("bench_scaling measure FILE | predict FILE... [--svg=FILE] | plan [--NAME=NUMBER ...]\n", stderr);
    return 2;
}

int run(int argc, char** argv)
{
    const std::string what = argc > 1 ? argv[1] : "";
    std::vector<std::string> files;
    std::string svg;
    numbers sizes = trillion();
    for (int i = 2; i < argc; ++i) {
        const std::string a = argv[i];
        const auto equals = a.find('=');
        if (a.rfind("--", 0) != 0) {
            files.push_back(a);
        } else if (equals == std::string::npos) {
            return usage();
        } else if (a.substr(2, equals - 2) == "svg" && what == "predict") {
            svg = a.substr(equals + 1);
        } else {
            const std::string name = a.substr(2, equals - 2);
            char* end = nullptr;
            const double value = std::strtod(a.c_str() + equals + 1, &end);
            if (what != "plan" || !sizes.count(name) || end == a.c_str() + equals + 1 || *end != '\0' || !(value > 0))
                return usage();
            sizes[name] = value;
        }
    }
    if (what == "measure" && files.size() == 1) return measure(files[0]);
    if (what == "predict" && !files.empty()) return predict(files, svg);
    if (what == "plan" && files.empty()) return std::fputs(plan_text(sizes).c_str(), stdout) < 0;
    return usage();
}

} // namespace

int main(int argc, char** argv)
{
    try {
        return run(argc, argv);
    } catch (const std::exception& e) {
        std::fprintf(stderr, "%s\n", e.what());
        return 1;
    }
}
