// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// What the training program and its parts leave on a disk that is full: a real file system without room, which not every
/// machine lets a test mount.
#include <cstdlib>
#include <fstream>
#include <string>
#include <vector>

#include <doctest/doctest.h>

#include "support/skip.hpp"
#include "support/small_disk.hpp"
#include "train_gpt/checkpoint.hpp"
#include "train_gpt/report.hpp"

#define FASTMOE_NEEDS_A_DISK                                                                                          \
    if (!support::small_disk::permitted()) FASTMOE_SKIP("this user may not mount a file system")

namespace {

namespace fm = fastmoe;
using namespace train_gpt;
using support::small_disk;

constexpr const char* no_space = "No space left on device";

bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

/// The text of the error that f throws, or "none".
template <class F>
std::string error_of(F f)
{
    try {
        f();
    } catch (const fm::error& e) {
        return e.what();
    }
    return "none";
}

void save(const std::string& path, float value, std::size_t floats, std::int64_t step)
{
    std::vector<float> values(floats, value);
    save_checkpoint(path, {named("v", fm::as_vector(values))}, {step, step, 1, 2, "{}"});
}

std::int64_t step_of(const std::string& path) { return checkpoint(path).state().step; }

/// Takes all the room there is.
void fill(const std::string& path)
{
    std::ofstream out(path, std::ios::binary);
    const std::string page(4096, 'x');
    while (out.write(page.data(), static_cast<std::streamsize>(page.size())) && out.flush()) {}
}

int names_in(const std::string& folder)
{
    int n = 0;
    for (const auto& entry : std::filesystem::directory_iterator(folder)) n += entry.exists();
    return n;
}

} // namespace

TEST_CASE("A checkpoint that finds no room is an error that says so, and both older ones stay whole")
{
    FASTMOE_NEEDS_A_DISK;
    const std::string said = small_disk(1 << 20).run([](const std::string& folder) {
        const std::string path = folder + "/run.safetensors";
        for (int step = 1; step <= 2; ++step) save(path, static_cast<float>(step), 70'000, step);
        std::string text = error_of([&] { save(path, 3, 200'000, 3); });
        text += "; steps " + std::to_string(step_of(path)) + " " + std::to_string(step_of(previous_checkpoint(path)));
        text += ", " + std::to_string(names_in(folder)) + " files";
        save(path, 4, 70'000, 4);
        return text + ", then " + std::to_string(step_of(path));
    });
    CHECK_MESSAGE(contains(said, "run.safetensors': No space left on device; what stood there is unchanged"), said);
    CHECK_MESSAGE(contains(said, "; steps 2 1, 2 files, then 4"), said);
}

TEST_CASE("A row of the log that finds no room is an error that says so, and the rows before it can be read")
{
    FASTMOE_NEEDS_A_DISK;
    const std::string said = small_disk(1 << 16).run([](const std::string& folder) {
        csv_log log(folder + "/log.csv");
        log_row row;
        row.step = 1;
        log.write(row);
        fill(folder + "/filler");
        std::int64_t step = 1;
        const std::string text = error_of([&] {
            for (;; ++step) { // the last page of the log still has room
                row.step = step + 1;
                log.write(row);
            }
        });
        const auto rows = read_log(folder + "/log.csv");
        const bool whole = !rows.empty() && rows.size() <= static_cast<std::size_t>(step) &&
                           rows.back().step == static_cast<std::int64_t>(rows.size());
        return text + (whole && step < 1000 ? "; readable" : "; lost");
    });
    CHECK_MESSAGE(contains(said, std::string("log.csv': ") + no_space), said);
    CHECK_MESSAGE(contains(said, "; readable"), said);
}

TEST_CASE("A summary that finds no room is an error that says so, and the older one stays whole")
{
    FASTMOE_NEEDS_A_DISK;
    const std::string said = small_disk(1 << 16).run([](const std::string& folder) {
        const std::string path = folder + "/summary.json";
        demo_summary summary;
        summary.tokens = 17;
        write_summary(path, summary);
        fill(folder + "/filler");
        summary.tokens = 18;
        summary.load.assign(1000, {1, 2});
        const std::string text = error_of([&] { write_summary(path, summary); });
        std::ifstream in(path);
        return text + "; tokens " + nlohmann::json::parse(in).at("tokens").dump();
    });
    CHECK_MESSAGE(contains(said, std::string("summary.json': ") + no_space), said);
    CHECK_MESSAGE(contains(said, "; tokens 17"), said);
}

TEST_CASE("The program ends with the error, and goes on from its checkpoint once there is room")
{
    FASTMOE_NEEDS_A_DISK;
    const std::string said = small_disk(1 << 20).run([](const std::string& folder) {
        std::filesystem::create_directory(folder + "/text");
        for (const char* name : {"/text/a", "/text/b"}) std::ofstream(folder + name) << std::string(3000, 'a') << "\n";
        const std::string program = FASTMOE_TRAIN_GPT, out = " --out " + folder + "/out";
        const auto run = [&](const std::string& options) {
            const int status = std::system((program + out + options + " 2>>" + folder + "/said >/dev/null").c_str());
            return WIFEXITED(status) ? std::to_string(WEXITSTATUS(status)) : std::string("signal");
        };
        const std::string begun = run(" --text " + folder + "/text --width 16 --layers 1 --heads 2 --experts 4 --hidden 24"
                                      " --context 16 --batch 3 --steps 6 --stop-at 2");
        std::ofstream(folder + "/said") << "said:\n"; // its page has room for what the program says when the disk has none
        fill(folder + "/filler");
        const std::string full = run(" --resume");
        std::string text = begun + " " + full + " at " + std::to_string(step_of(folder + "/out/checkpoint.safetensors"));
        std::filesystem::remove(folder + "/filler");
        return text + " then " + run(" --resume") + ": " + support::read_file(folder + "/said");
    });
    CHECK_MESSAGE(contains(said, "0 1 at 2 then 0"), said);
    CHECK_MESSAGE(contains(said, no_space), said);
}
