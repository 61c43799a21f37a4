// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Part of device_run: gemm::portable in float32.

#include "run_steps.cuh"

void device_run::portable_float()
{
    compare<float>("float32", 1e-4);
}
