// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// What one file that uses the library tells about the version it sees.
#pragma once

#include <string>
#include <typeinfo>

struct witness {
    double first_output;
    double other_output;                   ///< with oneDNN's products, where there is oneDNN
    std::string header;                    ///< of a file without tensors
    const std::type_info* type_of_library; ///< differs between versions, is the same within one
    const std::type_info* type_of_file;    ///< so does this
    const void* address_of_inline;         ///< of an inline variable: one in each version
};
