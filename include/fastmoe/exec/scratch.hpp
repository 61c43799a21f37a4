// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// How verbs use a workspace: they ask for all of it before they write anything, and leave none of it taken when an
/// exception passes.
#pragma once

#include <fastmoe/exec/memory.hpp>

namespace fastmoe::inline FASTMOE_ABI::detail {

/// Runs body(arena), which takes its scratch and, unless the arena measures, does the work. That much scratch is asked for
/// first, so that what is too small is refused before anything is written, and given back afterwards.
/// @throws out_of_memory
template <class Body>
void with_scratch(arena& scratch, const Body& body, location where = location::current())
{
    if (!scratch.measuring()) {
        arena needed;
        body(needed);
        scratch.require(needed.bytes(), where);
    }
    const arena::scope lent(scratch);
    body(scratch);
}

/// A scope whose memory outlives it once keep() was called: for calls that hand out what they took, if they succeed.
class [[nodiscard]] kept_scope {
public:
    explicit kept_scope(arena& memory) noexcept : memory_(memory), used_(memory.used()) {}
    kept_scope(const kept_scope&) = delete;
    kept_scope& operator=(const kept_scope&) = delete;
    ~kept_scope()
    {
        if (!keeps_) memory_.rewind(used_);
    }
    void keep() noexcept { keeps_ = true; }

private:
    arena& memory_;
    int64_t used_;
    bool keeps_ = false;
};

} // namespace fastmoe::inline FASTMOE_ABI::detail
