// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include "train_gpt/run.hpp"

int train_gpt::run_float32(fm::host_executor& ex, program_options& o, const corpus& text)
{
    return run<float>(ex, o, text, one_rank{});
}
