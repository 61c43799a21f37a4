// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include "train_gpt/rank_team.hpp"
#include "train_gpt/run.hpp"

int train_gpt::run_team_bfloat16(fm::host_executor& ex, program_options o, const corpus& text, const host_ranks& world)
{
    return run<fm::bfloat16>(ex, o, text, rank_team(world, o.parallel));
}
