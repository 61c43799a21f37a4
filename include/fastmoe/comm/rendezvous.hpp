// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// How processes that know nothing but their number get a few bytes from rank 0: over TCP, through a shared file, or over
/// another communicator. What a communicator such as NCCL's is made of travels this way. POSIX; part of cuda/nccl.cuh.
#pragma once

#include <netdb.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <fcntl.h>
#include <netinet/in.h>

#include <cerrno>
#include <chrono>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <type_traits>

#include <fastmoe/comm/communicator.hpp>
#include <fastmoe/core/error.hpp>
#include <fastmoe/exec/executor.hpp>
#include <fastmoe/exec/memory.hpp>

namespace fastmoe::inline FASTMOE_ABI {

using std::chrono::milliseconds;

namespace detail {

/// A moment after which nobody waits any longer.
class patience {
public:
    explicit patience(milliseconds wait) : end_(clock::now() + wait) {}
    milliseconds left() const
    {
        const auto rest = std::chrono::ceil<milliseconds>(end_ - clock::now()); // a deadline is not over before its end
        return rest.count() > 0 ? rest : milliseconds(0);
    }
    bool over() const { return clock::now() >= end_; }

private:
    using clock = std::chrono::steady_clock;
    clock::time_point end_;
};

inline void nap() { std::this_thread::sleep_for(milliseconds(5)); }

/// A file descriptor that is closed.
class descriptor {
public:
    explicit descriptor(int fd = -1) noexcept : fd_(fd) {}
    descriptor(const descriptor&) = delete;
    descriptor& operator=(const descriptor&) = delete;
    ~descriptor()
    {
        if (fd_ >= 0) ::close(fd_);
    }
    int get() const noexcept { return fd_; }
    explicit operator bool() const noexcept { return fd_ >= 0; }

private:
    int fd_;
};

inline bool is_ready(int fd, short events, milliseconds wait)
{
    const patience until(wait);
    for (;;) { // a signal that the program handles ends no wait
        pollfd what{fd, events, 0};
        const milliseconds left = until.left();
        const int ready = ::poll(&what, 1, static_cast<int>(left.count() < 1000000 ? left.count() : 1000000));
        if (ready >= 0 || errno != EINTR) return ready > 0;
    }
}

/// Moves all bytes, or says that it could not before the time is over.
template <class Move>
bool move_all(int fd, char* bytes, std::size_t count, short events, const patience& until, const Move& move)
{
    while (count > 0) {
        if (!is_ready(fd, events, until.left())) return false;
        const ssize_t n = move(fd, bytes, count);
        if (n == 0 || (n < 0 && errno != EAGAIN && errno != EINTR)) return false;
        if (n > 0) bytes += n, count -= static_cast<std::size_t>(n);
    }
    return true;
}
inline bool send_all(int fd, const void* bytes, std::size_t count, const patience& until)
{
    return move_all(fd, static_cast<char*>(const_cast<void*>(bytes)), count, POLLOUT, until,
                    [](int to, char* p, std::size_t n) { return ::send(to, p, n, MSG_NOSIGNAL | MSG_DONTWAIT); });
}
inline bool receive_all(int fd, void* bytes, std::size_t count, const patience& until)
{
    return move_all(fd, static_cast<char*>(bytes), count, POLLIN, until,
                    [](int from, char* p, std::size_t n) { return ::recv(from, p, n, MSG_DONTWAIT); });
}

struct free_addresses {
    void operator()(addrinfo* a) const noexcept { ::freeaddrinfo(a); }
};
using addresses = std::unique_ptr<addrinfo, free_addresses>;

inline addresses look_up_host(const char* host, int port)
{
    addrinfo what{}, *found = nullptr;
    what.ai_socktype = SOCK_STREAM;
    what.ai_flags = AI_NUMERICSERV | (host ? 0 : AI_PASSIVE);
    const int status = ::getaddrinfo(host, std::to_string(port).c_str(), &what, &found);
    expects<comm_error>(status == 0, "the host of rank 0", host ? host : "any", "a name with an address: ", ::gai_strerror(status));
    return addresses(found);
}

/// A socket that listens on every address of this machine.
inline int listen_on(int port, int backlog)
{
    const addresses all = look_up_host(nullptr, port);
    int problem = 0;
    for (const int family : {AF_INET6, AF_INET}) // the first of these serves both
        for (const addrinfo* a = all.get(); a; a = a->ai_next) {
            if (a->ai_family != family) continue;
            const int fd = ::socket(a->ai_family, a->ai_socktype | SOCK_CLOEXEC, a->ai_protocol), on = 1, off = 0;
            if (fd < 0) continue;
            (void)::setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
            if (family == AF_INET6) (void)::setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof off);
            if (::bind(fd, a->ai_addr, a->ai_addrlen) == 0 && ::listen(fd, backlog) == 0) return fd;
            problem = errno;
            ::close(fd);
        }
    expects<comm_error>(false, "port", port, "one that rank 0 can listen on: ", std::strerror(problem));
    return -1;
}

inline int connect_to(const addrinfo* a, milliseconds wait)
{
    const int fd = ::socket(a->ai_family, a->ai_socktype | SOCK_CLOEXEC | SOCK_NONBLOCK, a->ai_protocol);
    if (fd < 0) return -1;
    if (::connect(fd, a->ai_addr, a->ai_addrlen) != 0 && errno == EINPROGRESS) (void)is_ready(fd, POLLOUT, wait);
    int problem = 0;
    socklen_t size = sizeof problem;
    sockaddr_storage peer{};
    socklen_t peer_size = sizeof peer;
    const bool there = ::getsockopt(fd, SOL_SOCKET, SO_ERROR, &problem, &size) == 0 && problem == 0 &&
                       ::getpeername(fd, reinterpret_cast<sockaddr*>(&peer), &peer_size) == 0;
    if (there) return fd;
    ::close(fd);
    return -1;
}

/// What a rank says first, and what it is answered.
struct greeting {
    static constexpr std::uint64_t sign = 0x464d6f4572656e64; // "FMoErend"
    std::uint64_t magic;
    std::int32_t rank, ranks;
    int64_t count;
};

inline void serve_bytes(int ranks, int port, const void* bytes, std::size_t count, const patience& until)
{
    const descriptor door(listen_on(port, ranks));
    const auto came = std::make_unique<bool[]>(static_cast<std::size_t>(ranks));
    for (int missing = ranks - 1; missing > 0;) {
        int absent = 1;
        while (absent < ranks && came[static_cast<std::size_t>(absent)]) ++absent;
        expects<comm_error>(!until.over() && is_ready(door.get(), POLLIN, until.left()), "the rendezvous", "over its deadline", "rank ", absent,
                            " and ", missing - 1, " others to come to port ", port);
        const descriptor guest(::accept4(door.get(), nullptr, nullptr, SOCK_CLOEXEC));
        if (!guest) nap(); // it may be that this process has no descriptor left for now
        const patience manners(until.left() < milliseconds(2000) ? until.left() : milliseconds(2000));
        greeting hello{};
        // Whoever says something else, or nothing, is none of ours.
        if (!guest || !receive_all(guest.get(), &hello, sizeof hello, manners) || hello.magic != greeting::sign) continue;
        const bool known = hello.rank > 0 && hello.rank < ranks && hello.ranks == ranks && hello.count == static_cast<int64_t>(count);
        const bool fits = known && !came[static_cast<std::size_t>(hello.rank)];
        const greeting answer{greeting::sign, fits ? 0 : -1, ranks, static_cast<int64_t>(count)};
        char thanks = 0;
        const bool heard = send_all(guest.get(), &answer, sizeof answer, manners) && fits &&
                           send_all(guest.get(), bytes, count, manners) && receive_all(guest.get(), &thanks, 1, manners);
        expects<comm_error>(known, "a rank at the rendezvous", hello.rank, "1 to ", ranks - 1, " of ", ranks, " ranks that want ",
                            static_cast<int64_t>(count), " bytes; it is one of ", hello.ranks, " and wants ", hello.count);
        expects<comm_error>(fits, "a rank at the rendezvous", hello.rank, "each rank once");
        if (!heard) continue;
        came[static_cast<std::size_t>(hello.rank)] = true;
        --missing;
    }
}

inline void fetch_bytes(int rank, int ranks, const char* host, int port, void* bytes, std::size_t count, const patience& until)
{
    const addresses all = look_up_host(host, port);
    while (!until.over()) {
        for (const addrinfo* a = all.get(); a; a = a->ai_next) {
            const descriptor line(connect_to(a, until.left()));
            const greeting hello{greeting::sign, rank, ranks, static_cast<int64_t>(count)};
            greeting answer{};
            if (!line || !send_all(line.get(), &hello, sizeof hello, until) ||
                !receive_all(line.get(), &answer, sizeof answer, until) || answer.magic != greeting::sign)
                continue;
            expects<comm_error>(answer.rank == 0, "this rank", rank, "one that rank 0 knows: it expects ", answer.ranks,
                                " ranks, each once");
            if (receive_all(line.get(), bytes, count, until) && send_all(line.get(), "!", 1, until)) return;
        }
        nap();
    }
    expects<comm_error>(false, "the rendezvous", "over its deadline", "rank 0 to answer at ", host, ":", port);
}

inline void expects_rank(int rank, int ranks, milliseconds deadline)
{
    expects(ranks >= 1 && ranks <= 1 << 20, "ranks", ranks, "1 to ", 1 << 20);
    expects(rank >= 0 && rank < ranks, "rank", rank, "0 to ", ranks - 1);
    expects(deadline.count() >= 1 && deadline.count() <= 950400000, "the deadline", static_cast<int64_t>(deadline.count()), "1 to 950400000 ms");
}

} // namespace detail

