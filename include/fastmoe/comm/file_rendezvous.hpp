// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The rendezvous of rendezvous.hpp through a file that all ranks see. Part of cuda/nccl.cuh.
#pragma once

#include <cstdio>

#include <fastmoe/comm/rendezvous.hpp>

namespace fastmoe::inline FASTMOE_ABI {

namespace detail {

/// The first bytes of such a file, and all of an answer to it: which meeting it belongs to.
struct file_mark {
    std::uint64_t magic;
    std::uint64_t meeting; ///< never the same twice
    int64_t ranks, count;
    int64_t is_complete; ///< rank 0 has an answer from every rank

    static std::uint64_t fresh_meeting()
    {
        const auto now = std::chrono::system_clock::now().time_since_epoch().count();
        return static_cast<std::uint64_t>(now) * 0x9e3779b97f4a7c15u ^ static_cast<std::uint64_t>(::getpid());
    }
};

/// Writes a whole file under another name and renames it, so that nobody sees a part.
inline void write_whole(const std::string& path, const void* head, std::size_t head_size, const void* body, std::size_t body_size)
{
    const std::string fresh = path + ".new";
    std::FILE* file = std::fopen(fresh.c_str(), "wb");
    expects<comm_error>(file != nullptr, "the rendezvous file", fresh, "a file that can be written: ", std::strerror(errno));
    bool done = std::fwrite(head, 1, head_size, file) == head_size;
    done = done && (body_size == 0 || std::fwrite(body, 1, body_size, file) == body_size);
    done = std::fclose(file) == 0 && done;
    done = done && std::rename(fresh.c_str(), path.c_str()) == 0;
    expects<comm_error>(done, "the rendezvous file", path, "a file that can be written: ", std::strerror(errno));
}

inline bool read_whole(const std::string& path, void* head, std::size_t head_size, void* body, std::size_t body_size)
{
    std::FILE* file = std::fopen(path.c_str(), "rb");
    if (!file) return false;
    const bool done = std::fread(head, 1, head_size, file) == head_size &&
                      (body_size == 0 || std::fread(body, 1, body_size, file) == body_size);
    std::fclose(file);
    return done;
}

} // namespace detail

/// Every rank gets rank 0's value through files `path` and `path.RANK`, which are gone when all ranks return. What a job
/// that died has left there misleads nobody, nor does it if somebody removes it meanwhile: a rank answers to what it reads,
/// and believes it once rank 0 says that it has all answers to just that.
/// @param value  read on rank 0, overwritten elsewhere
/// @throws comm_error if a rank does not come within the deadline, or the file cannot be written
template <class T>
    requires std::is_trivially_copyable_v<T>
void share_by_file(int rank, int ranks, const std::string& path, T& value, milliseconds deadline)
{
    detail::expects_rank(rank, ranks, deadline);
    const detail::patience until(deadline);
    using detail::file_mark;
    const auto answer_of = [&path](int r) { return path + "." + std::to_string(r); };
    if (rank == 0) {
        if (ranks == 1) return;
        file_mark mark{detail::greeting::sign, file_mark::fresh_meeting(), ranks, sizeof(T), false};
        const auto write = [&] { detail::write_whole(path, &mark, sizeof mark, &value, sizeof(T)); };
        const auto has_answered = [&](int r) {
            file_mark seen{};
            return detail::read_whole(answer_of(r), &seen, sizeof seen, nullptr, 0) && seen.meeting == mark.meeting;
        };
        // What cannot be looked at just now may still be there.
        const auto has_gone = [&](int r) { return ::access(answer_of(r).c_str(), F_OK) != 0 && errno == ENOENT; };
        const auto until_all = [&](const auto& have, const char* what) {
            for (int r = 1; r < ranks; ++r)
                for (; !have(r); detail::nap()) {
                    if (until.over()) std::remove(path.c_str());
                    expects<comm_error>(!until.over(), "the rendezvous", "over its deadline", "rank ", r, what, answer_of(r));
                }
        };
        write();
        until_all(has_answered, " to answer in ");
        mark.is_complete = true;
        write();
        until_all(has_gone, " to remove ");
        std::remove(path.c_str());
        return;
    }
    std::uint64_t answered = 0;
    for (;; detail::nap()) {
        expects<comm_error>(!until.over(), "the rendezvous", "over its deadline", "rank 0 to ",
                            answered ? "hear all answers to " : "write ", path);
        file_mark seen{};
        T read;
        const bool there = detail::read_whole(path, &seen, sizeof seen, &read, sizeof(T)) && seen.magic == detail::greeting::sign &&
                           seen.ranks == ranks && seen.count == static_cast<int64_t>(sizeof(T));
        if (!there) continue;
        if (seen.is_complete) {
            if (seen.meeting != answered) continue; // it was others' meeting
            std::remove(answer_of(rank).c_str());
            return;
        }
        if (seen.meeting == answered && ::access(answer_of(rank).c_str(), F_OK) == 0) continue;
        value = read;
        answered = seen.meeting;
        detail::write_whole(answer_of(rank), &seen, sizeof seen, nullptr, 0);
    }
}

} // namespace fastmoe::inline FASTMOE_ABI
