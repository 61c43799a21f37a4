// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Plots of a run as SVG text: the loss over the tokens, and the share of choices that each expert got.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include <fastmoe/io/replace_file.hpp>

#include "train_gpt/report.hpp"
#include "train_gpt/svg.hpp"

namespace train_gpt {

/// One run in the loss plot.
struct loss_curve {
    std::string label; ///< e.g. "MoE, 8 experts, 2 chosen"
    std::vector<log_row> rows;
};

namespace detail {

/// Okabe and Ito's colours, which people with any colour vision tell apart.
inline constexpr const char* palette[] = {"#0072B2", "#D55E00", "#009E73", "#CC79A7"};

/// The mean over a window, a fiftieth of the run to either side. Over the first steep steps it shrinks, so that it does
/// not lean to one side; at the end it keeps what lies behind, so that it stays calm.
inline std::vector<double> smoothed(const std::vector<log_row>& rows)
{
    const std::size_t n = rows.size();
    const std::size_t widest = std::max<std::size_t>(1, n / 50);
    std::vector<double> sums(n + 1, 0.0);
    for (std::size_t i = 0; i < n; ++i) sums[i + 1] = sums[i] + rows[i].loss;
    std::vector<double> out(n);
    for (std::size_t i = 0; i < n; ++i) {
        const std::size_t before = std::min(widest, i);
        const std::size_t after = std::min(before, n - 1 - i);
        out[i] = (sums[i + after + 1] - sums[i - before]) / static_cast<double>(before + after + 1);
    }
    return out;
}

/// What the loss axis must show: all of validation, and of training what comes after the first steep twentieth.
inline std::pair<double, double> loss_range(const std::vector<loss_curve>& curves)
{
    double low = INFINITY;
    double high = -INFINITY;
    const auto see = [&](double v) {
        if (!std::isfinite(v)) return;
        low = std::min(low, v);
        high = std::max(high, v);
    };
    for (const loss_curve& c : curves) {
        const auto mean = smoothed(c.rows);
        for (std::size_t i = c.rows.size() / 20; i < mean.size(); ++i) see(mean[i]);
        for (std::size_t i = c.rows.size() / 20; i < mean.size(); ++i) see(c.rows[i].val_loss);
    }
    return low <= high ? std::pair(low, high) : std::pair(0.0, 1.0);
}

/// Moves labels that stand closer than `gap` apart, in their order.
inline void spread(std::vector<double>& y, double gap)
{
    std::vector<std::size_t> order(y.size());
    for (std::size_t i = 0; i < y.size(); ++i) order[i] = i;
    std::sort(order.begin(), order.end(), [&](auto a, auto b) { return y[a] < y[b]; });
    for (std::size_t i = 1; i < y.size(); ++i) {
        const double short_by = gap - (y[order[i]] - y[order[i - 1]]);
        if (short_by <= 0) continue;
        y[order[i]] += short_by / 2;
        for (std::size_t j = 0; j < i; ++j) y[order[j]] -= short_by / 2;
    }
}

/// The three layers of one curve, in pixels.
struct drawn_curve {
    const char* color;
    point_list steps;      ///< every step
    point_list mean;       ///< smoothed
    point_list validation; ///< where it was measured
    std::string last;      ///< the last validation loss in words
};

inline drawn_curve draw(const loss_curve& c, const char* color, const axis& x, const axis& y, double unit)
{
    drawn_curve out{color, {}, {}, {}, {}};
    const auto mean = smoothed(c.rows);
    const std::size_t stride = c.rows.size() / 1500 + 1; // more points than pixels would only make the file large
    for (std::size_t i = 0; i < c.rows.size(); ++i) {
        const log_row& row = c.rows[i];
        const double at = x(static_cast<double>(row.tokens) / unit);
        const bool shown = i % stride == 0 || i + 1 == c.rows.size();
        if (shown && std::isfinite(row.loss)) out.steps.emplace_back(at, y(row.loss));
        if (shown && std::isfinite(mean[i])) out.mean.emplace_back(at, y(mean[i]));
        if (!std::isfinite(row.val_loss)) continue;
        if (row.val_loss <= y.high) out.validation.emplace_back(at, y(row.val_loss));
        out.last = format("%.3f", row.val_loss);
    }
    return out;
}

/// Grid, ticks and the two lines of a pair of axes.
inline void draw_axes(picture& out, const axis& x, const axis& y)
{
    y.each([&](double v) {
        out.line(x.from, y(v), x.to, y(v), grid_ink, 1);
        out.text(x.from - 9, y(v) + 4.5, y.label(v), {.anchor = "end"});
    });
    x.each([&](double v) {
        out.line(x(v), y.from, x(v), y.to, grid_ink, 1);
        out.line(x(v), y.from, x(v), y.from + 5, ink, 1);
        out.text(x(v), y.from + 21, x.label(v), {.anchor = "middle"});
    });
    out.line(x.from, y.from, x.to, y.from, ink, 1.2);
    out.line(x.from, y.from, x.from, y.to, ink, 1.2);
}

/// In the upper right corner, where a loss that falls leaves room: two rows a curve.
inline void draw_legend(picture& out, const std::vector<loss_curve>& curves, double right, double top)
{
    std::size_t longest = 0;
    for (const auto& c : curves) longest = std::max(longest, c.label.size());
    const double width = 62 + 6.9 * static_cast<double>(longest + sizeof(": training, smoothed"));
    const double height = 16 + 21.0 * 2 * static_cast<double>(curves.size());
    const double left = right - width;
    out.rect(left, top, width, height, "#FFFFFF", grid_ink);
    double y = top + 23;
    for (std::size_t c = 0; c < curves.size(); ++c, y += 42) {
        out.line(left + 12, y - 4.5, left + 42, y - 4.5, palette[c % 4], 2);
        out.text(left + 52, y, curves[c].label + ": training, smoothed", {});
        out.circle(left + 27, y + 16.5, 4.5, palette[c % 4]);
        out.text(left + 52, y + 21, curves[c].label + ": validation", {});
    }
}

} // namespace detail

/// Training loss (each step faint, its running mean strong) and validation loss (points) over the tokens seen.
/// The first steep steps may lie above the axis; a note then says where they begin.
inline std::string loss_svg(const std::vector<loss_curve>& curves, const std::string& subtitle = {})
{
    using namespace detail;
    constexpr double width = 900, height = 520, left = 78, right = 826, top = 74, bottom = 448;
    double tokens = 1;
    double first = 0;
    for (const auto& c : curves)
        for (const auto& row : c.rows) tokens = std::max(tokens, static_cast<double>(row.tokens));
    for (const auto& c : curves)
        if (!c.rows.empty() && std::isfinite(c.rows[0].loss)) first = std::max(first, c.rows[0].loss);
    const double unit = tokens >= 2e6 ? 1e6 : tokens >= 2e3 ? 1e3 : 1;
    const auto [low, high] = loss_range(curves);
    const axis x = axis::over(0, tokens / unit, left, right, 8, false);
    const axis y = axis::over(low - 0.06 * (high - low), high, bottom, top, 6, true);

    picture out(width, height);
    out.text(left, 32, "Loss during training", {.size = 19, .bold = true});
    out.text(left, 54, subtitle, {.color = soft_ink});
    draw_axes(out, x, y);
    const char* scale = unit == 1e6 ? " (millions)" : unit == 1e3 ? " (thousands)" : "";
    out.text((left + right) / 2, height - 22, std::string("training tokens seen") + scale,
             {.size = 14, .anchor = "middle"});
    out.text(26, (top + bottom) / 2, "cross-entropy (nats per byte)", {.size = 14, .anchor = "middle", .turn = -90});

    // All faint lines lie below all strong ones, or the second run would grey the first.
    std::vector<drawn_curve> drawn;
    for (std::size_t c = 0; c < curves.size(); ++c) drawn.push_back(draw(curves[c], palette[c % 4], x, y, unit));
    out.clip(left, top, right - left, bottom - top);
    for (const auto& c : drawn) out.path(c.steps, c.color, 1, 0.2);
    for (const auto& c : drawn) out.path(c.mean, c.color, 2, 1);
    for (const auto& c : drawn)
        for (const auto& [px, py] : c.validation) out.circle(px, py, 4.5, c.color);
    draw_legend(out, curves, right - 10, top + 10);
    if (first > y.high) {
        double cut = left; // where the last of the curves comes down into the picture
        for (const auto& c : drawn)
            for (const auto& [px, py] : c.mean)
                if (py < top) cut = std::max(cut, px);
        out.text(cut + 14, top + 15, format("\u2191 first step: %.2f", first), {.size = 12, .color = soft_ink});
    }

    std::vector<double> at;
    for (const auto& c : drawn) at.push_back(c.validation.empty() ? bottom : c.validation.back().second);
    spread(at, 17);
    for (std::size_t c = 0; c < drawn.size(); ++c)
        out.text(right + 12, at[c] + 4.5, drawn[c].last, {.size = 14, .color = drawn[c].color, .bold = true});
    return std::move(out).finish();
}

/// The share of each layer's choices that each expert got: a panel a layer, one scale, a line where all were equal.
inline std::string load_svg(const expert_load& load, const std::string& subtitle = {})
{
    using namespace detail;
    const std::size_t layers = load.size();
    const std::size_t experts = layers ? load[0].size() : 0;
    const std::size_t abreast = layers <= 3 ? std::max<std::size_t>(1, layers) : layers == 4 ? 2 : layers <= 9 ? 3 : 4;
    constexpr double width = 900, left = 78, right = 876, top = 106, gap = 22, panel = 170, pitch = 250;
    const auto lines = static_cast<double>((layers + abreast - 1) / abreast);
    const double across = (right - left - gap * static_cast<double>(abreast - 1)) / static_cast<double>(abreast);
    const double height = top + lines * pitch - 22;
    const double uniform = experts ? 100.0 / static_cast<double>(experts) : 0;
    double most = uniform;
    for (const auto& layer : load)
        for (const auto n : layer) most = std::max(most, share(layer, n));

    picture out(width, height);
    out.text(left, 32, "Expert load by layer", {.size = 19, .bold = true});
    out.text(left, 54, subtitle, {.color = soft_ink});
    out.line(right - 182, 27.5, right - 148, 27.5, palette[1], 2, "6 4");
    out.text(right - 140, 32, format("uniform load: %.*f %%", uniform < 10 ? 2 : 1, uniform), {});
    out.text(right, 54, "CV: standard deviation / mean", {.size = 12, .anchor = "end", .color = soft_ink});
    out.text(26, top + (lines * pitch - (pitch - panel)) / 2, "share of choices (%)",
             {.size = 14, .anchor = "middle", .turn = -90});
    for (std::size_t l = 0; l < layers; ++l) {
        const double x0 = left + static_cast<double>(l % abreast) * (across + gap);
        const double y0 = top + static_cast<double>(l / abreast) * pitch;
        const axis y = axis::over(0, most * 1.02, y0 + panel, y0, 4, true);
        const double slot = across / static_cast<double>(experts);
        out.text(x0, y0 - 10, format("Layer %zu", l), {.size = 13.5, .bold = true});
        out.text(x0 + across, y0 - 10, format("CV %.2f", load_cv(load[l])),
                 {.size = 12, .anchor = "end", .color = soft_ink});
        y.each([&](double v) {
            out.line(x0, y(v), x0 + across, y(v), grid_ink, 1);
            if (l % abreast == 0) out.text(x0 - 9, y(v) + 4.5, y.label(v), {.anchor = "end"});
        });
        // As many expert ids as fit, at a round distance.
        const double every =
            axis::over(0, static_cast<double>(experts), 0, 1, static_cast<int>(across / 20), false).step;
        for (std::size_t e = 0; e < experts; ++e) {
            const double at = x0 + slot * (static_cast<double>(e) + 0.5);
            const double tall = y(0) - y(share(load[l], load[l][e]));
            const double wide = std::min(slot * 0.74, 64.0);
            out.rect(at - wide / 2, y(0) - tall, wide, tall, palette[0]);
            if (std::fmod(static_cast<double>(e), std::max(1.0, every)) == 0)
                out.text(at, y(0) + 17, format("%zu", e), {.size = 12, .anchor = "middle"});
        }
        out.line(x0, y(uniform), x0 + across, y(uniform), palette[1], 2, "6 4");
        out.line(x0, y(0), x0 + across, y(0), ink, 1.2);
        out.text(x0 + across / 2, y(0) + 36, "expert", {.size = 13, .anchor = "middle"});
    }
    return std::move(out).finish();
}

/// Writes a text file as a whole or not at all.
inline void write_text(const std::string& path, const std::string& text)
{
    fastmoe::io::replace_file file(path);
    file.write(text);
    file.commit();
}

} // namespace train_gpt
