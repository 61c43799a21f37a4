// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// What the copies of a `staged` communicator share: what ranks tell each other before they move anything, and what happens if
/// a rank fails in between. Part of staged.hpp.
#pragma once

#include <cstdint>
#include <exception>
#include <memory>
#include <optional>

#include <fastmoe/comm/announcement.hpp>
#include <fastmoe/comm/communicator.hpp>
#include <fastmoe/comm/device_memory.hpp>
#include <fastmoe/comm/staging_memory.hpp>
#include <fastmoe/exec/host_executor.hpp>

namespace fastmoe::inline FASTMOE_ABI::detail {

/// The largest number of elements a pair, so that what goes out and what comes in fits into `half` each.
/// @param out, in  elements to and from each other rank: out(r), in(r)
template <class Out, class In>
int64_t fair_share(int ranks, int rank, int64_t half, const Out& out, const In& in)
{
    const auto fits = [&](int64_t share) {
        int64_t left = half, room = half;
        for (int r = 0; r < ranks; ++r) {
            if (r == rank) continue;
            left -= out(r) < share ? out(r) : share;
            room -= in(r) < share ? in(r) : share;
            if (left < 0 || room < 0) return false;
        }
        return true;
    };
    if (fits(INT64_MAX)) return INT64_MAX;
    int64_t low = half / ranks, high = half + 1; // fits(low), not fits(high)
    while (high - low > 1) {
        const int64_t middle = low + (high - low) / 2;
        (fits(middle) ? low : high) = middle;
    }
    return low;
}

/// What a rank tells another before a collective, as int64.
struct staged_notice {
    announcement own;
    int64_t room = 0;   ///< bytes that this rank stages at a time; of all_to_all_v, then elements a pair
    int64_t direct = 0; ///< its messages may start and end in memory of the device
    int64_t rows = 0;   ///< of all_to_all_v: that it sends to the other; then the most elements of a pair
};

/// One rank, with all that was taken when its communicator was made.
template <class Inner>
struct staged_rank {
    std::optional<Inner> whole; ///< nothing after a failure
    std::string broken;         ///< why
    std::shared_ptr<staging_memory> memory;
    host_executor host;         ///< whose memory Inner moves
    rank_table table;
    int64_t room = 0;           ///< of the rank that has least
    int direct;                 ///< 1: all ranks reach devices; 0: not all do; -1: this one does, the others were not asked yet
    std::unique_ptr<staged_notice[]> sent, received; // (R)
    std::unique_ptr<int64_t[]> counts;               // (2R)  elements to and from each rank, of one piece

    staged_rank(Inner inner, std::shared_ptr<staging_memory> m, int threads, bool reaches)
        : whole(std::move(inner)), memory(std::move(m)), host({.threads = threads}), table(whole->rank(), 1, whole->size()),
          direct(reaches ? -1 : 0), sent(new staged_notice[at(table.ranks())]), received(new staged_notice[at(table.ranks())]),
          counts(new int64_t[at(2 * table.ranks())]())
    {
    }

    const Inner& inner() const
    {
        if (!whole) raise<comm_error>(broken);
        return *whole;
    }

    /// Returns when all ranks are here, prepare() has passed on each, and they agree; else throws on all. With rows, arriving()
    /// then has what every rank sends to this one.
    /// @param sent_rows  valid once prepare() has passed
    template <class Prepare>
    void announce(const announcement& mine, vector_view<const int64_t> sent_rows, const Prepare& prepare)
    {
        if (!whole) raise<comm_error>(broken);
        table.own = mine;
#if defined(__cpp_exceptions)
        try {
            memory->renew();
            prepare();
        } catch (...) {
            table.own.refused = 1;
            try {
                tell({});
            } catch (const comm_error&) { // the reason of its own is the better one
            }
            throw;
        }
#else
        memory->renew();
        prepare();
#endif
        tell(sent_rows);
        expects_agreement();
    }

    /// Whether the rows that arrive are those that this rank expects, on all ranks. Both numbers come back as they are to be
    /// used: the least of `share`, the largest of `most`.
    void compare_rows(vector_view<const int64_t> received_rows, int64_t& share, int64_t& most)
    {
        table.compare(received_rows);
        sent[0] = {table.own, share, 0, most};
        hop([&](const Inner& c) {
            c.all_gather(host, vector_view<const int64_t>(words(sent.get(), 1)), words(received.get(), table.ranks()));
        });
        for (int r = 0; r < table.ranks(); ++r) {
            table.all[r] = received[r].own;
            share = received[r].room < share ? received[r].room : share;
            most = received[r].rows > most ? received[r].rows : most;
        }
        expects_agreement();
    }

    /// Moves data by f(). If that throws, this rank is out of step with others, and can only leave; and messages may still
    /// be on their way.
    template <class F>
    void move(const F& f)
    {
        run([&] { f(*whole); }, [this](bool pending) { memory->lose(pending); });
    }

    /// part(first, count, stage) for n elements, as many at a time as fit into the staging memory `blocks` times.
    template <class T, class Executor, class Part>
    void in_parts(Executor& ex, int64_t n, int64_t blocks, const Part& part)
    {
        const int64_t most = whole_lines<T>(room / static_cast<int64_t>(sizeof(T)) / blocks);
        for (int64_t first = 0; first < n; first += most)
            part(first, n - first < most ? n - first : most, memory->template at<T>(0));
        ex.synchronize();
    }
    /// Parts begin at cache lines, if they are longer than one.
    template <class T>
    static int64_t whole_lines(int64_t elements) noexcept
    {
        constexpr int64_t line = 64 / static_cast<int64_t>(sizeof(T));
        return elements > line ? elements / line * line : elements;
    }

