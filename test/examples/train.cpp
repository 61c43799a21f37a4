// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The training program as a user meets it: what it prints, what it leaves behind, and that no way of stopping it
/// changes a bit of the model that comes out.
#include <chrono>
#include <csignal>
#include <filesystem>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

#include <doctest/doctest.h>
#include <nlohmann/json.hpp>

#include "examples/training_run.hpp"

namespace {

using namespace training_run;

constexpr const char* whole = "whole/checkpoint.safetensors";
constexpr const char* parts = "parts/checkpoint.safetensors";

} // namespace

TEST_CASE("a run that was stopped and resumed has the bits of one that was not, in either type")
{
    for (const char* type : {"float32", "bfloat16"}) {
        CAPTURE(type);
        const place p;
        REQUIRE(run(p, p.tiny("whole") + words{"--dtype", type}) == 0);
        REQUIRE(run(p, p.tiny("parts") + words{"--dtype", type, "--stop-at", "4"}) == 0);
        CHECK(p.bytes(parts) != p.bytes(whole));
        REQUIRE(run(p, p.resumed("parts") + words{"--stop-at", "5"}) == 0);
        REQUIRE(run(p, p.resumed("parts")) == 0);
        CHECK(p.bytes(parts) == p.bytes(whole));
        CHECK(numbers(p.at("whole/log.csv")).size() == 12);
        CHECK(numbers(p.at("parts/log.csv")) == numbers(p.at("whole/log.csv")));
    }
}

TEST_CASE("the number of threads does not change a bit of the model")
{
    const place p;
    REQUIRE(run(p, p.tiny("whole") + words{"--threads", "1"}) == 0);
    for (const char* threads : {"2", "4"}) {
        REQUIRE(run(p, p.tiny("parts") + words{"--threads", threads}) == 0);
        CHECK(p.bytes(parts) == p.bytes(whole));
    }
}

TEST_CASE("a run that is killed again and again in the middle of its checkpoints ends with the bits of one that was not")
{
    const place p;
    FASTMOE_SEEDED(draw, 601);
    const words options = p.tiny("parts") + words{"--steps", "200", "--checkpoint-every", "1", "--threads", "1"};
    const fs::path checkpoint = p.folder / parts, unfinished = p.at(parts) + ".partial";
    REQUIRE(run(p, p.tiny("whole") + words{"--steps", "200", "--checkpoint-every", "0", "--threads", "1"}) == 0);
    const auto written = [&] { return fs::exists(checkpoint) ? fs::last_write_time(checkpoint) : fs::file_time_type::min(); };
    int kills = 0, inside = 0, status = 1;
    while (kills < 25 && status != 0) {
        const auto before = written();
        child c(p, fs::exists(checkpoint) ? options + words{"--resume"} : options);
        // One checkpoint more, so that every attempt gets further; then the moment in which the next one is written.
        while (written() == before && !c.ended()) {}
        while (!fs::exists(unfinished) && !c.ended()) {}
        std::this_thread::sleep_for(std::chrono::microseconds(draw.one_of(0, 20, 100, 500)));
        c.send(SIGKILL);
        status = c.wait();
        const std::string said = p.bytes("stderr"); // not in CAPTURE: that is evaluated while doctest holds its lock
        CAPTURE(said);
        REQUIRE((status == 0 || status == -SIGKILL));
        kills += status == -SIGKILL;
        inside += status == -SIGKILL && fs::exists(unfinished);
    }
    CAPTURE(kills);
    CHECK(inside >= 10); // or the kills would prove little
    CHECK(p.bytes(parts) != p.bytes(whole));
    REQUIRE(run(p, options + words{"--resume"}) == 0);
    CHECK(p.bytes(parts) == p.bytes(whole));
    CHECK(numbers(p.at("parts/log.csv")) == numbers(p.at("whole/log.csv")));
}

