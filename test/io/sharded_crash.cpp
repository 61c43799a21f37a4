// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// A save that is cut short: at every call that changes a file, by a kill and by a failing disk; by a full disk; by a rank
/// that is gone. What stands at the path is whole, the older or the newer one.
#include <csignal>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include <sys/wait.h>
#include <unistd.h>

#include <doctest/doctest.h>

#include "sharded_scene.hpp"
#include "support/file_calls.hpp"
#include "support/scratch.hpp"
#include "support/skip.hpp"
#include "support/small_disk.hpp"
#include "support/temporary_folder.hpp"

namespace {

namespace fm = fastmoe;
namespace io = fastmoe::io;
using fm::int64_t;
using support::has;

/// Which generation is whole at the path; -1 if any byte of it is not.
int64_t whole(const std::string& path, const std::vector<scene::holding>& ranks)
{
    int64_t generation = -1;
    io::sharded_checkpoint(path).verify();
    return scene::load(path, ranks, generation) == 0 ? generation : -1;
}

/// What each rank says that saves a generation.
std::vector<std::string> try_to_save(const std::string& path, const std::vector<scene::holding>& ranks, int generation)
{
    std::vector<std::string> said(ranks.size());
    fm::run_ranks(static_cast<int>(ranks.size()), [&](const fm::threads& c) {
        fm::host_executor ex({.threads = 1});
        scene::rank_memory own(ranks[c.rank()]);
        own.fill(generation);
        said[c.rank()] = support::message_of<fm::error>([&] {
            io::save_sharded_checkpoint(ex, path, own.entries(), c,
                                        {.step = generation, .text = "generation " + std::to_string(generation)});
        });
    });
    return said;
}

/// `threads` whose rank 1 loses touch after a number of sums: the others had its contribution and go on.
struct losing_touch {
    const fm::threads& inner;
    mutable int sums_left;

    int rank() const { return inner.rank(); }
    int size() const { return inner.size(); }
    template <fm::executor Executor, class T>
    void all_reduce(Executor& ex, fm::vector_view<T> values) const
    {
        inner.all_reduce(ex, values);
        if (inner.rank() == 1 && --sums_left == 0) fm::raise<fm::comm_error>("rank 1 has lost touch");
    }
};

constexpr const char* silent = "nothing was thrown";

} // namespace

TEST_CASE("a process that is killed at any call which changes a file leaves the older checkpoint whole, or the newer one")
{
    FASTMOE_SEEDED(rng, 541);
    const support::temporary_folder folder;
    const std::string path = folder / "c";
    const auto ranks = scene::placement(rng, 3, 1), others = scene::placement(rng, 2, 2);
    scene::save(path, ranks, 1);
    const auto files = folder.entries();
    int64_t kills = 0, older = 0;
    for (int64_t n = 1;; ++n) {
        const pid_t child = ::fork();
        if (child == 0) {
            const support::faulty_files fault(support::file_fault::kill, n);
            scene::save(path, ranks, 2);
            ::_exit(0);
        }
        int status = 0;
        REQUIRE(::waitpid(child, &status, 0) == child);
        const int64_t now = whole(path, others);
        if (WIFEXITED(status)) {
            CHECK_EQ(WEXITSTATUS(status), 0);
            CHECK_EQ(now, 2);
            break;
        }
        CHECK_EQ(WTERMSIG(status), SIGKILL);
        ++kills;
        older += now == 1;
        CHECK_MESSAGE((now == 1 || now == 2), "kill ", n);
        scene::save(path, ranks, 1);
        CHECK_EQ(whole(path, others), 1);
        CHECK_EQ(folder.entries(), files); // what the crash left is gone
    }
    CHECK(kills > 30);          // three parts and a manifest
    CHECK(older > kills / 2);   // most come before the rename
    CHECK(older < kills);       // and some after it
}

