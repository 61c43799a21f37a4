// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The training program over ranks: R of them train what one trains, whatever shares the experts, whatever stops it.
#include <chrono>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

#include <doctest/doctest.h>
#include <nlohmann/json.hpp>

#include <fastmoe/io/sharded_checkpoint.hpp>

#include "examples/compare_runs.hpp"

namespace {

using namespace training_run;

/// The tiny run with an option that ranks could get wrong unseen: a balance loss that weighs.
words tiny(const place& p, const char* out) { return p.tiny(out) + words{"--balance", "0.3"}; }

words over(int ranks, int expert_parallel = 0)
{
    return {"--ranks", std::to_string(ranks), "--expert-parallel", std::to_string(expert_parallel)};
}

constexpr const char* manifest = "parts/checkpoint/manifest.safetensors";

/// All of a tensor of the model from a folder's checkpoint.
template <class Shape>
std::vector<float> stored(fastmoe::io::sharded_checkpoint& from, const std::string& name, const Shape& shape)
{
    namespace io = fastmoe::io;
    const bool experts = name.find("moe.up") != std::string::npos || name.find("moe.down") != std::string::npos;
    std::size_t count = 1;
    for (const auto extent : shape) count *= static_cast<std::size_t>(extent);
    std::vector<float> out(count, -7.0f);
    auto* room = reinterpret_cast<std::byte*>(out.data());
    io::checkpoint_entry e{name, io::entry_kind::replicated, io::element_type::f32, shape, room, room, {}, {}, {}};
    if (experts) {
        e.kind = io::entry_kind::per_expert;
        for (int i = 0; i < shape[0]; ++i) e.experts.push_back(i);
    }
    from.load({e});
    return out;
}

} // namespace

TEST_CASE("R ranks have the losses, gradient norms and counts of one rank, whatever groups share the experts")
{
    const place p;
    // 5 steps of 3 sequences: over 2 ranks their shares are uneven, and one of 4 has none.
    const words options{"--stop-at", "5"};
    REQUIRE(run(p, tiny(p, "whole") + options) == 0);
    const auto one = numbers(p.at("whole/log.csv"));
    REQUIRE(one.size() == 5);
    for (const words& how : {over(1), over(2), over(3), over(4), over(4, 2), over(3, 1), over(2) + words{"--chunks", "3"},
                             over(4, 2) + words{"--chunks", "2"}, over(3) + words{"--exchange", "padded"},
                             over(4, 2) + words{"--exchange", "padded", "--chunks", "2"},
                             over(4) + words{"--exchange", "gathered"}, over(7)}) { // more ranks than experts
        const std::string shown = text_of(how);
        CAPTURE(shown);
        REQUIRE(run(p, tiny(p, "parts") + options + how) == 0);
        CHECK(p.bytes("stderr").empty());
        CHECK(difference(numbers(p.at("parts/log.csv")), one) == "");
    }
}

TEST_CASE("a dense model over ranks is its one rank's, and so is a bfloat16 model but for that type's rounding")
{
    const place p;
    REQUIRE(run(p, p.tiny("whole") + words{"--dense"}) == 0);
    REQUIRE(run(p, p.tiny("parts") + words{"--dense"} + over(3)) == 0);
    CHECK(difference(numbers(p.at("parts/log.csv")), numbers(p.at("whole/log.csv"))) == "");
    REQUIRE(run(p, tiny(p, "whole") + words{"--dtype", "bfloat16", "--stop-at", "4"}) == 0);
    REQUIRE(run(p, tiny(p, "parts") + words{"--dtype", "bfloat16", "--stop-at", "4"} + over(4, 2)) == 0);
    // 8 bits of a significand: a sum in another order may round to the neighbour, 0.4 % away, in any activation; the loss is
    // the mean of 48 tokens'. A routing that flips would change the counts, so these are not compared.
    const auto one = numbers(p.at("whole/log.csv")), other = numbers(p.at("parts/log.csv"));
    REQUIRE(other.size() == one.size());
    for (std::size_t i = 0; i < one.size(); ++i) {
        CHECK(other[i][2] == doctest::Approx(one[i][2]).epsilon(2e-3));
        CHECK(other[i][6] == doctest::Approx(one[i][6]).epsilon(3e-2));
    }
}

