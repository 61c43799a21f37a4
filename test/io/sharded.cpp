// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Checkpoints of R ranks, loaded by R' of them; what is damaged is refused, whatever byte it is.
#include <sys/stat.h>

#include <algorithm>
#include <filesystem>
#include <string>
#include <vector>

#include <doctest/doctest.h>

#include "sharded_scene.hpp"
#include "support/scratch.hpp"
#include "support/temporary_folder.hpp"

namespace {

namespace fm = fastmoe;
namespace io = fastmoe::io;
using fm::int64_t;
using support::has;

/// The text of the error of a type that f throws; another error is told from none.
template <class Error, class F>
std::string refusal(F f)
{
    try {
        f();
    } catch (const Error& e) {
        return e.what();
    } catch (const std::exception& e) {
        return std::string("another error: ") + e.what();
    }
    return "none";
}

std::vector<std::string> files_in(const support::temporary_folder& folder)
{
    std::vector<std::string> out;
    for (const auto& file : std::filesystem::directory_iterator(folder.path())) out.push_back(file.path().string());
    std::sort(out.begin(), out.end());
    return out;
}

std::vector<float> numbers(int64_t n, float first)
{
    std::vector<float> out;
    for (int64_t i = 0; i < n; ++i) out.push_back(first + static_cast<float>(i));
    return out;
}

} // namespace

TEST_CASE("what R ranks saved, any R' load to the bit, whatever the placements, whole or in slices, with all moments")
{
    FASTMOE_SEEDED(rng, 531);
    for (int ranks : {1, 2, 4})
        for (int cuts : {1, 2, 4}) {
            if (ranks % cuts != 0) continue;
            const support::temporary_folder folder;
            const std::string path = folder / "checkpoint";
            scene::save(path, scene::placement(rng, ranks, cuts), 7);
            CHECK(folder.entries() <= ranks + 1); // a rank without experts writes nothing
            for (int others : {1, 2, 3, 4, 8})
                for (int other_cuts : {1, 2, 4}) {
                    if (others % other_cuts != 0) continue;
                    INFO("ranks ", ranks, " / ", cuts, " -> ", others, " / ", other_cuts);
                    int64_t generation = 0;
                    CHECK_EQ(scene::load(path, scene::placement(rng, others, other_cuts), generation), 0);
                    CHECK_EQ(generation, 7);
                }
            io::sharded_checkpoint from(path);
            CHECK_EQ(from.ranks(), ranks);
            from.verify();
        }
}

TEST_CASE("the next save replaces the parts of the one before, and removes what crashed ones have left, but nothing else")
{
    FASTMOE_SEEDED(rng, 532);
    const support::temporary_folder folder;
    const std::string path = folder / "run.fm";
    const auto keep = [&](const std::string& name) { support::write_file(folder / name, "mine"); return folder / name; };
    const std::vector<std::string> others{keep("run.fm.part"),       keep("run.fm.1.part"),      keep("run.fm.x.0.part"),
                                          keep("run.fm.1.2.3.part"), keep("run.fmx.1.0.part"),   keep("run.fm.01.0.part"),
                                          keep("other.1.0.part"),    keep("run.fm.-1.0.part"), keep("run.fm.1.0.parts")};
    keep("run.fm.5.0.part");
    keep("run.fm.5.1.part.partial");
    keep("run.fm.99999999999.7.part");
    scene::save(path, scene::placement(rng, 3, 1), 1);
    CHECK(!std::filesystem::exists(folder / "run.fm.5.0.part"));
    CHECK(!std::filesystem::exists(folder / "run.fm.5.1.part.partial"));
    CHECK(!std::filesystem::exists(folder / "run.fm.99999999999.7.part"));
    for (const std::string& file : others) CHECK_EQ(support::read_file(file), "mine");
    std::vector<std::string> first = files_in(folder);
    for (int ranks : {4, 2, 1}) {
        keep("run.fm.6.0.part");
        scene::save(path, scene::placement(rng, ranks, 1), 10 + ranks);
        const auto now = files_in(folder);
        CHECK(now.size() <= others.size() + 1 + static_cast<std::size_t>(ranks));
        for (const std::string& file : now) // no part is overwritten: all are new
            if (file.find(".part") != std::string::npos && std::count(others.begin(), others.end(), file) == 0)
                CHECK(std::count(first.begin(), first.end(), file) == 0);
        first = now;
        int64_t generation = 0;
        CHECK_EQ(scene::load(path, scene::placement(rng, 3, 1), generation), 0);
        CHECK_EQ(generation, 10 + ranks);
    }
}

