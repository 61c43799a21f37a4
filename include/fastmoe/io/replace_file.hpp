// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Writes a file so that its path always shows either the whole old content or the whole new one. POSIX.
#pragma once

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <utility>

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <fastmoe/core/error.hpp>

namespace fastmoe::inline FASTMOE_ABI {
namespace io {

namespace detail {

/// The folder of a path, with its slash.
inline std::string folder_of(const std::string& path)
{
    const std::size_t slash = path.rfind('/');
    return slash == std::string::npos ? "./" : path.substr(0, slash + 1);
}

/// Where the symbolic links end that begin at a path; there need not be a file.
inline std::string end_of_links(std::string path)
{
    const std::string begin = path;
    for (int links = 0;; ++links) {
        char to[4096];
        const ssize_t n = ::readlink(path.c_str(), to, sizeof to);
        if (n < 0) return path; // no link
        const bool short_enough = links < 40 && n < static_cast<ssize_t>(sizeof to);
        expects(short_enough, "path", "'" + begin + "', links without an end", "links that lead to a file");
        path = (to[0] == '/' ? "" : folder_of(path)) + std::string(to, static_cast<std::size_t>(n));
    }
}

} // namespace detail

/// The new content of a path: written beside it as `path + ".partial"`, synced, and renamed over it by commit().
/// Without commit() the destructor removes the partial file, and the path is as it was. A process that is killed
/// leaves at most the partial file, which the next writer of the same path overwrites.
/// A symbolic link stays: what it leads to is replaced, and all that is said here of the path is true of that. The new file
/// has the permissions of the old one.
class replace_file {
public:
    /// @param permissions_of  a file whose permissions a new one gets where there is none at the path; none: the process's
    /// @throws invalid_argument if path is a folder, a device or anything else that is no regular file, or links in a circle
    /// @throws error if the partial file cannot be made, or another process is writing the same path
    explicit replace_file(std::string path, const std::string& permissions_of = {})
        : path_(detail::end_of_links(std::move(path))), partial_(path_ + ".partial")
    {
        expects(path_.find('\0') == std::string::npos, "path", "a name with a zero byte", "a name of a file");
        struct stat there;
        bool exists = ::stat(path_.c_str(), &there) == 0;
        const bool regular = !exists || S_ISREG(there.st_mode);
        expects(regular, "path", "'" + path_ + "', a folder or a device", "a regular file or a new name");
        open_partial();
        if (::ftruncate(file_, 0) != 0) fail("cannot empty");
        exists = exists || (!permissions_of.empty() && ::stat(permissions_of.c_str(), &there) == 0 && S_ISREG(there.st_mode));
        // Before any content: what was private must not be public for a moment. Its next writer must be able to open it.
        if (exists) mode_ = static_cast<int>(there.st_mode & 0777);
        if (exists && ::fchmod(file_, static_cast<mode_t>(mode_ | S_IWUSR)) != 0) fail("cannot keep the permissions of");
    }

    replace_file(const replace_file&) = delete;
    replace_file& operator=(const replace_file&) = delete;

    ~replace_file()
    {
        if (file_ < 0) return;
        ::unlink(partial_.c_str());
        ::close(file_);
    }

    /// Appends bytes to the new content.
    /// @throws error on a full disk or a broken device; the path is as it was
    void write(const void* data, std::size_t bytes)
    {
        const char* p = static_cast<const char*>(data);
        while (bytes > 0) {
            // One call takes at most about 2 GiB on Linux.
            const ssize_t n = ::write(file_, p, bytes < (1u << 30) ? bytes : (1u << 30));
            if (n < 0 && errno == EINTR) continue;
            if (n <= 0) fail("cannot write");
            p += n;
            bytes -= static_cast<std::size_t>(n);
        }
    }

    /// Appends text as it is.
    void write(const std::string& text) { write(text.data(), text.size()); }

