// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The safetensors reader against files made by hand, good and hostile; the writer against a reading of its bytes that
/// shares no code with the library; and what a full disk, a second writer and a device leave behind.
#include <cmath>
#include <csignal>
#include <cstring>
#include <numeric>
#include <string>
#include <vector>

#include <doctest/doctest.h>

#include <sys/resource.h>

#include <nlohmann/json.hpp>

#include <fastmoe/exec/host_executor.hpp>
#include <fastmoe/gemm/quantize.hpp>
#include <fastmoe/io/safetensors.hpp>

#include "support/random.hpp"
#include "support/temporary_folder.hpp"

namespace {

namespace fm = fastmoe;
namespace io = fastmoe::io;
using support::temporary_folder;

/// The bytes of a file with this header and data; `length` replaces the true header length.
std::string file_of(const std::string& header, const std::string& data, std::uint64_t length)
{
    std::string out;
    for (int i = 0; i < 8; ++i) out += static_cast<char>(length >> 8 * i);
    return out + header + data;
}
std::string file_of(const std::string& header, const std::string& data = {})
{
    return file_of(header, data, header.size());
}

/// Parses bytes that lie in memory of exactly their size, so that the address sanitizer sees one read too far.
io::safetensors parse(const std::string& bytes, std::vector<std::byte>& memory)
{
    memory.resize(bytes.size());
    if (!bytes.empty()) std::memcpy(memory.data(), bytes.data(), bytes.size());
    memory.shrink_to_fit();
    return io::parse_safetensors(memory.data(), memory.size(), "some.safetensors");
}

/// The text of the format_error, or "none".
std::string refusal(const std::string& bytes)
{
    std::vector<std::byte> memory;
    try {
        parse(bytes, memory);
    } catch (const fm::format_error& e) {
        return e.what();
    }
    return "none";
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

/// A limit on the size of files, as a full disk is one; back to what it was at the end.
struct small_disk {
    rlimit before;
    explicit small_disk(rlim_t bytes)
    {
        std::signal(SIGXFSZ, SIG_IGN);
        getrlimit(RLIMIT_FSIZE, &before);
        const rlimit now{bytes, before.rlim_max};
        setrlimit(RLIMIT_FSIZE, &now);
    }
    ~small_disk() { setrlimit(RLIMIT_FSIZE, &before); }
};

io::safetensors one_tensor(const std::vector<float>& values)
{
    return {{{"x", io::as_safetensor(fm::as_vector(values))}}, {}};
}

} // namespace

TEST_CASE("A file made by hand gives its tensors and its metadata")
{
    temporary_folder folder;
    const float values[6] = {1, 2, 3, 4, 5, -6.5f};
    const std::int32_t ids[2] = {-1, 1 << 30};
    std::string data(reinterpret_cast<const char*>(values), sizeof values);
    data.append(reinterpret_cast<const char*>(ids), sizeof ids);
    support::write_file(folder / "a", file_of(R"({"__metadata__":{"k":"v","\u00e9":""},)"
                                              R"("w":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},)"
                                              R"("none":{"shape":[0,7],"data_offsets":[24,24],"dtype":"BF16"},)"
                                              R"("ids":{"dtype":"I32","shape":[2],"data_offsets":[24,32]}}   )",
                                              data));
    const io::safetensors_file file(folder / "a");
    CHECK(file.tensors().size() == 3);
    CHECK(file.metadata() == io::metadata_map{{"k", "v"}, {"\u00e9", ""}});
    const auto w = file.view<float>("w", 2, 3);
    CHECK(w(0, 0) == 1.0f);
    CHECK(w(1, 2) == -6.5f);
    const auto i = file.view<std::int32_t, 1>("ids");
    CHECK(i.extent(0) == 2);
    CHECK(i(1) == 1 << 30);
    CHECK(file.view<fm::bfloat16>("none", 0, 7).size() == 0);
    CHECK(file.contains("w"));
    CHECK_FALSE(file.contains("v"));
}

TEST_CASE("A tensor of another name, dtype, rank or shape is refused with both facts in the message")
{
    temporary_folder folder;
    const std::vector<float> values(6, 1.0f);
    io::write_safetensors(folder / "a", {{{"w", io::as_safetensor(fm::as_matrix(values, 2, 3))}}, {}});
    const io::safetensors_file file(folder / "a");
    const auto text = [&](auto f) { return message_of<fm::format_error>(f); };
    const std::string missing = text([&] { file.view<float>("v", 2, 3); });
    CHECK(contains(missing, folder / "a"));
    CHECK(contains(missing, "tensor 'v': is missing"));
    CHECK(contains(text([&] { file.view<float>("w", 3, 2); }),
                   "'w': is F32 of shape (2,3); expected F32 of shape (3,2)"));
    CHECK(contains(text([&] { file.view<float>("w", 6); }), "expected F32 of shape (6)"));
    CHECK(contains(text([&] { file.view<double, 2>("w"); }), "is F32 of shape (2,3); expected F64 of rank 2"));
    CHECK(contains(text([&] { file.view<float, 3>("w"); }), "expected F32 of rank 3"));
}

TEST_CASE("A tensor at an odd place of the file is read through an aligned pointer")
{
    temporary_folder folder;
    const double values[3] = {1.25, -2, 3e300};
    const std::string data = "!" + std::string(reinterpret_cast<const char*>(values), sizeof values);
    std::string header = R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
                         R"("b":{"dtype":"F64","shape":[3],"data_offsets":[1,25]}})";
    for (int pad = 0; pad < 8; ++pad, header += ' ') {
        support::write_file(folder / "a", file_of(header, data));
        const io::safetensors_file file(folder / "a");
        const auto b = file.view<double>("b", 3);
        CHECK(reinterpret_cast<std::uintptr_t>(b.data_handle()) % alignof(double) == 0);
        CHECK(std::vector<double>(b.data_handle(), b.data_handle() + 3) == std::vector<double>{1.25, -2, 3e300});
        CHECK(file.view<std::uint8_t>("a", 1)(0) == '!');
    }
}

TEST_CASE("Codes of eight bits beside their inverse scales, as checkpoints hold them, are an expert's weights as they lie")
{
    temporary_folder folder;
    std::string data(3 * 130, '\x38'); // 1.0
    data[0] = '\x7e', data[131] = '\xb8'; // 448 and -1
    const float scales[2] = {0.5f, 3.0f};
    data.append(reinterpret_cast<const char*>(scales), sizeof scales);
    support::write_file(folder / "a", file_of(R"({"w":{"dtype":"F8_E4M3","shape":[3,130],"data_offsets":[0,390]},)"
                                              R"("w_scale_inv":{"dtype":"F32","shape":[1,2],"data_offsets":[390,398]}})",
                                              data));
    const io::safetensors_file file(folder / "a");
    const auto codes = file.view<fm::float8_e4m3>("w", 3, 130);
    const fm::block_scaled_weights<const fm::float8_e4m3> w{fm::single(codes), file.view<float>("w_scale_inv", fm::scale_blocks(3), fm::scale_blocks(130)).data_handle()};
    std::vector<float> numbers(3 * 130);
    fm::host_executor ex;
    fm::dequantize_weights(ex, w, fm::single(fm::matrix_view<float>(numbers.data(), 3, 130)));
    CHECK(numbers[0] == 224.0f);
    CHECK(numbers[1] == 0.5f);
    CHECK(numbers[131] == -0.5f);
    CHECK(numbers[129] == 3.0f);
    CHECK(io::as_safetensor(codes).type == io::element_type::f8_e4m3);
}

TEST_CASE("What the writer leaves is the format, as a reader of another make finds it")
{
    FASTMOE_SEEDED(draw, 2201);
    temporary_folder folder;
    std::vector<double> doubles = draw.normals(7);
    std::vector<std::uint8_t> bytes{1, 2, 3};
    std::vector<fm::half> halves(10, fm::half(0.5f));
    std::vector<float> scalar{2.5f};
    const io::safetensors content{
        {{"bytes \"quoted\"\n", io::as_safetensor(fm::as_vector(bytes))},
         {"doubles", io::as_safetensor(fm::as_vector(doubles))},
         {"empty", {io::element_type::i64, {3, 0}, nullptr}},
         {"halves", io::as_safetensor(fm::as_matrix(halves, 2, 5))},
         {"scalar", {io::element_type::f32, {}, reinterpret_cast<std::byte*>(scalar.data())}}},
        {{"author", "\u00fcber"}, {"step", "7"}}};
    io::write_safetensors(folder / "a", content);
    CHECK(folder.entries() == 1);

    const std::string file = support::read_file(folder / "a");
    std::uint64_t length = 0;
    std::memcpy(&length, file.data(), 8);
    REQUIRE(8 + length <= file.size());
    CHECK((8 + length) % 64 == 0);
    const auto header = nlohmann::json::parse(file.substr(8, length));
    CHECK(header.size() == content.tensors.size() + 1);
    CHECK(header["__metadata__"] == nlohmann::json{{"author", "\u00fcber"}, {"step", "7"}});
    const std::string data = file.substr(8 + length);
    std::size_t covered = 0;
    for (const auto& [key, t] : content.tensors) {
        const std::string name = key; // clang 14 captures no structured binding
        INFO(name);
        const auto& entry = header[name];
        CHECK(entry["dtype"] == io::name_of(t.type));
        CHECK(entry["shape"] == t.shape);
        const std::size_t begin = entry["data_offsets"][0], end = entry["data_offsets"][1];
        REQUIRE(end <= data.size());
        REQUIRE(end - begin == static_cast<std::size_t>(t.bytes()));
        CHECK(begin % static_cast<std::size_t>(io::bytes_of(t.type)) == 0);
        if (end > begin) CHECK(std::memcmp(data.data() + begin, t.data, end - begin) == 0);
        covered += end - begin;
    }
    CHECK(covered == data.size());

    const io::safetensors_file again(folder / "a");
    CHECK(again.metadata() == content.metadata);
    CHECK(again.view<float>("scalar")() == 2.5f);
    CHECK(again.view<std::int64_t>("empty", 3, 0).size() == 0);
    CHECK(float(again.view<fm::half, 2>("halves")(1, 4)) == 0.5f);
}

TEST_CASE("A file without tensors and one without anything but an object are files")
{
    temporary_folder folder;
    io::write_safetensors(folder / "a", {});
    CHECK(io::safetensors_file(folder / "a").tensors().empty());
    std::vector<std::byte> memory;
    CHECK(parse(file_of("{}"), memory).tensors.empty());
    CHECK(parse(file_of(R"({"__metadata__":{}})"), memory).metadata.empty());
}

TEST_CASE("A hostile file is refused, and the message says what is wrong with which tensor")
{
    const std::string eight(8, '\0');
    const auto tensor = [](const std::string& name, const std::string& dtype, const std::string& shape,
                           const std::string& at) {
        return "\"" + name + R"(":{"dtype":")" + dtype + R"(","shape":)" + shape + R"(,"data_offsets":)" + at + "}";
    };
    const auto file = [&](const std::string& tensors) { return file_of("{" + tensors + "}", eight); };
    struct hostile {
        std::string bytes;
        const char* said;
    };
    const hostile all[] = {
        {"", "it has 0 bytes; expected at least 8"},
        {"1234567", "it has 7 bytes; expected at least 8"},
        {file_of("{}", "", 3), "header length is 3; expected at most 2"},
        {file_of("{}", "", ~std::uint64_t{0}), "header length is 18446744073709551615"},
        {file_of("{}", "", std::uint64_t{1} << 63), "header length is 9223372036854775808"},
        {file_of("", "", 0), "does not begin with '{'"},
        {file_of(" {}"), "does not begin with '{'"},
        {file_of("[]"), "does not begin with '{'"},
        {file_of("{"), "not valid JSON in UTF-8"},
        {file_of("{} x"), "not valid JSON in UTF-8"},
        {file_of("{}{}"), "not valid JSON in UTF-8"},
        {file_of(std::string("{}\0{", 4)), "the header holds a zero byte"},
        {file_of("{\"\xff\":{}}"), "not valid JSON in UTF-8"},
        {file_of("{\"\xc0\xaf\":{}}"), "not valid JSON in UTF-8"},
        {file_of("{\"\xed\xa0\x80\":{}}"), "not valid JSON in UTF-8"},
        {file_of("{\"\\ud800\":{}}"), "not valid JSON in UTF-8"},
        {file_of("{\"a\":1e999}"), "not valid JSON in UTF-8"},
        {file_of("{'a':1}"), "not valid JSON in UTF-8"},
        {file_of("{}", "1"), "1 bytes of data; expected 0"},
        {file_of(R"({"a":1})"), "'a': has a number; expected an object with dtype"},
        {file_of(R"({"a":[]})"), "'a': has an array; expected an object with dtype"},
        {file_of(R"({"a":null})"), "'a': has null"},
        {file_of(R"({"a":true})"), "'a': has true or false"},
        {file_of(R"({"a":"F32"})"), "'a': has a string"},
        {file_of(R"({"a":{}})"), "'a': lacks dtype, shape or data_offsets"},
        {file_of(R"({"a":{"dtype":"F32","shape":[2]}})"), "'a': lacks dtype, shape or data_offsets"},
        {file_of(R"({"a":{"dtype":32}})"), "'a': has a number; expected a string as dtype"},
        {file_of(R"({"a":{"dtype":"F32","dtype":"F32"}})"), "'a': 'dtype' stands twice"},
        {file_of(R"({"a":{"more":0}})"), "'a': 'more' is no field of a tensor"},
        {file_of(R"({"a":{"shape":{}}})"), "'a': has an object; expected an array as shape"},
        {file_of(R"({"a":{"shape":[[1]]}})"), "'a': has an array; expected an extent"},
        {file_of(R"({"a":{"shape":["1"]}})"), "'a': has a string; expected an extent"},
        {file_of(R"({"a":{"data_offsets":[0,1,2]}})"), "'a': has a third number"},
        {file_of(R"({"a":{"data_offsets":[0]}})"), "'a': data_offsets does not hold two numbers"},
        {file_of(R"({"__metadata__":[]})"), "'__metadata__': has an array; expected an object of strings"},
        {file_of(R"({"__metadata__":{"a":1}})"), "'__metadata__': has a number; expected a string"},
        {file_of(R"({"__metadata__":{"a":{}}})"), "'__metadata__': has an object; expected a string"},
        {file_of(R"({"__metadata__":{"a":"1","a":"2"}})"), "the key 'a' stands twice"},
        {file_of(R"({"__metadata__":{},"__metadata__":{}})"), "'__metadata__': stands twice"},
        {file(tensor("a", "F31", "[2]", "[0,8]")), "'a': dtype is 'F31'"},
        {file(tensor("a", "F32", "[-2]", "[0,8]")), "'a': has a negative number; expected an extent"},
        {file(tensor("a", "F32", "[2.0]", "[0,8]")), "'a': has a fraction"},
        {file(tensor("a", "F32", "[18446744073709551616]", "[0,8]")), "beyond 64 bits"},
        {file(tensor("a", "F32", "[9223372036854775808]", "[0,8]")), "'a': has a number beyond 63 bits"},
        {file(tensor("a", "F32", "[2]", "[0,-8]")), "'a': has a negative number; expected an offset"},
        {file(tensor("a", "F32", "[4611686018427387904,4]", "[0,8]")),
         "'a': shape (4611686018427387904,4) holds more bytes"},
        {file(tensor("a", "U8", "[4294967296,4294967296,4294967296]", "[0,8]")),
         "holds more bytes than 63 bits can count"},
        {file(tensor("a", "U8", "[4294967296,4294967296,0]", "[0,8]")), "holds more bytes than 63 bits can count"},
        {file(tensor("a", "F32", "[3]", "[0,8]")),
         "'a': data_offsets are [0,8]; expected 12 bytes for F32 of shape (3)"},
        {file(tensor("a", "BF16", "[2]", "[0,8]")), "expected 4 bytes for BF16 of shape (2)"},
        {file(tensor("a", "F32", "[3]", "[0,12]")),
         "'a': data_offsets are [0,12]; expected a range inside of the 8 bytes"},
        {file(tensor("a", "F32", "[2]", "[8,0]")), "'a': data_offsets are [8,0]; expected a range"},
        {file(tensor("a", "F32", "[2]", "[18446744073709551608,0]")), "expected a range inside of the 8 bytes"},
        {file(tensor("a", "F32", "[1]", "[0,4]")), "8 bytes of data; expected 4"},
        {file(tensor("a", "F32", "[1]", "[4,8]")), "'a': its data begins at 4; expected 0"},
        {file(tensor("a", "F32", "[2]", "[0,8]") + "," + tensor("b", "F32", "[1]", "[4,8]")),
         "'b': its data begins at 4; expected 8"},
        {file(tensor("a", "F32", "[2]", "[0,8]") + "," + tensor("b", "F32", "[2]", "[0,8]")),
         "its data begins at 0; expected 8"},
        {file(tensor("a", "U8", "[3]", "[0,3]") + "," + tensor("b", "U8", "[3]", "[5,8]")),
         "'b': its data begins at 5; expected 3"},
        {file(tensor("a", "U8", "[0]", "[2,2]") + "," + tensor("b", "F32", "[2]", "[0,8]")),
         "'a': its data begins at 2; expected 8"},
        {file(tensor("a", "U8", "[4]", "[0,4]") + "," + tensor("a", "U8", "[4]", "[4,8]")), "'a': stands twice"},
    };
    for (const hostile& h : all) {
        INFO(h.bytes);
        const std::string text = refusal(h.bytes);
        CHECK_MESSAGE(contains(text, h.said), text);
        CHECK(contains(text, "some.safetensors"));
    }
}

