// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Compiled once for each version; ONE_VERSION names the function.
#include "use_library.hpp"

#define CONCATENATE_NOW(a, b) a##b
#define CONCATENATE(a, b) CONCATENATE_NOW(a, b)

witness CONCATENATE(use_, ONE_VERSION)() { return use_library(); }
