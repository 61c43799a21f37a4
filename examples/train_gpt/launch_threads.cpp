// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include <fastmoe/comm/threads.hpp>

#include "train_gpt/launch.hpp"

int train_gpt::run_on_threads(int ranks, const rank_body& body)
{
    int status = 0;
    fm::run_ranks(
        ranks,
        [&](const fm::threads& c) {
            const int own = body(host_ranks(c));
            if (c.rank() == 0) status = own;
        },
        {.deadline = rank_deadline});
    return status;
}
