// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The umbrella for nvcc: all of moe.hpp, the executor that runs it on a GPU, Hopper's grouped GEMM, and what takes
/// rows to other ranks through page-locked memory.
#pragma once

#include <fastmoe/comm/staged.hpp>
#include <fastmoe/cuda/cuda_executor.cuh>
#include <fastmoe/cuda/pinned_memory.cuh>
#include <fastmoe/gemm/hopper_fp8.hpp>
#include <fastmoe/moe.hpp>
