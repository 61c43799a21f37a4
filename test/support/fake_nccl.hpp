// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// NCCL's verbs over host memory: ranks are threads, sends and receives of a pair meet in the order in which they were
/// posted, a non-blocking call says "in progress" until it has been polled, and nothing ends before its peer has come. It
/// counts what it is asked, refuses what NCCL forbids, and fails when told to.
#pragma once

#include <algorithm>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include <fastmoe/comm/nccl_ranks.hpp>
#include <fastmoe/exec/host_executor.hpp>

namespace support {

/// What all ranks of one communicator share.
struct fake_clique {
    int ranks = 0;
    int arrived = 0, finalized = 0;
    std::map<std::pair<int, int>, std::deque<std::vector<std::byte>>> mail; // by (from, to)
    std::vector<std::tuple<int, int, int>> wishes;                          // (color, key, rank) of a split
    std::map<int, std::shared_ptr<fake_clique>> parts;                      // by color
    int taken = 0;
};

struct fake_rank;

/// A receive that waits for its message, or a step of a collective.
struct fake_work {
    int from;
    void* to;
    std::size_t bytes;
};

struct fake_rank {
    std::shared_ptr<fake_clique> clique;
    int rank = 0, polls = 0;
    std::deque<fake_work> receives;
    bool splitting = false, finalizing = false;
    int color = 0, key = 0;
    fake_rank** child = nullptr;
};

struct fake_nccl {
    enum class status { success, in_progress, remote_error, invalid_usage };
    using handle = fake_rank*;
    struct id {
        int number;
    };

    struct counters {
        int sends, receives, groups_begun, groups_ended, aborted, destroyed, begun, enrolled, dismissed, polls;
    };
    // Of this thread, and so of one rank.
    static inline thread_local counters count{};
    static inline thread_local std::vector<handle> own;      ///< live handles
    static inline thread_local status next_send = status::success; ///< what the next send answers
    static inline thread_local int fail_after_polls = -1;    ///< from then on every poll says remote_error
    static inline thread_local int depth = 0;

    static bool succeeded(status s) { return s == status::success; }
    static bool pending(status s) { return s == status::in_progress; }
    static const char* text(status s) { return s == status::remote_error ? "remote process exited" : "invalid usage"; }

    static id fresh_id()
    {
        const std::lock_guard lock(mutex);
        return {++last_id};
    }
    static status begin(handle& h, int ranks, const id& which, int rank)
    {
        const std::lock_guard lock(mutex);
        auto& clique = cliques[which.number];
        if (!clique) clique = std::make_shared<fake_clique>();
        clique->ranks = ranks;
        h = make(clique, rank);
        return status::in_progress;
    }
    static status split(handle h, int color, int key, handle& child)
    {
        const std::lock_guard lock(mutex);
        h->clique->wishes.emplace_back(color, key, h->rank);
        h->splitting = true;
        h->color = color;
        h->key = key;
        h->child = &child;
        return status::in_progress;
    }
    static status place(handle h, int& rank, int& ranks)
    {
        rank = h->rank;
        ranks = h->clique->ranks;
        return status::success;
    }
    /// One poll: what can go on goes on.
    static status ask(handle h)
    {
        ++count.polls;
        if (fail_after_polls >= 0 && count.polls > fail_after_polls) return status::remote_error;
        const std::lock_guard lock(mutex);
        if (h->polls++ == 0) return status::in_progress; // always once, to see who does not ask again
        fake_clique& c = *h->clique;
        if (c.arrived < c.ranks) return status::in_progress;
        if (h->splitting && !divide(*h)) return status::in_progress;
        if (h->finalizing && c.finalized < c.ranks) return status::in_progress;
        while (!h->receives.empty()) {
            const fake_work w = h->receives.front();
            auto& box = c.mail[{w.from, h->rank}];
            if (box.empty()) return status::in_progress;
            if (box.front().size() != w.bytes) return status::invalid_usage;
            std::memcpy(w.to, box.front().data(), w.bytes);
            box.pop_front();
            h->receives.pop_front();
        }
        return status::success;
    }
    static status finalize(handle h)
    {
        const std::lock_guard lock(mutex);
        ++h->clique->finalized;
        h->finalizing = true;
        h->polls = 0;
        return status::in_progress;
    }
    static status destroy(handle h)
    {
        ++count.destroyed;
        drop(h);
        return status::success;
    }
    static status abort(handle h)
    {
        ++count.aborted;
        drop(h);
        return status::success;
    }
    static status group_begin()
    {
        ++count.groups_begun;
        ++depth;
        return status::success;
    }
    static status group_end()
    {
        ++count.groups_ended;
        --depth;
        return status::in_progress;
    }

