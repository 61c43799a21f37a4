// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// How the ranks of an `mpi` communicator do a collective: every rank tells every other what it is about to do, small data in
/// the same message; when all have agreed, what is larger follows. Part of mpi.hpp.
///
/// A rank that waits polls. So it learns at once of a peer that fails or leaves, and after the deadline it knows who is
/// missing.
#pragma once

#include <cstddef>
#include <cstring>
#include <utility>

#include <fastmoe/comm/mpi_link.hpp>
#include <fastmoe/comm/mpi_mailbox.hpp>
#include <fastmoe/comm/post.hpp>

namespace fastmoe::inline FASTMOE_ABI::detail {

/// What this rank sends to another and receives from it.
struct mpi_move {
    const void* sent;
    int64_t sent_bytes;
    void* received;
    int64_t received_bytes;
};

class mpi_channel final : public mpi_mailbox {
public:
    /// @param members  ranks of the link, in the order of this communicator's        // (R)
    mpi_channel(mpi_link& link, std::vector<int> members, int rank, int64_t number)
        : mpi_mailbox(link, std::move(members), rank, number)
    {
        out_ = std::make_unique<std::byte[]>(at(ranks_) * static_cast<std::size_t>(capacity_));
        sends_.assign(at(ranks_), MPI_REQUEST_NULL);
        posts_.resize(at(ranks_));
        moves_.resize(at(ranks_));
    }

    /// The rank of the link that is rank r here.
    using mpi_mailbox::member;
    /// What rank r said in the last meeting; the pointers are valid no more.
    const post& of(int r) const noexcept { return posts_[at(r)]; }
    /// The least number that none of the ranks of the last meeting has used for a communicator.
    int64_t free_number() const noexcept { return free_number_; }

    /// What will move. The entry of the own rank is not looked at.
    mpi_move& move(int r) noexcept { return moves_[at(r)]; }
    void clear_moves() noexcept
    {
        for (auto& m : moves_) m = {};
    }
    /// Moves of at most so many bytes travel with the head: meet() does them.
    int64_t room(const post& mine) const noexcept
    {
        const int64_t room = message_bytes - payload_at(mine);
        return room > 0 && !mine.on_device ? room : 0;
    }

    /// Tells all, hears all, and does the small moves. When it returns, all ranks have agreed.
    /// @throws comm_error
    void meet(const post& mine)
    {
        if (broken()) raise<comm_error>(broken_);
        if (link_.closed() || left_) raise<comm_error>(named(mine.verb, rank_, " has left"));
        ++round_;
        for (auto& p : peers_) p.is_alive = false;
        tell(mine);
        wait(mine.verb, phase::heads, [&] {
            listen(mine.verb, phase::heads);
            return arrived_ == ranks_ - 1;
        });
        const std::string disagreement = agree(mine) ? "" : disagreement_of(posts_.data(), ranks_);
        for (int r = 0; r < ranks_ && disagreement.empty(); ++r) {
            const mpi_move& m = moves_[at(r)];
            if (r != rank_ && m.received_bytes > 0 && m.received_bytes <= room(mine))
                std::memcpy(m.received, in(r) + payload_at(mine), static_cast<std::size_t>(m.received_bytes));
        }
        turn_over();
        wait(mine.verb, phase::sends, [&] { return are_done(mine.verb, sends_); });
        if (!disagreement.empty()) raise<comm_error>(disagreement);
    }

    /// Does the moves of more than `room` bytes, and calls meanwhile() while they are under way.
    /// @throws comm_error  with messages_pending if MPI may still read what is sent and write what is received
    template <class Meanwhile>
    void exchange(const char* verb, int64_t room, const Meanwhile& meanwhile)
    {
        bulk_.clear();
        bulk_peers_.clear();
        for (int k = 1; k < ranks_; ++k) { // not all to the same rank at once
            const int r = (rank_ + ranks_ - k) % ranks_;
            const mpi_move& m = moves_[at(r)];
            auto* to = static_cast<std::byte*>(m.received);
            for (int64_t n = m.received_bytes > room ? m.received_bytes : 0; n > 0;
                 n -= piece_bytes, to += piece_bytes)
                expects_success(verb, MPI_Irecv(to, piece(n), MPI_BYTE, member(r), tag_ + 1, link_.comm(), add_bulk(r)));
        }
        receives_ = bulk_.size();
        for (int k = 1; k < ranks_; ++k) {
            const int r = (rank_ + k) % ranks_;
            const mpi_move& m = moves_[at(r)];
            const auto* from = static_cast<const std::byte*>(m.sent);
            for (int64_t n = m.sent_bytes > room ? m.sent_bytes : 0; n > 0; n -= piece_bytes, from += piece_bytes)
                expects_success(verb, MPI_Isend(from, piece(n), MPI_BYTE, member(r), tag_ + 1, link_.comm(), add_bulk(r)));
        }
        meanwhile();
        if (bulk_.empty()) return;
        finished_.resize(bulk_.size());
        std::size_t left = bulk_.size();
        int64_t polls = 0;
        wait(verb, phase::bulk, [&] {
            if (++polls % 64 == 0) listen(verb, phase::bulk);
            int done = 0;
            expects_success(verb, MPI_Testsome(static_cast<int>(bulk_.size()), bulk_.data(), &done, finished_.data(),
                                               MPI_STATUSES_IGNORE));
            left -= at(done);
            progress_ += done;
            return left == 0;
        });
    }

