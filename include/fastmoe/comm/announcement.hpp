// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// What the ranks of a `hierarchical` or `staged` communicator tell each other before they move anything, and how they find
/// out that they disagree: the same way on all, so that all throw or none. Part of hierarchical.hpp and staged.hpp.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>

#include <fastmoe/comm/self.hpp>
#include <fastmoe/core/dtype.hpp>
#include <fastmoe/exec/memory.hpp>

namespace fastmoe::inline FASTMOE_ABI::detail {

enum class collective : std::uint8_t {
    all_reduce, reduce_scatter, all_gather, all_to_all, all_to_all_v, broadcast, barrier, split
};

inline constexpr const char* collective_names[] = {"all_reduce",   "reduce_scatter", "all_gather", "all_to_all",
                                                   "all_to_all_v", "broadcast",      "barrier",    "split"};
/// What a collective's count is, in words.
inline constexpr const char* count_names[] = {"values (N)",  "received (N)", "sent (N)", "a block of sent (R*N)",
                                              "the width D", "values (N)",   "",         ""};
inline constexpr const char* element_names[] = {"byte",    dtype_name<double>,  dtype_name<float>,  dtype_name<bfloat16>,
                                                dtype_name<half>, dtype_name<int32_t>, dtype_name<int64_t>};

/// The place of T in element_names.
template <class T>
inline constexpr int element_code = [] {
    if constexpr (dtype_name<T> != nullptr)
        for (int i = 1; i < 7; ++i)
            if (std::string_view(element_names[i]) == dtype_name<T>) return i;
    return 0;
}();

/// The text of an error without what raise() puts around it.
inline std::string bare_text(const char* what)
{
    std::string text = what;
    if (text.starts_with("fastmoe: ")) text.erase(0, 9);
    if (const auto at = text.rfind(" ["); at != std::string::npos) text.erase(at);
    return text;
}

/// What a rank tells all others, as int64: it must look the same whatever the rank is about to do.
struct announcement {
    int64_t verb = 0;      ///< a collective
    int64_t type = 0;      ///< of the elements
    int64_t count = 0;     ///< must be the same on all ranks; of split, the color
    int64_t root = 0;      ///< must be the same on all ranks; of split, the key
    int64_t refused = 0;   ///< this rank will not take part
    int64_t wrong_from = -1, wrong_received = 0, wrong_sent = 0; ///< counts of rows that do not fit
};
inline constexpr int64_t announced = sizeof(announcement) / sizeof(int64_t);

/// What this rank knows of all others. Arrays are taken once, when the communicator is made.
struct rank_table {
    int rank, nodes, places;
    announcement own;
    std::unique_ptr<announcement[]> node, all;      // (places), (R)
    std::unique_ptr<int64_t[]> counts;              // (4R+2*nodes+2*places)

    rank_table(int r, int n, int p)
        : rank(r), nodes(n), places(p), node(new announcement[static_cast<std::size_t>(p)]),
          all(new announcement[static_cast<std::size_t>(n * p)]),
          counts(new int64_t[static_cast<std::size_t>(4 * n * p + 2 * n + 2 * p)]())
    {
    }

    int ranks() const noexcept { return nodes * places; }

    static vector_view<int64_t> words(announcement* a, int64_t n)
    {
        return vector_view<int64_t>(reinterpret_cast<int64_t*>(a), n * announced);
    }

    // Rows that this rank sends to a place of its node, for each node; that it has to pass on from a place of its node, for
    // each node; that arrive from each rank; then the sums of each hop.
    int64_t* leaving() const { return counts.get(); }                      // (places,nodes)
    int64_t* passing() const { return leaving() + ranks(); }               // (places,nodes)
    int64_t* crossing() const { return passing() + ranks(); }              // (nodes,places)  the same, node by node
    int64_t* arriving() const { return crossing() + ranks(); }             // (nodes,places)
    int64_t passing_rows() const { return total(from_places()); }
    /// Room for what leaves, and later for what passes.
    int64_t packed_rows() const
    {
        const int64_t out = total(to_places()), on = passing_rows();
        return out > on ? out : on;
    }
    vector_view<const int64_t> to_places() const { return sums(0, places); }
    vector_view<const int64_t> from_places() const { return sums(places, places); }
    vector_view<const int64_t> to_nodes() const { return sums(2 * places, nodes); }
    vector_view<const int64_t> from_nodes() const { return sums(2 * places + nodes, nodes); }

    /// Fills the sums, when the three tables above them are there.
    void add_up()
    {
        int64_t* to = arriving() + ranks();
        const auto add = [&to](const int64_t* from, int groups, int members) {
            for (int g = 0; g < groups; ++g, from += members) *to++ = total(vector_view<const int64_t>(from, members));
        };
        add(leaving(), places, nodes);
        add(passing(), places, nodes);
        add(crossing(), nodes, places);
        add(arriving(), nodes, places);
    }

    /// Compares what arrives with what this rank expects.
    void compare(vector_view<const int64_t> received_rows)
    {
        for (int r = 0; r < ranks() && own.wrong_from < 0; ++r)
            if (arriving()[r] != received_rows(r)) {
                own.wrong_from = r;
                own.wrong_received = received_rows(r);
                own.wrong_sent = arriving()[r];
            }
    }

