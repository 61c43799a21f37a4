// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Checkpoints that survive a change of the number of ranks: saved by R of them, loaded by any R', one included, with any
/// placement of the experts and any slices of them. Needs nlohmann-json and POSIX; included by name, never by an umbrella.
///
///     io::save_sharded_checkpoint(ex, "run/checkpoint", entries, communicator, {.step = step});
///     io::sharded_checkpoint from("run/checkpoint");   from.load(entries_of_another_run);
#pragma once

#include <cstring>
#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include <fastmoe/io/sharded_save.hpp>

namespace fastmoe::inline FASTMOE_ABI {
namespace io {

namespace detail {

/// A range of every axis of a tensor.
struct tensor_box {
    std::vector<int64_t> begin, extent;

    /// All of a tensor but for one axis, if total is not -1.
    static tensor_box of(const std::vector<int64_t>& shape, int64_t axis, int64_t from, int64_t to, int64_t total)
    {
        tensor_box out{std::vector<int64_t>(shape.size(), 0), shape};
        if (total < 0) return out;
        out.begin[static_cast<std::size_t>(axis)] = from;
        out.extent[static_cast<std::size_t>(axis)] = to - from;
        return out;
    }
};

/// Copies what two boxes of one tensor have in common, from the memory of one to that of the other, both row-major.
struct box_copy {
    const std::byte* from;
    std::byte* to;
    tensor_box source, target;
    int64_t element; ///< bytes

    void run() const
    {
        // Behind the last axis that is cut differently, everything lies together.
        std::size_t axes = source.extent.size();
        int64_t inner = element;
        const auto alike = [&](std::size_t a) {
            return source.begin[a] == target.begin[a] && source.extent[a] == target.extent[a];
        };
        while (axes > 0 && alike(axes - 1)) inner *= source.extent[--axes];
        if (axes == 0) {
            if (inner > 0) std::memcpy(to, from, static_cast<std::size_t>(inner));
            return;
        }
        along(0, axes - 1, inner, 0, 0);
    }

private:
    /// @param source_row, target_row  the row of all axes before this one
    void along(std::size_t axis, std::size_t last, int64_t inner, int64_t source_row, int64_t target_row) const
    {
        const int64_t s = source.begin[axis], s_end = s + source.extent[axis], t = target.begin[axis];
        const int64_t t_end = t + target.extent[axis], begin = s > t ? s : t, end = s_end < t_end ? s_end : t_end;
        if (begin >= end) return;
        const int64_t source_at = source_row * source.extent[axis] + begin - s;
        const int64_t target_at = target_row * target.extent[axis] + begin - t;
        if (axis == last) {
            const int64_t bytes = (end - begin) * inner;
            if (bytes > 0) std::memcpy(to + target_at * inner, from + source_at * inner, static_cast<std::size_t>(bytes));
            return;
        }
        for (int64_t i = 0; i < end - begin; ++i) along(axis + 1, last, inner, source_at + i, target_at + i);
    }
};

} // namespace detail

/// A checkpoint on disk, whose manifest is read and verified when it is opened; parts are opened when something in them is
/// asked for. Every rank opens it by itself: no communicator is needed, but all should have loaded what they want before the next
/// save to that path, which removes the parts. Used by one thread at a time.
class sharded_checkpoint {
public:
    /// @throws invalid_argument if there is no such file, format_error if it is no intact manifest
    explicit sharded_checkpoint(std::string path) : path_(detail::end_of_links(std::move(path))), manifest_(detail::read_manifest(path_)) {}

    int64_t step() const { return manifest_.step; }
    /// How many ranks have saved it.
    int64_t ranks() const { return manifest_.ranks; }
    /// What the caller of the save gave.
    const std::string& text() const { return manifest_.text; }
    /// The names of all tensors, as stored: "<name>", "<name>.<expert>" or "<name>.<expert>[<axis>:<begin>:<end>:<total>]".
    std::vector<std::string> names() const
    {
        std::vector<std::string> out;
        for (const auto& [key, where] : manifest_.tensors) out.push_back(key);
        return out;
    }

