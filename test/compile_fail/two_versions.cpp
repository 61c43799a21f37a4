// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The headers of two versions in one file are refused in one sentence.
// expect: one file includes the headers of two versions
#include <fastmoe/core/config.hpp>
#if !defined(CORRECT)
#include <another/config.hpp>
#endif