TEST_CASE("ranks begin with one rank's weights to the bit, each expert under its own number")
{
    const place p;
    const words still{"--learning-rate", "1e-60", "--stop-at", "1"}; // zero in float32: a step moves nothing
    REQUIRE(run(p, tiny(p, "whole") + still) == 0);
    const fastmoe::io::safetensors_file file(p.at("whole/checkpoint.safetensors"));
    for (const words& how : {over(3), over(4, 2), over(4, 4)}) {
        REQUIRE(run(p, tiny(p, "parts") + still + how) == 0);
        fastmoe::io::sharded_checkpoint folder(p.at(manifest));
        int compared = 0;
        for (const auto& entry : file.tensors()) {
            const std::string& name = entry.first;
            const auto& t = entry.second;
            if (name.find('/') != std::string::npos) continue; // a moment, which is of the gradient
            CAPTURE(name);
            const auto theirs = stored(folder, name, t.shape);
            CHECK(std::memcmp(theirs.data(), t.data, theirs.size() * sizeof(float)) == 0);
            ++compared;
        }
        CHECK(compared == 2 + 2 * 7 + 1);
    }
}

TEST_CASE("a run over ranks that was stopped and resumed has the numbers of one that was not, for any number of threads")
{
    const place p;
    REQUIRE(run(p, tiny(p, "whole") + over(4, 2) + words{"--threads", "1"}) == 0);
    REQUIRE(run(p, tiny(p, "parts") + over(4, 2) + words{"--threads", "3", "--stop-at", "4"}) == 0);
    REQUIRE(run(p, p.resumed("parts") + over(4, 2)) == 0);
    CHECK(p.bytes("stdout").find("resumed after step 4") != std::string::npos);
    CHECK(numbers(p.at("parts/log.csv")) == numbers(p.at("whole/log.csv")));
}

TEST_CASE("a run goes on over any other number of ranks, one included, from either kind of checkpoint")
{
    const place p;
    REQUIRE(run(p, tiny(p, "whole")) == 0);
    REQUIRE(run(p, tiny(p, "parts") + words{"--stop-at", "2"}) == 0);
    const auto go_on = [&](const words& how, int from, int to) {
        REQUIRE(run(p, p.resumed("parts") + how + words{"--stop-at", std::to_string(to)}) == 0);
        CHECK(p.bytes("stdout").find("resumed after step " + std::to_string(from) + "\n") != std::string::npos);
    };
    go_on(over(3), 2, 4); // the file of one rank
    go_on(over(4, 2), 4, 5);
    go_on({}, 5, 7); // the folder, whose rest is older than the file from now on
    go_on(over(2), 7, 9);
    go_on(over(5), 9, 12);
    for (const char* path : {"parts/checkpoint", manifest}) { // by name
        CHECK(run(p, {"--out", p.at("again"), "--resume", p.at(path)}) == 0);
        CHECK(p.bytes("stdout").find("resumed after step 12\n") != std::string::npos);
    }
    CHECK(difference(numbers(p.at("parts/log.csv")), numbers(p.at("whole/log.csv"))) == "");
}

TEST_CASE("validation and a sample are those of one rank with the same weights")
{
    const place p;
    const words said{"--sample", "alpha be", "--sample-length", "40"};
    REQUIRE(run(p, p.tiny("parts") + words{"--steps", "200", "--learning-rate", "1e-2"} + said) == 0);
    const auto result = [&] {
        const std::string out = p.bytes("stdout");
        return out.substr(out.find("validation loss"));
    };
    const std::string one = result();
    for (const words& how : {over(3), over(4, 2)}) {
        REQUIRE(run(p, p.resumed("parts") + said + how) == 0); // it is finished: nothing but validation and sample
        CHECK(result() == one);
    }
}

