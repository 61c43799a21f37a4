// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include <fastmoe/cuda/cuda_executor.cuh>

#include "train_gpt/run.hpp"

int train_gpt::run_on_cuda(program_options& o, const corpus& text)
{
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) fm::raise<fm::error>("--device cuda: there is no GPU");
    fm::cuda_executor ex;
    return o.config.type == dtype::float32 ? run<float>(ex, o, text, one_rank{}) : run<fm::bfloat16>(ex, o, text, one_rank{});
}
