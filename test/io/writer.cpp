// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// What the safetensors writer refuses because no reader would take it, before it touches the disk.
#include <cstdint>
#include <string>
#include <vector>

#include <doctest/doctest.h>

#include <fastmoe/io/safetensors.hpp>

#include "support/temporary_folder.hpp"

namespace {

namespace fm = fastmoe;
namespace io = fastmoe::io;

std::string refusal(const std::string& path, const io::safetensors& content)
{
    try {
        io::write_safetensors(path, content);
    } catch (const fm::invalid_argument& e) {
        return e.what();
    }
    return "none";
}

} // namespace

TEST_CASE("A tensor that no file can hold is refused with its name, and nothing is written")
{
    support::temporary_folder folder;
    const std::vector<float> values(6, 1.0f);
    const auto good = io::as_safetensor(fm::as_matrix(values, 2, 3));
    const auto refused = [&](auto spoil) {
        auto bad = good;
        spoil(bad);
        return refusal(folder / "a", {{{"good", good}, {"layer.7", bad}}, {}});
    };
    const auto has = [](const std::string& text, const std::string& part) {
        CAPTURE(text);
        CHECK(text.find("tensor 'layer.7' is " + part) != std::string::npos);
    };
    has(refused([](io::safetensor& t) { t.shape = {2, -3}; }), "of shape (2,-3); expected extents of 0 or more");
    has(refused([](io::safetensor& t) { t.shape = {-2, -3}; }), "of shape (-2,-3); expected extents of 0 or more");
    has(refused([](io::safetensor& t) { t.shape = {INT64_MAX, 2}; }), "of shape (9223372036854775807,2); expected no more bytes");
    has(refused([](io::safetensor& t) { t.shape = {INT64_C(1) << 61}; }), "of shape (2305843009213693952); expected no more bytes");
    has(refused([](io::safetensor& t) { t.shape = {(INT64_C(1) << 61) - 1}; }), "of shape (2305843009213693951); expected no more bytes"); // with the others
    has(refused([](io::safetensor& t) { t.type = io::element_type::count_; }), "of type 17; expected one of element_type");
    has(refused([](io::safetensor& t) { t.type = static_cast<io::element_type>(255); }), "of type 255; expected one of element_type");
    has(refused([](io::safetensor& t) { t.data = nullptr; }), "a null pointer; expected 24 bytes of memory");
    CHECK(folder.entries() == 0);
    CHECK(refused([](io::safetensor& t) { t.data = nullptr, t.shape = {5, 0}; }) == "none");
    CHECK(io::safetensors_file(folder / "a").view<float>("layer.7", 5, 0).size() == 0);
}

TEST_CASE("A header longer than readers accept is refused, and nothing is written")
{
    support::temporary_folder folder;
    const std::string text = refusal(folder / "a", {{}, {{"notes", std::string(100'000'000, 'x')}}});
    CHECK(text.find("; expected at most 100000000 bytes") != std::string::npos);
    CHECK(folder.entries() == 0);
}
