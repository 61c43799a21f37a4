// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// R ranks write a checkpoint together: each a part under a new name, then rank 0 the manifest that names them, renamed last.
/// Part of sharded_checkpoint.hpp.
#pragma once

#include <cerrno>
#include <chrono>
#include <cstdint>
#include <exception>
#include <filesystem>
#include <string>
#include <utility>
#include <vector>

#include <fastmoe/io/checkpoint_entry.hpp>
#include <fastmoe/io/checkpoint_manifest.hpp>
#include <fastmoe/io/replace_file.hpp>
#include <fastmoe/parallel/agreement.hpp>

namespace fastmoe::inline FASTMOE_ABI {
namespace io {

struct sharded_save_options {
    int64_t step = 0; ///< the same on all ranks
    std::string text{}; ///< what else the caller wants to know of the run, in UTF-8; that of rank 0 is kept
    checkpoint_role role = checkpoint_role::writer; ///< of all experts' tensors of this rank
};

namespace detail {

using fastmoe::detail::compare_ranks;
using fastmoe::detail::sum_over_ranks;
using fastmoe::detail::with_own_scratch;

/// What stands beside a manifest and has the name of a part, finished or not, and the number in it.
struct part_files {
    std::vector<std::pair<std::string, int64_t>> found;

    explicit part_files(const std::string& path)
    {
        const std::filesystem::path manifest(path);
        const std::string begin = manifest.filename().string() + ".";
        std::error_code problem; // a folder that cannot be listed has nothing to clean
        const std::filesystem::path folder = manifest.has_parent_path() ? manifest.parent_path() : ".";
        for (auto at = std::filesystem::directory_iterator(folder, problem);
             !problem && at != std::filesystem::directory_iterator(); at.increment(problem)) {
            const std::string name = at->path().filename().string();
            std::string_view rest = name;
            if (!rest.starts_with(begin)) continue;
            rest.remove_prefix(begin.size());
            if (rest.ends_with(".partial")) rest.remove_suffix(8);
            const std::size_t dot = rest.find('.');
            if (dot == std::string_view::npos || !rest.ends_with(".part") || rest.size() < dot + 6) continue;
            int64_t save = 0, rank = 0;
            if (read_number(rest.substr(0, dot), save) && save < INT64_MAX && // of which there is no next one
                read_number(rest.substr(dot + 1, rest.size() - dot - 6), rank))
                found.emplace_back(at->path().string(), save);
        }
    }
    int64_t largest() const
    {
        int64_t out = 0;
        for (const auto& file : found) out = file.second > out ? file.second : out;
        return out;
    }
    /// Removes those of other saves. What cannot be removed now is left to the next save.
    void remove_but(int64_t save) const
    {
        for (const auto& file : found)
            if (file.second != save) ::unlink(file.first.c_str());
    }
};

/// One save by all ranks.
template <class Executor, class Communicator>
class joint_save {
public:
    joint_save(Executor& ex, const std::string& path, const Communicator& c) : ex_(ex), path_(end_of_links(path)), c_(c) {}