    /// Whether MPI may still use the memory of the call that broke it.
    bool moves_pending() const noexcept { return moves_pending_; }

    /// This rank cannot go on with a collective: the others learn it, and every later call throws. The first reason stays.
    /// @param started  whether it had met the others
    void fail(const char* verb, bool started) noexcept
    {
        if (!started) ++round_; // the one that it will not come to
        break_up(named(verb, rank_, " failed"));
    }

private:
    /// MPI counts in int.
    static constexpr int64_t piece_bytes = int64_t{1} << 30;

    enum class phase : unsigned char { heads, sends, bulk };

    static int piece(int64_t n) noexcept { return static_cast<int>(n < piece_bytes ? n : piece_bytes); }
    int64_t payload_at(const post& p) const noexcept
    {
        return static_cast<int64_t>(sizeof(mpi_head)) + (p.sent_rows ? 16 * ranks_ : 0);
    }
    MPI_Request* add_bulk(int r)
    {
        bulk_peers_.push_back(r);
        bulk_.push_back(MPI_REQUEST_NULL);
        return &bulk_.back();
    }

    std::string named(const char* verb, int r, const char* what) const
    {
        std::string text = verb;
        text += ": rank " + std::to_string(r);
        text += " of " + std::to_string(ranks_);
        return text += what;
    }

    static mpi_terms terms_of(const post& p) noexcept
    {
        mpi_terms t{};
        std::memcpy(t.verb, p.verb, std::strlen(p.verb));
        std::memcpy(t.type, p.type, std::strlen(p.type));
        t.count = p.count;
        t.root = p.root;
        return t;
    }

    void tell(const post& mine)
    {
        mpi_head h{};
        h.terms = terms_of(mine);
        h.round = round_;
        h.number = link_.next_number();
        h.kind = mpi_head::call;
        h.color = mine.color;
        h.key = mine.key;
        const int64_t payload = payload_at(mine);
        const auto rows = 8 * at(ranks_);
        for (int k = 1; k < ranks_; ++k) {
            const int r = (rank_ + k) % ranks_;
            const mpi_move& m = moves_[at(r)];
            std::byte* to = out_.get() + r * capacity_;
            std::memcpy(to, &h, sizeof h);
            if (mine.sent_rows) {
                std::memcpy(to + sizeof h, mine.sent_rows, rows);
                std::memcpy(to + sizeof h + rows, mine.received_rows, rows);
            }
            const int64_t bytes = m.sent_bytes <= room(mine) ? m.sent_bytes : 0;
            if (bytes > 0) std::memcpy(to + payload, m.sent, static_cast<std::size_t>(bytes));
            expects_success(mine.verb, MPI_Isend(to, static_cast<int>(payload + bytes), MPI_BYTE, member(r), tag_, link_.comm(),
                                       &sends_[at(r)]));
        }
        posts_[at(rank_)] = mine;
        free_number_ = h.number;
    }

    /// Reads what all have said. @returns whether it is the same
    bool agree(const post& mine)
    {
        const mpi_terms own = terms_of(mine);
        bool same = true;
        for (int r = 0; r < ranks_; ++r) {
            if (r == rank_) continue;
            const mpi_head& h = head(r);
            post& p = posts_[at(r)];
            p = mine;
            p.verb = h.terms.verb;
            p.type = h.terms.type;
            p.count = h.terms.count;
            p.root = static_cast<int>(h.terms.root);
            p.color = h.color;
            p.key = h.key;
            p.sent_rows = reinterpret_cast<const int64_t*>(in(r) + sizeof h);
            p.received_rows = p.sent_rows + ranks_;
            free_number_ = h.number > free_number_ ? h.number : free_number_;
            same = same && std::memcmp(&h.terms, &own, sizeof own) == 0;
        }
        if (!same || !mine.sent_rows) return same;
        for (int to = 0; to < ranks_; ++to)
            for (int from = 0; from < ranks_; ++from)
                same = same && posts_[at(from)].sent_rows[to] == posts_[at(to)].received_rows[from];
        return same;
    }

    void listen(const char* verb, phase now)
    {
        expects_success(verb, collect());
        if (gone_ == 0) return;
        // A failure in a later call is met there: this one can still be completed.
        for (int r = 0; r < ranks_; ++r)
            if (peers_[at(r)].is == peer::has_failed && (now == phase::heads || head(r).round <= round_))
                give_up(reinterpret_cast<const char*>(in(r) + sizeof(mpi_head)));
        for (int r = 0; r < ranks_ && now == phase::heads; ++r)
            if (peers_[at(r)].is == peer::has_left) give_up(named(verb, r, " has left"));
    }

