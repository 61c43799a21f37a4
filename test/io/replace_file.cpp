// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Files that are replaced as a whole: by way of symbolic links, and with the permissions that they had.
#include <string>

#include <doctest/doctest.h>

#include <sys/stat.h>
#include <unistd.h>

#include <fastmoe/io/replace_file.hpp>

#include "support/temporary_folder.hpp"

namespace {

namespace fm = fastmoe;
using support::read_file;
using support::temporary_folder;
using support::write_file;

void replace(const std::string& path, const std::string& text, const std::string& keep_previous_as = {})
{
    fm::io::replace_file file(path);
    file.write(text);
    file.commit(keep_previous_as);
}

bool is_link(const std::string& path)
{
    struct stat there;
    return ::lstat(path.c_str(), &there) == 0 && S_ISLNK(there.st_mode);
}

int mode_of(const std::string& path)
{
    struct stat there;
    return ::stat(path.c_str(), &there) == 0 ? static_cast<int>(there.st_mode & 07777) : -1;
}

void link_to(const std::string& target, const std::string& path) { REQUIRE(::symlink(target.c_str(), path.c_str()) == 0); }

} // namespace

TEST_CASE("A symbolic link stays, and the file that it leads to is replaced, wherever that is")
{
    temporary_folder folder;
    write_file(folder / "data/real", "old");
    link_to("data/real", folder / "relative");
    link_to(folder / "data/real", folder / "absolute");
    link_to("relative", folder / "chain");
    int round = 0;
    for (const char* name : {"relative", "absolute", "chain"}) {
        const std::string text = "new " + std::to_string(++round);
        replace(folder / name, text);
        CHECK(is_link(folder / name));
        CHECK_FALSE(is_link(folder / "data/real"));
        CHECK(read_file(folder / "data/real") == text);
        CHECK(read_file(folder / name) == text);
    }
    CHECK(folder.entries() == 4); // three links and the folder "data": nothing partial is left beside them
    replace(folder / "chain", "last", folder / "kept");
    CHECK(read_file(folder / "data/real") == "last");
    CHECK(read_file(folder / "kept") == "new 3");
}

TEST_CASE("A link to a file that is not there yet makes it, and one that leads in a circle or to a folder is refused")
{
    temporary_folder folder;
    link_to("later", folder / "early");
    replace(folder / "early", "here");
    CHECK(is_link(folder / "early"));
    CHECK(read_file(folder / "later") == "here");
    link_to("b", folder / "a");
    link_to("a", folder / "b");
    CHECK_THROWS_WITH_AS(replace(folder / "a", "x"), doctest::Contains("links without an end"), fm::invalid_argument);
    link_to(".", folder / "here");
    CHECK_THROWS_WITH_AS(replace(folder / "here", "x"), doctest::Contains("a folder or a device"), fm::invalid_argument);
    CHECK(folder.entries() == 5);
}

TEST_CASE("The new file has the permissions of the old one from its first byte on, and a new name those of any new file")
{
    temporary_folder folder;
    const mode_t mask = ::umask(0022);
    for (const int mode : {0600, 0640, 0666, 0400}) {
        const std::string path = folder / ("file" + std::to_string(mode));
        write_file(path, "old");
        REQUIRE(::chmod(path.c_str(), static_cast<mode_t>(mode)) == 0);
        fm::io::replace_file file(path);
        CHECK(mode_of(path + ".partial") == (mode | 0200)); // private things stay private, and a next writer can write
        file.write("new");
        file.commit();
        CHECK(mode_of(path) == mode);
        CHECK(read_file(path) == "new");
    }
    replace(folder / "fresh", "new");
    CHECK(mode_of(folder / "fresh") == 0644);
    ::umask(mask);
}

TEST_CASE("What is left under the partial file's name is no way to another file, and no obstacle")
{
    temporary_folder folder;
    write_file(folder / "live", "one");
    REQUIRE(::link((folder / "live").c_str(), (folder / "new.partial").c_str()) == 0); // as a killed process may have left it
    replace(folder / "new", "seven");
    CHECK(read_file(folder / "live") == "one");
    CHECK(read_file(folder / "new") == "seven");

    // A previous content that cannot be kept: its second name goes, too.
    REQUIRE(::mkdir((folder / "taken").c_str(), 0700) == 0);
    CHECK_THROWS_WITH_AS(replace(folder / "live", "two", folder / "taken"), doctest::Contains("what stood there is unchanged"), fm::error);
    REQUIRE(::rmdir((folder / "taken").c_str()) == 0);
    replace(folder / "taken", "three");
    CHECK(read_file(folder / "live") == "one");

    // Read-only, as a process leaves it that is killed when all is written. Who may do anything does not notice.
    write_file(folder / "private.partial", "half");
    const bool root = ::geteuid() == 0;
    if (root) REQUIRE((::chmod((folder / "").c_str(), 0777) == 0 && ::chown((folder / "private.partial").c_str(), 65534, 65534) == 0));
    if (root) REQUIRE(::seteuid(65534) == 0);
    CHECK(::chmod((folder / "private.partial").c_str(), 0444) == 0);
    std::string said;
    try {
        replace(folder / "private", "whole");
    } catch (const fm::error& e) {
        said = e.what();
    }
    if (root) REQUIRE(::seteuid(0) == 0);
    CHECK(said == "");
    CHECK(read_file(folder / "private") == "whole");

    REQUIRE(::mkfifo((folder / "pipe.partial").c_str(), 0600) == 0); // nobody reads it
    CHECK_THROWS_AS(replace(folder / "pipe", "text"), fm::error);
}

TEST_CASE("The previous content cannot be kept under the names that the new one has, and a name has no zero byte")
{
    temporary_folder folder;
    write_file(folder / "file", "old");
    link_to("file", folder / "link");
    for (const char* name : {"file", "file.partial", "./file"})
        CHECK_THROWS_WITH_AS(replace(folder / "file", "new", folder / name), doctest::Contains("keep_previous_as"), fm::invalid_argument);
    CHECK_THROWS_WITH_AS(replace(folder / "link", "new", folder / "file"), doctest::Contains("keep_previous_as"), fm::invalid_argument);
    CHECK(read_file(folder / "file") == "old");
    CHECK(folder.entries() == 2);
    replace(folder / "file", "new", folder / "before");
    CHECK(read_file(folder / "before") == "old");
    CHECK(read_file(folder / "file") == "new");
    CHECK_THROWS_WITH_AS(fm::io::replace_file(std::string("a\0b", 3)), doctest::Contains("zero byte"), fm::invalid_argument);
}