TEST_CASE("the same where some ranks are replicas, which look whether what they leave to others is there")
{
    const support::temporary_folder folder;
    const std::string path = folder / "c";
    const std::vector<std::int32_t> ids{0, 1};
    const auto save = [&](float value) {
        fm::run_ranks(3, [&](const fm::threads& c) {
            fm::host_executor ex({.threads = 1});
            std::vector<float> w(12, value);
            io::save_sharded_checkpoint(ex, path, {io::expert_entry("w", fm::tensor_view<float, 3>(w.data(), 2, 2, 3), fm::as_vector(ids))}, c,
                                        {.role = c.rank() == 1 ? io::checkpoint_role::writer : io::checkpoint_role::replica});
        });
    };
    const auto stored = [&] {
        std::vector<float> w(12, -1.f);
        io::sharded_checkpoint from(path);
        from.verify();
        from.load({io::expert_entry("w", fm::tensor_view<float, 3>(w.data(), 2, 2, 3), fm::as_vector(ids))});
        for (const float v : w) CHECK_EQ(v, w[0]);
        return w[0];
    };
    save(1);
    const auto files = folder.entries();
    int64_t kills = 0, older = 0;
    for (int64_t n = 1;; ++n) {
        CAPTURE(n);
        const pid_t child = ::fork();
        if (child == 0) {
            const support::faulty_files fault(support::file_fault::kill, n);
            save(2);
            ::_exit(0);
        }
        int status = 0;
        REQUIRE(::waitpid(child, &status, 0) == child);
        if (WIFEXITED(status)) {
            CHECK_EQ(WEXITSTATUS(status), 0);
            CHECK_EQ(stored(), 2.f);
            CHECK_EQ(folder.entries(), files);
            break;
        }
        const float now = stored();
        CHECK((now == 1.f || now == 2.f));
        ++kills;
        older += now == 1.f;
        save(1);
        CHECK_EQ(stored(), 1.f);
        CHECK_EQ(folder.entries(), files); // the draft is gone, too
    }
    CHECK(kills > 20); // two parts, a draft and a manifest
    CHECK(older > kills / 2);
    CHECK(older < kills);
}

TEST_CASE("a call that fails on any rank makes all of them throw or none, and what stands at the path is whole")
{
    FASTMOE_SEEDED(rng, 542);
    const support::temporary_folder folder;
    const std::string path = folder / "c";
    const auto ranks = scene::placement(rng, 3, 3);
    scene::save(path, ranks, 1);
    const auto files = folder.entries();
    int64_t failures = 0, taken_away = 0;
    for (int64_t n = 1;; ++n) {
        INFO("call ", n);
        bool struck = false;
        std::vector<std::string> said;
        {
            const support::faulty_files fault(support::file_fault::fail, n, n % 2 ? EIO : ENOSPC);
            said = try_to_save(path, ranks, 2);
            struck = fault.struck();
        }
        const auto quiet = std::count(said.begin(), said.end(), silent);
        CHECK((quiet == 0 || quiet == 3));
        const int64_t now = whole(path, ranks);
        const bool wrote = has(said[0], "but cannot sync its folder") && !has(said[0], ".part'");
        CHECK_MESSAGE(now == (quiet == 3 || wrote ? 2 : 1), said[0]);
        if (quiet == 0) {
            ++failures;
            // All of them say why.
            for (const std::string& text : said) CHECK_MESSAGE((has(text, "Input/output") || has(text, "No space")), text);
            // A part that could not be written: all ranks know, and take theirs away.
            if (has(said[0], ".part': ") && !has(said[0], "path is")) {
                CHECK_EQ(folder.entries(), files);
                ++taken_away;
            }
        }
        if (!struck) break;
        scene::save(path, ranks, 1);
        CHECK_EQ(folder.entries(), files);
    }
    CHECK(failures > 25);
    CHECK(taken_away > 10);
}

