// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// What was measured, as a JSON file between the programs that measure and the one that predicts.
#pragma once

#include <cstdint>
#include <fstream>
#include <string>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include <fastmoe/core/error.hpp>
#include <fastmoe/io/replace_file.hpp>

#include "cost_model.hpp"
#include "fit.hpp"

namespace scaling {

/// A step's time: the median of the rounds and their quartiles, in seconds.
struct point {
    std::string over; ///< the communicator: threads or mpi
    shape sizes;
    load busiest;
    double low, seconds, high;
    int rounds;
};

/// Times of exchanges between `ranks` ranks with so many bytes for each other one.
struct link_times {
    std::string over;
    int ranks;
    std::vector<double> bytes, seconds;

    /// alpha and beta: seconds a message and a byte.
    line fitted() const
    {
        std::vector<double> sent;
        for (const double b : bytes) sent.push_back(b * (ranks - 1));
        const line l = fit_line(sent, seconds);
        return {l.a / (ranks - 1), l.b};
    }
};

struct measurements {
    int cores = 0;
    std::string processor;
    double load_before = 0, load_after = 0;          ///< programs that wanted a core, of others and this one
    struct products {
        int busy; ///< ranks at once
        throughput experts, router;
    };
    std::vector<products> compute;
    std::vector<link_times> links;
    std::vector<point> shapes; ///< the shapes of the fit and of its score, at R 1 and 2
    std::vector<point> weak;   ///< one shape a rank, at growing R

    rates rates_of(int ranks, const std::string& over) const
    {
        rates r;
        for (const products& p : compute)
            if (p.busy == std::min(ranks, compute.back().busy)) r.compute = p.experts, r.router = p.router;
        for (const link_times& l : links)
            if (l.over == over && (r.beta == 0 || l.ranks == 2)) {
                r.alpha = l.fitted().a;
                r.beta = l.fitted().b;
            }
        return r;
    }
};

inline nlohmann::json json_of(const point& p)
{
    const shape& s = p.sizes;
    const load& l = p.busiest;
    return {{"over", p.over},       {"ranks", l.ranks},   {"tokens", s.tokens},
            {"width", s.width},     {"hidden", s.hidden}, {"experts", s.experts},
            {"k", s.k},             {"choices", l.choices}, {"choices_an_expert", l.choices_an_expert},
            {"rows", l.rows},       {"crossing_choices", l.crossing_choices},
            {"seconds", {p.low, p.seconds, p.high}}, {"rounds", p.rounds}};
}
inline point point_from(const nlohmann::json& j)
{
    return {j.at("over"),
            {j.at("tokens"), j.at("width"), j.at("hidden"), j.at("experts"), j.at("k")},
            {j.at("ranks"), j.at("choices"), j.at("choices_an_expert"), j.at("rows"), j.at("crossing_choices")},
            j.at("seconds").at(0), j.at("seconds").at(1), j.at("seconds").at(2), j.at("rounds")};
}

inline nlohmann::json json_of(const throughput& t)
{
    return {{"rows", t.rows}, {"widths", t.widths}, {"flops", t.flops}};
}
inline throughput throughput_from(const nlohmann::json& j) { return {j.at("rows"), j.at("widths"), j.at("flops")}; }

inline nlohmann::json json_of(const measurements& m)
{
    nlohmann::json out{{"cores", m.cores}, {"processor", m.processor}, {"load", {m.load_before, m.load_after}}};
    for (const auto& p : m.compute)
        out["compute"].push_back({{"busy", p.busy}, {"experts", json_of(p.experts)}, {"router", json_of(p.router)}});
    for (const link_times& l : m.links)
        out["links"].push_back({{"over", l.over}, {"ranks", l.ranks}, {"bytes", l.bytes}, {"seconds", l.seconds}});
    for (const point& p : m.shapes) out["shapes"].push_back(json_of(p));
    for (const point& p : m.weak) out["weak"].push_back(json_of(p));
    return out;
}

/// Adds what a file holds. @throws format_error
inline void read(const std::string& path, measurements& m)
{
    std::ifstream file(path);
    try {
        const auto j = nlohmann::json::parse(file);
        const auto each = [&](const char* name, auto f) {
            if (j.contains(name)) for (const auto& e : j.at(name)) f(e);
        };
        m.cores = j.at("cores");
        m.processor = j.at("processor");
        m.load_before = j.at("load").at(0);
        m.load_after = j.at("load").at(1);
        each("compute", [&](const auto& e) {
            m.compute.push_back({e.at("busy"), throughput_from(e.at("experts")), throughput_from(e.at("router"))});
        });
        each("links", [&](const auto& e) {
            m.links.push_back({e.at("over"), e.at("ranks"), e.at("bytes"), e.at("seconds")});
        });
        each("shapes", [&](const auto& e) { m.shapes.push_back(point_from(e)); });
        each("weak", [&](const auto& e) { m.weak.push_back(point_from(e)); });
    } catch (const nlohmann::json::exception& e) {
        fastmoe::raise<fastmoe::format_error>("'" + path + "' is no file of measurements: " + e.what());
    }
}

inline void write(const std::string& path, const measurements& m)
{
    fastmoe::io::replace_file file(path);
    file.write(json_of(m).dump(1) + "\n");
    file.commit();
}

/// Shapes of the fit and of its score: drawn from one seed, so that a step takes from half a millisecond to ten, short
/// enough to fall between what other programs do, with weights that are not much larger than a cache.
inline std::vector<shape> drawn_shapes(int count)
{
    std::vector<shape> out;
    std::uint64_t state = 2022;
    const auto pick = [&state](std::initializer_list<std::int64_t> from) {
        std::uint64_t z = (state += 0x9e3779b97f4a7c15u);
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
        return *(from.begin() + (z ^ (z >> 31)) % from.size());
    };
    while (static_cast<int>(out.size()) < count) {
        const std::int64_t width = pick({64, 96, 128, 192, 256, 384, 512});
        const shape s{pick({32, 64, 128, 192, 256, 384, 512, 768, 1024}), width, width * pick({2, 3, 4}),
                      pick({4, 8, 16, 32, 64, 128}), pick({2, 3, 4})};
        const double flops = 12.0 * static_cast<double>(s.tokens * s.k) * static_cast<double>(s.width * s.hidden);
        const double weights = 8.0 * static_cast<double>(s.experts * s.width * s.hidden); // bytes
        if (flops > 2e7 && flops < 1e9 && weights < 2.5e7) out.push_back(s);
    }
    return out;
}

/// The shape of weak scaling: so much for every rank, four experts among it.
inline shape weak_shape(int ranks) { return {256, 256, 512, 4LL * ranks, 2}; }

/// The first in each pair of shapes is fitted on, the second scored on; both of its rank counts.
inline bool is_fitted_on(std::size_t shape_number) { return shape_number % 2 == 0; }

} // namespace scaling
