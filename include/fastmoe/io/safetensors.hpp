// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Safetensors files: a reader that gives checked, typed, aligned views, and a writer that leaves whole files only.
/// Needs nlohmann-json and POSIX; included by name, never by an umbrella.
#pragma once

#include <memory>

#include <sys/mman.h>

#include <fastmoe/io/replace_file.hpp>
#include <fastmoe/io/safetensors_header.hpp>

namespace fastmoe::inline FASTMOE_ABI {
namespace io {

/// A file on disk, mapped and checked as a whole when it is opened; the views live as long as this object.
/// A tensor whose place is misaligned for its type is copied once. The file must not be cut short while it is open;
/// a writer that renames, as write_safetensors does, never does that.
class safetensors_file {
public:
    /// @throws invalid_argument if there is no such file or it cannot be read, format_error if its content is wrong
    explicit safetensors_file(const std::string& path) : path_(path)
    {
        // Without O_NONBLOCK, opening a pipe would wait for its writer.
        const int file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
        if (file < 0) refuse(std::strerror(errno));
        struct stat there;
        const bool regular = ::fstat(file, &there) == 0 && S_ISREG(there.st_mode);
        size_ = regular ? static_cast<std::size_t>(there.st_size) : 0;
        void* memory = size_ ? ::mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file, 0) : nullptr;
        const int why = errno;
        ::close(file);
        if (!regular) refuse("it is a folder or a device");
        if (memory == MAP_FAILED) refuse(std::strerror(why));
        memory_ = mapping(static_cast<std::byte*>(memory), unmap{size_});
        content_ = parse_safetensors(memory_.get(), size_, path);
        for (auto& [name, t] : content_.tensors) align(t);
    }

    /// As it was given to the constructor.
    const std::string& path() const { return path_; }
    /// All tensors by name, each aligned for its type.
    const safetensor_map& tensors() const { return content_.tensors; }
    /// The strings of "__metadata__"; empty if the file has none.
    const metadata_map& metadata() const { return content_.metadata; }
    bool contains(std::string_view name) const { return content_.tensors.find(name) != content_.tensors.end(); }

    /// A tensor by name. @throws format_error if there is none
    const safetensor& at(std::string_view name) const
    {
        const auto found = content_.tensors.find(name);
        if (found == content_.tensors.end()) detail::refuse_file(path_, name, "is missing");
        return found->second;
    }

    /// A tensor of T with any extents. @throws format_error if it is missing, or has another dtype or rank
    template <class T, std::size_t Rank>
    tensor_view<const T, Rank> view(std::string_view name) const
    {
        static_assert(element_type_of<T> != element_type::count_, "safetensors has no name for this element type");
        const safetensor& t = at(name);
        if (t.type != element_type_of<T> || t.shape.size() != Rank)
            detail::refuse_file(path_, name,
                                facts(t) + "; expected " + name_of(element_type_of<T>) + " of rank " +
                                    std::to_string(Rank));
        ::cuda::std::array<int64_t, Rank> extents{};
        for (std::size_t i = 0; i < Rank; ++i) extents[i] = t.shape[i];
        return tensor_view<const T, Rank>(reinterpret_cast<const T*>(t.data), extents);
    }

    /// A tensor of T with these extents. @throws format_error if it is missing, or has another dtype or shape
    template <class T, class... Extents>
    tensor_view<const T, sizeof...(Extents)> view(std::string_view name, Extents... extents) const
    {
        const safetensor& t = at(name);
        const std::vector<int64_t> wanted{static_cast<int64_t>(extents)...};
        if (t.type != element_type_of<T> || t.shape != wanted)
            detail::refuse_file(path_, name,
                                facts(t) + "; expected " + name_of(element_type_of<T>) + " of shape " +
                                    detail::shape_text(wanted));
        return view<T, sizeof...(Extents)>(name);
    }

private:
    struct unmap {
        std::size_t size;
        void operator()(std::byte* p) const { ::munmap(p, size); }
    };
    using mapping = std::unique_ptr<std::byte, unmap>;

    /// What a tensor is, for a message.
    static std::string facts(const safetensor& t)
    {
        return std::string("is ") + name_of(t.type) + " of shape " + detail::shape_text(t.shape);
    }

    [[noreturn]] void refuse(const char* why) const
    {
        raise<invalid_argument>("path is " + detail::name_text(path_) + ": " + why + "; expected a readable file");
    }

