// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// All ranks of a test that mpirun has started.
#pragma once

#include <fastmoe/comm/mpi.hpp>

namespace support {

const fastmoe::mpi& mpi_world();

} // namespace support
