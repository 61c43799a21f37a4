// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The two levels of a `hierarchical` communicator: hops in either, what happens if one fails, and the exchange of metadata
/// over both. Part of hierarchical.hpp.
#pragma once

#include <exception>
#include <optional>

#include <fastmoe/comm/announcement.hpp>
#include <fastmoe/comm/communicator.hpp>
#include <fastmoe/exec/host_executor.hpp>

namespace fastmoe::inline FASTMOE_ABI::detail {

/// Blocks of n elements, (rows,cols) to (cols,rows).
template <class T, class Executor>
void turn_blocks(Executor& ex, const T* from, int rows, int cols, int64_t n, T* to)
{
    for (int c = 0; c < cols; ++c)
        for (int r = 0; r < rows && n > 0; ++r, to += n)
            for_each(ex, n, copy_elements<T>{from + (static_cast<int64_t>(r) * cols + c) * n, to});
}

/// The same with blocks of counts(r,c) rows.
template <class T, class Executor>
void turn_rows(Executor& ex, const T* from, int rows, int cols, const int64_t* counts, int64_t width, T* to)
{
    for (int c = 0; c < cols; ++c) {
        const T* at = from;
        for (int i = 0; i < rows * cols; ++i) {
            const int64_t n = counts[i] * width;
            if (n == 0) continue;
            if (i % cols == c) {
                for_each(ex, n, copy_elements<T>{at, to});
                to += n;
            }
            at += n;
        }
    }
}

/// What the copies of a hierarchical communicator share.
template <class Inner, class Outer>
struct two_levels {
    using pair = std::pair<Inner, Outer>;
    std::optional<pair> whole; ///< nothing after a failure
    std::string broken;        ///< why
    rank_table table;
    host_executor ex{{.threads = 1}}; ///< of the metadata

    two_levels(Inner i, Outer o)
        : whole(std::in_place, std::move(i), std::move(o)),
          table(whole->second.rank() * whole->first.size() + whole->first.rank(), whole->second.size(), whole->first.size())
    {
    }

    template <class F>
    void inner(const F& f)
    {
        const int first = table.rank / table.places * table.places;
        hop([&](const pair& l) { f(l.first); }, "within a node", first, first + table.places - 1, 1);
    }
    template <class F>
    void outer(const F& f)
    {
        const int place = table.rank % table.places;
        hop([&](const pair& l) { f(l.second); }, "across nodes", place, table.ranks() - table.places + place, table.places);
    }

    /// Returns when all ranks are here, verify() has passed on each, and they agree; else throws on all.
    template <class Check>
    void announce(const Check& verify)
    {
#if defined(__cpp_exceptions)
        try {
            verify();
        } catch (...) {
            table.own.refused = 1;
            try {
                tell();
            } catch (const comm_error&) { // the reason of its own is the better one
            }
            throw;
        }
#else
        verify();
#endif
        tell();
        const std::string text = table.find_disagreement();
        if (!text.empty()) raise<comm_error>(text);
    }

    /// What passes through this rank, and what arrives, from what each rank sends.
    void exchange_counts(vector_view<const int64_t> sent_rows) // (R)
    {
        const auto all = [&](int64_t* first) { return vector_view<int64_t>(first, table.ranks()); };
        turn_blocks(ex, sent_rows.data_handle(), table.nodes, table.places, 1, table.leaving());
        inner([&](const Inner& c) { c.all_to_all(ex, all(table.leaving()), all(table.passing())); });
        turn_blocks(ex, table.passing(), table.places, table.nodes, 1, table.crossing());
        outer([&](const Outer& c) { c.all_to_all(ex, all(table.crossing()), all(table.arriving())); });
        table.add_up();
    }

private:
    /// f(levels). If it throws, this rank is out of step with others, and can only leave.
    template <class F>
    void hop(const F& f, const char* level, int first, int last, int step)
    {
        if (!whole) raise<comm_error>(broken);
#if defined(__cpp_exceptions)
        try {
            f(*whole);
        } catch (const comm_error& e) {
            std::string where = std::string(" (") + level;
            where += ", ranks " + std::to_string(first) + " to " + std::to_string(last);
            if (step > 1) where += " in steps of " + std::to_string(step);
            leave(bare_text(e.what()) + where + ")");
            raise<comm_error>(broken);
        } catch (const std::exception& e) {
            leave(bare_text(e.what()));
            throw;
        } catch (...) {
            leave("a hop of a collective failed");
            throw;
        }
#else
        static_cast<void>(level), static_cast<void>(first), static_cast<void>(last), static_cast<void>(step);
        f(*whole);
#endif
    }
    void leave(std::string why)
    {
        broken = std::move(why);
        whole.reset();
    }

    void tell()
    {
        const auto one = rank_table::words(&table.own, 1), node = rank_table::words(table.node.get(), table.places);
        const auto all = rank_table::words(table.all.get(), table.ranks());
        inner([&](const Inner& c) { c.all_gather(ex, one, node); });
        outer([&](const Outer& c) { c.all_gather(ex, node, all); });
    }
};

} // namespace fastmoe::inline FASTMOE_ABI::detail