TEST_CASE("Brackets without end, a name without end and a header beyond the format's limit stay cheap")
{
    CHECK(contains(refusal(file_of("{\"a\":" + std::string(5'000'000, '['))), "has an array"));
    std::string objects = "{";
    for (int i = 0; i < 500'000; ++i) objects += "\"a\":{";
    CHECK(contains(refusal(file_of(objects)), "'a' is no field"));
    // The message quotes no more than a person reads, and no control character.
    const std::string text = refusal(file_of("{\"\\u001b[2J" + std::string(1'000'000, 'n') + "\":1}"));
    CHECK(contains(text, "'?[2Jnnn"));
    CHECK(text.size() < 400);
    CHECK(contains(refusal(file_of(R"({"a":{"dtype":"U8","shape":[)" + std::string(1'000'000, '1') + "]}}")), "'a'"));
    std::string many = "1";
    for (int i = 0; i < 200'000; ++i) many += ",1";
    CHECK(contains(refusal(file_of(R"({"a":{"dtype":"U8","shape":[)" + many + R"(],"data_offsets":[0,2]}})", "12")),
                   "expected 1 bytes for U8 of shape (1,1,1,1,1,1,1,1,...)"));
    CHECK(contains(refusal(file_of(std::string(100'000'001, ' '))), "expected at most 100000000"));
}

TEST_CASE("Whatever is changed in a file, it is read or refused, and nothing outside of it is touched")
{
    FASTMOE_SEEDED(draw, 2202);
    const std::string data(48, 'd');
    const std::string good =
        file_of(R"({"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},)"
                R"("b.weight":{"dtype":"BF16","shape":[4],"data_offsets":[24,32]},)"
                R"("c":{"dtype":"U8","shape":[2,4,2],"data_offsets":[32,48]}} )",
                data);
    const std::string words[] = {"{",    "}",
                                 "[",    "]",
                                 ",",    ":",
                                 "\"",   "-1",
                                 "0",    "24",
                                 "48",   "18446744073709551615",
                                 "1e9",  "null",
                                 "true", "\\u0000",
                                 "\xff", "\"shape\":",
                                 "F64",  "a",
                                 "\\",   "9223372036854775807"};
    int read = 0, refused = 0;
    for (int round = 0; round < 20000; ++round) {
        INFO("round ", round);
        std::string bytes = good;
        for (auto changes = draw.integer(1, 4); changes > 0 && !bytes.empty(); --changes) {
            const auto at = static_cast<std::size_t>(draw.integer(0, std::ssize(bytes) - 1));
            const auto some = static_cast<std::size_t>(draw.integer(1, 12));
            switch (draw.integer(0, 6)) {
            case 0:
                bytes[at] = static_cast<char>(draw.integer(0, 255));
                break;
            case 1:
                bytes[at] = static_cast<char>(bytes[at] ^ 1 << draw.integer(0, 7));
                break;
            case 2:
                bytes.insert(at, words[draw.integer(0, std::ssize(words) - 1)]);
                break;
            case 3:
                bytes.erase(at, some);
                break;
            case 4:
                bytes.resize(at + 1);
                break;
            case 5:
                bytes.insert(at, bytes.substr(at, some));
                break;
            default:
                bytes[static_cast<std::size_t>(draw.integer(0, std::min<std::int64_t>(7, std::ssize(bytes) - 1)))] ^= 3;
            }
            if (draw.coin() && bytes.size() >= 8) { // keep the length true, to get past the first check
                const std::uint64_t length = bytes.size() - 8 < 48 ? 0 : bytes.size() - 8 - 48;
                std::memcpy(bytes.data(), &length, 8);
            }
        }
        std::vector<std::byte> memory;
        try {
            const auto content = parse(bytes, memory);
            ++read;
            for (const auto& [name, t] : content.tensors) {
                REQUIRE(t.bytes() >= 0);
                REQUIRE(t.data >= memory.data());
                REQUIRE(t.data + t.bytes() <= memory.data() + memory.size());
            }
        } catch (const fm::format_error&) {
            ++refused;
        }
    }
    CHECK(read > 100);
    CHECK(refused > 10000);
}

