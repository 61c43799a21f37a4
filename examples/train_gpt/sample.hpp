// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Text from a model, byte after byte. A draw depends on the seed and the place alone.
#pragma once

#include <cstdint>
#include <string>

#include "train_gpt/model.hpp"
#include "train_gpt/program.hpp"

namespace train_gpt {

/// A byte drawn from softmax(logits / temperature), by a number on [0, 1).
template <class Real>
int draw_byte(const std::vector<Real>& logits, double temperature, double uniform)
{
    std::size_t best = 0;
    for (std::size_t v = 1; v < logits.size(); ++v)
        if (logits[v] > logits[best]) best = v;
    if (temperature <= 0) return static_cast<int>(best);
    std::vector<double> p;
    double total = 0;
    for (const Real z : logits) {
        p.push_back(std::exp((double(z) - double(logits[best])) / temperature));
        total += p.back();
    }
    double left = uniform * total;
    for (std::size_t v = 0; v < p.size(); ++v) {
        left -= p[v];
        if (left < 0) return static_cast<int>(v);
    }
    return static_cast<int>(best);
}

/// Continues the prompt until the length is reached or the model ends its file (a zero byte). The model sees the last
/// `context` bytes; each byte costs one pass over them. Over ranks, rank 0 has the text and the others their experts.
/// Collective.
template <class T, class Executor, class Gemm, class Parallel, class Ranks>
std::string generate(Executor& ex, gpt<T, Executor, Gemm, Parallel>& model, const std::string& prompt,
                     const sample_options& o, const Ranks& ranks)
{
    const int64_t context = model.config().context;
    fm::buffer<std::byte, Executor> workspace(ex, model.inference_bytes(1, context));
    fm::buffer<int32_t, Executor> ids(ex, context);
    std::vector<int32_t> text(1, 0); // a file begins where the one before it ended
    for (const char c : prompt) text.push_back(static_cast<unsigned char>(c));
    std::string out;
    for (int64_t i = 0; i < o.length; ++i) {
        const int64_t n = std::ssize(text) < context ? std::ssize(text) : context;
        to_executor<Executor, int32_t>(ex, text.data() + std::ssize(text) - n, fm::slice(ids.view(), 0, n));
        const auto seen = vector_view<const int32_t>(ids.data(), ranks.speaks() ? n : 0);
        const auto logits = model.logits(seen, n, fm::arena(workspace.view()));
        const auto word = fm::philox({{static_cast<std::uint32_t>(i), 0, 0, 0}}, o.seed).word[0];
        const auto draw = [&] {
            return draw_byte(to_host(ex, fm::row(logits, n - 1)), o.temperature, double(word) * 0x1p-32);
        };
        const int byte = ranks.from_first(ex, ranks.speaks() ? draw() : 0);
        if (byte == 0) break;
        text.push_back(byte);
        out += static_cast<char>(byte);
    }
    return out;
}

/// What a terminal may be shown: bytes that are neither printable nor white space become question marks.
inline std::string printable(std::string text)
{
    for (char& c : text)
        if (!(c >= ' ' && c <= '~') && c != '\n' && c != '\t') c = '?';
    return text;
}

} // namespace train_gpt