    void run(const std::vector<checkpoint_entry>& entries, const sharded_save_options& options)
    {
        int64_t facts[3] = {}; // the number of this save; how many tensors all ranks write; and leave to others
        safetensors own;
        together([&] {
            expects(options.step >= 0, "options.step", options.step, "zero or more");
            own = content_of(entries, options.role);
            facts[1] = static_cast<int64_t>(own.tensors.size());
            facts[2] = static_cast<int64_t>(of_others_.size());
            if (c_.rank() == 0) facts[0] = begin();
        }, options.step);
        with_own_scratch(ex_, [&](arena& scratch) { sum_over_ranks(ex_, c_, facts, scratch); });

        bool written = false;
        try {
            together([&] {
                if (c_.rank() != 0 && own.tensors.empty()) return;
                written = true;
                own.metadata["save"] = std::to_string(facts[0]);
                own.metadata["rank"] = std::to_string(c_.rank());
                write_safetensors(part_path(path_, facts[0], c_.rank()), own, {}, path_); // no more public than the manifest
            });
        } catch (...) {
            // If a rank is known to have failed, rank 0 knows as well, and no manifest will name the part. If a peer is gone,
            // rank 0 may be writing the manifest now: the part stays, and the next save removes it.
            if (written && refused_) ::unlink(part_path(path_, facts[0], c_.rank()).c_str());
            throw;
        }
        // From here on, parts stay whatever happens: if rank 0 fails after renaming, the manifest names them.
        safetensors content;
        const std::string draft = part_path(path_, facts[0], c_.size());
        together([&] {
            if (c_.rank() != 0) return;
            content = as_safetensors(gathered(facts[0], facts[1], options));
            write_safetensors(facts[2] > 0 ? draft : path_, content, {}, path_);
        });
        if (facts[2] > 0) { // who leaves something to others looks whether it is there
            together([&] { expects_saved(draft); });
            together([&] {
                if (c_.rank() == 0) write_safetensors(path_, content);
            });
        }
        if (c_.rank() != 0) return;
        if (facts[2] > 0) ::unlink(draft.c_str());
        part_files(path_).remove_but(facts[0]);
    }

private:
    /// Runs f on each rank. If it throws on one, or ranks have different numbers, all throw: a rank what f threw there, the
    /// others the text of the first rank that failed.
    template <class F>
    void together(const F& f, int64_t same = 0)
    {
        std::exception_ptr own;
        std::string said;
        try {
            f();
        } catch (const std::exception& e) {
            own = std::current_exception();
            said = e.what();
        }
        fastmoe::detail::rank_difference found{-1, 0, 0, 0};
        int64_t words[64] = {};
        try {
            const int64_t facts[] = {own != nullptr, same};
            with_own_scratch(ex_, [&](arena& scratch) { found = compare_ranks(ex_, c_, facts, scratch); });
            if (found.rank < 0) return;
            refused_ = true;
            const std::size_t bytes = said.size() < sizeof words ? said.size() : sizeof words;
            if (found.rank == c_.rank()) std::memcpy(words, said.data(), bytes);
            with_own_scratch(ex_, [&](arena& scratch) { sum_over_ranks(ex_, c_, words, scratch); });
        } catch (...) {
            if (own) std::rethrow_exception(own);
            throw;
        }
        if (own) std::rethrow_exception(own);
        const std::string rank = "rank " + std::to_string(found.rank);
        if (found.column != 0)
            raise<comm_error>("options.step of " + rank + " is " + std::to_string(found.value) + "; expected " +
                              std::to_string(found.expected) + ", as on rank 0");
        const char* text = reinterpret_cast<const char*>(words);
        const std::string why(text, ::strnlen(text, sizeof words));
        raise<error>("cannot save " + name_text(path_) + ": " + rank + " failed: " + why);
    }

    /// This rank's tensors under their keys, with their checksums.
    safetensors content_of(const std::vector<checkpoint_entry>& entries, checkpoint_role role)
    {
        safetensors out;
        out.metadata["format"] = part_format;
        for (const checkpoint_entry& e : entries) {
            expects_entry(e);
            const bool others = role == checkpoint_role::replica || e.role == checkpoint_role::replica;
            const bool is_replicated = e.kind == entry_kind::replicated;
            if (is_replicated && c_.rank() != 0) continue;
            for_each_part(e, [&](entry_part part) {
                if (part.empty_slice()) return; // others have all there is
                if (others && !is_replicated) {
                    of_others_.push_back(part.key);
                    return;
                }
                const std::string key = stored_key(part);
                const bool fresh = out.tensors.emplace(key, part.tensor).second;
                expects(fresh, "entry", name_text(key) + ", for the second time", "each tensor once");
                out.metadata["sum/" + key] = hex_text(checksum_of(key, part.tensor));
            });
        }
        expects_tensors(out.tensors);
        return out;
    }

    /// What this rank leaves to others must be in the manifest to be.
    void expects_saved(const std::string& draft) const
    {
        if (of_others_.empty()) return;
        const manifest all = read_manifest(draft);
        for (const std::string& key : of_others_) {
            const auto slice = all.tensors.lower_bound(key + "[");
            const bool found = all.tensors.contains(key) || (slice != all.tensors.end() && slice->first.starts_with(key + "["));
            expects(found, "entry", name_text(key) + ", a replica", "a rank that writes it; those that have it are replicas all");
        }
    }