TEST_CASE("Every prefix of a file is refused as truncated or corrupt")
{
    temporary_folder folder;
    const std::vector<float> values(20, 3.0f);
    io::write_safetensors(folder / "a", one_tensor(values));
    const std::string whole = support::read_file(folder / "a");
    CHECK(refusal(whole) == "none");
    for (std::size_t n = 0; n < whole.size(); ++n) {
        INFO(n);
        CHECK(refusal(whole.substr(0, n)) != "none");
    }
}

TEST_CASE("A path that is missing, a folder, a device or a pipe is refused without waiting")
{
    temporary_folder folder;
    REQUIRE(::mkfifo((folder / "pipe").c_str(), 0600) == 0);
    for (const std::string& path : {folder / "none", folder.path(), std::string("/dev/zero"), folder / "pipe"}) {
        const std::string text = message_of<fm::invalid_argument>([&] { io::safetensors_file file(path); });
        CHECK_MESSAGE(contains(text, "'" + path + "'"), text);
    }
    support::write_file(folder / "empty", "");
    CHECK(
        contains(message_of<fm::format_error>([&] { io::safetensors_file file(folder / "empty"); }), "it has 0 bytes"));
}

TEST_CASE("A full disk gives an error that says so, leaves the older file whole and nothing beside it")
{
    temporary_folder folder;
    const std::vector<float> older(100, 1.0f), newer(100000, 2.0f);
    io::write_safetensors(folder / "a", one_tensor(older));
    const std::string before = support::read_file(folder / "a");
    std::string text;
    {
        small_disk full(64 << 10);
        text =
            message_of<fm::error>([&] { io::write_safetensors(folder / "a", one_tensor(newer), folder / "previous"); });
    }
    CHECK(contains(text, "cannot write '" + folder / "a" + "': File too large; what stood there is unchanged"));
    CHECK(support::read_file(folder / "a") == before);
    CHECK(folder.entries() == 1);
    io::write_safetensors(folder / "a", one_tensor(newer));
    CHECK(io::safetensors_file(folder / "a").view<float, 1>("x").extent(0) == 100000);
}