TEST_CASE("a link to a manifest is as good as its name, for a save and for a load, and parts lie beside the manifest")
{
    FASTMOE_SEEDED(rng, 533);
    const support::temporary_folder folder;
    std::filesystem::create_directory(folder / "run5");
    const std::string path = folder / "run5/model", link = folder / "latest";
    scene::save(path, scene::placement(rng, 3, 1), 1);
    std::filesystem::create_symlink("run5/model", link);
    const auto generation_at = [&](const std::string& name) {
        int64_t generation = 0;
        CHECK_EQ(scene::load(name, scene::placement(rng, 2, 1), generation), 0);
        return generation;
    };
    CHECK_EQ(generation_at(link), 1);
    scene::save(link, scene::placement(rng, 2, 1), 2);
    CHECK(std::filesystem::is_symlink(link));
    CHECK_EQ(generation_at(path), 2);
    CHECK_EQ(generation_at(link), 2);
    for (const std::string& file : files_in(folder)) CHECK(file.find(".part") == std::string::npos);

    support::write_file(folder / "run5/model.9223372036854775807.0.part", "no number follows this one");
    scene::save(path, scene::placement(rng, 1, 1), 3);
    CHECK_EQ(generation_at(link), 3);
}

TEST_CASE("replicas write nothing, two writers of one expert are an error on all, and so are slices with a hole")
{
    const support::temporary_folder folder;
    std::string path = folder / "c";
    const auto save = [&](auto entries_of, auto role_of) {
        std::vector<std::string> said(4);
        fm::run_ranks(4, [&](const fm::threads& c) {
            fm::host_executor ex({.threads = 1});
            auto values = numbers(12, 100.f * float(c.rank() % 2));
            std::vector<int32_t> ids{c.rank() % 2, 2 + c.rank() % 2};
            said[c.rank()] = refusal<fm::error>([&] {
                io::save_sharded_checkpoint(ex, path, entries_of(c.rank(), values, ids), c, {.role = role_of(c.rank())});
            });
        });
        return said;
    };
    const auto plain = [](int, std::vector<float>& v, std::vector<int32_t>& ids) {
        return std::vector{io::expert_entry("w", fm::tensor_view<float, 3>(v.data(), 2, 2, 3), fm::as_vector(ids))};
    };
    const auto second_is_replica = [](int rank) { return rank < 2 ? io::checkpoint_role::writer : io::checkpoint_role::replica; };
    for (const std::string& text : save(plain, second_is_replica)) CHECK_EQ(text, "none");
    CHECK_EQ(folder.entries(), 3);
    const auto by_entry = [&](int rank, std::vector<float>& v, std::vector<int32_t>& ids) {
        auto entries = plain(rank, v, ids);
        if (rank < 2) entries[0].role = io::checkpoint_role::replica;
        return entries;
    };
    for (const std::string& text : save(by_entry, [](int) { return io::checkpoint_role::writer; })) CHECK_EQ(text, "none");
    CHECK_EQ(folder.entries(), 4); // rank 0 has an empty part, ranks 2 and 3 the tensors
    const auto before = files_in(folder);
    for (const std::string& text : save(plain, [](int) { return io::checkpoint_role::writer; }))
        CHECK_MESSAGE(has(text, "tensor 'w.0' is of ranks 0 and 2; expected one writer"), text);

    // Expert 1 of "w" has no writer: ranks 1 and 3 both leave it to each other.
    const auto second_of = [](int rank) { return rank == 0 ? io::checkpoint_role::writer : io::checkpoint_role::replica; };
    for (const std::string& text : save(plain, second_of))
        CHECK_MESSAGE(has(text, "entry is 'w.1', a replica; expected a rank that writes it"), text);
    const auto slices_of_others = [](int rank, std::vector<float>& v, std::vector<int32_t>& ids) {
        ids = {0, 10}; // whose names are alike
        return std::vector{io::expert_entry("w", fm::tensor_view<float, 3>(v.data(), 2, 2, 3), fm::as_vector(ids),
                                            {.axis = 0, .begin = rank % 2 * 2, .total = 4})};
    };
    path = folder / "sliced";
    for (const std::string& text : save(slices_of_others, second_is_replica)) CHECK_EQ(text, "none");
    CHECK_EQ(io::sharded_checkpoint(path).names().size(), 4); // two slices of each
    path = folder / "c";

    const auto holes = [](int rank, std::vector<float>& v, std::vector<int32_t>& ids) {
        ids = {0, 1};
        return std::vector{io::expert_entry("w", fm::tensor_view<float, 3>(v.data(), 2, 2, 3), fm::as_vector(ids),
                                            {.axis = 0, .begin = rank == 3 ? 7 : 2 * rank, .total = 9})};
    };
    for (const std::string& text : save(holes, [](int) { return io::checkpoint_role::writer; }))
        CHECK_MESSAGE(has(text, "expected one that begins at 6"), text);

    const auto steps = [&] {
        std::vector<std::string> said(3);
        fm::run_ranks(3, [&](const fm::threads& c) {
            fm::host_executor ex({.threads = 1});
            said[c.rank()] = refusal<fm::error>(
                [&] { io::save_sharded_checkpoint(ex, path, {}, c, {.step = c.rank() == 1 ? 4 : 5}); });
        });
        return said;
    }();
    for (const std::string& text : steps) CHECK_MESSAGE(has(text, "options.step of rank 1 is 4; expected 5"), text);

    // The checkpoint that stood there is whole.
    io::sharded_checkpoint from(path);
    from.verify();
    CHECK(from.names() == std::vector<std::string>{"w.0", "w.1", "w.2", "w.3"});
    std::vector<float> three(6);
    const int32_t id[] = {3};
    from.load({io::expert_entry("w", fm::tensor_view<float, 3>(three.data(), 1, 2, 3), fm::vector_view<const int32_t>(id, 1))});
    CHECK(three == numbers(6, 106.f));
    for (const std::string& file : before) CHECK(std::filesystem::exists(file));
}

