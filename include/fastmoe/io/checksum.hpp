// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// A checksum against disks and cables, not against malice: any change of one word is seen for certain, more with the odds
/// of 64 bits. Words go to four chains in turn, which a processor follows side by side.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>

#include <fastmoe/io/safetensor.hpp>

namespace fastmoe::inline FASTMOE_ABI {
namespace io {

class checksum {
public:
    /// Adds bytes and how many they are, so that two texts one after the other are not the same as one.
    void add(const void* data, std::size_t bytes)
    {
        const char* p = static_cast<const char*>(data);
        const std::size_t all = bytes;
        for (; bytes >= 4 * sizeof(std::uint64_t); bytes -= 4 * sizeof(std::uint64_t))
            for (std::uint64_t& chain : chains_) p = take(chain, p, sizeof chain);
        for (int c = 0; bytes > 0; ++c) {
            const std::size_t n = bytes < sizeof(std::uint64_t) ? bytes : sizeof(std::uint64_t);
            p = take(chains_[c], p, n);
            bytes -= n;
        }
        add(static_cast<std::uint64_t>(all));
    }
    void add(std::string_view text) { add(text.data(), text.size()); }
    void add(std::uint64_t word) { mix(chains_[0], word); }

    std::uint64_t value() const
    {
        std::uint64_t out = 0;
        for (const std::uint64_t chain : chains_) mix(out, chain);
        return out;
    }

private:
    // Each step is a bijection of what is added, and of the chain.
    static void mix(std::uint64_t& chain, std::uint64_t word)
    {
        chain = std::rotl((chain ^ word) * 0x9e3779b97f4a7c15u, 29) + 0x632be59bd9b4e019u;
    }
    static const char* take(std::uint64_t& chain, const char* p, std::size_t n)
    {
        std::uint64_t word = 0;
        std::memcpy(&word, p, n);
        mix(chain, word);
        return p + n;
    }

    std::uint64_t chains_[4] = {1, 2, 3, 4};
};

/// Of a tensor: its name, type, shape and every byte.
inline std::uint64_t checksum_of(std::string_view name, const safetensor& t)
{
    checksum sum;
    sum.add(name);
    sum.add(name_of(t.type));
    for (const int64_t extent : t.shape) sum.add(static_cast<std::uint64_t>(extent));
    sum.add(t.data, static_cast<std::size_t>(t.bytes()));
    return sum.value();
}

} // namespace io
} // namespace fastmoe::inline FASTMOE_ABI
