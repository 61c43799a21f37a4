// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The manifest of a sharded checkpoint: which parts it is made of, and where each tensor stands. It is a safetensors file of
/// metadata alone, read by the parser that trusts nothing. Part of sharded_checkpoint.hpp.
#pragma once

#include <algorithm>
#include <charconv>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include <fastmoe/io/checksum.hpp>
#include <fastmoe/io/safetensors.hpp>

namespace fastmoe::inline FASTMOE_ABI {
namespace io::detail {

inline constexpr const char* manifest_format = "fastmoe sharded checkpoint";
inline constexpr const char* part_format = "fastmoe sharded checkpoint, part";
/// Of files that this library reads. A change of their meaning takes the next one.
inline constexpr const char* manifest_version = "1";

/// Where a tensor stands.
struct stored_tensor {
    int64_t rank = 0;      ///< whose part
    std::uint64_t sum = 0; ///< checksum_of its key and content
};

struct manifest {
    int64_t save = 0; ///< the number in the names of the parts; larger than that of any save before
    int64_t step = 0, ranks = 0;
    std::string text;                                           ///< the caller's
    std::map<int64_t, int64_t> parts;                           ///< rank -> bytes of its file
    std::map<std::string, stored_tensor, std::less<>> tensors; ///< by stored_key
};

/// "<path>.<save>.<rank>.part"
inline std::string part_path(const std::string& path, int64_t save, int64_t rank)
{
    std::string out = path;
    out += "." + std::to_string(save);
    return out + "." + std::to_string(rank) + ".part";
}

inline std::string hex_text(std::uint64_t n)
{
    std::string out(16, '0');
    for (std::size_t i = 16; i-- > 0; n >>= 4) out[i] = "0123456789abcdef"[n & 15];
    return out;
}

/// A whole number as std::to_string or hex_text write it; false if the text is none.
template <class Integer>
bool read_number(std::string_view text, Integer& out, int base = 10)
{
    const bool length = base == 16 ? text.size() == 16 : !text.empty() && (text[0] != '0' || text.size() == 1);
    const bool digits = text.find_first_not_of(base == 16 ? "0123456789abcdef" : "0123456789") == std::string_view::npos;
    const auto [stop, problem] = std::from_chars(text.data(), text.data() + text.size(), out, base);
    return length && digits && problem == std::errc{} && stop == text.data() + text.size();
}

/// Of all pairs but the checksum itself.
inline std::uint64_t checksum_of_pairs(const metadata_map& pairs)
{
    checksum sum;
    for (const auto& [key, value] : pairs)
        if (key != "checksum") {
            sum.add(key);
            sum.add(value);
        }
    return sum.value();
}

inline safetensors as_safetensors(const manifest& m)
{
    safetensors out;
    out.metadata = {{"format", manifest_format},           {"version", manifest_version},
                    {"save", std::to_string(m.save)},      {"step", std::to_string(m.step)},
                    {"ranks", std::to_string(m.ranks)},    {"text", m.text}};
    for (const auto& [rank, bytes] : m.parts) out.metadata["part/" + std::to_string(rank)] = std::to_string(bytes);
    for (const auto& [key, t] : m.tensors) out.metadata["tensor/" + key] = std::to_string(t.rank) + " " + hex_text(t.sum);
    out.metadata["checksum"] = hex_text(checksum_of_pairs(out.metadata));
    return out;
}

/// Reads pairs of a file, one key at a time, and refuses with the file's name.
struct pair_reader {
    const std::string& file;
    const metadata_map& pairs;

