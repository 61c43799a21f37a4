// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The header of the safetensors format, read by a parser that trusts nothing. Needs nlohmann-json.
///
///     8 bytes: N, little-endian | N bytes: JSON {"name": {"dtype", "shape", "data_offsets"}, ...} | the tensors' data
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include <fastmoe/core/error.hpp>
#include <fastmoe/io/safetensor.hpp>

namespace fastmoe::inline FASTMOE_ABI {
namespace io {

namespace detail {

/// The limit that the format's reference reader keeps, and so ours and the writer.
inline constexpr std::uint64_t longest_header = 100'000'000;

/// Takes the events of the JSON parser. Its grammar is the format's, nothing else gets through: no tree is built, and
/// nesting stops at the third bracket.
class header_reader {
public:
    using number_integer_t = nlohmann::json::number_integer_t;
    using number_unsigned_t = nlohmann::json::number_unsigned_t;
    using number_float_t = nlohmann::json::number_float_t;
    using string_t = nlohmann::json::string_t;
    using binary_t = nlohmann::json::binary_t;

    /// What the header says of one tensor; nothing of it is checked yet.
    struct entry {
        safetensor tensor;
        std::uint64_t offsets[2] = {0, 0};
        int seen = 0; // one bit a field
    };

    std::map<std::string, entry, std::less<>> entries;
    metadata_map metadata;
    std::string problem; ///< empty while all is well
    std::string tensor;  ///< the one being read

    // The parser calls these; false ends the parse, and `problem` then says why.
    bool null() { return refuse("null"); }
    bool boolean(bool) { return refuse("true or false"); }
    bool number_integer(number_integer_t) { return refuse("a negative number"); }
    bool number_float(number_float_t, const string_t&) { return refuse("a fraction or a number beyond 64 bits"); }
    bool binary(binary_t&) { return refuse("binary data"); }

    bool number_unsigned(number_unsigned_t n)
    {
        if (at_ == place::shape) {
            if (n > static_cast<std::uint64_t>(INT64_MAX)) return refuse("a number beyond 63 bits");
            current_->tensor.shape.push_back(static_cast<int64_t>(n));
            return true;
        }
        if (at_ != place::offsets) return refuse("a number");
        if (offset_ == 2) return refuse("a third number");
        current_->offsets[offset_++] = n;
        return true;
    }

    bool string(string_t& s)
    {
        if (at_ == place::metadata_value) {
            at_ = place::metadata;
            return metadata.emplace(key_, s).second || complain("the key " + name_text(key_) + " stands twice");
        }
        if (at_ != place::dtype) return refuse("a string");
        at_ = place::tensor;
        for (int t = 0; t < static_cast<int>(element_type::count_); ++t)
            if (s == element_types[t].name) {
                current_->tensor.type = static_cast<element_type>(t);
                return true;
            }
        return complain("dtype is " + name_text(s) +
                        "; expected one of the format's whole-byte types, e.g. F32 or BF16");
    }

    bool start_object(std::size_t)
    {
        switch (at_) {
        case place::before:
            at_ = place::top;
            return true;
        case place::tensor_value:
            at_ = place::tensor;
            return true;
        case place::metadata_start:
            at_ = place::metadata;
            return true;
        default:
            return refuse("an object");
        }
    }

    bool key(string_t& k)
    {
        if (at_ == place::metadata) {
            key_ = k;
            at_ = place::metadata_value;
            return true;
        }
        if (at_ == place::tensor) return field(k);
        tensor = k;
        if (k == "__metadata__") {
            at_ = place::metadata_start;
            return !std::exchange(metadata_seen_, true) || complain("stands twice");
        }
        at_ = place::tensor_value;
        const auto [where, fresh] = entries.try_emplace(k);
        current_ = &where->second;
        return fresh || complain("stands twice");
    }

    bool end_object()
    {
        if (at_ == place::tensor && current_->seen != 7) return complain("lacks dtype, shape or data_offsets");
        at_ = at_ == place::top ? place::after : place::top;
        if (at_ == place::top) tensor.clear();
        return true;
    }

    bool start_array(std::size_t)
    {
        if (at_ == place::shape_start)
            at_ = place::shape;
        else if (at_ == place::offsets_start)
            at_ = place::offsets;
        else
            return refuse("an array");
        return true;
    }

    bool end_array()
    {
        if (at_ == place::offsets && offset_ != 2) return complain("data_offsets does not hold two numbers");
        at_ = place::tensor;
        return true;
    }

    bool parse_error(std::size_t position, const std::string&, const nlohmann::json::exception&)
    {
        return complain("byte " + std::to_string(position) + " of the header is not valid JSON in UTF-8");
    }

private:
    /// Where in the grammar the parser is: what may come next.
    enum class place {
        before,
        top,
        metadata_start,
        metadata,
        metadata_value,
        tensor_value,
        tensor,
        dtype,
        shape_start,
        shape,
        offsets_start,
        offsets,
        after
    };

    /// A key of a tensor: each of the three exactly once.
    bool field(const std::string& k)
    {
        const int bit = k == "dtype" ? 1 : k == "shape" ? 2 : k == "data_offsets" ? 4 : 0;
        if (bit == 0 || (current_->seen & bit))
            return complain(name_text(k) + (bit ? " stands twice" : " is no field of a tensor"));
        current_->seen |= bit;
        offset_ = 0;
        at_ = bit == 1 ? place::dtype : bit == 2 ? place::shape_start : place::offsets_start;
        return true;
    }