    /// Puts the new content in place and returns once the disk has it.
    /// @param keep_previous_as  where the old content stays readable, if any; empty = it is let go
    /// @throws error if the disk refuses; the path then shows the old content, whole
    /// @throws invalid_argument if keep_previous_as is the path itself, or the partial file
    void commit(const std::string& keep_previous_as = {})
    {
        const bool other = keep_previous_as.empty() || (!is_partial(keep_previous_as) && !is_partial(keep_previous_as + ".partial"));
        expects(other, "keep_previous_as", "'" + keep_previous_as + "'", "another name than '" + path_ + "' and its partial file's");
        if (mode_ >= 0 && ::fchmod(file_, static_cast<mode_t>(mode_)) != 0) fail("cannot keep the permissions of");
        // The content must be on the disk before the name points to it, or a power cut could leave a short file.
        if (::fsync(file_) != 0) fail("cannot sync");
        if (!keep_previous_as.empty()) keep_previous(keep_previous_as);
        if (::rename(partial_.c_str(), path_.c_str()) != 0) fail("cannot rename");
        ::close(file_);
        file_ = -1;
        sync_folder();
    }

private:
    /// The partial file, locked. What a killed process has left under its name may be read-only, or a second name of a file that
    /// is in use: then it is left to itself, and another one made.
    void open_partial()
    {
        constexpr int how = O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK; // the last, lest a pipe of that name makes us wait
        file_ = ::open(partial_.c_str(), how | O_WRONLY | O_CREAT, 0666);
        bool usable = file_ >= 0;
        if (!usable && errno == EACCES) {
            file_ = ::open(partial_.c_str(), how | O_RDONLY);
            if (file_ < 0) errno = EACCES;
        }
        if (file_ < 0) fail("cannot create");
        usable = lock() == 1 && usable;
        if (usable) return;
        const int old = file_;
        ::unlink(partial_.c_str()); // under its lock
        file_ = ::open(partial_.c_str(), how | O_WRONLY | O_CREAT | O_EXCL, 0666);
        const int why = errno;
        ::close(old);
        errno = why;
        if (file_ < 0) fail("cannot create");
        lock();
    }
    /// Keeps a second writer out; the same inode says that nobody renamed the file before we had it.
    /// @return  how many names it has
    nlink_t lock()
    {
        struct stat mine;
        struct stat named;
        std::string problem;
        if (::flock(file_, LOCK_EX | LOCK_NB) != 0)
            problem = errno == EWOULDBLOCK ? "another process is writing it now" : std::string("it cannot be locked: ") + std::strerror(errno);
        else if (::fstat(file_, &mine) != 0 || ::stat(partial_.c_str(), &named) != 0 || mine.st_ino != named.st_ino)
            problem = "another process is writing it now";
        else if (!S_ISREG(mine.st_mode)) problem = "'" + partial_ + "' is no regular file";
        if (problem.empty()) return mine.st_nlink;
        ::close(file_);
        file_ = -1;
        raise<error>("cannot write '" + path_ + "': " + problem);
    }
    /// Whether a name is one of the file that is being written.
    bool is_partial(const std::string& name) const
    {
        struct stat mine;
        struct stat named;
        return ::fstat(file_, &mine) == 0 && ::stat(name.c_str(), &named) == 0 && mine.st_ino == named.st_ino && mine.st_dev == named.st_dev;
    }

    /// A second link to the old content, so that the path itself is never without a file.
    void keep_previous(const std::string& name)
    {
        const std::string link = name + ".partial";
        ::unlink(link.c_str());
        if (::link(path_.c_str(), link.c_str()) != 0) {
            if (errno == ENOENT) return;
            fail("cannot keep the previous content of");
        }
        const bool named = ::rename(link.c_str(), name.c_str()) == 0;
        const int why = errno;
        ::unlink(link.c_str()); // still there if both names were one file already: rename then does nothing
        errno = why;
        if (!named) fail("cannot keep the previous content of");
    }

    /// Makes the new name last through a power cut.
    void sync_folder() const
    {
        const int f = ::open(detail::folder_of(path_).c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
        const bool synced =
            f >= 0 && (::fsync(f) == 0 || errno == EINVAL); // EINVAL: this file system has no such thing
        const int why = errno;
        if (f >= 0) ::close(f);
        if (!synced) raise<error>("wrote '" + path_ + "', but cannot sync its folder: " + std::strerror(why));
    }

    /// Reports errno and leaves the path alone.
    [[noreturn]] void fail(const char* what)
    {
        const int why = errno;
        if (file_ >= 0) {
            ::unlink(partial_.c_str());
            ::close(file_);
            file_ = -1;
        }
        raise<error>(std::string(what) + " '" + path_ + "': " + std::strerror(why) + "; what stood there is unchanged");
    }

    std::string path_;
    std::string partial_;
    int file_ = -1;
    int mode_ = -1; ///< permissions of the file that is replaced, if there is one
};

} // namespace io
} // namespace fastmoe::inline FASTMOE_ABI
