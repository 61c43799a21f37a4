// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The text of the training program: what is read, how it is split, and which windows a step sees.
#include <algorithm>
#include <filesystem>
#include <map>
#include <set>
#include <string>
#include <vector>

#include <doctest/doctest.h>

#include "support/random.hpp"
#include "support/temporary_folder.hpp"
#include "train_gpt/corpus.hpp"

namespace {

namespace fm = fastmoe;
using namespace train_gpt;
using support::temporary_folder;
using support::write_file;

/// Text of a length that says which file it is from.
std::string text_of(support::random& draw, int file, std::int64_t length)
{
    std::string out = "file " + std::to_string(file) + ": ";
    while (std::ssize(out) < length) out += static_cast<char>(draw.integer('a', 'z'));
    out.resize(static_cast<std::size_t>(length));
    return out;
}

/// The texts of a part: what stands before each zero byte.
std::vector<std::string> texts(const std::vector<std::uint8_t>& part)
{
    std::vector<std::string> out;
    for (auto begin = part.begin(); begin != part.end();) {
        const auto end = std::find(begin, part.end(), 0);
        REQUIRE(end != part.end());
        out.emplace_back(begin, end);
        begin = end + 1;
    }
    return out;
}

template <class F>
std::string refusal(F f)
{
    try {
        f();
    } catch (const fm::invalid_argument& e) {
        return e.what();
    }
    return "none";
}

bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

/// Text whose every position can be told from its value: a counter in bytes that are never zero.
corpus counted(std::int64_t train, std::int64_t validation)
{
    corpus out;
    out.path = "counted";
    for (std::int64_t i = 0; i < train; ++i) out.train.push_back(static_cast<std::uint8_t>(1 + i % 255));
    for (std::int64_t i = 0; i < validation; ++i) out.validation.push_back(static_cast<std::uint8_t>(1 + i % 255));
    return out;
}

/// Text that tells its place: even places hold the low digit of place / 2 in base 127, odd ones the high digit.
corpus addressed(std::int64_t length)
{
    corpus out = counted(0, 1000);
    for (std::int64_t i = 0; i < length; ++i)
        out.train.push_back(static_cast<std::uint8_t>(i % 2 ? 128 + i / 2 / 127 : 1 + i / 2 % 127));
    return out;
}

/// Where in that text a window of three or more bytes begins.
std::int64_t address_of(const std::vector<std::int32_t>& window)
{
    const bool odd = window[0] >= 128;
    return 2 * (127 * (window[1 + odd] - 128) + window[odd] - 1) - odd;
}

struct batch_buffer {
    std::vector<std::int32_t> data;
    fm::matrix_view<std::int32_t> view;
    batch_buffer(std::int64_t rows, std::int64_t context)
        : data(static_cast<std::size_t>(rows * (context + 1)), -1), view(data.data(), rows, context + 1)
    {}
};

} // namespace

TEST_CASE("Every text file is in exactly one part, whole, and about a tenth of the bytes validates")
{
    FASTMOE_SEEDED(draw, 2401);
    for (int round = 0; round < 20; ++round) {
        INFO("round ", round);
        temporary_folder folder;
        std::multiset<std::string> all;
        std::int64_t bytes = 0;
        const auto files = draw.integer(2, 60);
        for (int i = 0; i < files; ++i) {
            const std::string text = text_of(draw, i, draw.integer(20, 3000));
            const std::string sub = draw.coin() ? "" : draw.coin() ? "sub/" : "sub/deeper/";
            write_file(folder / (sub + std::to_string(i)), text);
            all.insert(text);
            bytes += std::ssize(text);
        }
        const corpus c = read_corpus(folder.path());
        const auto train = texts(c.train), validation = texts(c.validation);
        CHECK(c.files == files);
        CHECK(c.bytes == bytes);
        CHECK_FALSE(train.empty());
        CHECK_FALSE(validation.empty());
        std::multiset<std::string> both(train.begin(), train.end());
        both.insert(validation.begin(), validation.end());
        CHECK(both == all);
        if (files > 40) {
            CHECK(std::ssize(c.validation) < bytes / 10 + 60);
            CHECK(std::ssize(c.validation) > bytes / 20);
        }
    }
}

