// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The two levels of a `hierarchical` communicator: hops in either, what happens if one fails, and the exchange of metadata
/// over both. Part of hierarchical.hpp.
#pragma once

#include <cstring>
#include <exception>
#include <memory>
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
            fastmoe::for_each(ex, n, copy_elements<T>{from + (static_cast<int64_t>(r) * cols + c) * n, to});
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
                fastmoe::for_each(ex, n, copy_elements<T>{at, to});
                to += n;
            }
            at += n;
        }
    }
}

/// What the ranks of a node tell another node, as int64: the announcement of one of them, and the rows that it sends to the rank
/// of that node which hears this.
struct passed_notice {
    announcement of;
    int64_t rows = 0;
};

/// What the copies of a hierarchical communicator share. It never ends if messages may still be on their way to it.
template <class Inner, class Outer>
struct two_levels : std::enable_shared_from_this<two_levels<Inner, Outer>> {
    using pair = std::pair<Inner, Outer>;
    std::optional<pair> whole; ///< nothing after a failure
    std::string broken;        ///< why
    bool messages_pending = false;
    std::shared_ptr<lent_memory> workspace; ///< without bytes: the executor's resource
    rank_table table;
    host_executor ex{{.threads = 1}}; ///< of the metadata
    std::unique_ptr<int64_t[]> to_places, of_places;      // (places,announced+nodes)  an announcement, and rows for each node
    std::unique_ptr<passed_notice[]> to_nodes, of_nodes;  // (nodes,places)

    two_levels(Inner i, Outer o, std::shared_ptr<lent_memory> lent)
        : whole(std::in_place, std::move(i), std::move(o)), workspace(std::move(lent)),
          table(whole->second.rank() * whole->first.size() + whole->first.rank(), whole->second.size(), whole->first.size()),
          to_places(new int64_t[at(table.places * (announced + table.nodes))]()),
          of_places(new int64_t[at(table.places * (announced + table.nodes))]()), to_nodes(new passed_notice[at(table.ranks())]),
          of_nodes(new passed_notice[at(table.ranks())])
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

    /// Returns when all ranks are here, verify() has passed on each, and they agree; else throws on all. The table then has the
    /// rows that leave, pass and arrive.
    /// @param sent_rows  of all_to_all_v, valid once verify() has passed; else none                            // (R)
    template <class Check>
    void announce(vector_view<const int64_t> sent_rows, const Check& verify)
    {
        agree(verify, [&](bool refused) { tell(refused ? vector_view<const int64_t>{} : sent_rows); });
    }
    /// The same once more, of what only the rows could show. They stay in the table.
    template <class Check>
    void confirm(const Check& verify)
    {
        agree(verify, [&](bool) { tell_again(); });
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
            if (e.messages_pending) lose_memory();
            raise<comm_error>(broken, location::current(), messages_pending);
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
    void lose_memory()
    {
        messages_pending = workspace->is_lost = true;
        itself_ = this->shared_from_this();
    }

    template <class Check, class Tell>
    void agree(const Check& verify, const Tell& tell_all)
    {
        if (!whole) raise<comm_error>(broken);
#if defined(__cpp_exceptions)
        try {
            verify();
        } catch (...) {
            table.own.refused = 1;
            try {
                tell_all(true);
            } catch (const comm_error&) { // the reason of its own is the better one
            }
            throw;
        }
#else
        verify();
#endif
        tell_all(false);
        const std::string text = table.find_disagreement();
        if (!text.empty()) raise<comm_error>(text);
    }

    /// A rank tells each place of its node what it is about to do and how many rows go by way of it to each node; a place tells
    /// every node what it has heard, with the rows for the rank there. So it looks the same whatever a rank is about to do.
    void tell(vector_view<const int64_t> sent_rows)
    {
        const int nodes = table.nodes, places = table.places;
        const int64_t each = announced + nodes;
        for (int p = 0; p < places; ++p) {
            int64_t* to = to_places.get() + p * each;
            std::memcpy(to, &table.own, sizeof(announcement));
            for (int n = 0; n < nodes; ++n)
                to[announced + n] = table.leaving()[p * nodes + n] = sent_rows.extent(0) > 0 ? sent_rows(n * places + p) : 0;
        }
        inner([&](const Inner& c) {
            c.all_to_all(ex, vector_view<const int64_t>(to_places.get(), places * each), vector_view<int64_t>(of_places.get(), places * each));
        });
        for (int p = 0; p < places; ++p) {
            const int64_t* from = of_places.get() + p * each;
            for (int n = 0; n < nodes; ++n) {
                passed_notice& to = to_nodes[at(n * places + p)];
                std::memcpy(static_cast<void*>(&to.of), from, sizeof(announcement));
                to.rows = table.passing()[p * nodes + n] = table.crossing()[n * places + p] = from[announced + n];
            }
        }
        const auto words = [&](const std::unique_ptr<passed_notice[]>& of) {
            constexpr int64_t notice = sizeof(passed_notice) / sizeof(int64_t);
            return vector_view<int64_t>(reinterpret_cast<int64_t*>(of.get()), table.ranks() * notice);
        };
        outer([&](const Outer& c) { c.all_to_all(ex, vector_view<const int64_t>(words(to_nodes)), words(of_nodes)); });
        for (int r = 0; r < table.ranks(); ++r) {
            table.all[at(r)] = of_nodes[at(r)].of;
            table.arriving()[r] = of_nodes[at(r)].rows;
        }
        table.add_up();
    }

    void tell_again()
    {
        const auto one = rank_table::words(&table.own, 1), node = rank_table::words(table.node.get(), table.places);
        const auto all = rank_table::words(table.all.get(), table.ranks());
        inner([&](const Inner& c) { c.all_gather(ex, one, node); });
        outer([&](const Outer& c) { c.all_gather(ex, node, all); });
    }

    static constexpr std::size_t at(int64_t n) noexcept { return static_cast<std::size_t>(n); }

    std::shared_ptr<two_levels> itself_;
};

} // namespace fastmoe::inline FASTMOE_ABI::detail