TEST_CASE("parts are no more public than the manifest beside which they are written")
{
    const support::temporary_folder folder;
    const std::string path = folder / "c";
    FASTMOE_SEEDED(rng, 91);
    scene::save(path, scene::placement(rng, 3, 2), 1);
    for (const int mode : {0600, 0640}) {
        REQUIRE(::chmod(path.c_str(), static_cast<mode_t>(mode)) == 0);
        scene::save(path, scene::placement(rng, 3, 2), 2);
        CHECK(files_in(folder).size() > 2);
        for (const std::string& file : files_in(folder)) {
            struct stat there{};
            REQUIRE(::stat(file.c_str(), &there) == 0);
            CHECK_MESSAGE((there.st_mode & 0777) == static_cast<mode_t>(mode), file);
        }
    }
}

TEST_CASE("an entry that makes no sense is refused on its rank, told to the others, and nothing is written")
{
    const support::temporary_folder folder;
    std::vector<float> v(12);
    const int32_t ids[] = {4, 0};
    const fm::vector_view<const int32_t> two(ids, 2);
    const auto good = io::expert_entry("w", fm::tensor_view<float, 3>(v.data(), 2, 2, 3), two);
    const auto says = [&](auto spoil, const char* part) {
        std::vector<std::string> said(3);
        fm::run_ranks(3, [&](const fm::threads& c) {
            fm::host_executor ex({.threads = 1});
            std::vector<io::checkpoint_entry> entries;
            if (c.rank() == 1) {
                entries.push_back(good);
                spoil(entries);
            }
            const auto save = [&] { io::save_sharded_checkpoint(ex, folder / "c", entries, c); };
            said[c.rank()] = c.rank() == 1 ? refusal<fm::invalid_argument>(save) : refusal<fm::error>(save);
        });
        for (const std::string& text : said) CHECK_MESSAGE(has(text, part), text);
        CHECK_MESSAGE(has(said[2], "rank 1 failed"), said[2]);
    };
    using list = std::vector<io::checkpoint_entry>;
    says([](list& e) { e[0].name = "w]"; }, "a name that does not end in ']'");
    says([](list& e) { e[0].name = ""; }, "a name that does not end in ']'");
    says([](list& e) { e[0].type = io::element_type::count_; }, "of type 17");
    says([](list& e) { e[0].shape = {2, -1}; }, "extents of 0 or more");
    says([](list& e) { e[0].shape = {2, INT64_MAX}; }, "63 bits");
    says([](list& e) { e[0].shape = {3, 2, 3}; }, "a leading axis of its 2 experts");
    says([](list& e) { e[0].data = nullptr; }, "a null pointer; expected 48 bytes");
    says([](list& e) { e[0].experts[1] = -1; }, "of expert -1");
    says([](list& e) { e[0].experts[1] = 4; }, "for the second time");
    says([](list& e) { e.push_back(e[0]); }, "for the second time");
    says([](list& e) { e[0].slice = {2, 0, 9}; }, "along axis 2");
    says([](list& e) { e[0].slice = {0, 8, 9}; }, "cut from 8 on, 2 long; expected a range inside of 9");
    says([](list& e) { e[0].slice = {0, 0, -2}; }, "expected a range inside of -2");
    says([](list& e) { e[0].name = "\xff"; }, "expected UTF-8");
    CHECK_EQ(folder.entries(), 0);
    float* apart[] = {v.data(), v.data() + 6};
    CHECK(has(refusal<fm::invalid_argument>([&] {
                  io::expert_entry("w", fm::separate(fm::vector_view<float* const>(apart, 2), 2, 3), two);
              }),
              "matrices held apart or with gaps"));
    CHECK(io::expert_entry("w", fm::stacked_transposed(fm::tensor_view<float, 3>(v.data(), 2, 2, 3)), two).shape ==
          std::vector<int64_t>{2, 2, 3}); // as it lies in memory
}

