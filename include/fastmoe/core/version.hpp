// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The version of the headers; semantic versioning.
#pragma once

#include <fastmoe/core/config.hpp>

namespace fastmoe::inline FASTMOE_ABI {

inline constexpr int version_major = 0;
inline constexpr int version_minor = 1;
inline constexpr int version_patch = 0;

static_assert(FASTMOE_VERSION == 10000 * version_major + 100 * version_minor + version_patch);

} // namespace fastmoe::inline FASTMOE_ABI