TEST_CASE("SIGINT and SIGTERM save a checkpoint, say so, and lose nothing")
{
    for (const int signal : {SIGINT, SIGTERM}) {
        const place p;
        const words options = words{"--checkpoint-every", "0", "--steps", "3000", "--validate-every", "0"};
        child c(p, p.tiny("parts") + options);
        for (int i = 0; i < 60000; ++i) { // at most a minute
            if (fs::exists(p.folder / "parts/log.csv") && p.bytes("parts/log.csv").size() > 400) break;
            std::this_thread::sleep_for(std::chrono::milliseconds(1));
        }
        c.send(signal);
        REQUIRE(c.wait() == 128 + signal);
        CHECK(p.bytes("stdout").find("--resume goes on") != std::string::npos);
        const auto done = numbers(p.at("parts/log.csv")).back()[0];
        CHECK(done < 3000);
        const words stop{"--stop-at", std::to_string(static_cast<int>(done) + 3)};
        REQUIRE(run(p, words{"--out", p.at("parts"), "--resume"} + stop) == 0);
        REQUIRE(run(p, p.tiny("whole") + options + stop) == 0);
        CHECK(p.bytes(parts) == p.bytes(whole));
    }
}

TEST_CASE("a checkpoint that cannot be written is an error that says so, and the older one stays whole")
{
    const place p;
    REQUIRE(run(p, p.tiny("parts") + words{"--stop-at", "4"}) == 0);
    const std::string before = p.bytes(parts);
    child c(p, {"--out", p.at("parts"), "--resume"}, before.size() / 2);
    CHECK(c.wait() == 1);
    CHECK(p.bytes("stderr").find("checkpoint.safetensors") != std::string::npos);
    CHECK(p.bytes(parts) == before);
    REQUIRE(run(p, {"--out", p.at("parts"), "--resume"}) == 0);
    REQUIRE(run(p, p.tiny("whole")) == 0);
    CHECK(p.bytes(parts) == p.bytes(whole));
}

TEST_CASE("a truncated or altered checkpoint is refused, and the one before it can be resumed from")
{
    const place p;
    REQUIRE(run(p, p.tiny("whole")) == 0);
    REQUIRE(run(p, p.tiny("parts") + words{"--checkpoint-every", "4"}) == 0);
    const std::string good = p.bytes(parts);
    for (const bool truncate : {true, false}) {
        std::string bad = good;
        if (truncate) bad.resize(bad.size() - 1);
        else bad[bad.size() / 2] = static_cast<char>(bad[bad.size() / 2] ^ 1);
        std::ofstream(p.folder / parts, std::ios::binary | std::ios::trunc) << bad;
        CHECK(run(p, {"--out", p.at("parts"), "--resume"}) == 1);
        CHECK(p.bytes("stderr").find("previous.safetensors") != std::string::npos);
    }
    REQUIRE(run(p, {"--out", p.at("parts"), "--resume", p.at("parts/checkpoint.previous.safetensors")}) == 0);
    CHECK(p.bytes(parts) == p.bytes(whole));
}

TEST_CASE("an option that contradicts the resumed run, or another text, is refused by name")
{
    const place p;
    REQUIRE(run(p, p.tiny("parts") + words{"--stop-at", "4"}) == 0);
    CHECK(run(p, {"--out", p.at("parts"), "--resume", "--width", "32"}) == 1);
    CHECK(p.bytes("stderr").find("--width is 32; expected 16") != std::string::npos);
    CHECK(run(p, {"--out", p.at("parts"), "--resume", "--width", "16"}) == 0);
    std::ofstream(p.folder / "text/a.txt", std::ios::app) << "one more line\n";
    CHECK(run(p, {"--out", p.at("parts"), "--resume"}) == 1);
    CHECK(p.bytes("stderr").find("--text is ") != std::string::npos);
    CHECK(run(p, {"--out", p.at("nowhere"), "--resume"}) == 1);
    CHECK(p.bytes("stderr").find("nowhere/checkpoint.safetensors") != std::string::npos);
}