TEST_CASE("The same files give the same corpus wherever the folder is, and another byte gives another fingerprint")
{
    FASTMOE_SEEDED(draw, 2402);
    temporary_folder one, other;
    for (int i = 0; i < 30; ++i) {
        const std::string text = text_of(draw, i, 500);
        write_file(one / ("d/" + std::to_string(i)), text);
        write_file(other / ("d/" + std::to_string(29 - i)), text); // written in another order, below
    }
    for (int i = 0; i < 30; ++i)
        write_file(other / ("d/" + std::to_string(i)), support::read_file(one / ("d/" + std::to_string(i))));
    const corpus a = read_corpus(one.path()), b = read_corpus(other.path() + "/");
    CHECK(a.train == b.train);
    CHECK(a.validation == b.validation);
    CHECK(a.fingerprint == b.fingerprint);
    std::string text = support::read_file(one / "d/7");
    text[3] ^= 1;
    write_file(one / "d/7", text);
    CHECK(read_corpus(one.path()).fingerprint != b.fingerprint);
}

TEST_CASE("A single file is split by place: its last tenth validates")
{
    temporary_folder folder;
    std::string text;
    for (int i = 0; i < 1000; ++i) text += static_cast<char>('a' + i % 26);
    write_file(folder / "one.txt", text);
    for (const std::string& path : {folder / "one.txt", folder.path()}) {
        const corpus c = read_corpus(path);
        CHECK(texts(c.train) == std::vector{text.substr(0, 900)});
        CHECK(texts(c.validation) == std::vector{text.substr(900)});
        CHECK(c.bytes == 1000);
    }
    const corpus capped = read_corpus(folder / "one.txt", 500);
    CHECK(texts(capped.train) == std::vector{text.substr(0, 450)});
    CHECK(texts(capped.validation) == std::vector{text.substr(450, 50)});
}

TEST_CASE("Binary, empty, hidden and copied files are left out, and a link that goes in a circle ends")
{
    temporary_folder folder;
    write_file(folder / "a.txt", "the first text, with \xc3\xbc\n");
    write_file(folder / "b.txt", "the second text\twith a tab\r\n\f");
    write_file(folder / "copy.txt", "the first text, with \xc3\xbc\n");
    write_file(folder / "zero.bin", std::string("text with a zero byte \0 in it", 29));
    write_file(folder / "control.bin", "\x01\x02\x03\x04 text");
    write_file(folder / "empty", "");
    write_file(folder / ".hidden", "hidden text");
    write_file(folder / ".git/config", "text in a hidden folder");
    std::filesystem::create_directory_symlink(folder.path(), folder / "circle");
    const corpus c = read_corpus(folder.path());
    CHECK(c.files == 2);
    auto all = texts(c.train);
    for (const auto& t : texts(c.validation)) all.push_back(t);
    std::sort(all.begin(), all.end());
    CHECK(all == std::vector<std::string>{"the first text, with \xc3\xbc\n", "the second text\twith a tab\r\n\f"});
}

TEST_CASE("A cap takes exactly so many bytes, from files that are drawn and not only from the first by name")
{
    FASTMOE_SEEDED(draw, 2403);
    temporary_folder folder;
    for (int i = 0; i < 40; ++i) write_file(folder / std::to_string(100 + i), text_of(draw, i, 1000));
    const corpus c = read_corpus(folder.path(), 10500);
    CHECK(c.bytes == 10500);
    CHECK(c.files == 11);
    bool late = false;
    for (const auto& t : texts(c.train)) late = late || std::stoi(t.substr(5)) >= 20;
    CHECK(late);
    CHECK(read_corpus(folder.path(), 10500).fingerprint == c.fingerprint);
    CHECK(read_corpus(folder.path(), 1 << 30).bytes == 40000);
}

