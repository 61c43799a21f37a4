// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Tables as text: rates, scores, weak scaling. docs/scaling.md holds them, and a test holds it to them.
#pragma once

#include <string>
#include <vector>

#include "plot.hpp"
#include "report.hpp"

namespace scaling {

using train_gpt::detail::format;

inline std::string rates_text(const measurements& m)
{
    std::string out;
    out += format("%s, %d cores; load %.1f before and %.1f after\n", m.processor.c_str(), m.cores, m.load_before, m.load_after);
    const auto table = [&out](const char* what, const char* rows, int busy, const throughput& t) {
        out += format("\n%s, %d rank%s busy, GFLOP/s\n%8s", what, busy, busy > 1 ? "s" : "", rows);
        for (const double d : t.widths) out += format("   D %5g", d);
        for (std::size_t i = 0; i < t.rows.size(); ++i) {
            out += format("\n%8g", t.rows[i]);
            for (std::size_t j = 0; j < t.widths.size(); ++j) out += format("  %8.1f", t.flops[i * t.widths.size() + j] * 1e-9);
        }
        out += "\n";
    };
    for (const auto& p : m.compute) {
        table("products of experts with H = 4 D, by rows an expert", "rows", p.busy, p.experts);
        table("router, T 256, K 2", "experts", p.busy, p.router);
    }
    out += "\n";
    for (const link_times& l : m.links)
        out += format("messages over %s, R %d: alpha %.1f us a message, 1/beta %.2f GB/s\n", l.over.c_str(), l.ranks,
                    1e6 * l.fitted().a, 1e-9 / l.fitted().b);
    return out;
}

inline std::string scores_text(const predictor& p)
{
    std::string out;
    out += "\nfitted coefficients:";
    for (int i = 0; i < terms; ++i) out += format("%s %s %.3g", i ? "," : "", term_names[i], p.coefficients()[static_cast<std::size_t>(i)]);
    out += format("\n\n%-34s %8s %12s %12s %14s %14s\n", "prediction of steps at R 1 and 2", "points", "R^2 of time",
                "R^2 of log", "typically off", "at most off");
    const auto row = [&out](const char* name, const score& s) {
        out += format("%-34s %8d %12.4f %12.4f %13.1f%% %13.1f%%\n", name, s.points, s.linear, s.logarithmic, 100 * s.typical,
                    100 * s.worst);
    };
    row("fitted, on the half fitted on", p.score_fitted(true));
    row("fitted, on the other half", p.score_fitted(false));
    row("FasterMoE's equations, other half", p.score_unfitted(false));
    return out;
}

inline std::string weak_text(const measurements& m, const predictor& p, const std::vector<prediction>& predicted,
                             const std::string& over)
{
    std::string out;
    out += format("\nweak scaling over %s, %lld tokens and 4 experts a rank, D %lld, H %lld, K %lld, fp32; ms a step\n",
                over.c_str(), static_cast<long long>(weak_shape(1).tokens), static_cast<long long>(weak_shape(1).width),
                static_cast<long long>(weak_shape(1).hidden), static_cast<long long>(weak_shape(1).k));
    out += format("%6s %26s %14s %14s %10s %9s %11s %8s\n", "", "", "predicted for", "predicted, a", "of it", "of it", "", "");
    out += format("%6s %26s %7d shared %14s %10s %9s %11s %8s\n", "ranks", "measured [quartiles]", m.cores, "core each", "exchanges",
                "router", "efficiency", "R_CC");
    for (const prediction& q : predicted) {
        std::string measured = "-", shared = "-";
        for (const point& w : m.weak)
            if (w.over == over && w.busiest.ranks == q.ranks) {
                measured = format("%.2f [%.2f .. %.2f]", 1e3 * w.seconds, 1e3 * w.low, 1e3 * w.high);
                shared = format("%.2f", 1e3 * p.shared(w.sizes, w.busiest, over));
            }
        out += format("%6d %26s %14s %14.2f %10.2f %9.2f %10.0f%% %8.2f\n", q.ranks, measured.c_str(), shared.c_str(),
                    1e3 * q.seconds, 1e3 * q.exchanges, 1e3 * q.router, 100 * predicted[0].seconds / q.seconds, q.ratio);
    }
    return out;
}

/// All that is predicted, as text and as a picture.
struct predictions {
    std::string text, svg;
};
inline predictions predict_all(const measurements& m)
{
    const predictor p(m);
    predictions out{rates_text(m) + scores_text(p), ""};
    const char* colors[] = {"#0072B2", "#D55E00"};
    std::vector<series> drawn;
    int kind = 0;
    for (const std::string over : {"threads", "mpi"}) {
        if (m.rates_of(2, over).beta == 0) continue;
        const auto predicted = predict_weak(p, m, over, 1024);
        out.text += weak_text(m, p, predicted, over);
        series measured{"measured over " + over + " on " + std::to_string(m.cores) + " cores", {}, colors[kind % 2], true},
            shared{"predicted for " + std::to_string(m.cores) + " shared cores", {}, colors[kind % 2], false, true},
            line{"predicted over " + over + ", a core for each rank", {}, colors[kind % 2], false};
        for (const point& w : m.weak) {
            if (w.over != over) continue;
            measured.seconds.push_back({w.busiest.ranks, w.seconds});
            shared.seconds.push_back({w.busiest.ranks, p.shared(w.sizes, w.busiest, over)});
        }
        for (const prediction& q : predicted) line.seconds.push_back({q.ranks, q.seconds});
        drawn.push_back(line);
        if (kind == 0) drawn.push_back(shared);
        drawn.push_back(measured);
        ++kind;
    }
    out.svg = weak_scaling_svg("Weak scaling of an expert-parallel layer",
                               format("T 256 a rank, D 256, H 512, K 2, 4 experts a rank, fp32. Filled: measured. Hollow: predicted "
                                      "(R\u00b2 %.3f of log time on unseen shapes)",
                                      p.score_fitted(false).logarithmic),
                               drawn);
    return out;
}

} // namespace scaling
