// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Faults found inside parallel work: recorded by the smallest position with integer atomics, thrown by the executor.
#pragma once

#include <atomic>
#include <cstdint>

#include <fastmoe/core/error.hpp>

namespace fastmoe::inline FASTMOE_ABI {

enum class fault_kind : int32_t {
    expert_out_of_range, ///< routing.experts(position) is not in [-1, E)
    expert_repeated,     ///< routing.experts(position) stands twice in one token
    first_out_of_order,  ///< routing.first(position) is below its predecessor, over C, or does not start at 0
    token_out_of_range,  ///< an id outside of its table
    table_out_of_range,  ///< an entry of a table of experts is not in [-1, E); its position is row * K + column
    group_out_of_range,  ///< counts(position) rows from offsets(position) on do not lie inside of the S rows
    matrix_misaligned,   ///< the matrix of expert `position`, held apart, begins so many bytes beyond whole 16
    count_,
};

struct fault {
    fault_kind kind;
    int32_t position; ///< the smallest position with this fault
    int32_t value;    ///< what stood there
};

/// The memory of a fault log: one word a kind, position in the high and value in the low half.
struct fault_words {
    std::uint64_t word[static_cast<int>(fault_kind::count_)];
};

/// What a functor holds to report a fault; usable from any lane of any executor.
struct fault_recorder {
    fault_words* words;

    FASTMOE_HOST_DEVICE void record(fault_kind kind, int64_t position, int32_t value) const noexcept
    {
        const std::uint64_t key =
            (static_cast<std::uint64_t>(position) << 32) | static_cast<std::uint32_t>(value);
        std::uint64_t& word = words->word[static_cast<int>(kind)];
#if defined(__CUDA_ARCH__)
        atomicMin(reinterpret_cast<unsigned long long*>(&word), static_cast<unsigned long long>(key));
#else
        std::atomic_ref<std::uint64_t> shared(word);
        std::uint64_t seen = shared.load(std::memory_order_relaxed);
        while (key < seen && !shared.compare_exchange_weak(seen, key, std::memory_order_relaxed)) {}
#endif
    }
};

namespace detail {

inline void clear(fault_words& words) noexcept
{
    for (auto& w : words.word) w = ~std::uint64_t{0};
}

/// Takes what was recorded, and forgets it, at one place in the order of a stream.
struct take_faults {
    fault_words* record;
    fault_words* taken;

    FASTMOE_HOST_DEVICE void operator()(int64_t kind) const noexcept
    {
        taken->word[kind] = record->word[kind];
        record->word[kind] = ~std::uint64_t{0};
    }
};

/// The first kind that was recorded, if any.
inline bool first_fault(const fault_words& words, fault& out) noexcept
{
    for (int k = 0; k < static_cast<int>(fault_kind::count_); ++k)
        if (words.word[k] != ~std::uint64_t{0}) {
            out = {static_cast<fault_kind>(k), static_cast<int32_t>(words.word[k] >> 32),
                   static_cast<int32_t>(words.word[k] & 0xffffffffu)};
            return true;
        }
    return false;
}

[[noreturn]] inline void raise_fault(const fault& f, location where = location::current())
{
    std::string at = "("; // not "(" + text: g++ 12 warns of an overlap in its own operator
    at += std::to_string(f.position) + ")";
    const std::string value = std::to_string(f.value);
    switch (f.kind) {
    case fault_kind::expert_out_of_range:
        raise<invalid_argument>("routing.experts" + at + " is " + value + "; expected -1 or an id below E", where);
    case fault_kind::expert_repeated:
        raise<invalid_argument>("routing.experts" + at + " is " + value + "; expected each expert once in a token", where);
    case fault_kind::first_out_of_order:
        raise<invalid_argument>("routing.first" + at + " is " + value + "; expected 0 first, then no decrease, up to C", where);
    case fault_kind::table_out_of_range:
        raise<invalid_argument>("table" + at + " is " + value + "; expected -1 or an id below E", where);
    case fault_kind::group_out_of_range:
        raise<invalid_argument>("counts" + at + " is " + value + "; expected a group inside of the S rows", where);
    case fault_kind::matrix_misaligned:
        raise<invalid_argument>("the matrix of expert " + std::to_string(f.position) + " begins " + value +
                                " bytes beyond whole 16; expected matrices that are held apart to begin at whole 16 bytes", where);
    default: raise<invalid_argument>("token_ids" + at + " is " + value + "; expected an id inside of the table", where);
    }
}

} // namespace detail

} // namespace fastmoe::inline FASTMOE_ABI
