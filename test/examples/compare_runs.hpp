// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// What two runs of the training program may differ in when their ranks differ: the order of float32 sums.
#pragma once

#include <chrono>
#include <string>
#include <thread>
#include <vector>

#include "examples/training_run.hpp"

namespace training_run {

/// What differs between the logs of R ranks and of one; nothing, if it is rounding.
///
/// A step adds up to 48 tokens' losses and the squares of 1e4 gradients: in another order, a few units in the last of 24 bits,
/// 1e-6 in all. Each step passes on the differences of the one before: AdamW divides a gradient by its own size, so that one
/// that is all rounding moves a weight by up to the learning rate, here at most 1.5e-3 in weights of 0.1, and there are few of
/// them: 1e-5 after twelve steps. The counts of choices, and with them the balance, are the same.
inline std::string difference(const std::vector<std::vector<double>>& found, const std::vector<std::vector<double>>& expected)
{
    if (found.size() != expected.size()) return std::to_string(found.size()) + " rows";
    const char* names[] = {"step", "tokens", "loss", "val_loss", "balance", "learning_rate", "gradient_norm"};
    for (std::size_t i = 0; i < expected.size(); ++i)
        for (std::size_t j = 0; j < expected[i].size(); ++j) {
            const bool rounded = j == 2 || j == 3 || j == 6;
            const double room = !rounded ? 0 : (i == 0 ? 1e-6 : 1e-5) * std::abs(expected[i][j]);
            if (!(std::abs(found[i][j] - expected[i][j]) <= room))
                return "row " + std::to_string(i) + ": " + names[j] + " is " + std::to_string(found[i][j]) + "; expected " +
                       std::to_string(expected[i][j]);
        }
    return "";
}

inline std::string text_of(const words& all)
{
    std::string out;
    for (const auto& word : all) out += word + " ";
    return out;
}

/// Returns when the log has some steps, or after a minute.
inline void wait_for_steps(const place& p, const char* log, child& c)
{
    for (int i = 0; i < 60000 && !c.ended(); ++i) {
        if (fs::exists(p.folder / log) && p.bytes(log).size() > 400) break;
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
}

} // namespace training_run
