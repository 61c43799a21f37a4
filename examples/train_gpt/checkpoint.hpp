// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Checkpoints: parameters, moments and the place in the run, in one safetensors file that is whole or absent.
#pragma once

#include <bit>
#include <charconv>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include <fastmoe/core/tensor.hpp>
#include <fastmoe/io/safetensors.hpp>

namespace train_gpt {

/// A tensor of the run in host memory: a parameter or one of its moments, e.g. "blocks.0.query" and "blocks.0.query/m". Of
/// experts' tensors a rank may have some: rows [first, first + shape[0]) along the first axis, which has `whole` in all.
struct named_tensor {
    std::string name;
    fastmoe::io::element_type type;
    std::vector<std::int64_t> shape;
    void* data;
    std::int64_t whole = -1; ///< -1: no experts' tensor, and all of it
    std::int64_t first = 0;
};

/// A named_tensor over a view of any rank.
template <class T, class Shape>
named_tensor named(std::string name, ::cuda::std::mdspan<T, Shape> v)
{
    auto t = fastmoe::io::as_safetensor(v);
    return {std::move(name), t.type, std::move(t.shape), v.data_handle(), -1, 0};
}

/// The place in the run: with the tensors, all that is needed to go on as if never stopped.
struct run_state {
    std::int64_t step = 0;          ///< steps done
    std::int64_t data_position = 0; ///< windows read
    std::uint64_t seed = 0;         ///< every draw is a function of the seed and the step, so this is the random state
    std::uint64_t corpus = 0;       ///< fingerprint of the text
    std::string config;             ///< JSON text that describes the model and the schedule

    bool operator==(const run_state&) const = default;
};

namespace detail {

/// Of files this program reads. A change of names, shapes or meaning takes the next one.
inline constexpr std::uint64_t checkpoint_version = 1;

/// A hash that sees any change of one word for certain and of more with the odds of 64 bits.
class checksum {
public:
    void add(const void* data, std::size_t bytes)
    {
        const char* p = static_cast<const char*>(data);
        std::uint64_t word = 0;
        for (; bytes >= sizeof word; bytes -= sizeof word, p += sizeof word) {
            std::memcpy(&word, p, sizeof word);
            add(word);
        }
        word = 0;
        if (bytes > 0) std::memcpy(&word, p, bytes);
        add(word);
        add(bytes);
    }

    void add(std::uint64_t word) { sum_ = std::rotl((sum_ ^ word) * 0x9e3779b97f4a7c15u, 29); }
    void add(std::string_view text) { add(text.data(), text.size()); }
    std::uint64_t value() const { return sum_; }

private:
    std::uint64_t sum_ = 0;
};

/// Of everything in the file but the checksum itself.
inline std::uint64_t checksum_of(const fastmoe::io::safetensors& content)
{
    checksum sum;
    for (const auto& [key, value] : content.metadata)
        if (key != "checksum") {
            sum.add(key);
            sum.add(value);
        }
    for (const auto& [name, t] : content.tensors) {
        sum.add(name);
        sum.add(name_of(t.type));
        for (const std::int64_t extent : t.shape) sum.add(static_cast<std::uint64_t>(extent));
        sum.add(t.data, static_cast<std::size_t>(t.bytes()));
    }
    return sum.value();
}

} // namespace detail

/// Where the checkpoint before the newest one stays: "run.safetensors" gives "run.previous.safetensors".
inline std::string previous_checkpoint(const std::string& path)
{
    const std::size_t name = path.rfind('/') + 1; // 0 if there is no folder
    const std::size_t dot = path.rfind('.');
    return dot == std::string::npos || dot <= name ? path + ".previous"
                                                   : path.substr(0, dot) + ".previous" + path.substr(dot);
}

/// Writes a checkpoint; the one that stood at the path becomes previous_checkpoint(path).
/// At every moment, whatever kills the process, the path shows a whole checkpoint: the old one or the new one.
/// @throws error if the disk is full or the folder cannot be written; both files are then as they were
inline void save_checkpoint(const std::string& path, const std::vector<named_tensor>& tensors, const run_state& state)
{
    fastmoe::io::safetensors content;
    content.metadata = {{"format", "train_gpt"},
                        {"version", std::to_string(detail::checkpoint_version)},
                        {"step", std::to_string(state.step)},
                        {"data_position", std::to_string(state.data_position)},
                        {"seed", std::to_string(state.seed)},
                        {"corpus", std::to_string(state.corpus)},
                        {"config", state.config}};
    for (const named_tensor& t : tensors) {
        const auto* data = static_cast<const std::byte*>(t.data);
        const bool fresh = content.tensors.emplace(t.name, fastmoe::io::safetensor{t.type, t.shape, data}).second;
        fastmoe::expects(fresh, "tensor name", "'" + t.name + "', for the second time", "each name once");
    }
    content.metadata["checksum"] = std::to_string(detail::checksum_of(content));
    fastmoe::io::write_safetensors(path, content, previous_checkpoint(path));
}

/// A checkpoint on disk, opened and verified as a whole: format, version and the checksum of every byte.
class checkpoint {
public:
    /// @throws invalid_argument if there is no such file
    /// @throws format_error if it is truncated, corrupt or of another version; the message says whether the checkpoint
    ///         before it is whole
    explicit checkpoint(const std::string& path)
    {
        try {
            read(path);
        } catch (const fastmoe::format_error& e) {
            throw fastmoe::format_error(e.what() + advice(previous_checkpoint(path)));
        }
    }

