// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// What one file that uses the library tells about the version it sees.
#pragma once

#include <typeinfo>

struct witness {
    double first_output;
    const std::type_info* type_of_library; ///< differs between versions, is the same within one
    const void* address_of_inline;         ///< of an inline variable: one in each version
};
