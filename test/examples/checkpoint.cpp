// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Checkpoints of the training program: what comes back, what is refused, and what a kill or a full disk leaves.
#include <csignal>
#include <cstring>
#include <string>
#include <vector>

#include <doctest/doctest.h>

#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include "support/random.hpp"
#include "support/temporary_folder.hpp"
#include "train_gpt/checkpoint.hpp"

namespace {

namespace fm = fastmoe;
using namespace train_gpt;
using support::temporary_folder;

/// A small run whose every number follows from its step, so that a checkpoint tells whether it is of one piece.
struct run {
    std::vector<float> weight = std::vector<float>(300000);
    std::vector<float> moment = std::vector<float>(300000);
    std::vector<fm::bfloat16> half = std::vector<fm::bfloat16>(1000);
    run_state state;

    std::vector<named_tensor> tensors()
    {
        return {named("weight", fm::as_matrix(weight, 300, 1000)), named("weight/m", fm::as_matrix(moment, 300, 1000)),
                named("half", fm::as_vector(half))};
    }

    void set(std::int64_t step)
    {
        for (std::size_t i = 0; i < weight.size(); ++i) {
            weight[i] = static_cast<float>(step) + static_cast<float>(i) * 0x1p-20f;
            moment[i] = -weight[i];
        }
        for (auto& h : half) h = fm::bfloat16(static_cast<float>(step % 128));
        state = {step, step * 8, 17, 99, R"({"width":128,"text":"\u00fc \"quoted\""})"};
    }

    bool same(const run& other) const
    {
        return state == other.state && weight == other.weight && moment == other.moment &&
               std::memcmp(half.data(), other.half.data(), half.size() * sizeof half[0]) == 0;
    }
};

run loaded(const std::string& path)
{
    run out;
    const checkpoint file(path);
    file.load(out.tensors());
    out.state = file.state();
    return out;
}

run at_step(std::int64_t step)
{
    run out;
    out.set(step);
    return out;
}

template <class Error, class F>
std::string message_of(F f)
{
    try {
        f();
    } catch (const Error& e) {
        return e.what();
    }
    return "none";
}

bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

} // namespace

TEST_CASE("A checkpoint gives back every bit and the state that was saved, and the one before it stays")
{
    temporary_folder folder;
    const std::string path = folder / "run.safetensors";
    run r = at_step(5);
    save_checkpoint(path, r.tensors(), r.state);
    CHECK(loaded(path).same(r));
    run later = at_step(6);
    save_checkpoint(path, later.tensors(), later.state);
    CHECK(loaded(path).same(later));
    CHECK(previous_checkpoint(path) == folder / "run.previous.safetensors");
    CHECK(loaded(previous_checkpoint(path)).same(r));
    CHECK(folder.entries() == 2);
}

TEST_CASE("The name of the previous checkpoint keeps the extension of the file, not one of a folder")
{
    CHECK(previous_checkpoint("a.safetensors") == "a.previous.safetensors");
    CHECK(previous_checkpoint("x.y/a") == "x.y/a.previous");
    CHECK(previous_checkpoint("x.y/a.b.c") == "x.y/a.b.previous.c");
    CHECK(previous_checkpoint("x/.hidden") == "x/.hidden.previous");
}

TEST_CASE("NaN, infinities and the largest seeds come back as they were")
{
    temporary_folder folder;
    std::vector<float> odd{NAN, INFINITY, -0.0f, 1e-45f};
    std::vector<std::uint64_t> words{~std::uint64_t{0}};
    const run_state state{INT64_MAX, 0, ~std::uint64_t{0}, ~std::uint64_t{0} - 1, ""};
    save_checkpoint(folder / "a", {named("odd", fm::as_vector(odd)), named("words", fm::as_vector(words))}, state);
    const checkpoint file(folder / "a");
    CHECK(file.state() == state);
    std::vector<float> back(4, 7.0f);
    std::vector<std::uint64_t> back_words(1);
    file.load({named("words", fm::as_vector(back_words)), named("odd", fm::as_vector(back))});
    CHECK(std::memcmp(back.data(), odd.data(), sizeof(float) * 4) == 0);
    CHECK(back_words == words);
}