TEST_CASE("ranks on a GPU have the numbers of one rank there, and without a GPU are refused for the reason that one rank is")
{
    const place p;
    const words cuda{"--device", "cuda", "--stop-at", "5"};
    const int one = run(p, tiny(p, "whole") + cuda);
    const std::string reason = p.bytes("stderr");
    for (const words& how : {over(2), over(4, 2), over(2) + words{"--exchange", "gathered"}}) {
        const std::string shown = text_of(how);
        CAPTURE(shown);
        REQUIRE(run(p, tiny(p, "parts") + cuda + how) == one);
        CHECK(p.bytes("stderr") == reason);
        if (one == 0) CHECK(difference(numbers(p.at("parts/log.csv")), numbers(p.at("whole/log.csv"))) == "");
        else CHECK(reason.find("--device cuda: ") != std::string::npos);
    }
}

TEST_CASE("SIGTERM stops all ranks after the same step, with a checkpoint")
{
    const place p;
    const words options = words{"--checkpoint-every", "0", "--steps", "3000", "--validate-every", "0"};
    child c(p, tiny(p, "parts") + options + over(3, 1));
    wait_for_steps(p, "parts/log.csv", c);
    c.send(SIGTERM);
    REQUIRE(c.wait() == 128 + SIGTERM);
    CHECK(p.bytes("stdout").find("--resume goes on") != std::string::npos);
    const auto done = numbers(p.at("parts/log.csv")).back()[0];
    CHECK(done < 3000);
    const words stop{"--stop-at", std::to_string(static_cast<int>(done) + 3)};
    REQUIRE(run(p, words{"--out", p.at("parts"), "--resume"} + over(3, 1) + stop) == 0);
    REQUIRE(run(p, tiny(p, "whole") + options + over(3, 1) + stop) == 0);
    CHECK(numbers(p.at("parts/log.csv")) == numbers(p.at("whole/log.csv")));
}

TEST_CASE("ranks that are killed again and again in the middle of their checkpoints end with the numbers of ranks that were not")
{
    const place p;
    FASTMOE_SEEDED(draw, 611);
    const words options = tiny(p, "parts") + over(3) + words{"--steps", "60", "--checkpoint-every", "1", "--threads", "1"};
    REQUIRE(run(p, tiny(p, "whole") + over(3) + words{"--steps", "60", "--checkpoint-every", "0"}) == 0);
    const auto unfinished = [&] {
        std::error_code gone; // a file that goes while the folder is listed
        for (auto at = fs::directory_iterator(p.folder / "parts/checkpoint", gone); !gone && at != fs::directory_iterator();
             at.increment(gone))
            if (at->path().extension() == ".partial") return true;
        return false;
    };
    const auto written = [&] {
        std::error_code none;
        const auto time = fs::last_write_time(p.folder / manifest, none);
        return none ? fs::file_time_type::min() : time;
    };
    int kills = 0, inside = 0, status = 1;
    while (kills < 12 && status != 0) {
        const auto before = written();
        child c(p, before != fs::file_time_type::min() ? options + words{"--resume"} : options);
        while (written() == before && !c.ended()) {} // one checkpoint more, so that every attempt gets further
        while (!unfinished() && !c.ended()) {}
        std::this_thread::sleep_for(std::chrono::microseconds(draw.one_of(0, 20, 100, 500)));
        c.send(SIGKILL);
        status = c.wait();
        const std::string said = p.bytes("stderr");
        CAPTURE(said);
        REQUIRE((status == 0 || status == -SIGKILL));
        kills += status == -SIGKILL;
        inside += status == -SIGKILL && unfinished();
    }
    CAPTURE(kills);
    CHECK(inside >= 4); // or the kills would prove little
    if (status != 0) REQUIRE(run(p, options + words{"--resume"}) == 0);
    CHECK(numbers(p.at("parts/log.csv")) == numbers(p.at("whole/log.csv")));
}

