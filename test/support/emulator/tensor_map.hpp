// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// What the emulator's cuTensorMapEncodeTiled writes into the 128 bytes that programs pass to kernels.
#pragma once

#include <cstdint>

namespace emulator {

struct tensor_map {
    static constexpr std::uint64_t magic = 0x7465'6e73'6f72'6d61;
    std::uint64_t is = magic;
    std::uint64_t base = 0;
    std::uint64_t extent[3] = {}, stride[2] = {}; ///< elements; bytes
    std::uint32_t box[3] = {};
    std::uint32_t element_bytes = 0, swizzled = 0; ///< swizzled: lines of 128 bytes
};
static_assert(sizeof(tensor_map) <= 128);

} // namespace emulator
