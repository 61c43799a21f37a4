// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include <fastmoe/comm/mpi.hpp>

#include "train_gpt/launch.hpp"

int train_gpt::run_on_mpi(const rank_body& body)
{
    const fm::mpi_session session({.deadline = rank_deadline});
    return body(host_ranks(session.world()));
}
