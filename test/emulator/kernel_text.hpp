// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// Kernels written by hand, run by the emulator.
#pragma once

#include <doctest/doctest.h>

#include <cstring>
#include <string>
#include <vector>

#include "support/emulator/device.hpp"
#include "support/emulator/tensor_map.hpp"

namespace emulated {

/// Memory that kernels may touch, with nothing behind it.
template <class T>
class memory {
public:
    explicit memory(std::vector<T> values) : values_(std::move(values))
    {
        emulator::memory_map::instance().add(values_.data(), values_.size() * sizeof(T), emulator::memory_kind::device);
    }
    ~memory() { emulator::memory_map::instance().remove(values_.data()); }
    memory(const memory&) = delete;
    std::uint64_t address() const { return reinterpret_cast<std::uintptr_t>(values_.data()); }
    T operator[](std::size_t i) const { return values_[i]; }
    std::size_t size() const { return values_.size(); }
    const std::vector<T>& values() const { return values_; }

private:
    std::vector<T> values_;
};

/// The description of a matrix (depth, rows, columns) of two bytes an element, swizzled, and of the box (1, lines, 64), where kernels may read it.
class box_map {
public:
    box_map(std::uint64_t base, std::uint32_t columns, std::uint32_t rows, std::uint32_t depth, std::uint32_t lines)
    {
        emulator::tensor_map map;
        map.base = base;
        map.extent[0] = columns, map.extent[1] = rows, map.extent[2] = depth;
        map.stride[0] = columns * 2, map.stride[1] = columns * rows * 2;
        map.box[0] = 64, map.box[1] = lines, map.box[2] = 1;
        map.element_bytes = 2, map.swizzled = 1;
        std::memcpy(bytes_, &map, sizeof map);
        emulator::memory_map::instance().add(bytes_, sizeof bytes_, emulator::memory_kind::device);
    }
    ~box_map() { emulator::memory_map::instance().remove(bytes_); }
    box_map(const box_map&) = delete;
    std::uint64_t address() const { return reinterpret_cast<std::uintptr_t>(bytes_); }

private:
    alignas(64) std::byte bytes_[128] = {};
};

/// A kernel k(u64 a, u64 b, u64 c, u64 d), which are %rd1 to %rd4; registers %r, %rd, %f, %fd, %rs, %p to 99; %r1 is the thread.
inline std::string text_of(const std::string& body, const std::string& before = "")
{
    return ".version 9.0\n.target sm_90a\n.address_size 64\n.extern .shared .align 1024 .b8 dynamic[];\n.visible .entry k(\n.param .u64 "
           "k_param_0,\n.param .u64 k_param_1,\n"
           ".param .u64 k_param_2,\n.param .u64 k_param_3\n)\n.maxntid 1024, 1, 1\n{\n.reg .pred %p<100>;\n.reg .b16 %rs<100>;\n.reg .b32 "
           "%r<100>;\n.reg .b32 %f<100>;\n"
           ".reg .b64 %rd<100>;\n.reg .b64 %fd<100>;\n" +
           before +
           "\nld.param.u64 %rd1, [k_param_0];\nld.param.u64 %rd2, [k_param_1];\nld.param.u64 %rd3, [k_param_2];\n"
           "ld.param.u64 %rd4, [k_param_3];\nmov.u32 %r1, %tid.x;\n" +
           body + "\nret;\n}\n";
}

struct arguments {
    std::uint64_t a = 0, b = 0, c = 0, d = 0;
};
inline void run(const std::string& body, const arguments& with, emulator::launch_shape shape = {{1, 1, 1}, {32, 1, 1}, 1, 0},
                unsigned seed = 1, const std::string& before = "")
{
    const emulator::module text(text_of(body, before));
    const emulator::kernel* k = text.find("k");
    REQUIRE(k != nullptr);
    CHECK(k->unknown.empty());
    std::byte parameters[32];
    std::memcpy(parameters, &with, 32);
    emulator::run(text, *k, shape, parameters, seed);
}
/// What the emulator says of a kernel that is wrong; nothing if it finds nothing.
inline std::string complaint(const std::string& body, const arguments& with, emulator::launch_shape shape = {{1, 1, 1}, {32, 1, 1}, 1, 0},
                             unsigned seed = 1, const std::string& before = "")
{
    try {
        run(body, with, shape, seed, before);
    } catch (const emulator::kernel_error& e) {
        return e.what();
    }
    return {};
}
inline bool says(const std::string& text, const char* what) { return text.find(what) != std::string::npos; }

} // namespace emulated