    /// Replaces a misaligned pointer by that of a copy.
    void align(safetensor& t)
    {
        if (reinterpret_cast<std::uintptr_t>(t.data) % static_cast<std::size_t>(bytes_of(t.type)) == 0) return;
        const auto bytes = static_cast<std::size_t>(t.bytes());
        copies_.push_back(std::make_unique<std::byte[]>(bytes));
        if (bytes > 0) std::memcpy(copies_.back().get(), t.data, bytes);
        t.data = copies_.back().get();
    }

    std::string path_;
    std::size_t size_ = 0;
    mapping memory_{nullptr, unmap{0}};
    std::vector<std::unique_ptr<std::byte[]>> copies_;
    safetensors content_;
};

namespace detail {

/// Throws invalid_argument unless the tensors are ones that the reader will take, and that can be read from memory.
inline void expects_tensors(const safetensor_map& tensors)
{
    int64_t total = 0;
    for (const auto& [name, t] : tensors) {
        const std::string what = "tensor " + name_text(name);
        const char* const argument = what.c_str();
        const auto type = static_cast<int>(t.type);
        expects(name != "__metadata__", argument, "a tensor", "another name: the format reserves it");
        expects(type < static_cast<int>(element_type::count_), argument, "of type " + std::to_string(type), "one of element_type");
        bool fits = true, negative = false;
        int64_t bytes = bytes_of(t.type);
        for (int64_t extent : t.shape) negative = negative || extent < 0;
        for (int64_t extent : t.shape) fits = fits && !__builtin_mul_overflow(bytes, extent, &bytes);
        fits = fits && !__builtin_add_overflow(total, bytes, &total);
        const std::string shape = "of shape " + shape_text(t.shape);
        expects(!negative, argument, shape, "extents of 0 or more");
        expects(fits, argument, shape, "no more bytes than 63 bits can count, with the tensors before it");
        expects(t.data != nullptr || bytes == 0, argument, "a null pointer", std::to_string(bytes) + " bytes of memory");
    }
}

/// The header and its tensors' places: wide elements first, then by name, so that everything in the file is aligned.
inline std::string header_text(const safetensors& content)
{
    const auto text = [](std::string_view s) {
        try {
            return nlohmann::json(s).dump();
        } catch (const nlohmann::json::exception&) {
            raise<invalid_argument>("name or metadata is " + name_text(s) + "; expected UTF-8");
        }
    };
    std::string out = "{";
    for (const auto& [key, value] : content.metadata)
        out += (out.size() == 1 ? "\"__metadata__\":{" : ",") + text(key) + ":" + text(value);
    if (!content.metadata.empty()) out += "}";
    int64_t place = 0;
    for (int width = 8; width > 0; width /= 2)
        for (const auto& [name, t] : content.tensors) {
            if (bytes_of(t.type) != width) continue;
            const std::string begin = std::to_string(place);
            place += t.bytes();
            std::string shape;
            for (int64_t extent : t.shape) shape += (shape.empty() ? "" : ",") + std::to_string(extent);
            out += (out.size() == 1 ? "" : ",") + text(name) + ":{\"dtype\":\"" + name_of(t.type) + "\",\"shape\":[" +
                   shape + "],\"data_offsets\":[" + begin + "," + std::to_string(place) + "]}";
        }
    out += "}";
    out.append((64 - (out.size() + 8) % 64) % 64, ' '); // data begins on a cache line of the mapping
    return out;
}

} // namespace detail

/// Writes a file that stands at its path as a whole or not at all: see replace_file. The same content, the same bytes.
/// @param keep_previous_as  where the file that stood there stays readable; empty = it is let go
/// @param permissions_of    a file whose permissions the new one gets if none stood there
/// @throws invalid_argument for a name that is not UTF-8, a tensor without memory or with a shape that none has, more names
///         and shapes than a header may hold, or a path that is no file; error if the disk refuses
inline void write_safetensors(const std::string& path, const safetensors& content,
                              const std::string& keep_previous_as = {}, const std::string& permissions_of = {})
{
    detail::expects_tensors(content.tensors);
    const std::string header = detail::header_text(content);
    expects(header.size() <= detail::longest_header, "header", header.size(), "at most ", detail::longest_header, " bytes");
    unsigned char length[8];
    for (int i = 0; i < 8; ++i) length[i] = static_cast<unsigned char>(header.size() >> 8 * i);
    replace_file file(path, permissions_of);
    file.write(length, sizeof length);
    file.write(header);
    for (int width = 8; width > 0; width /= 2)
        for (const auto& [name, t] : content.tensors)
            if (bytes_of(t.type) == width) file.write(t.data, static_cast<std::size_t>(t.bytes()));
    file.commit(keep_previous_as);
}

} // namespace io
} // namespace fastmoe::inline FASTMOE_ABI
