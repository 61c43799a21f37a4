// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// How long a training step of an expert-parallel layer takes, from what its ranks hold and how fast they are: the
/// equations of He et al., FasterMoE (PPoPP 2022), section 3. Nothing here measures.
///
///     compute   max_w 4 B_w D H / P       two products of an MLP, forward       B_w: rows of rank w's experts
///     exchange  alpha (R-1) + beta V      V: bytes of the busiest rank, in or out
///     step      3 compute + 4 exchange    forward and backward, nothing overlapped
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace scaling {

/// A layer and the tokens of one rank.
struct shape {
    std::int64_t tokens, width, hidden, experts, k; ///< T a rank, D, H, E of all ranks, K
};

/// What the busiest of the ranks has in one step.
struct load {
    int ranks = 1;
    double choices = 0;          ///< B: choices of its experts
    double choices_an_expert = 0;
    double rows = 0;             ///< tokens that cross to or from other ranks, a token once for each rank
    double crossing_choices = 0; ///< their choices on the ranks that they cross to
};

/// Floating-point operations a second of products, as measured: of an expert's by rows an expert and by width, of the router's
/// by experts and by width. Between what was measured it is interpolated in logarithms, and beyond it stays what it was last.
struct throughput {
    std::vector<double> rows, widths; ///< ascending
    std::vector<double> flops;        ///< (rows, widths)

    double at(double r, double d) const
    {
        const auto [i, u] = where(rows, r);
        const auto [j, v] = where(widths, d);
        const auto value = [&](std::size_t a, std::size_t b) {
            a = std::min(a, rows.size() - 1), b = std::min(b, widths.size() - 1);
            return std::log(flops[a * widths.size() + b]);
        };
        return std::exp((1 - u) * ((1 - v) * value(i, j) + v * value(i, j + 1)) +
                        u * ((1 - v) * value(i + 1, j) + v * value(i + 1, j + 1)));
    }

private:
    struct place {
        std::size_t before;
        double rest;
    };
    static place where(const std::vector<double>& grid, double x)
    {
        if (!(x > grid.front())) return {0, 0};
        if (x >= grid.back()) return {grid.size() - 1, 0};
        std::size_t i = 0;
        while (grid[i + 1] <= x) ++i;
        return {i, std::log(x / grid[i]) / std::log(grid[i + 1] / grid[i])};
    }
};

/// What was measured of a machine.
struct rates {
    throughput compute, router;
    double alpha = 0; ///< seconds a message
    double beta = 0;  ///< seconds a byte
};

/// Seconds of the products of one forward pass: 4 B D H / P.
inline double compute_seconds(const shape& s, const load& l, const rates& r)
{
    const double flops = 4 * l.choices * static_cast<double>(s.width) * static_cast<double>(s.hidden);
    return l.choices > 0 ? flops / r.compute.at(l.choices_an_expert, static_cast<double>(s.width)) : 0;
}

/// Bytes of each of the four exchanges of rows: tokens out and partial rows back, forward and backward. fp32 either way.
inline double row_bytes(const shape& s, const load& l) { return l.rows * static_cast<double>(s.width) * 4; }

/// Bytes of the rest: 4 a row and 8 a choice when they go out, 4 a choice when the weights' gradients come back, 16 a pair
/// of ranks of counts.
inline double metadata_bytes(const load& l) { return 4 * l.rows + 12 * l.crossing_choices + 16 * (l.ranks - 1); }

/// How many times ranks wait for each other in a step: four exchanges of rows, and counts, choices and their gradients.
inline constexpr int row_exchanges = 4, metadata_exchanges = 3;

/// Seconds of one exchange.
inline double exchange_seconds(double bytes, int ranks, const rates& r)
{
    return r.alpha * (ranks - 1) + r.beta * bytes;
}

/// Seconds of all exchanges of a step.
inline double exchanges_seconds(const shape& s, const load& l, const rates& r)
{
    return row_exchanges * exchange_seconds(row_bytes(s, l), l.ranks, r) +
           metadata_exchanges * r.alpha * (l.ranks - 1) + r.beta * metadata_bytes(l);
}

/// FasterMoE's step, with the metadata that its equations leave out.
inline double step_seconds(const shape& s, const load& l, const rates& r)
{
    return 3 * compute_seconds(s, l, r) + exchanges_seconds(s, l, r);
}

/// R_CC = 3 compute / (4 exchange): at 1 and above, exchanges could hide behind the products.
inline double compute_to_exchange(const shape& s, const load& l, const rates& r)
{
    return 3 * compute_seconds(s, l, r) / exchanges_seconds(s, l, r);
}

/// The best that overlapping can do: the longer of the two. It is compute / min(1, R_CC), as the paper's roofline says.
inline double overlapped_seconds(const shape& s, const load& l, const rates& r)
{
    return std::max(3 * compute_seconds(s, l, r), exchanges_seconds(s, l, r));
}

/// Seconds of the router, forward and backward: three products of T E D.
inline double router_seconds(const shape& s, const rates& r)
{
    const auto e = static_cast<double>(s.experts), d = static_cast<double>(s.width);
    return 6 * static_cast<double>(s.tokens) * e * d / r.router.at(e, d);
}

/// What is taken as measured: exchanges and router, which grow with R. At the few ranks and experts of a fit they are so
/// small a part of a step that noise would decide their coefficients.
inline double known_seconds(const shape& s, const load& l, const rates& r)
{
    return exchanges_seconds(s, l, r) + router_seconds(s, r);
}

/// The other terms, with a coefficient each that is fitted: the paper's, and what its equations leave out. A rank's weights
/// come from memory and their gradients go there, whatever the number of rows: the rates of `throughput` are one expert's.
inline constexpr int terms = 6;
inline constexpr const char* term_names[terms] = {"3 compute",         "a step",              "elements moved B D",
                                                  "activations B H", "weights E/R D H", "experts of a rank E/R"};
inline std::vector<double> terms_of(const shape& s, const load& l, const rates& r)
{
    const auto d = static_cast<double>(s.width), h = static_cast<double>(s.hidden);
    const double experts = static_cast<double>(s.experts) / l.ranks;
    return {3 * compute_seconds(s, l, r), 1, l.choices * d, l.choices * h, experts * d * h, experts};
}

inline double predict(const std::vector<double>& coefficients, const std::vector<double>& values)
{
    double sum = 0;
    for (std::size_t i = 0; i < values.size(); ++i) sum += coefficients[i] * values[i];
    return sum;
}

} // namespace scaling