TEST_CASE("what is not in the checkpoint, or is of another type or shape, is refused by name, and nothing is loaded")
{
    const support::temporary_folder folder;
    const std::string path = folder / "c";
    fm::host_executor ex({.threads = 1});
    std::vector<float> gate = numbers(4, 1), w = numbers(12, 50);
    const int32_t ids[] = {0, 7};
    const fm::vector_view<const int32_t> two(ids, 2);
    io::save_sharded_checkpoint(ex, path,
                                {io::replicated_entry("gate", fm::as_vector(gate)),
                                 io::expert_entry("w", fm::tensor_view<float, 3>(w.data(), 2, 2, 3), two),
                                 io::expert_entry("a[1", fm::tensor_view<float, 2>(w.data(), 2, 6), two)},
                                fm::self{});
    const auto says = [&](const io::checkpoint_entry& e, const char* part) {
        std::vector<float> first(4, -1.f);
        io::sharded_checkpoint from(path);
        const std::string text =
            refusal<fm::format_error>([&] { from.load({io::replicated_entry("gate", fm::as_vector(first)), e}); });
        CHECK_MESSAGE(has(text, part), text);
        CHECK_MESSAGE(has(text, folder.path().c_str()), text);
        CHECK(first == std::vector<float>(4, -1.f));
    };
    std::vector<float> room(100);
    std::vector<double> wide(100);
    const auto of = [&](const char* name, std::vector<int64_t> shape, std::vector<int32_t> experts, io::expert_slice slice = {}) {
        auto e = io::expert_entry(name, fm::as_matrix(room, 1, 100), fm::vector_view<const int32_t>(ids, 1), slice);
        e.shape = shape, e.experts = experts;
        return e;
    };
    says(of("w", {2, 2, 3}, {0, 1}), "tensor 'w.1': is missing");
    says(of("v", {1, 2, 3}, {0}), "tensor 'v.0': is missing");
    says(of("a", {1, 6}, {0}), "tensor 'a.0': is missing");
    says(io::replicated_entry("a", fm::as_vector(room)), "tensor 'a': is missing");
    says(of("w", {1, 3, 2}, {7}), "tensor 'w.7': is F32 of shape (2,3); expected F32, of (3,2) in all");
    says(of("w", {1, 2}, {7}), "expected F32, of (2) in all");
    says(of("w", {1, 1, 3}, {7}, {0, 0, 3}), "expected F32, of (3,3) in all");
    auto typed = io::expert_entry("w", fm::tensor_view<double, 3>(wide.data(), 1, 2, 3), fm::vector_view<const int32_t>(ids, 1));
    says(typed, "is F32 of shape (2,3); expected F64");
    const std::vector<float> constant(4);
    io::sharded_checkpoint from(path);
    CHECK(has(refusal<fm::invalid_argument>([&] { from.load({io::replicated_entry("gate", fm::as_vector(constant))}); }),
              "which is const"));
    std::vector<float> slice(3);
    from.load({io::expert_entry("w", fm::tensor_view<float, 3>(slice.data(), 1, 1, 3), fm::vector_view<const int32_t>(ids + 1, 1),
                                {0, 1, 2})});
    CHECK(slice == numbers(3, 59));
    CHECK(has(refusal<fm::invalid_argument>([&] { io::sharded_checkpoint(folder / "none"); }), "No such file"));
}

