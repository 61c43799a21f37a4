// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// What a rank puts into a checkpoint of R ranks, and asks of one: tensors that all ranks have alike, and those of experts,
/// under the experts' global ids, so that it does not matter who had them.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include <fastmoe/io/safetensor.hpp>
#include <fastmoe/parallel/parameter.hpp>

namespace fastmoe::inline FASTMOE_ABI {
namespace io {

enum class entry_kind : std::uint8_t {
    replicated, ///< the same on all ranks; stored once, by rank 0
    per_expert, ///< the leading axis is that of this rank's experts; each is stored under its global id
};

/// Whether a rank writes what it has of experts, or another does that has the same.
enum class checkpoint_role : std::uint8_t {
    writer,
    replica, ///< e.g. on rank 1 and higher of the data-parallel group
};

/// The part that a rank has of each of its experts' tensors: from `begin` on along an axis whose whole extent is `total`.
/// The axes are those of one expert's tensor: 0 is the one behind the experts.
struct expert_slice {
    int axis = 0;
    int64_t begin = 0;
    int64_t total = -1; ///< -1: the rank has all of it
};

/// A tensor in host memory. Optimizer state is further entries, e.g. "blocks.0.up/m"; names do not end in ']'.
struct checkpoint_entry {
    std::string name;
    entry_kind kind{};
    element_type type{};
    std::vector<int64_t> shape;      ///< per_expert: (L, ...)
    const std::byte* data = nullptr; ///< what is saved
    std::byte* room = nullptr;       ///< the same memory, if it may be written: where a load goes
    std::vector<int32_t> experts;    ///< per_expert: global ids                      // (L)
    expert_slice slice{};
    checkpoint_role role{};          ///< of this tensor, e.g. a bias that is whole on every rank with a slice
};

namespace detail {

template <class T, class Shape>
checkpoint_entry entry_of(std::string name, ::cuda::std::mdspan<T, Shape> v)
{
    const safetensor t = as_safetensor(v);
    checkpoint_entry out{std::move(name), entry_kind::replicated, t.type, t.shape, t.data, nullptr, {}, {}, {}};
    if constexpr (!std::is_const_v<T>) out.room = reinterpret_cast<std::byte*>(v.data_handle());
    return out;
}

} // namespace detail

/// A tensor that all ranks have alike: the gate, the dense part.
template <class T, class Shape>
checkpoint_entry replicated_entry(std::string name, ::cuda::std::mdspan<T, Shape> v)
{
    return detail::entry_of(std::move(name), v);
}

/// Tensors of this rank's experts, (L, ...), or its slices of them.
/// @param experts  global ids                                                        // (L)
template <class T, class Shape>
checkpoint_entry expert_entry(std::string name, ::cuda::std::mdspan<T, Shape> v,
                              type_identity_t<vector_view<const int32_t>> experts, expert_slice slice = {})
{
    checkpoint_entry out = detail::entry_of(std::move(name), v);
    out.kind = entry_kind::per_expert;
    for (int64_t i = 0; i < experts.extent(0); ++i) out.experts.push_back(experts(i));
    out.slice = slice;
    return out;
}
/// Weights of this rank's experts, as they lie in memory: (L,out,in), or (L,in,out) if they are transposed.
/// @throws invalid_argument as packed()
template <class T>
checkpoint_entry expert_entry(std::string name, const weight_view<T>& w, vector_view<const int32_t> experts,
                              expert_slice slice = {})
{
    return expert_entry(std::move(name), packed(w), experts, slice);
}

namespace detail {

/// One tensor of an entry: all of it, or that of one expert.
struct entry_part {

    std::string key;      ///< the name under which it is stored, without the range of a slice
    safetensor tensor;    ///< this rank's; the data of a part that is to be loaded is in the entry
    int64_t offset = 0;   ///< bytes from the beginning of the entry
    expert_slice slice{}; ///< total is -1 unless it is a slice

    bool empty_slice() const { return slice.total >= 0 && tensor.shape[static_cast<std::size_t>(slice.axis)] == 0; }
};

/// "<name>.<id>[<axis>:<begin>:<end>:<total>]" for a slice, the plain key otherwise.
inline std::string stored_key(const entry_part& part)
{
    if (part.slice.total < 0) return part.key;
    const int64_t end = part.slice.begin + part.tensor.shape[static_cast<std::size_t>(part.slice.axis)];
    return part.key + "[" + std::to_string(part.slice.axis) + ":" + std::to_string(part.slice.begin) + ":" +
           std::to_string(end) + ":" + std::to_string(part.slice.total) + "]";
}

/// Throws invalid_argument unless an entry makes sense.
inline void expects_entry(const checkpoint_entry& e)
{
    const std::string what = "entry " + name_text(e.name);
    const char* const argument = what.c_str();
    expects(!e.name.empty() && e.name.back() != ']', argument, "of this name", "a name that does not end in ']'");
    const std::string type = "of type " + std::to_string(static_cast<int>(e.type));
    expects(e.type < element_type::count_, argument, type, "one of element_type");
    int64_t bytes = bytes_of(e.type);
    bool fits = true;
    for (const int64_t extent : e.shape) fits = fits && extent >= 0 && !__builtin_mul_overflow(bytes, extent, &bytes);
    const std::string shape = "of shape " + shape_text(e.shape);
    expects(fits, argument, shape, "extents of 0 or more, and no more bytes than 63 bits can count");
    expects(e.data != nullptr || bytes == 0, argument, "a null pointer", std::to_string(bytes) + " bytes of memory");
    if (e.kind == entry_kind::replicated) return;
    const auto local = static_cast<int64_t>(e.experts.size());
    expects(!e.shape.empty() && e.shape[0] == local, argument, shape, "a leading axis of its ", local, " experts");
    for (const int32_t id : e.experts) expects(id >= 0, argument, "of expert " + std::to_string(id), "global ids from 0 on");
    if (e.slice.total == -1) return;
    const bool axis = e.slice.axis >= 0 && e.slice.axis + 1 < static_cast<int>(e.shape.size());
    expects(axis, argument, "cut along axis " + std::to_string(e.slice.axis), "an axis of one expert's tensor");
    const int64_t extent = e.shape[static_cast<std::size_t>(e.slice.axis) + 1], total = e.slice.total;
    const bool inside = e.slice.begin >= 0 && extent <= total && e.slice.begin <= total - extent;
    expects(inside, argument, "cut from " + std::to_string(e.slice.begin) + " on, " + std::to_string(extent) + " long",
            "a range inside of ", total);
}

/// f(entry_part) for every tensor of a checked entry. A slice that is all of its tensor is no slice.
template <class F>
void for_each_part(const checkpoint_entry& e, const F& f)
{
    if (e.kind == entry_kind::replicated) return f(entry_part{e.name, {e.type, e.shape, e.data}, 0, {}});
    const std::vector<int64_t> shape(e.shape.begin() + 1, e.shape.end());
    const bool cut = e.slice.total >= 0 && shape[static_cast<std::size_t>(e.slice.axis)] != e.slice.total;
    const expert_slice slice = cut ? e.slice : expert_slice{};
    const int64_t bytes = safetensor{e.type, shape, nullptr}.bytes();
    for (std::size_t i = 0; i < e.experts.size(); ++i) {
        const int64_t offset = static_cast<int64_t>(i) * bytes;
        const std::byte* data = e.data ? e.data + offset : nullptr;
        f(entry_part{e.name + "." + std::to_string(e.experts[i]), {e.type, shape, data}, offset, slice});
    }
}

} // namespace detail
} // namespace io
} // namespace fastmoe::inline FASTMOE_ABI