/// Who a process is, as launchers say it in the environment (torchrun does).
struct launched_process {
    int rank = 0, ranks = 1;
    std::string host = "localhost"; ///< of rank 0
    int port = 29501;               ///< of rank 0; MASTER_PORT + 1, since torchrun itself holds MASTER_PORT

    /// From RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. @throws invalid_argument naming what is missing or no number
    static launched_process from_environment()
    {
        const auto text = [](const char* name) {
            const char* value = std::getenv(name);
            expects(value && *value, name, value ? "empty" : "not set", "what the launcher puts into the environment");
            return std::string(value);
        };
        const auto number = [&text](const char* name, long least, long most) {
            const std::string value = text(name);
            char* end = nullptr;
            errno = 0;
            const long n = std::strtol(value.c_str(), &end, 10);
            expects(errno == 0 && *end == '\0' && n >= least && n <= most, name, value, least, " to ", most);
            return static_cast<int>(n);
        };
        launched_process out;
        out.ranks = number("WORLD_SIZE", 1, 1 << 20);
        out.rank = number("RANK", 0, out.ranks - 1);
        out.host = text("MASTER_ADDR");
        out.port = number("MASTER_PORT", 1, 65534) + 1;
        return out;
    }
};

/// Every rank gets rank 0's value, over TCP. A stranger who connects disturbs nobody for more than two seconds.
/// @param value  read on rank 0, overwritten elsewhere
/// @throws comm_error if a rank does not come within the deadline, comes twice, or disagrees about the number of ranks
template <class T>
    requires std::is_trivially_copyable_v<T>
void share_by_tcp(const launched_process& me, T& value, milliseconds deadline)
{
    detail::expects_rank(me.rank, me.ranks, deadline);
    const detail::patience until(deadline);
    if (me.rank == 0) detail::serve_bytes(me.ranks, me.port, &value, sizeof(T), until);
    else detail::fetch_bytes(me.rank, me.ranks, me.host.c_str(), me.port, &value, sizeof(T), until);
}

/// Every rank gets rank 0's value, over a communicator that there is already (MPI's), with memory of its executor.
template <class T, executor Executor, class Communicator>
    requires std::is_trivially_copyable_v<T> && broadcasts<Communicator, Executor, std::byte>
void share_over(Executor& ex, const Communicator& ranks, T& value)
{
    static_assert(has_readable_memory<Executor>, "the bytes are read and written on the host");
    buffer<std::byte, Executor> bytes(ex, sizeof(T));
    std::memcpy(bytes.data(), &value, sizeof(T));
    call_on([&] { ranks.broadcast(ex, bytes.view(), 0); }, bytes);
    ex.synchronize();
    std::memcpy(static_cast<void*>(&value), bytes.data(), sizeof(T));
}

} // namespace fastmoe::inline FASTMOE_ABI