    const std::string& text(std::string_view key) const
    {
        const auto found = pairs.find(key);
        if (found == pairs.end()) refuse_file(file, {}, "__metadata__ lacks " + name_text(key));
        return found->second;
    }
    template <class Integer>
    Integer number(std::string_view key, int base = 10) const
    {
        Integer out{};
        if (!read_number(text(key), out, base))
            refuse_file(file, {}, "__metadata__ " + name_text(key) + " is " + name_text(text(key)) + "; expected a whole number");
        return out;
    }
    /// Throws format_error unless a key has this value.
    void expect(std::string_view key, std::string_view value) const
    {
        if (text(key) != value)
            refuse_file(file, {},
                        "__metadata__ " + name_text(key) + " is " + name_text(text(key)) + "; expected " + name_text(value));
    }
};

/// @throws format_error for anything that as_safetensors() would not have written
inline manifest as_manifest(const safetensors& content, const std::string& file)
{
    const pair_reader in{file, content.metadata};
    in.expect("format", manifest_format);
    in.expect("version", manifest_version);
    if (in.number<std::uint64_t>("checksum", 16) != checksum_of_pairs(content.metadata))
        refuse_file(file, {}, "its checksum is not that of its content; expected an intact file: it is corrupt");
    if (!content.tensors.empty()) refuse_file(file, content.tensors.begin()->first, "expected no tensor in a manifest");
    manifest out;
    out.save = in.number<int64_t>("save");
    out.step = in.number<int64_t>("step");
    out.ranks = in.number<int64_t>("ranks");
    out.text = in.text("text");
    constexpr std::string_view part = "part/", tensor = "tensor/";
    std::size_t known = 7; // the pairs that every manifest has
    for (const auto& [key, value] : content.metadata) {
        if (!key.starts_with(part)) continue;
        ++known;
        int64_t rank = 0;
        if (!read_number(std::string_view(key).substr(part.size()), rank) || rank >= out.ranks)
            refuse_file(file, {}, name_text(key) + " is no rank below " + std::to_string(out.ranks));
        out.parts[rank] = in.number<int64_t>(key);
    }
    for (const auto& [key, value] : content.metadata) {
        if (!key.starts_with(tensor)) continue;
        ++known;
        const std::string name = key.substr(tensor.size());
        const std::size_t space = value.find(' ');
        stored_tensor where;
        if (space == std::string::npos || !read_number(std::string_view(value).substr(0, space), where.rank) ||
            !read_number(std::string_view(value).substr(space + 1), where.sum, 16) || !out.parts.count(where.rank))
            refuse_file(file, name, "its place is " + name_text(value) + "; expected the rank of a part and a checksum");
        out.tensors.emplace(name, where);
    }
    if (known != content.metadata.size()) refuse_file(file, {}, "__metadata__ has pairs that no manifest has");
    return out;
}

/// @throws invalid_argument if there is no such file, format_error if it is no manifest
inline manifest read_manifest(const std::string& path)
{
    const safetensors_file file(path);
    return as_manifest({file.tensors(), file.metadata()}, path);
}

/// Opens a rank's part, and sees that it is what the manifest says. Its tensors are not read yet.
/// @throws format_error
inline safetensors_file open_part(const std::string& path, const manifest& m, int64_t rank)
{
    const std::string name = part_path(path, m.save, rank);
    const std::string size = std::to_string(m.parts.at(rank)) + " bytes, by the manifest " + name_text(path);
    struct stat there;
    if (::stat(name.c_str(), &there) != 0 || !S_ISREG(there.st_mode)) refuse_file(name, {}, "is missing; expected " + size);
    if (there.st_size != m.parts.at(rank))
        refuse_file(name, {}, "it has " + std::to_string(there.st_size) + " bytes; expected " + size);
    safetensors_file out(name);
    const pair_reader in{name, out.metadata()};
    in.expect("format", part_format);
    in.expect("save", std::to_string(m.save));
    in.expect("rank", std::to_string(rank));
    return out;
}

/// The piece of a tensor that is stored under a key: all of it, or a range along an axis.
struct stored_piece {
    const std::string* key;
    const stored_tensor* where;
    int64_t axis = 0, begin = 0, end = 0, total = -1; ///< total is -1: all of it
};

/// The pieces of the tensor of a plain key, in order of place. Slices must have one axis and leave neither hole nor overlap.
/// @throws format_error if there is none, or they do not make a whole
inline std::vector<stored_piece> pieces_of(const manifest& m, std::string_view key, const std::string& file)
{
    std::vector<stored_piece> out;
    if (const auto whole = m.tensors.find(key); whole != m.tensors.end())
        out.push_back({&whole->first, &whole->second});
    const std::string prefix = std::string(key) + "[";
    for (auto at = m.tensors.lower_bound(prefix); at != m.tensors.end() && at->first.starts_with(prefix); ++at) {
        stored_piece piece{&at->first, &at->second};
        std::string_view rest = std::string_view(at->first).substr(prefix.size());
        if (!rest.ends_with(']') || rest.find('[') != std::string_view::npos) continue; // of a name that has brackets itself
        rest.remove_suffix(1);
        bool good = true;
        for (int64_t* number : {&piece.axis, &piece.begin, &piece.end, &piece.total}) {
            const std::size_t colon = number == &piece.total ? rest.size() : rest.find(':');
            good = good && colon != std::string_view::npos && read_number(rest.substr(0, colon), *number);
            if (good) rest.remove_prefix(colon < rest.size() ? colon + 1 : colon);
        }
        if (!good) refuse_file(file, at->first, "its range is no [axis:begin:end:total]");
        out.push_back(piece);
    }
    if (out.empty()) refuse_file(file, key, "is missing");
    const auto before = [](const stored_piece& a, const stored_piece& b) {
        return a.begin != b.begin ? a.begin < b.begin : a.end < b.end;
    };
    std::sort(out.begin(), out.end(), before);
    if (out.size() == 1 && out[0].total < 0) return out;
    int64_t next = 0;
    for (const stored_piece& p : out) {
        const bool alike = p.total >= 0 && p.total == out[0].total && p.axis == out[0].axis;
        if (!alike || p.begin != next || p.end < p.begin)
            refuse_file(file, *p.key, "slices of one tensor overlap, leave a hole or differ in axis or extent; expected one that "
                                      "begins at " + std::to_string(next));
        next = p.end;
    }
    if (next != out[0].total)
        refuse_file(file, key, "its slices end at " + std::to_string(next) + "; expected " + std::to_string(out[0].total));
    return out;
}

} // namespace io::detail
} // namespace fastmoe::inline FASTMOE_ABI
