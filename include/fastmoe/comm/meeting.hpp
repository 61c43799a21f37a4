// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Where the ranks of a `threads` communicator meet: each brings what it has to a collective, all learn that all are there
/// and agree, and none goes before all are done. Part of threads.hpp.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>

#include <fastmoe/comm/post.hpp>
#include <fastmoe/core/error.hpp>

namespace fastmoe::inline FASTMOE_ABI::detail {

/// R ranks, one collective at a time: first all arrive, then each moves its data, then all depart. A rank that fails, that
/// leaves, or that does not arrive in time breaks the meeting for good: every call, waiting or later, throws comm_error
/// with the same text. Ranks that disagree all throw, and may go on.
class meeting {
public:
    using clock = std::chrono::steady_clock;

    meeting(int ranks, std::chrono::milliseconds deadline)
        : ranks_(ranks), deadline_(deadline), posts_(new post[static_cast<std::size_t>(ranks)]),
          gone_(new bool[static_cast<std::size_t>(ranks)]()),
          children_(new std::shared_ptr<meeting>[static_cast<std::size_t>(ranks)]),
          places_(new int[static_cast<std::size_t>(ranks)]())
    {
    }

    int ranks() const noexcept { return ranks_; }

    /// Returns when all ranks have arrived and agree. From then on posts() may be read until this rank departs.
    /// @throws comm_error  then this rank has nothing to move, and does not depart
    void arrive(int rank, const post& mine)
    {
        std::unique_lock lock(mutex_);
        if (!broken_.empty()) raise<comm_error>(broken_);
        if (posts_[rank].verb) raise<comm_error>(two_calls(rank, posts_[rank].verb, mine.verb));
        posts_[rank] = mine;
        ++arrived_;
        const std::int64_t round = finished_;
        for (int r = 0; r < ranks_; ++r)
            if (gone_[r]) break_up(mine.verb, r, " has left");
        if (arrived_ == ranks_ && broken_.empty()) {
            disagreement_ = disagreement_of(posts_.get(), ranks_);
            if (disagreement_.empty() && std::string_view(mine.verb) == "split") make_children();
            started_ = round + 1;
            changed_.notify_all();
        }
        const auto ready = [&] { return started_ > round || !broken_.empty(); };
        if (!changed_.wait_until(lock, clock::now() + deadline_, ready)) {
            int missing = 0;
            while (posts_[missing].verb) ++missing;
            break_up(mine.verb, missing, (" did not come within " + std::to_string(deadline_.count()) + " ms").c_str());
        }
        if (started_ <= round) {
            const std::string text = broken_;
            lock.unlock();
            raise<comm_error>(text);
        }
        if (disagreement_.empty()) return;
        const std::string text = disagreement_;
        finish(lock, rank);
        raise<comm_error>(text);
    }

    const post& of(int rank) const noexcept { return posts_[rank]; }
    const std::shared_ptr<meeting>& child(int rank) const noexcept { return children_[rank]; }
    int place(int rank) const noexcept { return places_[rank]; }

    /// Returns when no rank needs the memory of another any more. There is no deadline: they only copy.
    /// @throws comm_error if one of them has failed to
    void depart(int rank)
    {
        std::unique_lock lock(mutex_);
        const std::int64_t round = finished_;
        finish(lock, rank);
        if (broken_round_ == round) raise<comm_error>(broken_);
    }

    /// This rank cannot go on with a collective.
    void fail(int rank, const char* verb, bool moving)
    {
        std::unique_lock lock(mutex_);
        break_up(verb, rank, " failed");
        if (moving) finish(lock, rank);
    }

    /// This rank will not come again.
    void leave(int rank)
    {
        std::lock_guard lock(mutex_);
        gone_[rank] = true;
        const bool waiting = arrived_ > 0 && started_ <= finished_;
        for (int r = 0; r < ranks_ && waiting; ++r)
            if (posts_[r].verb) return break_up(posts_[r].verb, rank, " has left");
    }

private:
    /// The first reason stays.
    void break_up(const char* verb, int rank, const char* what)
    {
        if (!broken_.empty()) return;
        broken_ = verb;
        broken_ += ": rank " + std::to_string(rank) + " of " + std::to_string(ranks_) + what;
        broken_round_ = finished_;
        changed_.notify_all();
    }

    void finish(std::unique_lock<std::mutex>& lock, int rank)
    {
        const std::int64_t round = finished_;
        posts_[rank].verb = nullptr;
        if (++departed_ == ranks_) {
            arrived_ = departed_ = 0;
            ++finished_;
            changed_.notify_all();
        } else {
            changed_.wait(lock, [&] { return finished_ > round; });
        }
    }

    static std::string two_calls(int rank, const char* first, const char* second)
    {
        std::string text = second;
        text += ": rank " + std::to_string(rank);
        text += " is in " + std::string(first);
        text += " already; expected one call of a rank at a time";
        return text;
    }

    /// One meeting a color, its ranks ordered by key, then by rank.
    void make_children()
    {
        for (int r = 0; r < ranks_; ++r) children_[r] = nullptr;
        for (int r = 0; r < ranks_; ++r) {
            int members = 0, before = 0;
            std::shared_ptr<meeting> child;
            for (int other = 0; other < ranks_; ++other) {
                if (posts_[other].color != posts_[r].color) continue;
                ++members;
                const int key = posts_[other].key, own = posts_[r].key;
                before += key < own || (key == own && other < r);
                if (other < r) child = children_[other];
            }
            children_[r] = child ? child : std::make_shared<meeting>(members, deadline_);
            places_[r] = before;
        }
    }

    const int ranks_;
    const std::chrono::milliseconds deadline_;
    std::unique_ptr<post[]> posts_; // (R)  written under the lock, read freely while all are between arrive and depart
    std::unique_ptr<bool[]> gone_;  // (R)
    std::unique_ptr<std::shared_ptr<meeting>[]> children_; // (R)  of the last split
    std::unique_ptr<int[]> places_;                        // (R)

    std::mutex mutex_;
    std::condition_variable changed_;
    int arrived_ = 0, departed_ = 0;
    std::int64_t started_ = 0, finished_ = 0; // rounds: all are there; all are gone
    std::int64_t broken_round_ = -1;
    std::string broken_, disagreement_;
};

/// The presence of a rank in one collective. If it ends by an exception, the others are told.
class presence {
public:
    presence(meeting& m, int rank, const char* verb) noexcept : meeting_(m), rank_(rank), verb_(verb) {}
    presence(const presence&) = delete;
    presence& operator=(const presence&) = delete;
    ~presence()
    {
        if (place_ != place::done) meeting_.fail(rank_, verb_, place_ == place::moving);
    }

    void arrive(const post& mine)
    {
        place_ = place::done; // whatever arrive throws, the others know
        meeting_.arrive(rank_, mine);
        place_ = place::moving;
    }
    void depart()
    {
        place_ = place::done;
        meeting_.depart(rank_);
    }

private:
    enum class place : std::uint8_t { outside, moving, done };

    meeting& meeting_;
    const int rank_;
    const char* verb_;
    place place_ = place::outside;
};

} // namespace fastmoe::inline FASTMOE_ABI::detail
