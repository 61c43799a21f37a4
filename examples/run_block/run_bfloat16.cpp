// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include "run_block/run.hpp"

void run_block::run_bfloat16(fm::host_executor& ex, const program_options& o, description d)
{
    run<fm::bfloat16>(ex, o, std::move(d));
}
