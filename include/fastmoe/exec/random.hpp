// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Counter-based random numbers: a draw is a function of (seed, step, stream, position) and of nothing else, so it is
/// the same on any executor, thread count or rank count, and a replayed graph draws anew when its step changes.
#pragma once

#include <cmath>
#include <cstdint>

#include <fastmoe/core/config.hpp>

namespace fastmoe::inline FASTMOE_ABI {

/// Four random words.
struct random_words {
    std::uint32_t word[4];
};

/// Philox 4x32 with ten rounds (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").
/// @param counter  any four words; different counters give independent words
/// @param key      any 64 bits
FASTMOE_HOST_DEVICE constexpr random_words philox(random_words counter, std::uint64_t key) noexcept
{
    auto k0 = static_cast<std::uint32_t>(key), k1 = static_cast<std::uint32_t>(key >> 32);
    for (int round = 0; round < 10; ++round) {
        const std::uint64_t a = std::uint64_t{0xD2511F53u} * counter.word[0];
        const std::uint64_t b = std::uint64_t{0xCD9E8D57u} * counter.word[2];
        counter = {{static_cast<std::uint32_t>(b >> 32) ^ counter.word[1] ^ k0, static_cast<std::uint32_t>(b),
                    static_cast<std::uint32_t>(a >> 32) ^ counter.word[3] ^ k1, static_cast<std::uint32_t>(a)}};
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return counter;
}

/// What a draw is for; two purposes in one step never share numbers.
enum class random_stream : std::uint16_t { weights, data, jitter, noise, choice };

/// The draws of one step and one purpose. `seed_and_step` is memory of the executor, read when a draw is made.
struct random_source {
    const std::uint64_t* seed_and_step; // (2): seed; step, below 2^48
    random_stream stream;

    /// The words at a position, e.g. token * width + column with the token's global number.
    FASTMOE_HOST_DEVICE constexpr random_words words(std::uint64_t position) const noexcept
    {
        const std::uint64_t step = seed_and_step[1];
        const auto high = static_cast<std::uint32_t>(step >> 32 & 0xffffu);
        return philox({{static_cast<std::uint32_t>(position), static_cast<std::uint32_t>(position >> 32),
                        static_cast<std::uint32_t>(step), static_cast<std::uint32_t>(stream) << 16 | high}},
                      seed_and_step[0]);
    }

    /// Uniform on [0, 1): a multiple of 2^-24 for float, of 2^-53 for double.
    template <class Real>
    FASTMOE_HOST_DEVICE constexpr Real uniform(std::uint64_t position) const noexcept
    {
        const random_words w = words(position);
        if constexpr (sizeof(Real) == 8) {
            const std::uint64_t bits = (std::uint64_t{w.word[0]} << 32 | w.word[1]) >> 11;
            return static_cast<Real>(bits) * Real(1.1102230246251565e-16);
        } else {
            return static_cast<Real>(w.word[0] >> 8) * Real(5.9604644775390625e-8);
        }
    }

    /// Standard normal, by the transform of Box and Muller in double. Uses the words of uniform() at the position.
    template <class Real>
    FASTMOE_HOST_DEVICE Real normal(std::uint64_t position) const noexcept
    {
        const random_words w = words(position);
        const double radius = (static_cast<double>(w.word[0]) + 0.5) * 2.3283064365386963e-10; // in (0, 1)
        const double angle = static_cast<double>(w.word[1]) * 1.4629180792671596e-9;           // 2 pi / 2^32
        return static_cast<Real>(std::sqrt(-2.0 * std::log(radius)) * std::cos(angle));
    }
};

} // namespace fastmoe::inline FASTMOE_ABI
