// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The views and the host executor, used from a file that nvcc compiles. Needs no GPU to run.
#include <vector>

#include <fastmoe/exec/host_executor.hpp>

struct twice {
    fastmoe::vector_view<float> v; // (N)

    FASTMOE_HOST_DEVICE void operator()(fastmoe::int64_t i) const { v(i) *= 2; }
};

int main()
{
    fastmoe::host_executor ex({.threads = 2});
    std::vector<float> v(10000, 21.0f);
    fastmoe::for_each(ex, 10000, twice{fastmoe::as_vector(v)});
    for (float x : v)
        if (x != 42.0f) return 1;
    return 0;
}
