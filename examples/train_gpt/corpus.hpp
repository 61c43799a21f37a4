// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Text for training: files to bytes, a split by file, and batches that depend on nothing but the seed and the step.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include <fastmoe/core/tensor.hpp>

namespace train_gpt {

/// Byte-level text: a token is a byte. Each file is followed by one zero byte, which text never holds.
struct corpus {
    std::string path;
    std::int64_t files = 0;        ///< that are in one of the parts
    std::int64_t bytes = 0;        ///< of text; the zero bytes behind the files are not counted
    std::uint64_t fingerprint = 0; ///< of both parts: another text, another split or another order changes it
    std::vector<std::uint8_t> train;
    std::vector<std::uint8_t> validation;
};

namespace detail {

/// A 64-bit finalizer: every bit of the result depends on every bit of n.
inline std::uint64_t mix(std::uint64_t n)
{
    n = (n ^ n >> 30) * 0xbf58476d1ce4e5b9u;
    n = (n ^ n >> 27) * 0x94d049bb133111ebu;
    return n ^ n >> 31;
}

/// FNV-1a over bytes, mixed at the end; `from` continues an earlier hash.
inline std::uint64_t hash_bytes(std::string_view bytes, std::uint64_t from = 0xcbf29ce484222325u)
{
    for (const char c : bytes) from = (from ^ static_cast<std::uint8_t>(c)) * 0x100000001b3u;
    return mix(from);
}

/// Whether a person could read it: no zero byte, and hardly any other control character.
inline bool looks_like_text(std::string_view bytes)
{
    std::size_t odd = 0;
    for (const unsigned char c : bytes) {
        if (c == 0) return false;
        odd += c < 0x20 && !(c >= '\b' && c <= '\r') && c != 0x1b;
    }
    return !bytes.empty() && odd * 200 <= bytes.size();
}

/// A file's first `most` bytes.
inline std::string read_bytes(const std::filesystem::path& path, std::int64_t most)
{
    std::ifstream in(path, std::ios::binary);
    std::string out;
    char block[1 << 16];
    while (std::ssize(out) < most && (in.read(block, sizeof block) || in.gcount() > 0))
        out.append(block, static_cast<std::size_t>(std::min<std::int64_t>(in.gcount(), most - std::ssize(out))));
    const bool read = in.is_open() && !in.bad();
    fastmoe::expects(read, "--text", "'" + path.string() + "', which cannot be read", "a readable file");
    return out;
}

struct text_file {
    std::string name; // relative to the folder, '/' between its parts
    std::filesystem::path path;
    std::uint64_t order; // a hash of the name: the draw that decides cap and split
    std::string bytes;
};

/// All regular files below a folder but hidden ones. Links to folders are not followed, so there are no cycles.
inline std::vector<text_file> list_files(const std::filesystem::path& root)
{
    namespace fs = std::filesystem;
    std::vector<text_file> out;
    if (!fs::is_directory(root)) return {{root.filename().generic_string(), root, 0, {}}};
    std::error_code why;
    fs::recursive_directory_iterator at(root, why);
    for (const fs::recursive_directory_iterator end; !why && at != end; at.increment(why)) {
        const std::string name = at->path().filename().generic_string();
        std::error_code ignored;
        if (name[0] == '.') {
            if (at->is_directory(ignored)) at.disable_recursion_pending();
        } else if (at->is_regular_file(ignored)) {
            const std::string relative = at->path().lexically_relative(root).generic_string();
            out.push_back({relative, at->path(), hash_bytes(relative), {}});
        }
    }
    fastmoe::expects(!why, "--text", "'" + root.string() + "'", "a readable folder: " + why.message());
    std::sort(out.begin(), out.end(),
              [](const auto& a, const auto& b) { return std::tie(a.order, a.name) < std::tie(b.order, b.name); });
    return out;
}

/// Reads files in the order drawn until the cap is reached. Leaves out what is no text and what is a copy of an earlier
/// file, since a copy in the other part would make the validation loss a lie.
inline std::vector<text_file> read_texts(std::vector<text_file> files, std::int64_t max_bytes)
{
    std::vector<text_file> out;
    std::map<std::uint64_t, std::size_t> seen;
    std::int64_t left = max_bytes > 0 ? max_bytes : INT64_MAX;
    for (text_file& f : files) {
        if (left == 0) break;
        f.bytes = read_bytes(f.path, left);
        if (!looks_like_text(f.bytes)) continue;
        const auto [earlier, fresh] = seen.emplace(hash_bytes(f.bytes), out.size());
        if (!fresh && out[earlier->second].bytes == f.bytes) continue;
        left -= std::ssize(f.bytes);
        out.push_back(std::move(f));
    }
    return out;
}

/// Which files validate: in the order drawn, each that still fits into a tenth of the bytes; the smallest if none does.
inline std::vector<bool> validating(const std::vector<text_file>& files)
{
    std::size_t total = 0;
    std::size_t smallest = 0;
    for (std::size_t i = 0; i < files.size(); ++i) {
        total += files[i].bytes.size();
        if (files[i].bytes.size() < files[smallest].bytes.size()) smallest = i;
    }
    std::vector<bool> out(files.size());
    std::size_t taken = 0;
    for (std::size_t i = 0; i < files.size(); ++i)
        if (taken + files[i].bytes.size() <= total / 10) {
            out[i] = true;
            taken += files[i].bytes.size();
        }
    if (taken == 0) out[smallest] = true;
    return out;
}

inline void append(std::vector<std::uint8_t>& part, std::string_view text)
{
    part.insert(part.end(), text.begin(), text.end());
    part.push_back(0);
}

} // namespace detail

/// Where the text comes from when nobody says: the headers of the C++ standard library that this program was built
/// with, or else the newest that the machine has. Empty if it has none.
/// TRAIN_GPT_DEFAULT_TEXT, if the build defines it, is tried first.
inline std::string default_text_path()
{
    namespace fs = std::filesystem;
    std::vector<std::string> tries;
#if defined(TRAIN_GPT_DEFAULT_TEXT)
    tries.push_back(TRAIN_GPT_DEFAULT_TEXT);
#endif
#if defined(_GLIBCXX_RELEASE)
    for (const char* prefix : {"/usr", "/usr/local"})
        tries.push_back(std::string(prefix) + "/include/c++/" + std::to_string(_GLIBCXX_RELEASE));
#endif
    std::error_code why;
    std::map<int, std::string> versions; // by number, so that 9 comes before 12
    for (const auto& entry : fs::directory_iterator("/usr/include/c++", why))
        versions[std::atoi(entry.path().filename().c_str())] = entry.path().string();
    for (auto v = versions.rbegin(); v != versions.rend(); ++v) tries.push_back(v->second);
    for (const auto& entry : fs::directory_iterator("/usr/lib", why))
        if (entry.path().filename().string().starts_with("llvm"))
            tries.push_back(entry.path().string() + "/include/c++/v1");
    for (const std::string& path : tries)
        if (fs::exists(path + "/vector", why)) return path;
    return {};
}

/// Reads a file, or a folder with all below it that looks like text. Hidden files and copies are left out.
/// A folder is split by file: about a tenth of the bytes validates, drawn by a hash of the files' names, and each part
/// has at least one file. A single file is split by place: its last tenth validates.
/// @param max_bytes  reads no more text than this; a folder's files are drawn in the order of that hash. 0 = everything
/// @throws invalid_argument if the path is missing or unreadable, or holds no text
inline corpus read_corpus(const std::string& path, std::int64_t max_bytes = 0)
{
    using fastmoe::expects;
    const std::string shown = "'" + path + "'";
    std::error_code why;
    expects(!path.empty(), "--text", "empty", "a file or a folder: this machine has no C++ standard library headers");
    const auto status = std::filesystem::status(path, why);
    expects(std::filesystem::exists(status), "--text", shown + ", which does not exist", "a file or a folder");
    const bool device = !std::filesystem::is_regular_file(status) && !std::filesystem::is_directory(status);
    expects(!device, "--text", shown + ", which is a device or a pipe", "a file or a folder");
    expects(max_bytes >= 0, "max_bytes", max_bytes, "0 for everything, or a number of bytes");
    auto files = detail::read_texts(detail::list_files(path), max_bytes);
    expects(!files.empty(), "--text", shown + ", which holds no text",
            "at least one file that is not empty and not binary");

    corpus out{path, static_cast<std::int64_t>(files.size()), 0, 0, {}, {}};
    const std::vector<bool> validates = detail::validating(files);
    for (std::size_t i = 0; i < files.size(); ++i) {
        const std::string_view text = files[i].bytes;
        out.bytes += static_cast<std::int64_t>(text.size());
        if (files.size() == 1) {
            const std::size_t cut = text.size() - text.size() / 10;
            detail::append(out.train, text.substr(0, cut));
            detail::append(out.validation, text.substr(cut));
        } else {
            detail::append(validates[i] ? out.validation : out.train, text);
        }
    }
    for (const auto* part : {&out.train, &out.validation})
        out.fingerprint =
            detail::hash_bytes({reinterpret_cast<const char*>(part->data()), part->size()}, out.fingerprint + 1);
    return out;
}

/// Batches over a corpus. Window n of training is a pure function of (seed, n): a resumed run needs its step only.
/// An epoch cuts the text at a random phase into windows of `context` targets and visits each once, in random order.
class batch_source {
public:
    /// @param text  referenced: it must outlive the source
    /// @throws invalid_argument if a part of the text is shorter than one window
    batch_source(const corpus& text, std::int64_t batch, std::int64_t context, std::uint64_t seed)
        : text_(text), batch_(batch), context_(context), seed_(seed)
    {
        fastmoe::expects(batch > 0, "batch", batch, "at least 1");
        fastmoe::expects(context > 0, "context", context, "at least 1");
        for (const auto* part : {&text.train, &text.validation})
            fastmoe::expects(std::ssize(*part) > context, "--text",
                             "'" + text.path + "' with " + std::to_string(part->size()) + " bytes for " +
                                 (part == &text.train ? "training" : "validation"),
                             "more than the context of ", context, " bytes: give more text or a smaller context");
        const std::int64_t train = std::ssize(text.train);
        // One window is given up to the phase, unless there is only one.
        epoch_ = std::max<std::int64_t>(1, (train - context) / context);
        phases_ = train - epoch_ * context;
        for (half_bits_ = 1; std::int64_t{1} << 2 * half_bits_ < epoch_; ++half_bits_) {
        }
    }

