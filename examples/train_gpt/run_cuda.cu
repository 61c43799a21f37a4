// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include "train_gpt/gpus.cuh"
#include "train_gpt/run.hpp"

int train_gpt::run_on_cuda(program_options& o, const corpus& text)
{
    count_gpus();
    fm::cuda_executor ex;
    return o.config.type == dtype::float32 ? run<float>(ex, o, text, one_rank{}) : run<fm::bfloat16>(ex, o, text, one_rank{});
}