    const run_state& state() const { return state_; }

    /// Copies every tensor, or the caller's part of it, into the caller's memory. Names, dtypes and shapes are compared first, so nothing is written
    /// unless everything fits.
    /// @throws format_error that names the tensor, what the file has and what the model expects
    void load(const std::vector<named_tensor>& into) const
    {
        using namespace fastmoe::io;
        for (const named_tensor& t : into) {
            const safetensor& mine = file_->at(t.name);
            std::vector<std::int64_t> expected = t.shape;
            if (t.whole >= 0) expected[0] = t.whole;
            if (mine.type != t.type || mine.shape != expected)
                refuse("tensor '" + t.name + "' is " + facts(mine.type, mine.shape) + "; expected " +
                       facts(t.type, expected));
        }
        for (const auto& [name, t] : file_->tensors()) {
            bool known = false;
            for (const named_tensor& wanted : into) known = known || wanted.name == name;
            if (!known) refuse("tensor '" + name + "' is not in this model; expected a checkpoint of the same options");
        }
        for (const named_tensor& t : into) {
            const safetensor& mine = file_->at(t.name);
            const std::int64_t bytes = safetensor{t.type, t.shape, nullptr}.bytes();
            const std::int64_t skipped = t.whole > 0 ? mine.bytes() / t.whole * t.first : 0;
            if (bytes > 0) std::memcpy(t.data, mine.data + skipped, static_cast<std::size_t>(bytes));
        }
    }

private:
    void read(const std::string& path)
    {
        file_.emplace(path);
        const auto& facts = file_->metadata();
        if (text("format") != "train_gpt") refuse("it is a safetensors file, but no checkpoint of this program");
        if (number<std::uint64_t>("version") != detail::checkpoint_version)
            refuse("its version is " + text("version") + "; expected " + std::to_string(detail::checkpoint_version));
        if (number<std::uint64_t>("checksum") != detail::checksum_of({file_->tensors(), facts}))
            refuse("its checksum is not that of its content; expected an intact file: it is corrupt");
        state_ = {number<std::int64_t>("step"), number<std::int64_t>("data_position"), number<std::uint64_t>("seed"),
                  number<std::uint64_t>("corpus"), text("config")};
    }

    const std::string& text(const char* key) const
    {
        const auto found = file_->metadata().find(key);
        if (found == file_->metadata().end()) refuse(std::string("__metadata__ lacks '") + key + "'");
        return found->second;
    }

    template <class Integer>
    Integer number(const char* key) const
    {
        const std::string& digits = text(key);
        const char* end = digits.data() + digits.size();
        Integer out{};
        const auto [stop, problem] = std::from_chars(digits.data(), end, out);
        if (problem != std::errc{} || stop != end || digits[0] == '-')
            refuse(std::string("__metadata__ '") + key + "' is no whole number");
        return out;
    }

    [[noreturn]] void refuse(const std::string& why) const
    {
        fastmoe::raise<fastmoe::format_error>("'" + file_->path() + "': " + why);
    }

    static std::string facts(fastmoe::io::element_type type, const std::vector<std::int64_t>& shape)
    {
        return name_of(type) + (" of shape " + fastmoe::io::detail::shape_text(shape));
    }

    /// What a person whose checkpoint is broken can do.
    static std::string advice(const std::string& previous)
    {
        try {
            checkpoint older;
            older.read(previous);
            return "; the checkpoint before it is whole (step " + std::to_string(older.state().step) +
                   "): resume from '" + previous + "'";
        } catch (const fastmoe::error&) {
            return "; there is no whole checkpoint before it";
        }
    }

    checkpoint() = default;

    std::optional<fastmoe::io::safetensors_file> file_;
    run_state state_;
};

} // namespace train_gpt
