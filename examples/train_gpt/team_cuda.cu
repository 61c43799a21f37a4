// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include <fastmoe/comm/threads.hpp>
#if defined(TRAIN_GPT_MPI)
#include <fastmoe/comm/mpi.hpp>
#include <fastmoe/comm/staged.hpp>
#include <fastmoe/cuda/pinned_memory.cuh>
#endif

#include "train_gpt/gpus.cuh"
#include "train_gpt/launch.hpp"
#include "train_gpt/rank_team.hpp"
#include "train_gpt/run.hpp"

namespace train_gpt {
namespace {

using cuda_ranks = any_ranks<fm::cuda_executor>;

/// A stream that waits for no other: the ranks of one process queue their work side by side.
class own_stream {
public:
    own_stream() { fm::detail::cuda_check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreateWithFlags"); }
    own_stream(const own_stream&) = delete;
    own_stream& operator=(const own_stream&) = delete;
    ~own_stream() { (void)cudaStreamDestroy(stream_); }

    cudaStream_t get() const noexcept { return stream_; }

private:
    cudaStream_t stream_ = nullptr;
};

/// One rank's part, on the device that is current.
int run_rank(const program_options& options, const corpus& text, const cuda_ranks& world)
{
    program_options o = options;
    const own_stream stream;
    fm::cuda_executor ex{stream.get()};
    const rank_team<fm::cuda_executor> team(world, o.parallel);
    return o.config.type == dtype::float32 ? run<float>(ex, o, text, team) : run<fm::bfloat16>(ex, o, text, team);
}

int run_threads(const program_options& o, const corpus& text)
{
    int status = 0;
    fm::run_ranks(
        o.parallel.ranks,
        [&](const fm::threads& c) {
            const int own = run_rank(o, text, cuda_ranks(c));
            if (c.rank() == 0) status = own;
        },
        {.deadline = rank_deadline});
    return status;
}

#if defined(TRAIN_GPT_MPI)
/// Messages start and end on the device if MPI says that it reaches it, else in 64 MiB of page-locked memory.
int run_process(const program_options& o, const corpus& text)
{
    const fm::mpi_session session({.deadline = rank_deadline});
    fm::pinned_memory pinned;
    return run_rank(o, text, cuda_ranks(fm::staged(session.world(), int64_t{64} << 20, pinned)));
}
#endif

} // namespace
} // namespace train_gpt

int train_gpt::run_team_on_cuda(const program_options& o, const corpus& text, const std::optional<launched>& place)
{
    const int gpus = count_gpus();
    if (!place) return run_threads(o, text);
#if defined(TRAIN_GPT_MPI)
    fm::detail::cuda_check(cudaSetDevice(place->local_rank % gpus), "cudaSetDevice"); // before MPI looks for it
    return run_process(o, text);
#else
    static_cast<void>(gpus);
    fm::raise<fm::error>("mpirun has started this process, but it was built without MPI; --ranks needs none");
#endif
}
