// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Part of device_run: gemm::portable in float16.

#include "run_steps.cuh"

void device_run::portable_half()
{
    compare<fm::half>("float16", 5e-3);
}
