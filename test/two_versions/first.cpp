// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// One of two files that include the same version.
#include "use_library.hpp"

witness use_from_first() { return use_library(); }
