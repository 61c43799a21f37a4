// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// What check_vectors.py disassembles: an activation and its backward in a loop of the host's, compiled at -O2. Nothing runs.
#include <fastmoe/exec/host_executor.hpp>

#include "levels/there_and_back.hpp"

namespace vectors {

void call(fastmoe::host_executor& ex, int64_t rows, const bench::there_and_back& f) { ex.for_each_row(rows, f, fastmoe::row_hint{}); }

} // namespace vectors