TEST_CASE("a byte that changed, a file that is short, long, missing or of another save is a format_error, wherever it is")
{
    FASTMOE_SEEDED(rng, 533);
    const support::temporary_folder folder;
    const std::string path = folder / "c";
    const std::vector<scene::holding> ranks{{{3, 0, 1, 5, 4, 2}, 0, 5}, {{3, 0, 1, 5, 4, 2}, 5, scene::hidden}};
    scene::save(path, ranks, 3);
    std::vector<std::string> files = files_in(folder);
    std::vector<std::string> old;
    for (const std::string& file : files) old.push_back(support::read_file(file));
    REQUIRE(files.size() == 3);
    const auto read = [&] {
        return refusal<fm::format_error>([&] {
            io::sharded_checkpoint from(path);
            from.verify();
            int64_t generation = 0;
            CHECK_EQ(scene::load(path, ranks, generation), 0); // if nothing was said, all is right
        });
    };
    CHECK_EQ(read(), "none");
    for (std::size_t f = 0; f < files.size(); ++f) {
        const std::string whole = old[f];
        int64_t harmless = 0;
        const std::size_t step = whole.size() / 600 + 1;
        for (std::size_t i = 0; i < whole.size(); i += step) {
            std::string bad = whole;
            bad[i] = static_cast<char>(bad[i] ^ (1 << rng.integer(0, 7)));
            support::write_file(files[f], bad);
            const std::string text = read();
            CHECK_MESSAGE(!has(text, "another error"), text);
            harmless += text == "none";
            if (text != "none") CHECK_MESSAGE(has(text, files[f].c_str()), text);
        }
        // Spaces that fill a header mean nothing; a checksum of a part's header is not read, since the manifest has it.
        CHECK(harmless < static_cast<int64_t>(whole.size() / step) / 5);
        for (std::size_t n : {std::size_t{0}, std::size_t{7}, std::size_t{8}, whole.size() / 2, whole.size() - 1, whole.size() + 1}) {
            std::string bad = whole;
            bad.resize(n);
            support::write_file(files[f], bad);
            const std::string text = read();
            CHECK_MESSAGE(has(text, files[f].c_str()), text);
            CHECK_MESSAGE(!has(text, "another error"), text);
        }
        std::filesystem::remove(files[f]);
        if (files[f] != path) CHECK_MESSAGE(has(read(), "is missing"), read());
        support::write_file(files[f], whole);
    }
    CHECK_EQ(read(), "none");
    // Parts in each other's place have the right names, and are still seen.
    support::write_file(files[1], old[2]);
    support::write_file(files[2], old[1]);
    CHECK_MESSAGE(has(read(), files[1].c_str()), read());
}