TEST_CASE("The file that stood at the path is kept under the other name if one is given")
{
    temporary_folder folder;
    const auto write = [&](float v) {
        const std::vector<float> values{v};
        io::write_safetensors(folder / "a", one_tensor(values), folder / "b");
    };
    const auto value = [&](const char* name) { return io::safetensors_file(folder / name).view<float>("x", 1)(0); };
    write(1);
    CHECK(folder.entries() == 1);
    for (int i = 2; i < 5; ++i) {
        write(static_cast<float>(i));
        CHECK(value("a") == static_cast<float>(i));
        CHECK(value("b") == static_cast<float>(i - 1));
        CHECK(folder.entries() == 2);
    }
}

TEST_CASE("A view of a file stays what it was when the file is written again")
{
    temporary_folder folder;
    const std::vector<float> one(5000, 1.0f), two(7, 2.0f);
    io::write_safetensors(folder / "a", one_tensor(one));
    const io::safetensors_file file(folder / "a");
    const auto x = file.view<float>("x", 5000);
    io::write_safetensors(folder / "a", one_tensor(two));
    CHECK(std::accumulate(x.data_handle(), x.data_handle() + 5000, 0.0f) == 5000.0f);
    CHECK(io::safetensors_file(folder / "a").view<float>("x", 7)(6) == 2.0f);
}

