// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Where a rank of an `mpi` communicator gets what its peers say: the calls that they make, signs of life, and their last
/// words. From a rank to another, messages arrive in order: that is all that is asked of MPI. Part of mpi.hpp.
#pragma once

#include <cstddef>
#include <cstring>
#include <utility>

#include <fastmoe/comm/mpi_link.hpp>

namespace fastmoe::inline FASTMOE_ABI::detail {

/// What must be the same on all ranks; unused bytes are zero.
struct mpi_terms {
    char verb[16], type[16];
    int64_t count, root;
};

/// The head of every message but bulk. After that of a call come, for all_to_all_v, sent_rows and received_rows (R each),
/// and small data; after that of `failed`, a text.
struct mpi_head {
    enum kind_t : int32_t { call, alive, left, failed };

    mpi_terms terms;
    int64_t round;  ///< how many collectives the sender has begun
    int64_t number; ///< of split: the sender's next number of a communicator
    int32_t kind;
    int32_t spoiled;    ///< of last words: the sender will not finalize MPI
    int32_t color, key; ///< of split
};

class mpi_mailbox : public mpi_link::tenant {
public:
    int rank() const noexcept { return rank_; }
    int size() const noexcept { return ranks_; }
    mpi_link& link() const noexcept { return link_; }
    bool broken() const noexcept { return !broken_.empty(); }

    void leave() noexcept override
    {
        if (left_) return;
        left_ = true;
        if (!broken()) send_note(last_words, mpi_head::left, "");
    }

    bool ended() noexcept override
    {
        if (broken()) return false;
        collect();
        for (int r = 0; r < ranks_; ++r)
            if (peers_[at(r)].arrived) { // of a call that will fail, since this rank has left
                peers_[at(r)].arrived = false;
                receive(r);
            }
        int sent = 0;
        MPI_Testall(static_cast<int>(notes_.size()), notes_.data(), &sent, MPI_STATUSES_IGNORE);
        bool all = sent != 0;
        for (int r = 0; r < ranks_; ++r) all = all && (r == rank_ || peers_[at(r)].is != peer::here);
        return all;
    }

protected:
    /// Short enough for what MPIs send at once, without asking the receiver first.
    static constexpr int64_t message_bytes = 4000;
    static constexpr std::size_t note_bytes = sizeof(mpi_head) + 320;

    enum note : std::size_t { sign_of_life, last_words };
    struct peer {
        enum state : unsigned char { here, has_left, has_failed };
        state is = here;
        bool arrived = false;   ///< its next call lies in the buffer
        bool is_alive = false;  ///< it has said since this call began that it waits, too
        unsigned char side = 0; ///< which of its two buffers receives
    };

    /// @param members  ranks of the link, in the order of this communicator's        // (R)
    mpi_mailbox(mpi_link& link, std::vector<int> members, int rank, int64_t number)
        : link_(link),
          members_(std::move(members)),
          rank_(rank),
          ranks_(static_cast<int>(members_.size())),
          tag_(static_cast<int>(2 * number)),
          capacity_(message_bytes)
    {
        const auto least = static_cast<int64_t>(sizeof(mpi_head)) + 16 * ranks_;
        if (capacity_ < least) capacity_ = least;
        const auto n = at(ranks_);
        in_ = std::make_unique<std::byte[]>(2 * n * static_cast<std::size_t>(capacity_));
        note_ = std::make_unique<std::byte[]>(2 * note_bytes);
        heads_.assign(n, MPI_REQUEST_NULL);
        notes_.assign(2 * n, MPI_REQUEST_NULL);
        indices_.resize(n);
        peers_.resize(n);
        for (int r = 0; r < ranks_; ++r)
            if (r != rank_) receive(r);
    }

    static std::size_t at(int r) noexcept { return static_cast<std::size_t>(r); }
    int member(int r) const noexcept { return members_[at(r)]; }
    std::byte* in(int r) noexcept { return in_.get() + (2 * r + peers_[at(r)].side) * capacity_; }
    const mpi_head& head(int r) noexcept { return *reinterpret_cast<const mpi_head*>(in(r)); }

    /// Waits from now on for the next message from r.
    void receive(int r) noexcept
    {
        const int code =
            MPI_Irecv(in(r), static_cast<int>(capacity_), MPI_BYTE, member(r), tag_, link_.comm(), &heads_[at(r)]);
        if (code != MPI_SUCCESS) code_ = code;
    }

    /// The calls that have arrived were read: their buffers stay as they are until the next time.
    void turn_over() noexcept
    {
        for (int r = 0; r < ranks_; ++r) {
            if (r == rank_) continue;
            peers_[at(r)].arrived = false;
            peers_[at(r)].side ^= 1;
            receive(r);
        }
        arrived_ = 0;
    }

    /// Takes what has come. @returns MPI's code
    int collect() noexcept
    {
        int done = 0;
        const int code = MPI_Testsome(ranks_, heads_.data(), &done, indices_.data(), MPI_STATUSES_IGNORE);
        if (code != MPI_SUCCESS) return code;
        for (int i = 0; i < done; ++i) accept(indices_[at(i)]);
        return code_;
    }

    /// To every peer that listens, unless the last note of this kind is still on its way.
    void send_note(note which, mpi_head::kind_t kind, const char* text) noexcept
    {
        MPI_Request* requests = notes_.data() + which * at(ranks_);
        int done = 0;
        MPI_Testall(ranks_, requests, &done, MPI_STATUSES_IGNORE);
        if (!done) return;
        mpi_head h{};
        h.round = round_;
        h.kind = kind;
        h.spoiled = !link_.whole();
        std::byte* to = note_.get() + which * note_bytes;
        std::memset(to, 0, note_bytes);
        std::memcpy(to, &h, sizeof h);
        std::memcpy(to + sizeof h, text, std::strlen(text) < 320 ? std::strlen(text) : 319);
        // Who has left waits for the last words of all; who has failed, for nothing.
        const auto last = which == last_words ? peer::has_left : peer::here;
        for (int r = 0; r < ranks_; ++r)
            if (r != rank_ && peers_[at(r)].is <= last)
                MPI_Isend(to, static_cast<int>(note_bytes), MPI_BYTE, member(r), tag_, link_.comm(), &requests[r]);
    }

    mpi_link& link_;
    const std::vector<int> members_; // (R)
    const int rank_, ranks_, tag_;   ///< tag_ + 1 is that of bulk
    int64_t capacity_;               ///< of a buffer, in bytes
    int64_t round_ = 0;
    int arrived_ = 0, gone_ = 0; ///< peers whose call lies in the buffer; that have left or failed
    int code_ = MPI_SUCCESS;
    bool left_ = false;
    std::string broken_;             ///< why every call throws
    std::vector<peer> peers_;        // (R)
    std::vector<MPI_Request> notes_; // (2,R)

private:
    void accept(int r) noexcept
    {
        peer& p = peers_[at(r)];
        const mpi_head& h = head(r);
        switch (h.kind) {
        case mpi_head::call:
            p.arrived = true;
            ++arrived_;
            return;
        case mpi_head::alive:
            p.is_alive = true;
            receive(r);
            return;
        case mpi_head::left:
            p.is = peer::has_left;
            break;
        default:
            p.is = peer::has_failed;
        }
        ++gone_;
        if (h.spoiled) link_.spoil();
    }

    std::vector<MPI_Request> heads_;         // (R)
    std::vector<int> indices_;               // (R)
    std::unique_ptr<std::byte[]> in_, note_; // (R,2,capacity), (2,note_bytes)
};

} // namespace fastmoe::inline FASTMOE_ABI::detail
