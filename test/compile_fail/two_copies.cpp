// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Two copies of the headers in one file are refused in one sentence.
// expect: one file includes two copies
#include <fastmoe/core/config.hpp>
#if !defined(CORRECT)
#include <another/config.hpp>
#endif