    /// Ends the parse with this text.
    bool complain(std::string text)
    {
        problem = std::move(text);
        return false;
    }

    /// Ends the parse at a value that has no business where it stands.
    bool refuse(const char* what)
    {
        static constexpr const char* wanted[] = {"an object of tensors",
                                                 "a name",
                                                 "an object of strings",
                                                 "a key",
                                                 "a string",
                                                 "an object with dtype, shape and data_offsets",
                                                 "a key",
                                                 "a string as dtype",
                                                 "an array as shape",
                                                 "an extent",
                                                 "an array as data_offsets",
                                                 "an offset",
                                                 "the end"};
        return complain(std::string("has ") + what + "; expected " + wanted[static_cast<int>(at_)]);
    }

    place at_ = place::before;
    entry* current_ = nullptr;
    std::string key_;
    int offset_ = 0;
    bool metadata_seen_ = false;
};

[[noreturn]] inline void refuse_file(const std::string& file, std::string_view tensor, const std::string& text)
{
    raise<format_error>(name_text(file) + ": " + (tensor.empty() ? "" : "tensor " + name_text(tensor) + ": ") + text);
}

/// Checks one tensor's extents and offsets against each other and against the bytes that are there.
inline void check_entry(const std::string& file, const std::string& name, const header_reader::entry& e,
                        std::uint64_t size)
{
    const auto [begin, end] = e.offsets;
    const std::string offsets =
        "data_offsets are [" + std::to_string(begin) + "," + std::to_string(end) + "]; expected ";
    int64_t bytes = bytes_of(e.tensor.type);
    for (int64_t extent : e.tensor.shape)
        if (__builtin_mul_overflow(bytes, extent, &bytes))
            refuse_file(file, name, "shape " + shape_text(e.tensor.shape) + " holds more bytes than 63 bits can count");
    if (begin > end || end > size)
        refuse_file(file, name, offsets + "a range inside of the " + std::to_string(size) + " bytes of data");
    if (end - begin != static_cast<std::uint64_t>(bytes))
        refuse_file(file, name,
                    offsets + std::to_string(bytes) + " bytes for " + name_of(e.tensor.type) + " of shape " +
                        shape_text(e.tensor.shape));
}

} // namespace detail

/// Reads a file that lies in memory. The tensors point into it; a pointer may be misaligned for its type.
/// No number of the header is used before it is checked: memory is taken in proportion to the bytes that are there.
/// @param file  the name that messages show
/// @throws format_error that names the file, the tensor and what was expected
inline safetensors parse_safetensors(const std::byte* data, std::size_t size, const std::string& file)
{
    if (size < 8)
        detail::refuse_file(file, {},
                            "it has " + std::to_string(size) + " bytes; expected at least 8: it is truncated");
    std::uint64_t length = 0;
    for (int i = 7; i >= 0; --i) length = length << 8 | static_cast<std::uint8_t>(data[i]);
    const std::uint64_t most = size - 8 < detail::longest_header ? size - 8 : detail::longest_header;
    if (length > most)
        detail::refuse_file(file, {},
                            "header length is " + std::to_string(length) + "; expected at most " +
                                std::to_string(most) + ": it is truncated or no safetensors file");
    const char* header = reinterpret_cast<const char*>(data + 8);
    if (length == 0 || header[0] != '{') detail::refuse_file(file, {}, "the header does not begin with '{'");
    // The parser takes a zero byte for the end of its input, which would let anything hide behind it.
    if (std::memchr(header, 0, length) != nullptr) detail::refuse_file(file, {}, "the header holds a zero byte");

    detail::header_reader reader;
    if (!nlohmann::json::sax_parse(header, header + length, &reader))
        detail::refuse_file(file, reader.tensor, reader.problem);

    // In order of place the tensors must tile the data: no overlap, no hole, nothing behind the last.
    const std::byte* begin = data + 8 + length;
    const std::uint64_t bytes = size - 8 - length;
    std::multimap<std::pair<std::uint64_t, std::uint64_t>, std::string_view> places;
    safetensors out{{}, std::move(reader.metadata)};
    for (auto& [name, e] : reader.entries) {
        detail::check_entry(file, name, e, bytes);
        places.emplace(std::pair(e.offsets[0], e.offsets[1]), name);
        e.tensor.data = begin + e.offsets[0];
        out.tensors.emplace_hint(out.tensors.end(), name, std::move(e.tensor));
    }
    std::uint64_t next = 0;
    for (const auto& [where, name] : places) {
        if (where.first != next)
            detail::refuse_file(file, name,
                                "its data begins at " + std::to_string(where.first) + "; expected " +
                                    std::to_string(next) +
                                    ", where the tensor before it ends: tensors overlap or leave a hole");
        next = where.second;
    }
    if (next != bytes)
        detail::refuse_file(
            file, {}, std::to_string(bytes) + " bytes of data; expected " + std::to_string(next) + " by its header");
    return out;
}

} // namespace io
} // namespace fastmoe::inline FASTMOE_ABI