    /// Fills the caller's tensors: each expert's by its global id, whoever had it, whole or put together from slices. All is
    /// found, compared and verified first, so nothing is written unless everything fits. Other tensors may be there.
    /// @throws invalid_argument if an entry makes no sense or cannot be written to
    /// @throws format_error that names the file, the tensor and what was expected
    void load(const std::vector<checkpoint_entry>& into)
    {
        std::vector<detail::box_copy> copies;
        for (const checkpoint_entry& e : into) {
            detail::expects_entry(e);
            expects(e.room == e.data, "entry", detail::name_text(e.name) + ", which is const", "memory to load into");
            detail::for_each_part(e, [&](const detail::entry_part& part) { find(e, part, copies); });
        }
        for (const detail::box_copy& copy : copies) copy.run();
    }

    /// Reads every part and compares all checksums.
    /// @throws format_error that names the first file and tensor that is not intact
    void verify()
    {
        for (const auto& [rank, bytes] : manifest_.parts) part(rank);
        for (const auto& [key, where] : manifest_.tensors) {
            verified(key, where);
            const bool slice = key.ends_with(']') && key.rfind('[') != std::string::npos;
            if (slice) detail::pieces_of(manifest_, std::string_view(key).substr(0, key.rfind('[')), path_);
        }
    }

private:
    const safetensors_file& part(int64_t rank)
    {
        auto at = parts_.find(rank);
        if (at == parts_.end()) at = parts_.emplace(rank, detail::open_part(path_, manifest_, rank)).first;
        return at->second;
    }

    /// A stored tensor, whose bytes are those that were saved.
    const safetensor& verified(const std::string& key, const detail::stored_tensor& where)
    {
        const safetensors_file& file = part(where.rank);
        const safetensor& t = file.at(key);
        if (verified_.count(key) == 0) {
            if (checksum_of(key, t) != where.sum)
                detail::refuse_file(file.path(), key,
                                    "its checksum is not that of the manifest; expected an intact file: it is corrupt");
            verified_.insert(key);
        }
        return t;
    }

    /// Adds the copies that fill one tensor of an entry.
    void find(const checkpoint_entry& e, const detail::entry_part& wanted, std::vector<detail::box_copy>& copies)
    {
        const std::vector<int64_t>& own = wanted.tensor.shape;
        std::vector<int64_t> whole = own;
        if (wanted.slice.total >= 0) whole[static_cast<std::size_t>(wanted.slice.axis)] = wanted.slice.total;
        detail::tensor_box target{std::vector<int64_t>(own.size(), 0), own};
        if (wanted.slice.total >= 0) target.begin[static_cast<std::size_t>(wanted.slice.axis)] = wanted.slice.begin;
        for (const detail::stored_piece& piece : detail::pieces_of(manifest_, wanted.key, path_)) {
            const safetensor& t = verified(*piece.key, *piece.where);
            const bool axis = piece.total < 0 || (piece.axis < static_cast<int64_t>(whole.size()) &&
                                                  whole[static_cast<std::size_t>(piece.axis)] == piece.total);
            const auto source = axis ? detail::tensor_box::of(whole, piece.axis, piece.begin, piece.end, piece.total)
                                     : detail::tensor_box{};
            if (!axis || t.type != e.type || t.shape != source.extent)
                detail::refuse_file(part(piece.where->rank).path(), *piece.key,
                                    std::string("is ") + name_of(t.type) + " of shape " + detail::shape_text(t.shape) +
                                        "; expected " + name_of(e.type) + ", of " + detail::shape_text(whole) + " in all");
            copies.push_back({t.data, e.room ? e.room + wanted.offset : nullptr, source, target, bytes_of(e.type)});
        }
    }

    std::string path_;
    detail::manifest manifest_;
    std::map<int64_t, safetensors_file> parts_; // by rank
    std::set<std::string, std::less<>> verified_;
};

} // namespace io
} // namespace fastmoe::inline FASTMOE_ABI