    template <class T>
    int64_t half_room() const noexcept
    {
        return room / 2 / static_cast<int64_t>(sizeof(T));
    }
    /// Elements that this rank and another can exchange at a time.
    template <class T, class Out, class In>
    int64_t share_of(const Out& out, const In& in)
    {
        return whole_lines<T>(detail::fair_share(table.ranks(), table.rank, half_room<T>(), out, in));
    }

    /// out(r) elements go to rank r and in(r) come from it, `share` of them at a time.
    /// @param most  elements of any pair of ranks
    template <class T, class Executor, class Out, class In>
    void exchange(Executor& ex, const T* from, const Out& out, T* to, const In& in, int64_t share, int64_t most)
    {
        T* const outgoing = memory->template at<T>(0);
        T* const incoming = outgoing + half_room<T>();
        int64_t* const out_counts = counts.get();
        int64_t* const in_counts = out_counts + table.ranks();
        // copy(first element in all, element in this part, count) for each rank; the own rank has nothing in a part.
        const auto each = [&](const auto& total, int64_t first, int64_t* n, const auto& copy) {
            int64_t before = 0, packed = 0;
            for (int r = 0; r < table.ranks(); ++r) {
                const int64_t left = r == table.rank || total(r) < first ? 0 : total(r) - first;
                n[r] = left < share ? left : share;
                if (n[r] > 0) copy(before + first, packed, n[r]);
                before += total(r);
                packed += n[r];
            }
            return packed;
        };
        move([&](const Inner& c) {
            int64_t own_from = 0, own_to = 0;
            for (int r = 0; r < table.rank; ++r) own_from += out(r), own_to += in(r);
            detail::queue_copy<T>(ex, from + own_from, in(table.rank), to + own_to);
            for (int64_t first = 0; table.ranks() > 1 && first < most; first += share) {
                detail::joined_copies<T, Executor> down(ex), up(ex);
                const int64_t sends = each(out, first, out_counts, [&](int64_t at, int64_t packed, int64_t n) {
                    down.add(from + at, n, outgoing + packed);
                });
                down.flush();
                const int64_t comes = each(in, first, in_counts, [](int64_t, int64_t, int64_t) {});
                ex.synchronize();
                c.all_to_all_v(host, matrix_view<const T>(outgoing, sends, 1), one_each(out_counts),
                               matrix_view<T>(incoming, comes, 1), one_each(in_counts));
                each(in, first, in_counts, [&](int64_t at, int64_t packed, int64_t n) { up.add(incoming + packed, n, to + at); });
                up.flush();
                if (most - first <= share) break; // share may be the largest number there is
            }
            ex.synchronize();
        });
    }

private:
    static constexpr std::size_t at(int n) noexcept { return static_cast<std::size_t>(n); }
    static vector_view<int64_t> words(staged_notice* first, int64_t n)
    {
        constexpr int64_t each = sizeof(staged_notice) / sizeof(int64_t);
        return vector_view<int64_t>(reinterpret_cast<int64_t*>(first), n * each);
    }

    vector_view<const int64_t> one_each(const int64_t* n) const { return vector_view<const int64_t>(n, table.ranks()); }

    template <class F, class Failed>
    void run(const F& f, const Failed& failed)
    {
#if defined(__cpp_exceptions)
        const auto leave = [&](const std::string& why, bool pending = false) {
            broken = std::string(collective_names[table.own.verb]) + ", staged: " + why;
            failed(pending);
            if (pending) static_cast<void>(sent.release()), static_cast<void>(received.release()); // nobody else gets them
            whole.reset();
        };
        try {
            f();
        } catch (const comm_error& e) {
            leave(bare_text(e.what()), e.messages_pending);
            raise<comm_error>(broken, location::current(), e.messages_pending);
        } catch (const std::exception& e) {
            leave(bare_text(e.what()));
            throw;
        } catch (...) {
            leave("this rank failed");
            throw;
        }
#else
        static_cast<void>(failed);
        f();
#endif
    }
    template <class F>
    void hop(const F& f)
    {
        run([&] { f(*whole); }, [](bool) {});
    }

    void tell(vector_view<const int64_t> sent_rows)
    {
        const int ranks = table.ranks();
        for (int r = 0; r < ranks; ++r)
            sent[r] = {table.own, memory->bytes(), direct != 0, sent_rows.extent(0) > 0 ? sent_rows(r) : 0};
        hop([&](const Inner& c) {
            c.all_to_all(host, vector_view<const int64_t>(words(sent.get(), ranks)), words(received.get(), ranks));
        });
        bool all = true;
        room = memory->bytes();
        for (int r = 0; r < ranks; ++r) {
            table.all[r] = received[r].own;
            table.arriving()[r] = received[r].rows;
            room = received[r].room < room ? received[r].room : room;
            all = all && received[r].direct != 0;
        }
        direct = all;
    }

    void expects_agreement() const
    {
        const std::string text = table.find_disagreement();
        if (!text.empty()) raise<comm_error>(text);
    }
};

} // namespace fastmoe::inline FASTMOE_ABI::detail
