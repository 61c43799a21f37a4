// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// A run on disk, of either kind: one file that one rank has written, or a folder with a part of each of R ranks. Both can
/// be loaded by any number of ranks.
#pragma once

#include <filesystem>
#include <memory>

#include <nlohmann/json.hpp>

#include <fastmoe/io/sharded_checkpoint.hpp>

#include "train_gpt/checkpoint.hpp"

namespace train_gpt {

/// The manifest in the folder of a checkpoint that ranks have written.
inline std::string manifest_of(const std::string& folder)
{
    return (std::filesystem::path(folder) / "manifest.safetensors").string();
}

namespace detail {

inline std::string state_text(const run_state& s)
{
    return nlohmann::ordered_json{{"format", "train_gpt"},
                                  {"version", checkpoint_version},
                                  {"step", s.step},
                                  {"data_position", s.data_position},
                                  {"seed", s.seed},
                                  {"corpus", s.corpus},
                                  {"config", s.config}}
        .dump();
}

/// @throws format_error that names the file
inline run_state parse_state(const std::string& text, const std::string& path)
{
    const auto refuse = [&](const std::string& why) { fastmoe::raise<fastmoe::format_error>("'" + path + "': " + why); };
    run_state out;
    try {
        const auto json = nlohmann::json::parse(text);
        if (json.at("format") != "train_gpt") refuse("it is a checkpoint of ranks, but none of this program");
        if (json.at("version") != checkpoint_version)
            refuse("its version is " + json.at("version").dump() + "; expected " + std::to_string(checkpoint_version));
        out = {json.at("step").get<std::int64_t>(), json.at("data_position").get<std::int64_t>(),
               json.at("seed").get<std::uint64_t>(), json.at("corpus").get<std::uint64_t>(),
               json.at("config").get<std::string>()};
    } catch (const nlohmann::json::exception& e) {
        refuse(std::string("it is no checkpoint of this program: ") + e.what());
    }
    return out;
}

inline fastmoe::io::checkpoint_entry as_entry(const named_tensor& t)
{
    using namespace fastmoe::io;
    auto* data = static_cast<std::byte*>(t.data);
    checkpoint_entry out{t.name, entry_kind::replicated, t.type, t.shape, data, data, {}, {}, {}};
    if (t.whole < 0) return out;
    out.kind = entry_kind::per_expert;
    for (std::int64_t l = 0; l < t.shape[0]; ++l) out.experts.push_back(static_cast<std::int32_t>(t.first + l));
    return out;
}

} // namespace detail

/// Writes what R ranks have into a folder, which then shows the older checkpoint or this one, whatever is killed when.
/// Collective.
/// @param folder  there already, and one that all ranks see
/// @param role    replica for a rank whose experts another one has as well, and writes
/// @throws as save_sharded_checkpoint()
template <class Executor, class Communicator>
void save_parts(Executor& ex, const std::string& folder, const std::vector<named_tensor>& tensors, const run_state& state,
                const Communicator& c, fastmoe::io::checkpoint_role role)
{
    std::vector<fastmoe::io::checkpoint_entry> entries;
    for (const auto& t : tensors) entries.push_back(detail::as_entry(t));
    fastmoe::io::save_sharded_checkpoint(ex, manifest_of(folder), entries, c,
                                         {.step = state.step, .text = detail::state_text(state), .role = role});
}

/// A checkpoint that was found and whose place in the run is known. May be shared by threads.
class saved_run {
public:
    /// @param path  a file, or a folder that ranks have written, or its manifest
    /// @throws as checkpoint and sharded_checkpoint
    explicit saved_run(const std::string& path)
    {
        namespace fs = std::filesystem;
        std::error_code problem;
        if (fs::is_directory(path, problem)) manifest_ = manifest_of(path);
        else if (fs::path(path).filename() == fs::path(manifest_of({})).filename()) manifest_ = path;
        if (manifest_.empty()) {
            whole_ = std::make_shared<const checkpoint>(path);
            state_ = whole_->state();
        } else {
            state_ = detail::parse_state(fastmoe::io::sharded_checkpoint(manifest_).text(), manifest_);
        }
    }

    /// Of a file and a folder, the one that was written last; the file's path if neither is there.
    static std::string newest(const std::string& file, const std::string& folder)
    {
        namespace fs = std::filesystem;
        std::error_code no_file, no_folder;
        const auto of_file = fs::last_write_time(file, no_file);
        const auto of_folder = fs::last_write_time(manifest_of(folder), no_folder);
        return !no_folder && (no_file || of_folder > of_file) ? folder : file;
    }

    const run_state& state() const { return state_; }

    /// Copies into the caller's memory; nothing is written unless everything fits.
    /// @throws format_error that names the tensor, what the checkpoint has and what the model expects
    void load(const std::vector<named_tensor>& into) const
    {
        if (whole_) return whole_->load(into);
        fastmoe::io::sharded_checkpoint parts(manifest_);
        std::vector<fastmoe::io::checkpoint_entry> entries;
        for (const auto& t : into) entries.push_back(detail::as_entry(t));
        parts.load(entries);
    }

private:
    std::string manifest_;
    std::shared_ptr<const checkpoint> whole_;
    run_state state_;
};

} // namespace train_gpt