TEST_CASE("a full disk is an error on all ranks that says so, and once there is room the next save succeeds")
{
    if (!support::small_disk::permitted()) FASTMOE_SKIP("this user may not mount a file system");
    const std::string said = support::small_disk(1 << 20).run([](const std::string& folder) {
        support::random rng(543);
        const std::string path = folder + "/c";
        const auto ranks = scene::placement(rng, 2, 1);
        scene::save(path, ranks, 1);
        {
            std::ofstream out(folder + "/filler", std::ios::binary);
            const std::string page(4096, 'x');
            while (out.write(page.data(), static_cast<std::streamsize>(page.size())) && out.flush()) {}
        }
        const auto texts = try_to_save(path, ranks, 2);
        std::string text = texts[0] + " | " + texts[1] + " | whole: " + std::to_string(whole(path, ranks));
        std::filesystem::remove(folder + "/filler");
        scene::save(path, ranks, 3);
        text += ", then " + std::to_string(whole(path, ranks));
        int64_t files = 0;
        for (const auto& file : std::filesystem::directory_iterator(folder)) files += file.exists();
        return text + ", files " + std::to_string(files);
    });
    const std::size_t bar = said.find('|');
    CHECK_MESSAGE(has(said.substr(0, bar), "No space left on device"), said);
    CHECK_MESSAGE(has(said.substr(bar), "No space left on device"), said);
    CHECK_MESSAGE(has(said, "| whole: 1, then 3, files 3"), said);
}

TEST_CASE("a rank that is gone is a comm_error on the others, and the checkpoint stays what it was")
{
    FASTMOE_SEEDED(rng, 544);
    const support::temporary_folder folder;
    const std::string path = folder / "c";
    const auto ranks = scene::placement(rng, 3, 1);
    scene::save(path, ranks, 1);
    std::vector<std::string> said(3);
    fm::run_ranks(3, [&](const fm::threads& c) {
        if (c.rank() == 1) return;
        fm::host_executor ex({.threads = 1});
        scene::rank_memory own(ranks[c.rank()]);
        said[c.rank()] = support::message_of<fm::comm_error>([&] { io::save_sharded_checkpoint(ex, path, own.entries(), c); });
    });
    for (int r : {0, 2}) CHECK_MESSAGE(has(said[r], "rank 1 of 3 has left"), said[r]);
    CHECK_EQ(whole(path, ranks), 1);
}

TEST_CASE("a rank that loses touch leaves its part: the others may have agreed to name it")
{
    FASTMOE_SEEDED(rng, 546);
    const support::temporary_folder folder;
    const std::string path = folder / "c";
    auto ranks = scene::placement(rng, 3, 1);
    ranks[1].ids = {0}, ranks[0].ids = {1, 2, 3}, ranks[2].ids = {4, 5};
    scene::save(path, ranks, 1);
    const auto files = folder.entries();
    for (int sums = 1; sums <= 5; ++sums) {
        INFO("after ", sums, " sums");
        std::vector<std::string> said(3);
        fm::run_ranks(3, [&](const fm::threads& c) {
            fm::host_executor ex({.threads = 1});
            scene::rank_memory own(ranks[c.rank()]);
            own.fill(2);
            said[c.rank()] = support::message_of<fm::comm_error>([&] {
                io::save_sharded_checkpoint(ex, path, own.entries(), losing_touch{c, sums}, {.step = 2, .text = "generation 2"});
            });
        });
        CHECK_EQ(whole(path, ranks), sums < 3 ? 1 : 2); // the third sum says that all have written their parts
        CHECK(has(said[1], "lost touch") == (sums <= 4)); // there are four
        scene::save(path, ranks, 1);
        CHECK_EQ(folder.entries(), files);
    }
}

TEST_CASE("over a manifest that is corrupt, a save writes a new one and then removes all older parts")
{
    FASTMOE_SEEDED(rng, 545);
    const support::temporary_folder folder;
    const std::string path = folder / "c";
    const auto ranks = scene::placement(rng, 2, 2);
    scene::save(path, ranks, 1);
    const auto files = folder.entries();
    support::write_file(path, "no manifest");
    scene::save(path, ranks, 2);
    CHECK_EQ(whole(path, ranks), 2);
    CHECK_EQ(folder.entries(), files);
    const std::string is_folder = folder / "d";
    std::filesystem::create_directory(is_folder);
    for (const std::string& text : try_to_save(is_folder, ranks, 3)) CHECK_MESSAGE(has(text, "folder or a device"), text);
    for (const std::string& text : try_to_save(folder / "none/c", ranks, 3)) CHECK_MESSAGE(has(text, "No such file"), text);
}
