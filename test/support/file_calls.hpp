// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Ends the process, or fails, at the n-th system call that changes files, whichever thread makes it: what power cuts and
/// broken disks do, at every moment there is. It stands before the C library's calls: include it in one file of an
/// executable. Linux.
#pragma once

#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstdarg>
#include <cstdint>

#include <fcntl.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace support {

enum class file_fault : int { none, kill, fail };

inline std::atomic<file_fault> file_fault_now{file_fault::none};
inline std::atomic<std::int64_t> file_calls_left{0}; ///< the call that finds 1 here has the fault
inline std::atomic<int> file_errno{EIO};

/// While it lives, the n-th call from now on has a fault; n counts from 1.
class faulty_files {
public:
    faulty_files(file_fault what, std::int64_t n, int error = EIO)
    {
        file_errno = error;
        file_calls_left = n;
        file_fault_now = what;
    }
    ~faulty_files() { file_fault_now = file_fault::none; }
    /// Whether it came to the n-th.
    bool struck() const { return file_calls_left <= 0; }
};

/// Counts a call; true if it has to fail.
inline bool file_call_fails()
{
    const file_fault what = file_fault_now;
    if (what == file_fault::none || --file_calls_left != 0) return false;
    if (what == file_fault::kill) ::raise(SIGKILL);
    errno = file_errno;
    return true;
}

} // namespace support

extern "C" {

__attribute__((used)) int open(const char* path, int flags, ...)
{
    va_list rest;
    va_start(rest, flags);
    const int mode = (flags & O_CREAT) != 0 ? va_arg(rest, int) : 0;
    va_end(rest);
    if (support::file_call_fails()) return -1;
    return static_cast<int>(::syscall(SYS_openat, AT_FDCWD, path, flags, mode));
}
__attribute__((used)) ssize_t write(int file, const void* data, std::size_t bytes)
{
    return support::file_call_fails() ? -1 : ::syscall(SYS_write, file, data, bytes);
}
__attribute__((used)) int fsync(int file)
{
    return support::file_call_fails() ? -1 : static_cast<int>(::syscall(SYS_fsync, file));
}
__attribute__((used)) int ftruncate(int file, off_t size) noexcept
{
    return support::file_call_fails() ? -1 : static_cast<int>(::syscall(SYS_ftruncate, file, size));
}
__attribute__((used)) int rename(const char* from, const char* to) noexcept
{
    return support::file_call_fails() ? -1 : static_cast<int>(::syscall(SYS_renameat2, AT_FDCWD, from, AT_FDCWD, to, 0));
}
__attribute__((used)) int unlink(const char* path) noexcept
{
    return support::file_call_fails() ? -1 : static_cast<int>(::syscall(SYS_unlinkat, AT_FDCWD, path, 0));
}

} // extern "C"