TEST_CASE("a manifest with a good checksum and bad content is a format_error that says what was expected")
{
    const support::temporary_folder folder;
    const std::string path = folder / "c";
    fm::host_executor ex({.threads = 1});
    std::vector<float> w = numbers(12, 50);
    const int32_t ids[] = {0, 1};
    io::save_sharded_checkpoint(ex, path,
                                {io::expert_entry("w", fm::tensor_view<float, 3>(w.data(), 2, 2, 3), fm::vector_view<const int32_t>(ids, 2))},
                                fm::self{}, {.step = 9});
    const io::metadata_map pairs = io::safetensors_file(path).metadata();
    const auto says = [&](auto spoil, const std::string& part) {
        io::safetensors bad{{}, pairs};
        spoil(bad);
        bad.metadata["checksum"] = io::detail::hex_text(io::detail::checksum_of_pairs(bad.metadata));
        io::write_safetensors(path, bad);
        std::vector<float> room(6);
        const std::string text = refusal<fm::format_error>([&] {
            io::sharded_checkpoint from(path);
            from.verify();
            from.load({io::expert_entry("w", fm::tensor_view<float, 3>(room.data(), 1, 2, 3), fm::vector_view<const int32_t>(ids, 1))});
        });
        CHECK_MESSAGE(has(text, part.c_str()), text);
    };
    using content = io::safetensors;
    const float x = 1;
    const std::string sum(16, '0'), any = "0 " + sum;
    says([&](content& c) { c.tensors["x"] = io::as_safetensor(fm::tensor_view<const float, 0>(&x)); }, "expected no tensor in a manifest");
    says([](content& c) { c.metadata["format"] = "else"; }, "'format' is 'else'; expected 'fastmoe sharded checkpoint'");
    says([](content& c) { c.metadata["version"] = "2"; }, "'version' is '2'; expected '1'");
    says([](content& c) { c.metadata.erase("text"); }, "lacks 'text'");
    says([](content& c) { c.metadata["more"] = ""; }, "pairs that no manifest has");
    for (const char* number : {"", "-1", "+1", " 1", "1 ", "01", "0x1", "1.0", "9223372036854775808"})
        says([&](content& c) { c.metadata["step"] = number; }, std::string("'step' is '") + number + "'; expected a whole number");
    says([](content& c) { c.metadata["ranks"] = "0"; }, "no rank below 0");
    says([](content& c) { c.metadata["part/../0"] = "1"; }, "is no rank below 1");
    says([](content& c) { c.metadata["part/0"] = "7"; }, "expected 7 bytes, by the manifest");
    says([](content& c) { c.metadata["save"] = "1"; }, "c.1.0.part': is missing");
    for (const std::string& place : {std::string(), std::string("0"), "1 " + sum, "0 " + sum + "0", std::string("0 0"), "-0 " + sum, any + " "})
        says([&](content& c) { c.metadata["tensor/w.0"] = place; }, "tensor 'w.0': its place is '" + place + "'");
    says([&](content& c) { c.metadata["tensor/w.0"] = any; }, "its checksum is not that of the manifest");
    says([&](content& c) { c.metadata["tensor/v"] = any; }, "tensor 'v': is missing");
    for (const char* range : {"[]", "[0:0:1]", "[0:0:1:2:3]", "[0:0:-1:2]", "[a:0:1:2]", "[0:0:1:]", "[0::1:2]"})
        says([&](content& c) { c.metadata.erase("tensor/w.0"), c.metadata[std::string("tensor/w.0") + range] = any; }, "w.0");
    const auto slices = [&](std::vector<const char*> ranges, const char* part) {
        io::detail::manifest m;
        for (const char* range : ranges) m.tensors[std::string("w.0") + range];
        const std::string text = refusal<fm::format_error>([&] { io::detail::pieces_of(m, "w.0", path); });
        CHECK_MESSAGE(has(text, part), text);
    };
    slices({"[0:0:2:4]", "[0:2:4:4]"}, "none");
    slices({"[0:0:10:10]", "[0:10:10:10]"}, "none");
    slices({"[0:2:10:10]", "[0:0:2:10]"}, "none"); // not in the order of their names
    slices({""}, "none");
    slices({"[0:0:2:4]"}, "its slices end at 2; expected 4");
    slices({"[0:1:4:4]"}, "expected one that begins at 0");
    slices({"[0:0:2:4]", "[0:1:4:4]"}, "expected one that begins at 2");
    slices({"[0:0:2:4]", "[1:2:4:4]"}, "expected one that begins at 2");
    slices({"[0:0:2:4]", "[0:2:5:5]"}, "expected one that begins at 2");
    slices({"", "[0:0:4:4]"}, "overlap");
    slices({"[0:0:x:4]"}, "no [axis:begin:end:total]");
    slices({"[0:0:2]"}, "no [axis:begin:end:total]");
    slices({"[0:0:2:4:5]"}, "no [axis:begin:end:total]");
    slices({"[0:0:02:4]"}, "no [axis:begin:end:total]");
    slices({}, "is missing");
}