TEST_CASE("a rank that cannot write ends all with its message, and the older checkpoint stays whole")
{
    const place p;
    REQUIRE(run(p, tiny(p, "parts") + over(3) + words{"--stop-at", "4"}) == 0);
    child c(p, words{"--out", p.at("parts"), "--resume"} + over(3), 8000); // less than any part, more than the log
    CHECK(c.wait() == 1);
    CHECK(p.bytes("stderr").find("cannot write '" + p.at(manifest)) != std::string::npos);
    REQUIRE(run(p, p.resumed("parts") + over(3)) == 0);
    CHECK(p.bytes("stdout").find("resumed after step 4\n") != std::string::npos);
    REQUIRE(run(p, tiny(p, "whole") + over(3)) == 0);
    CHECK(numbers(p.at("parts/log.csv")) == numbers(p.at("whole/log.csv")));
}

TEST_CASE("wrong options about ranks are refused by name, and a damaged part of a checkpoint too")
{
    const place p;
    CHECK(run(p, tiny(p, "parts") + over(4, 3)) == 1);
    CHECK(p.bytes("stderr").find("--expert-parallel is 3; expected a divisor of the number of ranks, 4") != std::string::npos);
    CHECK(run(p, tiny(p, "parts") + over(2) + words{"--chunks", "0"}) == 1);
    CHECK(p.bytes("stderr").find("--chunks is 0") != std::string::npos);
    CHECK(run(p, tiny(p, "parts") + words{"--ranks", "65"}) != 0);
    CHECK(run(p, tiny(p, "parts") + over(2) + words{"--exchange", "none"}) != 0);
    CHECK(!fs::exists(p.folder / "parts"));
    REQUIRE(run(p, tiny(p, "parts") + over(2) + words{"--stop-at", "1"}) == 0);
    CHECK(run(p, {"--out", p.at("parts"), "--resume", "--width", "32"}) == 1);
    CHECK(p.bytes("stderr").find("--width is 32; expected 16") != std::string::npos);
    for (const auto& entry : fs::directory_iterator(p.folder / "parts/checkpoint")) {
        if (entry.path().extension() != ".part") continue;
        std::fstream file(entry.path(), std::ios::in | std::ios::out | std::ios::binary);
        file.seekg(-1, std::ios::end);
        const char last = static_cast<char>(file.get());
        file.seekp(-1, std::ios::end);
        file.put(static_cast<char>(last ^ 1));
    }
    for (const words& how : {words{}, over(3)}) {
        CHECK(run(p, words{"--out", p.at("parts"), "--resume"} + how) == 1);
        CHECK(p.bytes("stderr").find("its checksum is not that of the manifest") != std::string::npos);
    }
}

TEST_CASE("the demo over ranks trains both models as on one rank, and says so once")
{
    const place p;
    const words demo{"demo"};
    const int status = run(p, demo + p.tiny("demo"));
    const auto one = nlohmann::json::parse(p.bytes("demo/summary.json"));
    CHECK(run(p, demo + p.tiny("parts") + over(4)) == status);
    const auto four = nlohmann::json::parse(p.bytes("parts/summary.json"));
    for (const char* model : {"moe", "dense"}) {
        CHECK(difference(numbers(p.at(("parts/" + std::string(model) + "/log.csv").c_str())),
                         numbers(p.at(("demo/" + std::string(model) + "/log.csv").c_str()))) == "");
        CHECK(four.at(model).at("total_params") == one.at(model).at("total_params"));
        CHECK(four.at(model).at("active_params") == one.at(model).at("active_params"));
        CHECK(four.at(model).at("val_loss").get<double>() ==
              doctest::Approx(one.at(model).at("val_loss").get<double>()).epsilon(1e-5));
    }
    CHECK(four.at("expert_load_cv") == one.at("expert_load_cv"));
    const std::string said = p.bytes("stdout");
    for (const char* once : {"text: ", "a sample of the MoE's text", "share of choices per expert", "wrote "}) {
        CAPTURE(once);
        CHECK(said.find(once) != std::string::npos);
        CHECK(said.find(once) == said.rfind(once));
    }
}
