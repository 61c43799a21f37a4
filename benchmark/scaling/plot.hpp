// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The picture of weak scaling: what was measured as filled points, what is predicted as lines with hollow ones.
#pragma once

#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "train_gpt/plot.hpp"

namespace scaling {

/// One series over R. Measured ones are filled points without a line between them.
struct series {
    std::string name;
    std::vector<std::pair<int, double>> seconds; ///< by ranks
    const char* color;
    bool measured;
    bool dashed = false;
};

/// Milliseconds over ranks, both in logarithms.
inline std::string weak_scaling_svg(const std::string& title, const std::string& subtitle, const std::vector<series>& all)
{
    using namespace train_gpt::detail;
    constexpr double width = 900, height = 560, left = 86, right = 868, top = 78, bottom = 478;
    double least = 1e300, most = 0, ranks = 1;
    for (const series& s : all)
        for (const auto& [r, t] : s.seconds) {
            least = std::min(least, t * 1e3), most = std::max(most, t * 1e3);
            ranks = std::max(ranks, static_cast<double>(r));
        }
    const double low = std::floor(std::log10(least) * 2) / 2, high = std::ceil(std::log10(most) * 2 + 0.6) / 2;
    const auto x = [&](double r) { return left + 24 + std::log2(r) / std::log2(ranks) * (right - left - 48); };
    const auto y = [&](double ms) { return bottom - (std::log10(ms) - low) / (high - low) * (bottom - top); };
    picture out(width, height);
    out.text(left, 32, title, {.size = 19, .bold = true});
    out.text(left, 54, subtitle, {.color = soft_ink});
    for (double r = 1; r <= ranks; r *= 2) {
        out.line(x(r), bottom, x(r), top, grid_ink, 1);
        out.text(x(r), bottom + 21, format("%g", r), {.anchor = "middle"});
    }
    for (int decade = static_cast<int>(std::floor(low)); decade <= high; ++decade)
        for (const int lead : {1, 2, 5}) {
            const double ms = lead * std::pow(10.0, decade);
            if (y(ms) > bottom + 0.5 || y(ms) < top - 0.5) continue;
            out.line(left, y(ms), right, y(ms), grid_ink, 1);
            out.text(left - 9, y(ms) + 4.5, format("%g", ms), {.anchor = "end"});
        }
    out.line(left, bottom, right, bottom, ink, 1.2);
    out.line(left, bottom, left, top, ink, 1.2);
    out.text((left + right) / 2, height - 34, "ranks, with the same work for each", {.size = 14, .anchor = "middle"});
    out.text(28, (top + bottom) / 2, "forward + backward (ms)", {.size = 14, .anchor = "middle", .turn = -90});
    out.clip(left, top, right - left, bottom - top);
    double key = top + 22;
    for (const series& s : all) {
        const auto mark = [&](double px, double py) {
            out.circle(px, py, s.measured ? 5.5 : 3.5, s.color);
            if (!s.measured) out.circle(px, py, 1.8, "#FFFFFF");
        };
        for (std::size_t i = 0; i + 1 < s.seconds.size() && !s.measured; ++i)
            out.line(x(s.seconds[i].first), y(s.seconds[i].second * 1e3), x(s.seconds[i + 1].first),
                     y(s.seconds[i + 1].second * 1e3), s.color, 1.8, s.dashed ? "6 4" : "none");
        for (const auto& [r, t] : s.seconds) mark(x(r), y(t * 1e3));
        if (!s.measured) out.line(left + 18, key - 4.5, left + 48, key - 4.5, s.color, 1.8, s.dashed ? "6 4" : "none");
        mark(left + 33, key - 4.5);
        out.text(left + 58, key, s.name, {});
        key += 21;
    }
    return std::move(out).finish();
}

} // namespace scaling
