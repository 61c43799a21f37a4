// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The lanes executor itself: it must catch functors that break the rules of a team.
#include <atomic>
#include <chrono>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include <doctest/doctest.h>

#include <fastmoe/exec/executor.hpp>

#include "support/lanes.hpp"

namespace fm = fastmoe;
using std::int64_t;
using support::lane_team;

namespace {

struct plus {
    int operator()(int a, int b) const { return a + b; }
};

/// A functor from a function, to break rules with.
struct calls {
    void (*body)(lane_team&, int64_t);
    void operator()(lane_team& team, int64_t row) const { body(team, row); }
};

/// The text of the exception that a row functor provokes.
std::string complaint(support::lanes& ex, void (*body)(lane_team&, int64_t), fm::row_hint hint = {})
{
    try {
        fm::for_each_row(ex, 3, calls{body}, hint);
    } catch (const std::exception& e) {
        return e.what();
    }
    return "";
}

bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

void innocent(lane_team& team, int64_t)
{
    team.sync();
    (void)team.reduce(9, 0, plus{}, [](int64_t i) { return static_cast<int>(i); });
}

struct stays {
    void operator()(int64_t) const {}
};
struct nested {
    support::lanes* ex;
    void operator()(int64_t) const { fm::for_each(*ex, 1, stays{}); }
};

std::atomic<int> gave_up{0};

} // namespace

TEST_CASE("lanes refuse collectives that some lanes call and others do not, and work on afterwards")
{
    support::lanes ex;
    std::string text = complaint(ex, [](lane_team& team, int64_t) {
        if (team.lane() != 2) team.sync();
    });
    CHECK(contains(text, "the lanes of a team disagree"));
    CHECK(contains(text, "sync"));
    text = complaint(ex, [](lane_team& team, int64_t) {
        if (team.lane() == 0) (void)team.reduce(4, 0, plus{}, [](int64_t) { return 1; });
        else team.sync();
    });
    CHECK(contains(text, "reduce(4)"));
    text = complaint(ex, [](lane_team& team, int64_t) { team.for_each(team.lane(), [](int64_t) {}); });
    CHECK(contains(text, "the lanes of a team disagree"));
    text = complaint(ex, [](lane_team& team, int64_t) {
        (void)team.reduce(team.lane() < 3 ? 8 : 9, 0, plus{}, [](int64_t) { return 1; });
    });
    CHECK(contains(text, "reduce(9)"));
    text = complaint(ex, [](lane_team& team, int64_t) {
        team.for_each(8, [&](int64_t i) {
            if (i == 1) team.sync();
        });
    });
    CHECK(contains(text, "the lanes of a team disagree"));
    text = complaint(ex, [](lane_team& team, int64_t) {
        team.scan(team.lane() == 1 ? 3 : 9, 0, plus{}, [](int64_t) { return 1; }, [](int64_t, int) {});
    });
    CHECK(contains(text, "the lanes of a team disagree"));
    CHECK(complaint(ex, innocent) == "");
}

TEST_CASE("lanes refuse scratch beyond the hint, taken or written")
{
    support::lanes ex;
    CHECK(contains(complaint(ex, [](lane_team& team, int64_t) { team.scratch<float>(65); }, {.scratch_bytes = 256}),
                   "scratch up to byte 260 was taken; row_hint announced 256"));
    CHECK(complaint(ex, [](lane_team& team, int64_t) { team.scratch<float>(64); }, {.scratch_bytes = 256}) == "");
    const auto two = [](lane_team& team, int64_t) {
        team.scratch<char>(1);
        team.scratch<float>(16);
    };
    CHECK(contains(complaint(ex, two, {.scratch_bytes = 65}), "scratch up to byte 128"));
    CHECK(complaint(ex, two, {.scratch_bytes = 128}) == "");
    const auto writes = [](lane_team& team, int64_t) {
        float* s = team.scratch<float>(16);
        if (team.lane() == 3) s[16] = 1;
    };
    CHECK(contains(complaint(ex, writes, {.scratch_bytes = 64}), "was written; row_hint announced 64"));
    CHECK(complaint(ex, innocent) == "");
}

TEST_CASE("lanes give every row poisoned scratch")
{
    support::lanes ex;
    const auto looks = [](lane_team& team, int64_t) {
        float* s = team.scratch<float>(32);
        team.for_each(32, [&](int64_t i) {
            if (s[i] == s[i]) throw std::runtime_error("scratch holds a number");
            s[i] = 0;
        });
    };
    CHECK(complaint(ex, looks, {.scratch_bytes = 128}) == "");
    const auto second_looks = [](lane_team& team, int64_t) {
        float* s = team.scratch<float>(1);
        team.for_each(1, [&](int64_t) { s[0] = 0; });
        team.sync();
        if (s[0] == 0) throw std::runtime_error("it does see what was written");
    };
    CHECK(complaint(ex, second_looks, {.scratch_bytes = 4}) == "it does see what was written");
}

TEST_CASE("an exception in any lane reaches the caller instead of a hang, and the executor works on")
{
    support::lanes ex;
    for (int round = 0; round < 50; ++round) {
        CHECK(complaint(ex, [](lane_team& team, int64_t row) {
                  if (row == 1 && team.lane() == 2) throw std::runtime_error("lane 2 has enough");
                  team.sync();
              }) == "lane 2 has enough");
        CHECK(complaint(ex, [](lane_team&, int64_t) { throw std::runtime_error("all of them"); }) == "all of them");
        CHECK(complaint(ex, innocent) == "");
    }
}

TEST_CASE("a parallel loop inside of a parallel loop is refused instead of a deadlock")
{
    support::lanes ex;
    CHECK_THROWS_AS(fm::for_each(ex, 5, nested{&ex}), support::misuse);
    CHECK_NOTHROW(fm::for_each(ex, 5, stays{}));
}

TEST_CASE("lanes that wait too long for one of them say where each of them is")
{
    static std::string said;
    gave_up = 0;
    support::lanes ex({.patience = std::chrono::milliseconds(20), .give_up = [](const char* text) {
                           static std::mutex mutex;
                           std::lock_guard lock(mutex);
                           if (gave_up++ == 0) said = text; // lane 1 goes on after the first
                       }});
    fm::for_each_row(ex, 1, calls{[](lane_team& team, int64_t) {
                         while (team.lane() == 1 && gave_up == 0)
                             std::this_thread::sleep_for(std::chrono::milliseconds(1));
                         team.sync();
                     }},
                     {});
    CHECK(gave_up > 0);
    CHECK(contains(said, "waits in vain"));
    CHECK(contains(said, "lane 1 after 0 calls: nothing"));
}

TEST_CASE("several threads may use one lanes executor")
{
    support::lanes ex;
    std::vector<std::thread> users;
    std::atomic<int> wrong{0};
    for (int u = 0; u < 3; ++u)
        users.emplace_back([&] {
            for (int round = 0; round < 20; ++round) wrong += complaint(ex, innocent) != "";
        });
    for (std::thread& t : users) t.join();
    CHECK(wrong == 0);
}
