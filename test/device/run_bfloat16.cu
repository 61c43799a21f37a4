// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Part of device_run: gemm::portable in bfloat16.

#include "run_steps.cuh"

void device_run::portable_bfloat16()
{
    compare<fm::bfloat16>("bfloat16", 4e-2);
    compare<fm::bfloat16>("bfloat16, few tokens, early kernels", 4e-2,
                          {.replays = 100, .tokens = 7, .options = {.programmatic_launch = true}});
}
