// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// What the plots are drawn with: a picture as SVG text, and axes whose ticks are round numbers.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <string>
#include <utility>
#include <vector>

#include "train_gpt/report.hpp"

namespace train_gpt::detail {

inline constexpr const char* ink = "#222222";
inline constexpr const char* soft_ink = "#5F5F5F";
inline constexpr const char* grid_ink = "#E3E3E3";

using point_list = std::vector<std::pair<double, double>>;

/// An SVG picture that grows by elements; coordinates are pixels, y down.
class picture {
public:
    picture(double width, double height)
    {
        body_ = format("<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%g\" height=\"%g\" viewBox=\"0 0 %g %g\" "
                       "font-family=\"Helvetica, Arial, 'Liberation Sans', 'DejaVu Sans', sans-serif\">\n",
                       width, height, width, height);
        rect(0, 0, width, height, "#FFFFFF");
    }

    struct text_style {
        double size = 13;
        const char* anchor = "start"; ///< start, middle or end
        const char* color = ink;
        bool bold = false;
        double turn = 0; ///< degrees, clockwise
    };

    void text(double x, double y, const std::string& words, text_style s)
    {
        body_ += format("<text x=\"%.1f\" y=\"%.1f\" font-size=\"%g\" text-anchor=\"%s\" fill=\"%s\"", x, y, s.size,
                        s.anchor, s.color);
        if (s.bold) body_ += " font-weight=\"bold\"";
        if (s.turn != 0) body_ += format(" transform=\"rotate(%g %.1f %.1f)\"", s.turn, x, y);
        body_ += ">" + escaped(words) + "</text>\n";
    }

    void line(double x1, double y1, double x2, double y2, const char* color, double width, const char* dashes = "none")
    {
        body_ += format("<line x1=\"%.1f\" y1=\"%.1f\" x2=\"%.1f\" y2=\"%.1f\" stroke=\"%s\" stroke-width=\"%g\" "
                        "stroke-dasharray=\"%s\"/>\n",
                        x1, y1, x2, y2, color, width, dashes);
    }

    void rect(double x, double y, double width, double height, const char* color, const char* border = "none")
    {
        body_ += format("<rect x=\"%.1f\" y=\"%.1f\" width=\"%.1f\" height=\"%.1f\" fill=\"%s\" stroke=\"%s\"/>\n", x,
                        y, width, height, color, border);
    }

    void circle(double x, double y, double radius, const char* color)
    {
        body_ +=
            format("<circle cx=\"%.1f\" cy=\"%.1f\" r=\"%g\" fill=\"%s\" stroke=\"#FFFFFF\" stroke-width=\"1.2\"/>\n",
                   x, y, radius, color);
    }

    /// A line through points, cut off at a box that clip() has set.
    void path(const point_list& points, const char* color, double width, double opacity)
    {
        if (points.empty()) return;
        body_ += "<path clip-path=\"url(#box)\" d=\"";
        for (std::size_t i = 0; i < points.size(); ++i)
            body_ += format("%s%.1f %.1f", i ? "L" : "M", points[i].first, points[i].second);
        body_ += format(
            "\" fill=\"none\" stroke=\"%s\" stroke-width=\"%g\" stroke-opacity=\"%g\" stroke-linejoin=\"round\"/>\n",
            color, width, opacity);
    }

    void clip(double x, double y, double width, double height)
    {
        body_ +=
            format("<clipPath id=\"box\"><rect x=\"%.1f\" y=\"%.1f\" width=\"%.1f\" height=\"%.1f\"/></clipPath>\n", x,
                   y, width, height);
    }

    std::string finish() && { return std::move(body_) + "</svg>\n"; }

private:
    static std::string escaped(const std::string& words)
    {
        std::string out;
        for (const char c : words)
            out += c == '<' ? "&lt;" : c == '>' ? "&gt;" : c == '&' ? "&amp;" : std::string(1, c);
        return out;
    }

    std::string body_;
};

/// An axis from data to pixels with ticks at 1, 2 or 5 times a power of ten.
struct axis {
    double low, high; ///< data
    double from, to;  ///< pixels
    double step;      ///< between ticks
    double first;     ///< the first tick

    double operator()(double v) const { return from + (v - low) / (high - low) * (to - from); }

    /// Grows [low, high] to whole ticks, about `ticks` of them, where `round` says so.
    static axis over(double low, double high, double from, double to, int ticks, bool round)
    {
        if (!(high > low)) high = low + 1;
        const double rough = (high - low) / ticks;
        const double power = std::pow(10, std::floor(std::log10(rough)));
        const double lead = rough / power;
        const double step = power * (lead <= 1 ? 1 : lead <= 2 ? 2 : lead <= 5 ? 5 : 10);
        if (round) low = std::floor(low / step + 1e-9) * step;
        if (round) high = std::ceil(high / step - 1e-9) * step;
        return {low, high, from, to, step, std::ceil(low / step - 1e-9) * step};
    }

    std::string label(double v) const
    {
        const int digits = std::max(0, -static_cast<int>(std::floor(std::log10(step) + 1e-9)));
        return format("%.*f", digits, std::abs(v) < step * 1e-6 ? 0.0 : v);
    }

    /// Calls f(value) for every tick.
    template <class F>
    void each(F f) const
    {
        for (int i = 0; first + i * step <= high + step * 1e-6; ++i) f(first + i * step);
    }
};

} // namespace train_gpt::detail