    std::int64_t batch() const { return batch_; }
    std::int64_t context() const { return context_; }

    /// Windows in an epoch.
    std::int64_t epoch() const { return epoch_; }

    /// Windows read before this step.
    std::int64_t position(std::int64_t step) const { return step * batch_; }

    /// Overwrites tokens with the batch of a step; inputs are columns [0, context), targets [1, context].
    /// @param tokens  (batch, context+1)
    void training(std::int64_t step, fastmoe::matrix_view<std::int32_t> tokens) const
    {
        fastmoe::expects_shape(tokens, "tokens (batch, context+1)", batch_, context_ + 1);
        for (std::int64_t b = 0; b < batch_; ++b) copy(text_.train, start_of(position(step) + b), tokens, b);
    }

    /// How many windows of validation do not overlap.
    std::int64_t validation_windows() const { return (std::ssize(text_.validation) - 1) / context_; }

    /// Overwrites tokens with windows [first, first + rows of tokens) of a fixed set of `windows`, which are spread
    /// evenly over the validation text. The same for every seed, step and batch size.
    /// @param tokens  (any, context+1)
    void validation(std::int64_t first, std::int64_t windows, fastmoe::matrix_view<std::int32_t> tokens) const
    {
        fastmoe::expects_shape(tokens, "tokens (any, context+1)", tokens.extent(0), context_ + 1);
        fastmoe::expects(windows > 0 && windows <= validation_windows(), "windows", windows, "1 to ",
                         validation_windows());
        fastmoe::expects(first >= 0 && first + tokens.extent(0) <= windows, "first", first, "a window below ", windows,
                         " for each row of tokens");
        const std::int64_t last = std::ssize(text_.validation) - 1 - context_;
        for (std::int64_t i = 0; i < tokens.extent(0); ++i)
            copy(text_.validation, windows == 1 ? 0 : last * (first + i) / (windows - 1), tokens, i);
    }

private:
    /// Where window n of the training text begins.
    std::int64_t start_of(std::int64_t n) const
    {
        const auto key = detail::mix(seed_ ^ detail::mix(static_cast<std::uint64_t>(n / epoch_) + 1));
        const auto phase = static_cast<std::int64_t>(detail::mix(key) % static_cast<std::uint64_t>(phases_));
        return phase + permuted(static_cast<std::uint64_t>(n % epoch_), key) * context_;
    }

    /// A permutation of [0, epoch): four Feistel rounds over the next power of four, walked until inside.
    std::int64_t permuted(std::uint64_t n, std::uint64_t key) const
    {
        const std::uint64_t mask = (std::uint64_t{1} << half_bits_) - 1;
        do {
            for (std::uint64_t round = 0; round < 4; ++round)
                n = (n & mask) << half_bits_ |
                    ((n >> half_bits_ ^ detail::mix(key + (round << 60) + (n & mask))) & mask);
        } while (n >= static_cast<std::uint64_t>(epoch_));
        return static_cast<std::int64_t>(n);
    }

    void copy(const std::vector<std::uint8_t>& part, std::int64_t start, fastmoe::matrix_view<std::int32_t> tokens,
              std::int64_t i) const
    {
        for (std::int64_t j = 0; j <= context_; ++j) tokens(i, j) = part[static_cast<std::size_t>(start + j)];
    }

    const corpus& text_;
    std::int64_t batch_;
    std::int64_t context_;
    std::uint64_t seed_;
    std::int64_t epoch_;
    std::int64_t phases_; ///< shifts of the grid that an epoch may draw
    int half_bits_;
};

} // namespace train_gpt
