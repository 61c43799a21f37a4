// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// What ranks tell each other before they move anything: a few numbers each, which all must have alike, so that a
/// difference is an error on all of them and not a wait for ever. One all-reduce of a fixed size, of integers: a table with
/// a row a rank and zeros elsewhere adds up to what each rank has.
#pragma once

#include <fastmoe/comm/communicator.hpp>
#include <fastmoe/exec/executor.hpp>
#include <fastmoe/exec/memory.hpp>
#include <fastmoe/parallel/parameter.hpp>

namespace fastmoe::inline FASTMOE_ABI {

namespace detail {

/// Row `rank` of a table of zeros.
template <int Columns>
struct write_rank_row {
    int64_t own[Columns];
    int64_t* table; // (R,Columns)
    int64_t rank;

    FASTMOE_HOST_DEVICE void operator()(int64_t i) const { table[i] = i / Columns == rank ? own[i % Columns] : 0; }
};

/// Where ranks differ. Column 0 is a rank's trouble, which should be 0; the others should be those of rank 0.
struct rank_difference {
    int64_t rank; ///< -1: nowhere
    int64_t column, value, expected;
};

template <int Columns>
struct find_difference {
    const int64_t* table; // (R,Columns)
    rank_difference* found;    // (1)
    int64_t ranks;

    FASTMOE_HOST_DEVICE void operator()(int64_t) const
    {
        *found = {-1, 0, 0, 0};
        for (int64_t c = 0; c < Columns; ++c)
            for (int64_t r = 0; r < ranks; ++r) {
                const int64_t value = table[r * Columns + c], expected = c == 0 ? 0 : table[c];
                if (value == expected) continue;
                *found = {r, c, value, expected};
                return;
            }
    }
};

/// The first difference between what the ranks bring; the same on all of them. Collective, unless there is one rank.
template <int Columns, class Executor, class Communicator>
rank_difference compare_ranks(Executor& ex, const Communicator& c, const int64_t (&own)[Columns], arena& scratch)
{
    static_assert(sums_over_ranks<Communicator, Executor, int64_t>, "the communicator lacks sums; see communicator.hpp");
    const arena::scope lent(scratch);
    const int64_t ranks = c.size();
    const vector_view<int64_t> table = scratch.vector<int64_t>(ranks * Columns);
    const vector_view<rank_difference> found = scratch.vector<rank_difference>(1);
    if (scratch.measuring()) return {-1, 0, 0, 0};
    write_rank_row<Columns> row{{}, table.data_handle(), c.rank()};
    for (int i = 0; i < Columns; ++i) row.own[i] = own[i];
    fastmoe::for_each(ex, ranks * Columns, row);
    if (ranks > 1) c.all_reduce(ex, table);
    fastmoe::for_each(ex, 1, find_difference<Columns>{table.data_handle(), found.data_handle(), ranks});
    rank_difference out;
    read_back(ex, vector_view<const rank_difference>(found), &out);
    return out;
}

template <int Words>
struct write_words {
    int64_t words[Words];
    int64_t* to; // (Words)

    FASTMOE_HOST_DEVICE void operator()(int64_t i) const { to[i] = words[i]; }
};

/// Each number becomes its sum over the ranks. Collective, unless there is one rank.
template <int Words, class Executor, class Communicator>
void sum_over_ranks(Executor& ex, const Communicator& c, int64_t (&numbers)[Words], arena& scratch)
{
    static_assert(sums_over_ranks<Communicator, Executor, int64_t>, "the communicator lacks sums; see communicator.hpp");
    const arena::scope lent(scratch);
    const vector_view<int64_t> shared = scratch.vector<int64_t>(Words);
    if (scratch.measuring() || c.size() == 1) return;
    write_words<Words> words{{}, shared.data_handle()};
    for (int i = 0; i < Words; ++i) words.words[i] = numbers[i];
    fastmoe::for_each(ex, Words, words);
    c.all_reduce(ex, shared);
    read_back(ex, vector_view<const int64_t>(shared), numbers);
}

/// What a rank brings of the parameters of one tag.
struct parameter_facts {
    int64_t entries = 0, elements = 0;
    std::uint64_t shapes = 0; ///< of types and counts in order, and of what the call was told
    int64_t tokens = 0;

    void add(std::uint64_t word) noexcept
    {
        shapes = (shapes ^ word) * 0x9e3779b97f4a7c15u;
        shapes ^= shapes >> 29;
    }
    static parameter_facts of(vector_view<const parameter_view> parameters, parameter_tag tag, parameter_side side)
    {
        parameter_facts out;
        for (int64_t i = 0; i < parameters.extent(0); ++i) {
            const parameter_view& p = parameters(i);
            if (p.tag != tag) continue;
            ++out.entries;
            out.elements += p.count;
            out.add(static_cast<std::uint64_t>(type_of(p, side)));
            out.add(static_cast<std::uint64_t>(p.count));
        }
        return out;
    }
};

template <class Executor, class Communicator>
rank_difference compare_facts(Executor& ex, const Communicator& c, const parameter_facts& own, int64_t trouble, arena& scratch)
{
    const int64_t row[] = {trouble, own.entries, own.elements, static_cast<int64_t>(own.shapes), own.tokens};
    return compare_ranks(ex, c, row, scratch);
}

inline std::string difference_text(const rank_difference& d, const char* tag)
{
    static constexpr const char* what[] = {"", "the number of parameters", "the number of elements",
                                           "the types, sizes, order or options (a hash)", "the number of tokens"};
    const std::string rank = std::to_string(d.rank);
    if (d.column == 0) return "the group of replicas of rank " + rank + " does not agree; expected all to";
    std::string out = what[d.column];
    if (d.column < 4) out += std::string(" tagged ") + tag;
    out += " of rank " + rank;
    out += " is " + std::to_string(d.value);
    return out + "; expected " + std::to_string(d.expected) + ", as on rank 0";
}

/// Throws comm_error on all ranks unless all have the same parameters tagged `world`, and all of each group of replicas the
/// same tagged `data`. The groups come first, so that a rank of another group learns of their trouble too.
template <class Executor, class World, class Data>
void expects_agreement(Executor& ex, const World& world, const Data& data, const parameter_facts& of_world,
                       const parameter_facts& of_data, arena& scratch)
{
    expects(data.size() <= world.size(), "data.size()", data.size(), "at most that of world: ", world.size());
    if (world.size() == 1) return;
    rank_difference group{-1, 0, 0, 0};
    if (data.size() > 1) group = compare_facts(ex, data, of_data, 0, scratch);
    const rank_difference all = compare_facts(ex, world, of_world, group.rank >= 0, scratch);
    if (scratch.measuring()) return;
    if (group.rank >= 0) raise<comm_error>(difference_text(group, "data") + " of its group");
    if (all.rank >= 0) raise<comm_error>(difference_text(all, "world"));
}

/// call(arena) on memory of the executor, of the size that it asks for.
template <class Executor, class Call>
auto with_own_scratch(Executor& ex, const Call& call)
{
    arena measure;
    call(measure);
    buffer<std::byte, Executor> memory(ex, measure.bytes());
    arena scratch(memory.view());
    return call_on([&] { return call(scratch); }, memory);
}

} // namespace detail

} // namespace fastmoe::inline FASTMOE_ABI
