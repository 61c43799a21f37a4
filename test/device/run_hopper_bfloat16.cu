// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Part of device_run: gemm::hopper in bfloat16.

#include <fastmoe/gemm/hopper.hpp>

#include "run_steps.cuh"

void device_run::hopper_bfloat16()
{
    compare<fm::bfloat16, fm::gemm::hopper>("bfloat16, hopper", 4e-2, {.replays = 1000});
    // As in decoding: features down, logits and plan of few tokens, kernels that begin early.
    compare<fm::bfloat16, fm::gemm::hopper>("bfloat16, hopper, few tokens", 4e-2, {.replays = 100, .tokens = 24});
    compare<fm::bfloat16, fm::gemm::hopper>("bfloat16, hopper, few tokens, early kernels", 4e-2,
                                            {.replays = 100, .tokens = 24, .options = {.programmatic_launch = true}});
}