    template <class Executor>
    static status send(const void* from, std::int64_t bytes, int peer, handle h, Executor&)
    {
        ++count.sends;
        if (depth != 1 || bytes <= 0 || peer == h->rank || peer < 0 || peer >= h->clique->ranks) return status::invalid_usage;
        if (next_send != status::success) return std::exchange(next_send, status::success);
        post(h, from, bytes, peer);
        return status::success;
    }
    template <class Executor>
    static status receive(void* to, std::int64_t bytes, int peer, handle h, Executor&)
    {
        ++count.receives;
        if (depth != 1 || bytes <= 0 || peer == h->rank || peer < 0 || peer >= h->clique->ranks) return status::invalid_usage;
        expect(h, to, bytes, peer);
        return status::success;
    }
    template <class Executor>
    static status all_gather(const void* from, void* to, std::int64_t bytes, handle h, Executor&)
    {
        auto* all = static_cast<std::byte*>(to);
        std::memmove(all + h->rank * bytes, from, static_cast<std::size_t>(bytes));
        for (int r = 0; r < h->clique->ranks; ++r)
            if (r != h->rank) post(h, from, bytes, r), expect(h, all + r * bytes, bytes, r);
        return status::success;
    }
    template <class Executor>
    static status broadcast(void* values, std::int64_t bytes, int root, handle h, Executor&)
    {
        for (int r = 0; r < h->clique->ranks && h->rank == root; ++r)
            if (r != root) post(h, values, bytes, r);
        if (h->rank != root) expect(h, values, bytes, root);
        return status::success;
    }
    /// Of integers. The fake sums when it is asked, so it waits for the others here.
    template <class T, class Executor>
    static status all_reduce(T* values, std::int64_t n, handle h, Executor& ex)
    {
        std::vector<T> blocks(static_cast<std::size_t>(n * h->clique->ranks));
        all_gather(values, blocks.data(), n * static_cast<std::int64_t>(sizeof(T)), h, ex);
        if (const status s = drain(h); s != status::success) return s;
        for (std::int64_t i = 0; i < n; ++i) {
            T total{};
            for (int r = 0; r < h->clique->ranks; ++r) total = static_cast<T>(total + blocks[static_cast<std::size_t>(r * n + i)]);
            values[i] = total;
        }
        return status::success;
    }
    template <class T, class Executor>
    static status reduce_scatter(const T* from, T* to, std::int64_t n, handle h, Executor& ex)
    {
        std::vector<T> all(from, from + n * h->clique->ranks);
        const status s = all_reduce(all.data(), n * h->clique->ranks, h, ex);
        if (s == status::success) std::copy_n(all.data() + h->rank * n, n, to);
        return s;
    }
    static status enroll(handle, void*, std::int64_t, void*& token)
    {
        ++count.enrolled;
        token = &count;
        return status::success;
    }
    static status dismiss(handle, void* token)
    {
        ++count.dismissed;
        return token == &count ? status::success : status::invalid_usage;
    }
    template <class Executor>
    static void copy(Executor&, void* to, const void* from, std::int64_t bytes)
    {
        std::memcpy(to, from, static_cast<std::size_t>(bytes));
    }
    /// Whether this thread's ranks have nothing left to receive.
    template <class Executor>
    static bool idle(Executor&)
    {
        const std::lock_guard lock(mutex);
        for (const handle h : own)
            if (!h->receives.empty()) return false;
        return true;
    }

private:
    static inline std::mutex mutex; // guards cliques and what is in them
    static inline std::map<int, std::shared_ptr<fake_clique>> cliques;
    static inline int last_id = 0;

    static handle make(const std::shared_ptr<fake_clique>& clique, int rank)
    {
        ++count.begun;
        auto* h = new fake_rank;
        h->clique = clique;
        h->rank = rank;
        ++clique->arrived;
        own.push_back(h);
        return h;
    }
    static void drop(handle h)
    {
        std::erase(own, h);
        delete h;
    }
    static void post(handle h, const void* from, std::int64_t bytes, int peer)
    {
        const std::lock_guard lock(mutex);
        const auto* p = static_cast<const std::byte*>(from);
        h->clique->mail[{h->rank, peer}].emplace_back(p, p + bytes);
        h->polls = 0;
    }
    static void expect(handle h, void* to, std::int64_t bytes, int peer)
    {
        const std::lock_guard lock(mutex);
        h->receives.push_back({peer, to, static_cast<std::size_t>(bytes)});
        h->polls = 0;
    }
    static status drain(handle h)
    {
        const fastmoe::detail::patience until(fastmoe::milliseconds(5000));
        status s = status::in_progress;
        while (s == status::in_progress && !until.over()) s = ask(h);
        return s;
    }
    /// Gives a rank its part once all have said their wish.
    static bool divide(fake_rank& me)
    {
        fake_clique& c = *me.clique;
        if (static_cast<int>(c.wishes.size()) < c.ranks) return false;
        int before = 0, members = 0;
        for (const auto& [color, key, rank] : c.wishes) {
            if (color != me.color) continue;
            ++members;
            before += std::pair(key, rank) < std::pair(me.key, me.rank);
        }
        auto& part = c.parts[me.color];
        if (!part) part = std::make_shared<fake_clique>();
        part->ranks = members;
        *me.child = make(part, before);
        me.splitting = false;
        if (++c.taken == c.ranks) c.wishes.clear(), c.parts.clear(), c.taken = 0;
        return true;
    }
};

/// body(communicator, executor) on R threads; exceptions come back as texts, one a rank, empty where there was none.
template <class Body>
std::vector<std::string> fake_ranks(int ranks, const Body& body, const fastmoe::nccl_options& options = {})
{
    const auto id = fake_nccl::fresh_id();
    std::vector<std::string> failures(static_cast<std::size_t>(ranks));
    std::vector<std::thread> threads;
    for (int r = 0; r < ranks; ++r)
        threads.emplace_back([&, r] {
            fake_nccl::count = {};
            fake_nccl::fail_after_polls = -1;
            try {
                fastmoe::host_executor ex({.threads = 1});
                const fastmoe::nccl_ranks<fake_nccl> c(id, r, ranks, options);
                body(c, ex);
            } catch (const fastmoe::comm_error& e) {
                failures[static_cast<std::size_t>(r)] = e.what();
            } catch (const std::exception& e) {
                failures[static_cast<std::size_t>(r)] = std::string("not a comm_error: ") + e.what();
            }
        });
    for (auto& t : threads) t.join();
    return failures;
}

} // namespace support
