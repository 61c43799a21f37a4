// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// An executor whose memory the host cannot read is refused by mpi, which would otherwise hand MPI a device's pointers.
// expect: mpi moves host memory only
#include <fastmoe/comm/mpi.hpp>
#include <fastmoe/exec/host_executor.hpp>

namespace fm = fastmoe;

struct device_executor : fm::host_executor {
#if !defined(CORRECT)
    static constexpr bool readable_memory = false;
#endif
};

void use(device_executor& ex, const fm::mpi& c, fm::vector_view<float> x) { c.all_reduce(ex, x); }
