// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The safetensors reader under libFuzzer. Any bytes are read or refused with format_error; what is read is what a JSON
/// parser of another make finds in the header, lies inside of the file, is the same through a mapped file, and comes back
/// from what the writer would make of it. Metadata is read as the manifest of a sharded checkpoint too, which is refused with
/// format_error or comes back from what would be written of it.
///
/// The target builds it with clang++ (FASTMOE_BUILD_FUZZERS); a test runs it over the corpus with any compiler.
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <string_view>

#include <sys/mman.h>
#include <unistd.h>

#include <nlohmann/json.hpp>

#include <fastmoe/io/checkpoint_manifest.hpp>
#include <fastmoe/io/safetensors.hpp>

namespace {

namespace fm = fastmoe;
namespace io = fastmoe::io;

#define REQUIRE(...)                                                                                                  \
    do {                                                                                                              \
        if (!(__VA_ARGS__)) {                                                                                         \
            std::fprintf(stderr, "%s:%d: does not hold: %s\n", __FILE__, __LINE__, #__VA_ARGS__);                     \
            std::abort();                                                                                             \
        }                                                                                                             \
    } while (false)

/// Adds up bytes so that the sanitizer sees every one of them read.
std::uint64_t touch(const io::safetensor& t)
{
    std::uint64_t sum = 0;
    for (std::int64_t i = 0; i < t.bytes(); ++i) sum += static_cast<std::uint64_t>(t.data[i]);
    return sum;
}

std::int64_t size_of_type(std::string_view name)
{
    if (name == "F64" || name == "I64" || name == "U64" || name == "C64") return 8;
    if (name == "F32" || name == "I32" || name == "U32") return 4;
    if (name == "F16" || name == "BF16" || name == "I16" || name == "U16") return 2;
    return 1;
}

/// The content against the header as a tree, and against the size of the file.
void check_against_tree(const io::safetensors& content, const std::byte* data, std::size_t size)
{
    std::uint64_t length = 0;
    for (int i = 0; i < 8; ++i) length |= static_cast<std::uint64_t>(data[i]) << 8 * i;
    REQUIRE(length <= size - 8);
    const char* text = reinterpret_cast<const char*>(data) + 8;
    const auto tree = nlohmann::json::parse(text, text + length);
    const std::byte* begin = data + 8 + length;
    const bool has_metadata = tree.contains("__metadata__");
    REQUIRE(tree.size() == content.tensors.size() + has_metadata);
    REQUIRE(content.metadata.size() == (has_metadata ? tree["__metadata__"].size() : 0));
    for (const auto& [key, value] : content.metadata) REQUIRE(tree["__metadata__"].at(key) == value);
    std::uint64_t covered = 0;
    for (const auto& [name, t] : content.tensors) {
        const auto& entry = tree.at(name);
        const std::string type = entry.at("dtype");
        const std::uint64_t first = entry.at("data_offsets").at(0), last = entry.at("data_offsets").at(1);
        REQUIRE(type == io::name_of(t.type));
        REQUIRE(entry.at("shape") == t.shape);
        REQUIRE(io::bytes_of(t.type) == size_of_type(type));
        REQUIRE(t.bytes() >= 0);
        REQUIRE(last - first == static_cast<std::uint64_t>(t.bytes()));
        REQUIRE(t.data == begin + first);
        covered += last - first;
    }
    REQUIRE(covered == size - 8 - length); // without overlap, as the places also have to follow each other
}

bool same(const io::safetensor& a, const io::safetensor& b)
{
    const auto bytes = static_cast<std::size_t>(a.bytes());
    return a.type == b.type && a.shape == b.shape && (bytes == 0 || std::memcmp(a.data, b.data, bytes) == 0);
}

bool same(const io::safetensor_map& a, const io::safetensor_map& b)
{
    if (a.size() != b.size()) return false;
    for (const auto& [name, t] : a) {
        const auto other = b.find(name);
        if (other == b.end() || !same(t, other->second)) return false;
    }
    return true;
}

/// The content after the way through the writer's header and back.
void check_rewritten(const io::safetensors& content)
{
    const std::string header = io::detail::header_text(content);
    std::string bytes;
    for (int i = 0; i < 8; ++i) bytes += static_cast<char>(header.size() >> 8 * i);
    bytes += header;
    for (int width = 8; width > 0; width /= 2)
        for (const auto& [name, t] : content.tensors)
            if (io::bytes_of(t.type) == width)
                bytes.append(reinterpret_cast<const char*>(t.data), static_cast<std::size_t>(t.bytes()));
    const auto again = io::parse_safetensors(reinterpret_cast<const std::byte*>(bytes.data()), bytes.size(), "again");
    REQUIRE(again.metadata == content.metadata);
    REQUIRE(same(again.tensors, content.tensors));
}

/// The same bytes through the reader of files. Null where this machine has no file in memory.
void check_file(const std::byte* data, std::size_t size, const io::safetensors* content)
{
    const int file = ::memfd_create("fuzz", MFD_CLOEXEC);
    if (file < 0) return;
    const bool written = ::write(file, data, size) == static_cast<ssize_t>(size);
    try {
        const io::safetensors_file whole("/proc/self/fd/" + std::to_string(file));
        REQUIRE(written && content != nullptr);
        REQUIRE(same(whole.tensors(), content->tensors));
        REQUIRE(whole.metadata() == content->metadata);
        for (const auto& [name, t] : whole.tensors()) {
            REQUIRE(reinterpret_cast<std::uintptr_t>(t.data) % static_cast<std::size_t>(io::bytes_of(t.type)) == 0);
            REQUIRE(whole.contains(name));
            touch(whole.at(name));
        }
    } catch (const fm::format_error&) {
        REQUIRE(!written || content == nullptr);
    } catch (const fm::invalid_argument&) { // no /proc
    }
    ::close(file);
}

/// The metadata as a manifest, with the checksum that no fuzzer would find.
void check_manifest(const io::safetensors& content)
{
    io::safetensors with{{}, content.metadata};
    with.metadata["checksum"] = io::detail::hex_text(io::detail::checksum_of_pairs(with.metadata));
    io::detail::manifest m;
    try {
        m = io::detail::as_manifest(with, "fuzzed");
    } catch (const fm::format_error& e) {
        REQUIRE(std::strlen(e.what()) < 1000);
        return;
    }
    REQUIRE(io::detail::as_safetensors(m).metadata == with.metadata);
    for (const auto& [key, where] : m.tensors) {
        REQUIRE(m.parts.count(where.rank) == 1);
        try {
            std::int64_t next = 0;
            const auto pieces = io::detail::pieces_of(m, std::string_view(key).substr(0, key.rfind('[')), "fuzzed");
            for (const auto& piece : pieces) {
                REQUIRE(m.tensors.count(*piece.key) == 1);
                if (piece.total < 0) continue;
                REQUIRE(piece.begin == next && piece.axis >= 0 && piece.end >= piece.begin);
                next = piece.end;
            }
            REQUIRE(next == (pieces[0].total < 0 ? 0 : pieces[0].total));
        } catch (const fm::format_error& e) {
            REQUIRE(std::strlen(e.what()) < 1000);
        }
    }
}

} // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* bytes, std::size_t size)
{
    // Memory of exactly this size, so that the sanitizer sees one byte too many.
    const auto data = std::make_unique<std::byte[]>(size);
    if (size > 0) std::memcpy(data.get(), bytes, size);
    io::safetensors content;
    try {
        content = io::parse_safetensors(data.get(), size, "fuzzed");
    } catch (const fm::format_error& e) {
        REQUIRE(std::strlen(e.what()) < 1000);
        check_file(data.get(), size, nullptr);
        return 0;
    }
    check_against_tree(content, data.get(), size);
    for (const auto& [name, t] : content.tensors) touch(t);
    check_rewritten(content);
    check_manifest(content);
    check_file(data.get(), size, &content);
    return 0;
}

#if defined(FASTMOE_LIBFUZZER)
extern "C" std::size_t LLVMFuzzerMutate(std::uint8_t* data, std::size_t size, std::size_t most);

/// Lets most changed headers keep a true length, or few inputs would get past the first check.
extern "C" std::size_t LLVMFuzzerCustomMutator(std::uint8_t* data, std::size_t size, std::size_t most, unsigned seed)
{
    size = LLVMFuzzerMutate(data, size, most);
    if (seed % 8 == 0 || size < 9) return size;
    std::size_t end = size;
    while (end > 8 && data[end - 1] != '}') --end;
    const std::uint64_t length = end - 8;
    for (int i = 0; i < 8; ++i) data[i] = static_cast<std::uint8_t>(length >> 8 * i);
    return size;
}
#endif
