// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// What each rank says before a collective begins, and the words for ranks that say different things. Part of threads.hpp
/// and mpi.hpp.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include <fastmoe/core/error.hpp>

namespace fastmoe::inline FASTMOE_ABI::detail {

/// What a rank brings.
struct post {
    const char* verb = nullptr;            ///< the collective; null: not here
    const char* type = "";                 ///< of the elements
    const char* shape = "";                ///< what `count` is, in words
    int64_t count = 0;                     ///< must be the same on all ranks
    int root = 0;                          ///< must be the same on all ranks
    const void* sent = nullptr;            ///< memory of the executor
    void* received = nullptr;              ///< memory of the executor
    const int64_t* sent_rows = nullptr;    // (R)  host memory; of all_to_all_v
    const int64_t* received_rows = nullptr; // (R)
    int color = 0, key = 0;                ///< of split
    bool on_device = false;                ///< the host can neither read what is sent nor write what is received
};

inline std::string posts_differ(const char* verb, const std::string& what, const std::string& is, const std::string& other)
{
    std::string text = verb;
    text += ": " + what;
    text += " is " + is;
    text += "; expected " + other;
    return text;
}

/// Compares every rank's post with that of rank 0, then the counts of rows in both directions; empty if all agree.
inline std::string disagreement_of(const post* posts, int ranks)
{
    const post& first = posts[0];
    for (int r = 1; r < ranks; ++r) {
        const post& p = posts[r];
        const std::string of = " of rank " + std::to_string(r), zero = ", as on rank 0";
        if (std::string_view(p.verb) != first.verb)
            return posts_differ(first.verb, "the collective" + of, p.verb, first.verb + zero);
        if (std::string_view(p.type) != first.type)
            return posts_differ(first.verb, "the element type" + of, p.type, first.type + zero);
        if (p.count != first.count)
            return posts_differ(first.verb, first.shape + of, std::to_string(p.count), std::to_string(first.count) + zero);
        if (p.root != first.root)
            return posts_differ(first.verb, "root" + of, std::to_string(p.root), std::to_string(first.root) + zero);
    }
    for (int to = 0; first.sent_rows && to < ranks; ++to)
        for (int from = 0; from < ranks; ++from) {
            const int64_t sent = posts[from].sent_rows[to], received = posts[to].received_rows[from];
            if (sent == received) continue;
            const std::string a = std::to_string(from), b = std::to_string(to);
            return posts_differ(first.verb, "received_rows(" + a + ") of rank " + b, std::to_string(received),
                              std::to_string(sent) + ", as sent_rows(" + b + ") of rank " + a);
        }
    return "";
}

} // namespace fastmoe::inline FASTMOE_ABI::detail
