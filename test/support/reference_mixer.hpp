// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The oracle's SparseMixer: K rounds for one token, scalar, in double, straight from the formula. Includes nothing of
/// the library.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

namespace support::reference {

/// One round of a token.
struct mixer_round {
    int chosen;
    int top;                     // of what was left; ties to the lower id
    std::vector<bool> competing; // (E)  left and not masked
    std::vector<double> shares;  // (E)  the softmax over those
};

/// @param logits  (E), finite
/// @param fixed   if given, the rounds whose choices and masks are to be used again
/// @param drawn   if given, the choices: the top where there is none
inline std::vector<mixer_round> mix(const std::vector<double>& logits, std::int64_t k, double epsilon,
                                    const std::vector<mixer_round>* fixed = nullptr, const std::vector<int>* drawn = nullptr)
{
    std::vector<mixer_round> out;
    std::vector<bool> left(logits.size(), true);
    for (std::int64_t j = 0; j < k; ++j) {
        mixer_round r{-1, -1, std::vector<bool>(logits.size()), std::vector<double>(logits.size())};
        for (std::size_t e = 0; e < logits.size(); ++e)
            if (left[e] && (r.top < 0 || logits[e] > logits[r.top])) r.top = static_cast<int>(e);
        const double top = logits[r.top];
        for (std::size_t e = 0; e < logits.size(); ++e)
            r.competing[e] = left[e] && !((top - logits[e]) / std::fmax(std::fabs(logits[e]), top) > 2 * epsilon);
        if (fixed) r.competing = (*fixed)[j].competing;
        r.chosen = drawn ? (*drawn)[j] : fixed ? (*fixed)[j].chosen : r.top;
        double sum = 0;
        for (std::size_t e = 0; e < logits.size(); ++e)
            if (r.competing[e]) sum += r.shares[e] = std::exp(logits[e] - top);
        for (double& s : r.shares) s /= sum;
        left[r.chosen] = false;
        out.push_back(r);
    }
    return out;
}

} // namespace support::reference