    bool are_done(const char* verb, std::vector<MPI_Request>& requests)
    {
        int done = 0;
        expects_success(verb, MPI_Testall(static_cast<int>(requests.size()), requests.data(), &done, MPI_STATUSES_IGNORE));
        return done != 0;
    }

    template <class Ready>
    void wait(const char* verb, phase now, const Ready& ready)
    {
        const auto how = now == phase::heads ? mpi_link::manner::resting : mpi_link::manner::busy;
        if (link_.poll(how, progress_, ready, [&] { send_note(sign_of_life, mpi_head::alive, ""); })) return;
        listen(verb, now);
        auto& requests = now == phase::sends ? sends_ : bulk_;
        const auto missing = [&](int r) {
            if (now == phase::heads) return !peers_[at(r)].arrived;
            for (std::size_t i = 0; i < requests.size(); ++i) {
                int done = 1; // completed ones become null
                if (requests[i] != MPI_REQUEST_NULL) MPI_Test(&requests[i], &done, MPI_STATUS_IGNORE);
                if (!done && r == (now == phase::sends ? static_cast<int>(i) : bulk_peers_[i])) return true;
            }
            return false;
        };
        // Who has shown a sign of life waits for somebody, too: the one to name is who has not.
        int late = -1;
        for (int r = 0; r < ranks_; ++r)
            if (r != rank_ && missing(r) && (late < 0 || (peers_[at(late)].is_alive && !peers_[at(r)].is_alive)))
                late = r;
        if (late < 0) return; // it came at the last moment
        const std::string deadline = std::to_string(link_.deadline().count());
        give_up(named(verb, late, (" did not come within " + deadline + " ms").c_str()));
    }

    void expects_success(const char* verb, int code)
    {
        if (code != MPI_SUCCESS) give_up(std::string(verb) + ": MPI: " + mpi_text(code));
    }

    [[noreturn]] void give_up(const std::string& text)
    {
        break_up(text);
        raise<comm_error>(broken_, location::current(), moves_pending_);
    }

    void break_up(const std::string& text) noexcept
    {
        if (broken()) return;
        broken_ = text;
        link_.spoil();
        send_note(last_words, mpi_head::failed, text.c_str());
        for (std::size_t i = 0; i < bulk_.size() && i < receives_; ++i)
            if (bulk_[i] != MPI_REQUEST_NULL) MPI_Cancel(&bulk_[i]);
        // A little time for both; what does not come now will not come.
        const auto start = mpi_link::clock::now();
        int sent = 0, done = 0;
        while (!(sent && done) && mpi_link::clock::now() - start < std::chrono::milliseconds(20)) {
            MPI_Testall(static_cast<int>(notes_.size()), notes_.data(), &sent, MPI_STATUSES_IGNORE);
            MPI_Testall(static_cast<int>(bulk_.size()), bulk_.data(), &done, MPI_STATUSES_IGNORE);
        }
        moves_pending_ = !done;
        if (!done) link_.abandon_staging();
    }

    int64_t free_number_ = 0;
    std::vector<post> posts_;        // (R)
    std::vector<mpi_move> moves_;    // (R)
    std::vector<MPI_Request> sends_; // (R)    of heads
    std::vector<MPI_Request> bulk_;  // (pieces)  receives first
    std::vector<int> bulk_peers_, finished_; // (pieces)
    int64_t progress_ = 0;                   ///< pieces that have moved
    std::size_t receives_ = 0;
    bool moves_pending_ = false; ///< when it broke
    std::unique_ptr<std::byte[]> out_; // (R,capacity)
};

/// A rank's part in one collective. If it ends by an exception, the others are told.
class mpi_call {
public:
    /// @throws comm_error if this process is in another call
    mpi_call(mpi_channel& channel, const char* verb) : channel_(channel), verb_(verb)
    {
        if (const char* other = channel.link().enter(verb))
            raise<comm_error>(std::string(verb) + ": this process is in " + other +
                              " already; expected one call of a process at a time");
    }
    mpi_call(const mpi_call&) = delete;
    mpi_call& operator=(const mpi_call&) = delete;
    ~mpi_call()
    {
        if (place_ != place::done) channel_.fail(verb_, place_ == place::moving);
        channel_.link().exit();
    }

    void meet(const post& mine)
    {
        place_ = place::done; // whatever meet throws, the others know
        channel_.meet(mine);
        place_ = place::moving;
    }
    void done() noexcept { place_ = place::done; }

private:
    enum class place : std::uint8_t { outside, moving, done };

    mpi_channel& channel_;
    const char* verb_;
    place place_ = place::outside;
};

} // namespace fastmoe::inline FASTMOE_ABI::detail