TEST_CASE("A path that holds no text is refused by its name")
{
    temporary_folder folder;
    CHECK(contains(refusal([&] { read_corpus(folder / "none"); }), "'" + folder / "none" + "', which does not exist"));
    CHECK(contains(refusal([&] { read_corpus(folder.path()); }), "which holds no text"));
    CHECK(contains(refusal([&] { read_corpus(""); }), "--text is empty"));
    CHECK(contains(refusal([&] { read_corpus("/dev/zero"); }), "which is a device or a pipe"));
    write_file(folder / "zero", std::string(100, '\0'));
    CHECK(contains(refusal([&] { read_corpus(folder / "zero"); }), "which holds no text"));
    CHECK(contains(refusal([&] { read_corpus(folder.path(), -1); }), "max_bytes is -1"));
    // The superuser reads what nobody may.
    write_file(folder / "secret", "text");
    std::filesystem::permissions(folder / "secret", std::filesystem::perms::none);
    if (::access((folder / "secret").c_str(), R_OK) != 0)
        CHECK(contains(refusal([&] { read_corpus(folder / "secret"); }), "which cannot be read"));
}

TEST_CASE("Text that is shorter than a window is refused with both lengths, and one window is enough")
{
    const corpus c = counted(33, 17);
    CHECK(contains(refusal([&] { batch_source(c, 1, 33, 0); }),
                   "33 bytes for training; expected more than the context of 33"));
    CHECK(contains(refusal([&] { batch_source(c, 1, 17, 0); }),
                   "17 bytes for validation; expected more than the context of 17"));
    CHECK(contains(refusal([&] { batch_source(c, 0, 8, 0); }), "batch is 0"));
    CHECK(contains(refusal([&] { batch_source(c, 1, 0, 0); }), "context is 0"));
    const corpus tight = counted(17, 17);
    const batch_source source(tight, 3, 16, 5);
    CHECK(source.epoch() == 1);
    batch_buffer b(3, 16);
    source.training(1000, b.view);
    for (int i = 0; i < 3; ++i)
        for (int j = 0; j <= 16; ++j) CHECK(b.view(i, j) == 1 + j);
    CHECK(source.validation_windows() == 1);
    batch_buffer v(1, 16);
    source.validation(0, 1, v.view);
    CHECK(v.view(0, 16) == 17);
    CHECK_THROWS_AS(source.training(0, v.view), const fm::invalid_argument&);
    CHECK_THROWS_AS(source.validation(1, 1, v.view), const fm::invalid_argument&);
    CHECK_THROWS_AS(source.validation(0, 2, v.view), const fm::invalid_argument&);
}

TEST_CASE("A step's batch depends on the seed and the step alone")
{
    const corpus c = counted(200000, 1000);
    const batch_source source(c, 4, 32, 7), again(c, 4, 32, 7), other(c, 4, 32, 8), halved(c, 2, 32, 7);
    std::vector<batch_buffer> ahead(50, batch_buffer(4, 32));
    for (int step = 0; step < 50; ++step) {
        ahead[step].view = fm::matrix_view<std::int32_t>(ahead[step].data.data(), 4, 33);
        source.training(step, ahead[step].view);
    }
    int same_as_other = 0;
    for (int step = 49; step >= 0; --step) {
        batch_buffer b(4, 32), o(4, 32), h(2, 32);
        again.training(step, b.view);
        CHECK(b.data == ahead[step].data);
        other.training(step, o.view);
        same_as_other += o.data == b.data;
        // Windows are numbered through: half the batch at twice the step begins at the same one.
        halved.training(2 * step, h.view);
        CHECK(std::equal(h.data.begin(), h.data.end(), b.data.begin()));
    }
    CHECK(same_as_other == 0);
    CHECK(source.position(49) == 196);
}

