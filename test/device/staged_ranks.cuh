// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Ranks in threads, a stream each, whose data go through page-locked memory in parts: sums, rows and gathers against their
/// definitions. Part of run.cu.
#pragma once

#include <cstddef>
#include <vector>

#include <fastmoe/comm/staged.hpp>
#include <fastmoe/comm/threads.hpp>
#include <fastmoe/cuda/cuda_executor.cuh>
#include <fastmoe/cuda/pinned_memory.cuh>

namespace staged_ranks {

namespace fm = fastmoe;
using fm::int64_t;

static_assert(fm::communicator<fm::staged<fm::threads>, fm::cuda_executor>);
static_assert(fm::queues_copies<fm::cuda_executor>);

/// How many elements are wrong, on all ranks together.
inline int64_t count_wrong_elements(int64_t staging_bytes)
{
    constexpr int ranks = 3;
    constexpr int64_t n = 5000, width = 7;
    std::vector<int64_t> wrong(ranks);
    fm::run_ranks(ranks, [&](const fm::threads& c) {
        cudaStream_t stream = nullptr;
        fm::detail::cuda_check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
        {
            fm::pinned_memory pinned;
            const fm::staged s(c, staging_bytes, pinned);
            fm::cuda_executor ex{stream};
            const int me = c.rank();
            const auto value = [](int rank, int64_t i) { return static_cast<float>((rank * 37 + i * 11) % 101); };
            const auto put = [&](fm::buffer<float, fm::cuda_executor>& to) {
                std::vector<float> host;
                for (int64_t i = 0; i < to.size(); ++i) host.push_back(value(me, i));
                ex.copy(to.data(), host.data(), to.size() * 4);
                ex.synchronize();
            };
            const auto judge = [&](fm::buffer<float, fm::cuda_executor>& result, int64_t count, const auto& expected) {
                std::vector<float> host(static_cast<std::size_t>(count));
                ex.copy_to_host(host.data(), result.data(), count * 4);
                for (int64_t i = 0; i < count; ++i) wrong[me] += host[i] != expected(i);
            };
            const auto sum = [&](int64_t i) { return value(0, i) + value(1, i) + value(2, i); };
            fm::buffer<float, fm::cuda_executor> own(ex, ranks * n), out(ex, ranks * n);
            put(own);
            s.all_gather(ex, fm::slice(own.view(), 0, n), out.view());
            judge(out, ranks * n, [&](int64_t i) { return value(static_cast<int>(i / n), i % n); });
            s.all_to_all(ex, own.view(), out.view());
            judge(out, ranks * n, [&](int64_t i) { return value(static_cast<int>(i / n), me * n + i % n); });
            s.reduce_scatter(ex, own.view(), fm::slice(out.view(), 0, n));
            judge(out, n, [&](int64_t i) { return sum(me * n + i); });

            // 100 (r + 1) rows go from each rank to rank r.
            const std::vector<int64_t> sent{100, 200, 300}, received(ranks, 100 * (me + 1));
            s.all_to_all_v(ex, own.matrix(600, width), fm::as_vector(sent), out.matrix(3 * received[0], width),
                           fm::as_vector(received));
            const int64_t block = received[0] * width, before = me == 0 ? 0 : me == 1 ? 100 : 300;
            judge(out, ranks * block, [&](int64_t i) { return value(static_cast<int>(i / block), before * width + i % block); });

            s.all_reduce(ex, own.view());
            judge(own, ranks * n, sum);
            put(own);
            s.broadcast(ex, own.view(), 1);
            judge(own, ranks * n, [&](int64_t i) { return value(1, i); });
            s.barrier(ex);
        }
        cudaStreamDestroy(stream);
    });
    return wrong[0] + wrong[1] + wrong[2];
}

} // namespace staged_ranks