    /// In the words of `threads`; empty if all agree. Every rank finds the same.
    std::string find_disagreement() const
    {
        const auto name = [](const announcement& a) { return std::string(collective_names[a.verb]); };
        const announcement& first = all[0];
        for (int r = 0; r < ranks(); ++r)
            if (all[r].refused)
                return name(all[r]) + ": rank " + std::to_string(r) + " of " + std::to_string(ranks()) + " failed";
        const auto difference = [&](const std::string& what, const std::string& is, const std::string& other) {
            std::string text = name(first);
            text += ": " + what;
            text += " is " + is;
            text += "; expected " + other;
            return text;
        };
        for (int r = 1; r < ranks(); ++r) {
            const announcement& a = all[r];
            const std::string of = " of rank " + std::to_string(r), zero = ", as on rank 0";
            if (a.verb != first.verb) return difference("the collective" + of, name(a), name(first) + zero);
            if (first.verb == static_cast<int64_t>(collective::split)) continue;
            if (a.type != first.type)
                return difference("the element type" + of, element_names[a.type], element_names[first.type] + zero);
            if (a.count != first.count)
                return difference(count_names[first.verb] + of, std::to_string(a.count), std::to_string(first.count) + zero);
            if (a.root != first.root)
                return difference("root" + of, std::to_string(a.root), std::to_string(first.root) + zero);
        }
        for (int r = 0; r < ranks(); ++r) {
            const announcement& a = all[r];
            if (a.wrong_from < 0) continue;
            const std::string from = std::to_string(a.wrong_from), to = std::to_string(r);
            return difference("received_rows(" + from + ") of rank " + to, std::to_string(a.wrong_received),
                              std::to_string(a.wrong_sent) + ", as sent_rows(" + to + ") of rank " + from);
        }
        return "";
    }

private:
    static int64_t total(vector_view<const int64_t> v)
    {
        int64_t sum = 0;
        for (int64_t i = 0; i < v.extent(0); ++i) sum += v(i);
        return sum;
    }
    vector_view<const int64_t> sums(int64_t first, int64_t n) const
    {
        return vector_view<const int64_t>(arriving() + ranks() + first, n);
    }
};

/// Where a split puts a rank: its node and place among those of its color.
struct split_place {
    int node = 0, place = 0;
    bool fits = true; ///< every color takes the same places of each of its nodes, node by node
};

/// From the colors and keys that all have announced. The order is that of a flat split: by key, then by rank.
inline split_place find_split_place(const rank_table& table)
{
    const int ranks = table.ranks();
    const std::unique_ptr<int[]> order(new int[static_cast<std::size_t>(ranks)]); // by color, key, rank
    const auto before = [&](int a, int b) {
        const announcement &x = table.all[a], &y = table.all[b];
        return x.count != y.count ? x.count < y.count : x.root != y.root ? x.root < y.root : a < b;
    };
    for (int r = 0; r < ranks; ++r) {
        int at = r;
        for (; at > 0 && before(r, order[at - 1]); --at) order[at] = order[at - 1];
        order[at] = r;
    }
    split_place out;
    for (int begin = 0, end = 0; begin < ranks; begin = end) {
        const int node = order[begin] / table.places;
        int width = 0; // ranks of the first node
        for (end = begin; end < ranks && table.all[order[end]].count == table.all[order[begin]].count; ++end)
            width += order[end] / table.places == node;
        out.fits = out.fits && (end - begin) % width == 0;
        for (int i = begin; i < end && out.fits; ++i) {
            const int place = (i - begin) % width, head = order[i - place];
            out.fits = order[i] / table.places == head / table.places &&
                       order[i] % table.places == order[begin + place] % table.places;
            if (order[i] == table.rank) out.node = (i - begin) / width, out.place = place;
        }
    }
    return out;
}

inline void expects_counts_of_rows(vector_view<const int64_t> rows, const char* name, int ranks, int64_t available,
                                   const char* matrix)
{
    expects_shape(rows, name, ranks);
    int64_t left = available;
    for (int r = 0; r < ranks; ++r) {
        expects(rows(r) >= 0 && rows(r) <= left, name, rows(r), "counts from 0 on whose sum is at most the ", available,
                " rows of ", matrix);
        left -= rows(r);
    }
}

/// Memory that a caller lent to one communicator and to all that are split from it.
struct lent_memory {
    vector_view<std::byte> bytes; // (bytes)
    bool is_lost = false;         ///< a message of one of them may still be on its way there
};

/// Memory for staging: from the caller's workspace, or, if that has no bytes, from the executor's resource.
template <class Executor>
class staging {
public:
    /// @param pending  true once messages of this communicator may be on their way for ever; outlives this
    staging(Executor& ex, const lent_memory& workspace, const bool& pending) : ex_(ex), workspace_(workspace), pending_(pending) {}
    staging(const staging&) = delete;
    staging& operator=(const staging&) = delete;
    ~staging()
    {
        if (pending_) owned_.abandon();
    }

    /// Two vectors.                                                                    // (first), (second)
    /// @throws out_of_memory; comm_error if the workspace is lost
    template <class T>
    std::pair<vector_view<T>, vector_view<T>> take(int64_t first, int64_t second)
    {
        const int64_t needed = bytes<T>(first, second);
        const bool lent = workspace_.bytes.extent(0) > 0;
        if (lent && workspace_.is_lost)
            raise<comm_error>("the workspace may still be written to, by a rank that another communicator has lost");
        if (!lent) owned_ = buffer<std::byte, Executor>(ex_, needed);
        arena memory(lent ? workspace_.bytes : owned_.view());
        memory.require(needed);
        const auto a = memory.vector<T>(first);
        return {a, memory.vector<T>(second)};
    }
    template <class T>
    static int64_t bytes(int64_t first, int64_t second)
    {
        arena measure;
        measure.vector<T>(first);
        measure.vector<T>(second);
        return measure.bytes();
    }

private:
    Executor& ex_;
    const lent_memory& workspace_;
    const bool& pending_;
    buffer<std::byte, Executor> owned_;
};

} // namespace fastmoe::inline FASTMOE_ABI::detail
