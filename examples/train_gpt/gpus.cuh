// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The GPUs of this machine, or why the program cannot go on.
#pragma once

#include <fastmoe/cuda/cuda_executor.cuh>

namespace train_gpt {

/// How many there are. @throws error if there is none
inline int count_gpus()
{
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0)
        fastmoe::raise<fastmoe::error>("--device cuda: there is no GPU");
    return devices;
}

} // namespace train_gpt