TEST_CASE("wrong options and help end at once, without a run")
{
    const place p;
    CHECK(run(p, {"--help"}) == 0);
    for (const char* option : {"--text", "--width", "--layers", "--heads", "--experts", "--k", "--hidden", "--batch",
                               "--context", "--steps", "--learning-rate", "--balance", "--seed", "--threads", "--dtype",
                               "--dense", "--resume", "--ranks", "--expert-parallel", "--exchange", "--chunks", "--sample", "--out", "--log", "demo"})
        CHECK_MESSAGE(p.bytes("stdout").find(option) != std::string::npos, option);
    CHECK(run(p, {"--no-such-option"}) != 0);
    CHECK(run(p, p.tiny("parts") + words{"--heads", "3"}) == 1);
    CHECK(p.bytes("stderr").find("width is 16; expected a multiple of heads = 3") != std::string::npos);
    CHECK(run(p, {"--text", p.at("missing")}) == 1);
    CHECK(p.bytes("stderr").find("missing") != std::string::npos);
    CHECK(!fs::exists(p.folder / "parts"));
}

TEST_CASE("training learns the text, is silent on stderr, and continues a prompt the same way every time")
{
    const place p;
    const words longer{"--steps",  "400",      "--warmup",      "20", "--learning-rate", "1e-2",
                       "--sample", "alpha be", "--temperature", "0",  "--sample-length", "30"};
    REQUIRE(run(p, p.tiny("whole") + longer) == 0);
    CHECK(p.bytes("stderr").empty());
    const std::string said = p.bytes("stdout");
    CHECK(said.find("alpha be") != std::string::npos);
    const auto log = train_gpt::read_log(p.at("whole/log.csv"));
    CHECK(log.front().loss == doctest::Approx(std::log(256.0)).epsilon(0.05));
    CHECK(log.back().loss < 1.2);
    CHECK(log.back().val_loss < 1.2);
    REQUIRE(run(p, p.tiny("parts") + longer) == 0);
    CHECK(p.bytes("stdout") == said);
    REQUIRE(run(p, words{"--out", p.at("parts"), "--resume", "--sample", "alpha be", "--temperature", "0",
                         "--sample-length", "30"}) == 0);
    const auto sample = [](const std::string& text) { return text.substr(text.find("----")); };
    CHECK(sample(p.bytes("stdout")) == sample(said));
}

TEST_CASE("the demo trains both models on the same tokens, writes its report, and fails if the mixture is not the better one")
{
    const place p;
    const int status = run(p, words{"demo"} + p.tiny("demo"));
    const auto summary = nlohmann::json::parse(p.bytes("demo/summary.json"));
    const bool lower = summary["moe"]["val_loss"] < summary["dense"]["val_loss"];
    CHECK(summary.at("moe_val_loss_is_lower") == lower);
    CHECK(status == (lower ? 0 : 3));
    CHECK((p.bytes("stderr").find("is not lower than its dense twin's") != std::string::npos) == !lower);
    CHECK(summary.at("corpus_bytes").get<std::int64_t>() ==
          static_cast<std::int64_t>(p.bytes("text/a.txt").size() + p.bytes("text/b.txt").size()));
    CHECK(summary.at("tokens") == 12 * 3 * 16);
    CHECK(summary.at("seconds") > 0);
    CHECK(summary.at("expert_load_cv").size() == 2);
    for (const char* model : {"moe", "dense"}) {
        CHECK(summary.at(model).at("val_loss") > 0);
        CHECK(summary.at(model).at("val_loss") < 6);
        CHECK(summary.at(model).at("tokens_per_second") > 0);
    }
    // The twin lacks the routers but for one row each: layers * (E - 1) * D.
    CHECK(summary["moe"]["active_params"].get<int>() - summary["dense"]["active_params"].get<int>() == 2 * 3 * 16);
    CHECK(summary["moe"]["total_params"] > summary["dense"]["total_params"]);
    const auto moe = numbers(p.at("demo/moe/log.csv")), dense = numbers(p.at("demo/dense/log.csv"));
    REQUIRE(moe.size() == dense.size());
    for (std::size_t i = 0; i < moe.size(); ++i) CHECK(moe[i][1] == dense[i][1]);
    for (const char* plot : {"demo/loss.svg", "demo/load.svg"}) CHECK(p.bytes(plot).find("<svg") != std::string::npos);
    CHECK(p.bytes("stdout").find("validation loss") != std::string::npos);
    CHECK(p.bytes("stdout").find("share of choices per expert") != std::string::npos);
}