TEST_CASE("An epoch predicts each byte of its stretch once, and the next one in another order at another place")
{
    FASTMOE_SEEDED(draw, 2404);
    for (int round = 0; round < 30; ++round) {
        INFO("round ", round);
        const auto context = draw.integer(1, 40);
        const auto length = draw.integer(context + 1, 3000);
        corpus c = counted(length, 100);
        // Two bytes a position would be needed to tell all apart; so mark one position a time by its own value.
        const batch_source source(c, 1, context, draw.bits());
        const auto epoch = source.epoch();
        CHECK(epoch >= 1);
        CHECK(epoch >= (length - context) / context);
        batch_buffer b(1, context);
        for (int e = 0; e < 2; ++e) {
            const auto marked = draw.integer(0, length - 1);
            const auto kept = std::exchange(c.train[static_cast<std::size_t>(marked)], std::uint8_t{0});
            int seen = 0;
            for (std::int64_t n = e * epoch; n < (e + 1) * epoch; ++n) {
                source.training(n, b.view);
                for (std::int64_t j = 1; j <= context; ++j) seen += b.view(0, j) == 0;
            }
            c.train[static_cast<std::size_t>(marked)] = kept;
            CHECK(seen <= 1);
            if (marked >= 2 * context && marked < length - 2 * context) CHECK(seen == 1);
        }
    }
}

TEST_CASE("Within an epoch the windows share a phase and come in no order; the next epoch has another order and phase")
{
    const std::int64_t context = 20;
    const corpus c = addressed(30000);
    const batch_source source(c, 1, context, 3);
    batch_buffer b(1, context);
    std::set<std::int64_t> phases, first_starts;
    for (int e = 0; e < 8; ++e) {
        std::set<std::int64_t> starts;
        std::int64_t before = -1, in_order = 0;
        for (std::int64_t n = 0; n < source.epoch(); ++n) {
            source.training(e * source.epoch() + n, b.view);
            const std::int64_t start = address_of(b.data);
            if (n == 0) first_starts.insert(start / context);
            starts.insert(start);
            in_order += start == before + context;
            before = start;
            for (int j = 0; j <= context; ++j) REQUIRE(b.view(0, j) == c.train[static_cast<std::size_t>(start + j)]);
        }
        CHECK(std::ssize(starts) == source.epoch());
        CHECK(*starts.rbegin() - *starts.begin() == (source.epoch() - 1) * context);
        CHECK(in_order < source.epoch() / 20);
        phases.insert(*starts.begin());
    }
    CHECK(phases.size() >= 5);
    CHECK(first_starts.size() >= 6);
}

TEST_CASE("The validation windows are fixed, spread from the first byte to the last, and do not overlap")
{
    corpus c = counted(1000, 0);
    for (int i = 0; i < 5000; ++i) c.validation.push_back(static_cast<std::uint8_t>(i % 251 + 1));
    const batch_source source(c, 4, 64, 1), other(c, 9, 64, 2);
    CHECK(source.validation_windows() == 78);
    for (const std::int64_t windows : {1, 2, 7, 78}) {
        batch_buffer all(windows, 64), pieces(windows, 64);
        source.validation(0, windows, all.view);
        for (std::int64_t i = 0; i < windows; ++i) other.validation(i, windows, fm::slice_rows(pieces.view, i, 1));
        CHECK(all.data == pieces.data);
        CHECK(all.view(0, 0) == c.validation.front());
        if (windows > 1) CHECK(all.view(windows - 1, 64) == c.validation.back());
    }
    // Each target is predicted at most once: give every position its own mark in turn.
    for (int marked = 0; marked < 5000; marked += 13) {
        const auto kept = std::exchange(c.validation[static_cast<std::size_t>(marked)], std::uint8_t{0});
        batch_buffer all(78, 64);
        source.validation(0, 78, all.view);
        int seen = 0;
        for (int i = 0; i < 78; ++i)
            for (int j = 1; j <= 64; ++j) seen += all.view(i, j) == 0;
        CHECK(seen <= 1);
        c.validation[static_cast<std::size_t>(marked)] = kept;
    }
}

TEST_CASE("The default text is the C++ standard library of this compiler, and it makes a corpus")
{
    const std::string path = default_text_path();
    REQUIRE_FALSE(path.empty());
    CHECK(std::filesystem::exists(path + "/vector"));
#if defined(_GLIBCXX_RELEASE)
    CHECK(contains(path, std::to_string(_GLIBCXX_RELEASE)));
#endif
    const corpus c = read_corpus(path, 500000);
    CHECK(c.bytes == 500000);
    CHECK(std::ssize(c.train) > 400000);
    CHECK(std::ssize(c.validation) > 25000);
}