TEST_CASE(
    "The writer refuses a device, a folder, a missing folder and a second writer, and overwrites what a kill left")
{
    temporary_folder folder;
    const std::vector<float> values(3, 1.0f);
    const auto refused = [&](const std::string& path) {
        return message_of<fm::error>([&] { io::write_safetensors(path, one_tensor(values)); });
    };
    CHECK(contains(refused("/dev/full"), "'/dev/full', a folder or a device"));
    CHECK(contains(refused(folder.path()), "a folder or a device"));
    CHECK(contains(refused(folder / "no/such"), "No such file or directory"));
    CHECK(folder.entries() == 0);
    {
        io::replace_file other(folder / "a");
        other.write("abc", 3);
        CHECK(contains(refused(folder / "a"), "another process is writing it now"));
        other.commit();
    }
    CHECK(support::read_file(folder / "a") == "abc");
    support::write_file(folder / "a.partial", std::string(10000, 'x'));
    CHECK(refused(folder / "a") == "none");
    CHECK(io::safetensors_file(folder / "a").view<float>("x", 3)(2) == 1.0f);
    CHECK(folder.entries() == 1);
    {
        io::replace_file given_up(folder / "a");
    }
    CHECK(io::safetensors_file(folder / "a").tensors().size() == 1);
    CHECK(folder.entries() == 1);
}

TEST_CASE("The writer refuses names and metadata that the format cannot hold")
{
    temporary_folder folder;
    const std::vector<float> values(1, 1.0f);
    const auto x = io::as_safetensor(fm::as_vector(values));
    const auto refused = [&](const io::safetensors& content) {
        return message_of<fm::invalid_argument>([&] { io::write_safetensors(folder / "a", content); });
    };
    CHECK(contains(refused({{{"\xff", x}}, {}}), "expected UTF-8"));
    CHECK(contains(refused({{{"x", x}}, {{"k", "\xc3"}}}), "expected UTF-8"));
    CHECK(contains(refused({{{"__metadata__", x}}, {}}), "the format reserves it"));
    CHECK(folder.entries() == 0);
}
