// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Something that cannot run anything is refused by name where it enters.
// expect: no matching function for call to .*for_each
// expect: runs_rows|runs_elements|allocates
#include <fastmoe/exec/host_executor.hpp>

struct nothing {
    FASTMOE_HOST_DEVICE void operator()(fastmoe::int64_t) const {}
};

struct no_executor {
    int threads() const { return 1; }
};

#if defined(CORRECT)
using executor_type = fastmoe::host_executor;
#else
using executor_type = no_executor;
#endif

void use(executor_type& ex) { fastmoe::for_each(ex, 4, nothing{}); }