    /// Removes what crashed saves have left, and gives the number of this one: no file has it, and neither will a process
    /// of an older run that still hangs somewhere.
    int64_t begin() const
    {
        const part_files there(path_);
        int64_t present = 0;
        struct stat any;
        if (::lstat(path_.c_str(), &any) != 0 && errno == ENOENT) there.remove_but(-1);
        else { // what cannot be read is not known to be of no use
            try {
                present = read_manifest(path_).save;
                there.remove_but(present);
            } catch (const format_error&) { // what it named is not known, so nothing is removed until the new one stands
            }
        }
        const int64_t least = (there.largest() > present ? there.largest() : present) + 1;
        const auto now = std::chrono::system_clock::now().time_since_epoch();
        const int64_t clock = std::chrono::duration_cast<std::chrono::nanoseconds>(now).count();
        return clock > least ? clock : least;
    }

    /// The manifest, from the parts as rank 0 sees them: they must be there, intact, and hold each tensor once.
    manifest gathered(int64_t save, int64_t tensors, const sharded_save_options& options) const
    {
        manifest out;
        out.save = save;
        out.step = options.step;
        out.ranks = c_.size();
        out.text = options.text;
        int64_t seen = 0;
        for (int64_t rank = 0; rank < c_.size(); ++rank) {
            struct stat there;
            if (::stat(part_path(path_, save, rank).c_str(), &there) != 0) continue;
            out.parts[rank] = there.st_size;
            const safetensors_file part = open_part(path_, out, rank);
            const pair_reader in{part.path(), part.metadata()};
            for (const auto& [key, t] : part.tensors()) {
                const stored_tensor where{rank, in.number<std::uint64_t>("sum/" + key, 16)};
                const auto [at, fresh] = out.tensors.emplace(key, where);
                if (!fresh)
                    raise<invalid_argument>("tensor " + name_text(key) + " is of ranks " + std::to_string(at->second.rank) +
                                            " and " + std::to_string(rank) + "; expected one writer, the others to be replicas");
                ++seen;
            }
        }
        expects<error>(seen == tensors, "the number of tensors in the parts that rank 0 finds", seen, tensors,
                       ", as written: a folder that all ranks share");
        for (const auto& [key, where] : out.tensors)
            if (const std::size_t range = key.find('['); key.ends_with(']') && range != std::string::npos)
                pieces_of(out, std::string_view(key).substr(0, key.rfind('[')), path_);
        return out;
    }

    Executor& ex_;
    std::string path_; ///< where the links end that the caller's may begin: parts lie beside the manifest itself
    const Communicator& c_;
    std::vector<std::string> of_others_; ///< plain keys of what this rank has as a replica
    bool refused_ = false;               ///< all ranks know that one has failed
};

} // namespace detail

/// Saves what R ranks have so that any R' can load it: the tensors of experts under their global ids, all others once. At
/// `path` is a manifest; beside it the parts "<path>.<number>.<rank>.part", safetensors files all. The ranks share the
/// folder. Whatever is killed at any moment, the path shows a whole checkpoint, the one before or the new one; what a save
/// leaves that was cut short, the next one removes, and the old parts go when the new manifest stands.
/// Collective. The data is read on the host; the executor serves the communicator alone, whose deadline has to allow for
/// what the slowest rank needs to write its part.
/// Ranks that are replicas read the new manifest before it stands, so that no expert is left to a writer that there is not.
/// @param entries  this rank's; each tensor of an expert is of one writer, which may be any rank that has it
/// @throws error on all ranks if one cannot write, invalid_argument on one whose entries make no sense (and error on the
///         others), comm_error if a peer is gone: the checkpoint that stood there is then unchanged, unless the text says
///         that the new one was written
template <executor Executor, counts_ranks Communicator>
void save_sharded_checkpoint(Executor& ex, const std::string& path, const std::vector<checkpoint_entry>& entries,
                             const Communicator& c, const sharded_save_options& options = {})
{
    detail::joint_save<Executor, Communicator>(ex, path, c).run(entries, options);
}

} // namespace io
} // namespace fastmoe::inline FASTMOE_ABI
