// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Prints one table from the JSON files of all benchmarks: the claim, the ratio as measured, its target, ok or short.

#include <cstdio>
#include <fstream>
#include <iostream>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

namespace {

struct line {
    std::string claim, target, verdict;
    double ratio, low, high, rounds;
};

std::string text(const char* format, double value)
{
    char out[64];
    std::snprintf(out, sizeof out, format, value);
    return out;
}

/// A benchmark that failed is a line, too.
line read(const nlohmann::json& b)
{
    if (b.value("error_occurred", false))
        return {b.value("name", "") + ": " + b.value("error_message", ""), "-", "failed", 0, 0, 0, 0};
    line l{b.value("label", b.value("name", "")), "-", "", b.value("ratio", 0.0), b.value("ratio_low", 0.0),
           b.value("ratio_high", 0.0), b.value("rounds", 0.0)};
    if (b.contains("at_least")) {
        const double t = b["at_least"];
        l.target = ">= " + text("%.2f", t);
        l.verdict = l.ratio >= t ? "ok" : "short";
    } else if (b.contains("at_most")) {
        const double t = b["at_most"];
        l.target = "<= " + text("%.2f", t);
        l.verdict = l.ratio <= t ? "ok" : "short";
    }
    return l;
}

} // namespace

int main(int argc, char** argv)
{
    std::vector<line> lines;
    for (int i = 1; i < argc; ++i) {
        std::ifstream file(argv[i]);
        const auto all = nlohmann::json::parse(file, nullptr, false);
        if (all.is_discarded() || !all.contains("benchmarks")) {
            std::cerr << argv[i] << ": not a benchmark's JSON\n";
            return 1;
        }
        for (const auto& b : all["benchmarks"]) lines.push_back(read(b));
    }
    std::size_t width = 5;
    for (const auto& l : lines) width = std::max(width, l.claim.size());
    const int w = static_cast<int>(width);
    std::printf("%-*s  %8s  %-17s  %6s  %-8s %s\n", w, "claim", "measured", "quartiles", "rounds", "target", "");
    int held = 0, missed = 0;
    for (const auto& l : lines) {
        const std::string quartiles = text("[%.3f", l.low) + text(" .. %.3f]", l.high);
        std::printf("%-*s  %8.3f  %-17s  %6.0f  %-8s %s\n", w, l.claim.c_str(), l.ratio, quartiles.c_str(), l.rounds,
                    l.target.c_str(), l.verdict.c_str());
        held += l.verdict == "ok";
        missed += l.verdict == "short" || l.verdict == "failed";
    }
    std::printf("%d of %d targets are met; lines without a target are for information\n", held, held + missed);
    return 0;
}
