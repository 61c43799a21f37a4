// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Part of device_run: gemm::hopper in half.

#include <fastmoe/gemm/hopper.hpp>

#include "run_steps.cuh"

void device_run::hopper_half()
{
    compare<fm::half, fm::gemm::hopper>("float16, hopper", 5e-3, {.replays = 1000});
    compare<fm::half, fm::gemm::hopper>("float16, hopper, early kernels", 5e-3, {.replays = 100, .options = {.programmatic_launch = true}});
}