TEST_CASE("A checkpoint of another model is refused by the name of the tensor, and nothing is written into the model")
{
    temporary_folder folder;
    const std::string path = folder / "a";
    run r = at_step(3);
    save_checkpoint(path, r.tensors(), r.state);
    const checkpoint file(path);
    run into = at_step(0);
    const run untouched = into;
    const auto refused = [&](std::vector<named_tensor> tensors) {
        const std::string text = message_of<fm::format_error>([&] { file.load(tensors); });
        CHECK(into.same(untouched));
        CHECK(contains(text, path));
        return text;
    };
    auto tensors = into.tensors();
    tensors[2].shape = {500, 2};
    CHECK(contains(refused(tensors), "tensor 'half' is BF16 of shape (1000); expected BF16 of shape (500,2)"));
    tensors = into.tensors();
    tensors[2].type = fm::io::element_type::f16;
    CHECK(contains(refused(tensors), "tensor 'half' is BF16 of shape (1000); expected F16 of shape (1000)"));
    tensors = into.tensors();
    tensors[2].name = "whole";
    CHECK(contains(refused(tensors), "tensor 'whole': is missing"));
    tensors = into.tensors();
    tensors.pop_back();
    CHECK(contains(refused(tensors), "tensor 'half' is not in this model"));
    CHECK_THROWS_AS(save_checkpoint(path, {into.tensors()[0], into.tensors()[0]}, {}), const fm::invalid_argument&);
}

TEST_CASE("A truncated checkpoint is refused at every length, and the message names the whole one before it")
{
    FASTMOE_SEEDED(draw, 2301);
    temporary_folder folder;
    const std::string path = folder / "run.safetensors";
    run r = at_step(1);
    save_checkpoint(path, r.tensors(), r.state);
    const std::string whole = support::read_file(path);
    support::write_file(path, whole.substr(0, whole.size() / 2));
    CHECK(contains(message_of<fm::format_error>([&] { checkpoint file(path); }),
                   "there is no whole checkpoint before it"));
    support::write_file(previous_checkpoint(path), whole);
    for (int i = 0; i < 200; ++i) {
        const auto length =
            static_cast<std::size_t>(i < 100 ? draw.integer(0, 900) : draw.integer(0, std::ssize(whole) - 1));
        INFO(length);
        support::write_file(path, whole.substr(0, length));
        const std::string text = message_of<fm::format_error>([&] { checkpoint file(path); });
        CHECK(contains(text, path));
        CHECK(contains(text, "whole (step 1): resume from '" + previous_checkpoint(path) + "'"));
    }
    CHECK(contains(message_of<fm::invalid_argument>([&] { checkpoint file(folder / "none"); }), "No such file"));
}

TEST_CASE("One changed bit anywhere in a checkpoint is found, in its header and in its numbers")
{
    FASTMOE_SEEDED(draw, 2302);
    temporary_folder folder;
    std::vector<float> values(50, 1.5f);
    std::vector<std::uint8_t> tail{1, 2, 3};
    save_checkpoint(folder / "a", {named("v", fm::as_vector(values)), named("t", fm::as_vector(tail))},
                    {12, 96, 3, 4, "{}"});
    const std::string whole = support::read_file(folder / "a");
    const std::size_t closing = whole.rfind('}', 8 + *reinterpret_cast<const std::uint64_t*>(whole.data()) - 1);
    int found = 0;
    for (std::size_t bit = 0; bit < whole.size() * 8; ++bit) {
        std::string bytes = whole;
        bytes[bit / 8] = static_cast<char>(bytes[bit / 8] ^ 1 << bit % 8);
        support::write_file(folder / "b", bytes);
        const bool refused = message_of<fm::format_error>([&] { checkpoint file(folder / "b"); }) != "none";
        found += refused;
        // Blanks behind the header's object mean nothing: a blank that became another kind of blank may pass.
        const bool padding =
            bit / 8 > closing && whole[bit / 8] == ' ' && bit / 8 < whole.size() - sizeof(float) * 50 - 3;
        if (!padding) CHECK_MESSAGE(refused, "bit ", bit % 8, " of byte ", bit / 8);
    }
    CHECK(found > static_cast<int>(whole.size()) * 7);
}

