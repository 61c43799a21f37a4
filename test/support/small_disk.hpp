// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// A real file system that is full: a few pages of memory, mounted for one child process in a name space of its own.
#pragma once

#include <exception>
#include <string>
#include <utility>

#include <sched.h>
#include <sys/mount.h>
#include <sys/wait.h>
#include <unistd.h>

#include "temporary_folder.hpp"

namespace support {

/// Where f(folder) runs: in a child process, `folder` holding at most `bytes`. What it returns, a text, comes back.
class small_disk {
public:
    /// Whether this machine lets a process mount a file system; why not, if it does not.
    static bool permitted()
    {
        return small_disk(1 << 16).run([](const std::string&) { return std::string("mounted"); }) == "mounted";
    }

    explicit small_disk(std::size_t bytes) : bytes_(bytes) {}

    /// "" if nothing could be mounted; "threw: " and the text of an exception that left f.
    template <class F>
    std::string run(F f) const
    {
        const temporary_folder place;
        int answer[2];
        if (::pipe(answer) != 0) return "";
        const pid_t child = ::fork();
        if (child == 0) {
            std::string text;
            try {
                if (mount(place.path())) text = f(place.path());
            } catch (const std::exception& e) {
                text = std::string("threw: ") + e.what();
            }
            const bool told = ::write(answer[1], text.data(), text.size()) == static_cast<ssize_t>(text.size());
            ::_exit(told ? 0 : 1);
        }
        ::close(answer[1]);
        std::string out;
        char part[4096];
        for (ssize_t n; (n = ::read(answer[0], part, sizeof part)) > 0;) out.append(part, static_cast<std::size_t>(n));
        ::close(answer[0]);
        if (child > 0) ::waitpid(child, nullptr, 0);
        return out;
    }

private:
    /// The name space of a user who is not root must come with one of users, in which he is.
    bool mount(const std::string& where) const
    {
        if (::unshare(CLONE_NEWNS) != 0 && ::unshare(CLONE_NEWUSER | CLONE_NEWNS) != 0) return false;
        if (::mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr) != 0) return false;
        const std::string options = "size=" + std::to_string(bytes_);
        return ::mount("none", where.c_str(), "tmpfs", 0, options.c_str()) == 0;
    }

    std::size_t bytes_;
};

} // namespace support
