// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// How a run over ranks is cut.
#pragma once

#include <cstdint>

#include <fastmoe/core/error.hpp>

namespace train_gpt {

namespace fm = fastmoe;

/// How tokens get to the ranks that hold their experts; the library's three exchanges.
enum class exchange_kind : std::uint8_t {
    exact,    ///< counts first, then what there is
    padded,   ///< no counts: always room for all tokens of a rank
    gathered, ///< all tokens to all ranks
};

struct rank_options {
    int ranks = 0;           ///< threads of this process, or what mpirun has started
    int expert_parallel = 0; ///< M, ranks of a group that shares the experts; 0: all
    int chunks = 1;          ///< pieces of an exchange: one travels while another is worked on
    exchange_kind exchange = exchange_kind::exact;

    /// @param size  R
    /// @throws invalid_argument if an option is out of range
    void check(int size) const
    {
        fm::expects(expert_parallel >= 0 && (expert_parallel == 0 || size % expert_parallel == 0), "--expert-parallel",
                    expert_parallel, "a divisor of the number of ranks, ", size);
        fm::expects(chunks >= 1 && chunks <= 1024, "--chunks", chunks, "1 to 1024");
    }
};

} // namespace train_gpt