TEST_CASE("A safetensors file of another kind and a checkpoint of another version are told apart from a corrupt one")
{
    temporary_folder folder;
    fm::io::write_safetensors(folder / "a", {{}, {{"format", "pt"}}});
    CHECK(contains(message_of<fm::format_error>([&] { checkpoint file(folder / "a"); }),
                   "no checkpoint of this program"));
    fm::io::write_safetensors(folder / "a", {});
    CHECK(
        contains(message_of<fm::format_error>([&] { checkpoint file(folder / "a"); }), "__metadata__ lacks 'format'"));
    fm::io::write_safetensors(folder / "a", {{}, {{"format", "train_gpt"}, {"version", "2"}}});
    CHECK(contains(message_of<fm::format_error>([&] { checkpoint file(folder / "a"); }), "version is 2; expected 1"));
    fm::io::write_safetensors(folder / "a", {{}, {{"format", "train_gpt"}, {"version", "1x"}}});
    CHECK(
        contains(message_of<fm::format_error>([&] { checkpoint file(folder / "a"); }), "'version' is no whole number"));
}

TEST_CASE("A full disk leaves both checkpoints as they were and says why")
{
    temporary_folder folder;
    const std::string path = folder / "run.safetensors";
    for (int step = 1; step <= 2; ++step) {
        run r = at_step(step);
        save_checkpoint(path, r.tensors(), r.state);
    }
    std::signal(SIGXFSZ, SIG_IGN);
    rlimit before;
    getrlimit(RLIMIT_FSIZE, &before);
    std::string text;
    for (const rlim_t bytes : {0, 4, 100, 4096, 1 << 20, 2402000}) {
        const rlimit now{bytes, before.rlim_max};
        setrlimit(RLIMIT_FSIZE, &now);
        run r = at_step(3);
        text = message_of<fm::error>([&] { save_checkpoint(path, r.tensors(), r.state); });
        setrlimit(RLIMIT_FSIZE, &before);
        INFO(bytes);
        CHECK(contains(text, "cannot write '" + path + "': File too large"));
        CHECK(loaded(path).same(at_step(2)));
        CHECK(loaded(previous_checkpoint(path)).same(at_step(1)));
        CHECK(folder.entries() == 2);
    }
}

TEST_CASE("A process killed at any moment of writing leaves a whole checkpoint, a hundred times out of a hundred")
{
    FASTMOE_SEEDED(draw, 2303);
    temporary_folder folder;
    const std::string path = folder / "run.safetensors";
    run first = at_step(1);
    save_checkpoint(path, first.tensors(), first.state);
    std::int64_t reached = 1;
    int in_the_middle = 0;
    for (int kill = 0; kill < 100; ++kill) {
        INFO("kill ", kill);
        int ready[2];
        REQUIRE(::pipe(ready) == 0);
        const pid_t child = ::fork();
        REQUIRE(child >= 0);
        if (child == 0) {
            run r;
            for (std::int64_t step = reached + 1;; ++step) {
                r.set(step);
                if (step == reached + 1 && ::write(ready[1], "!", 1) != 1) ::_exit(1);
                save_checkpoint(path, r.tensors(), r.state);
            }
        }
        char go;
        REQUIRE(::read(ready[0], &go, 1) == 1);
        ::usleep(static_cast<useconds_t>(draw.integer(0, 8000)));
        REQUIRE(::kill(child, SIGKILL) == 0);
        int status = 0;
        REQUIRE(::waitpid(child, &status, 0) == child);
        REQUIRE(WIFSIGNALED(status)); // it had not failed by itself
        ::close(ready[0]);
        ::close(ready[1]);

        const run found = loaded(path);
        CHECK(found.state.step >= reached);
        REQUIRE(found.same(at_step(found.state.step)));
        const std::string previous = previous_checkpoint(path);
        if (::access(previous.c_str(), F_OK) == 0) {
            const run older = loaded(previous);
            CHECK(older.state.step <= found.state.step);
            REQUIRE(older.same(at_step(older.state.step)));
        }
        in_the_middle += ::access((path + ".partial").c_str(), F_OK) == 0;
        reached = found.state.step;
    }
    CHECK(in_the_middle >= 5); // or the kills would prove little
    CHECK(reached > 1);
    run last = at_step(reached + 1);
    save_checkpoint(path, last.tensors(), last.state);
    CHECK(loaded(path).same(last));
    CHECK(folder.entries() == 2);
}
