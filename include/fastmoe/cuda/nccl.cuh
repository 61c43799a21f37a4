// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The communicator of many GPUs, over NCCL. Needs that library, 2.19 or newer, and is included by name.
///
///     fm::cuda_executor ex{stream};
///     const fm::nccl ranks = fm::nccl_from_environment();      // as torchrun starts processes
///     ranks.all_reduce(ex, gradients);
///
/// What it promises, and what it costs, is said in comm/nccl_ranks.hpp (sums) and comm/nccl_membership.hpp (failure).
#pragma once

#include <nccl.h>

#include <fastmoe/comm/file_rendezvous.hpp>
#include <fastmoe/comm/nccl_ranks.hpp>
#include <fastmoe/cuda/cuda_executor.cuh>

#if NCCL_VERSION_CODE < NCCL_VERSION(2, 19, 0)
#error "fastmoe needs NCCL 2.19 or newer"
#endif

namespace fastmoe::inline FASTMOE_ABI::inline FASTMOE_CUDA_ABI {

/// NCCL's verbs, as nccl_ranks asks for them. Handles are non-blocking: no call waits for a peer.
struct nccl_api {
    using handle = ncclComm_t;
    using id = ncclUniqueId;
    using status = ncclResult_t;

    static bool succeeded(status s) noexcept { return s == ncclSuccess; }
    static bool pending(status s) noexcept { return s == ncclInProgress; }
    static const char* text(status s) { return ncclGetErrorString(s); }

    /// For one rank to make and all to have.
    static id fresh_id()
    {
        id out;
        const status s = ncclGetUniqueId(&out);
        if (s != ncclSuccess) raise<comm_error>(std::string("ncclGetUniqueId: ") + text(s));
        return out;
    }
    static status begin(handle& h, int ranks, const id& which, int rank)
    {
        ncclConfig_t config = non_blocking();
        return ncclCommInitRankConfig(&h, ranks, which, rank, &config);
    }
    static status split(handle h, int color, int key, handle& child)
    {
        ncclConfig_t config = non_blocking();
        return ncclCommSplit(h, color, key, &child, &config);
    }
    static status place(handle h, int& rank, int& ranks)
    {
        const status s = ncclCommUserRank(h, &rank);
        return s == ncclSuccess ? ncclCommCount(h, &ranks) : s;
    }
    static status ask(handle h)
    {
        status state = ncclSuccess;
        const status s = ncclCommGetAsyncError(h, &state);
        return s == ncclSuccess ? state : s;
    }
    static status finalize(handle h) { return ncclCommFinalize(h); }
    static status destroy(handle h) { return ncclCommDestroy(h); }
    static status abort(handle h) { return h ? ncclCommAbort(h) : ncclSuccess; }
    static status group_begin() { return ncclGroupStart(); }
    static status group_end() { return ncclGroupEnd(); }

    static status send(const void* from, int64_t bytes, int peer, handle h, cuda_executor& ex)
    {
        return ncclSend(from, static_cast<std::size_t>(bytes), ncclUint8, peer, h, ex.stream());
    }
    static status receive(void* to, int64_t bytes, int peer, handle h, cuda_executor& ex)
    {
        return ncclRecv(to, static_cast<std::size_t>(bytes), ncclUint8, peer, h, ex.stream());
    }
    static status all_gather(const void* from, void* to, int64_t bytes, handle h, cuda_executor& ex)
    {
        return ncclAllGather(from, to, static_cast<std::size_t>(bytes), ncclUint8, h, ex.stream());
    }
    static status broadcast(void* values, int64_t bytes, int root, handle h, cuda_executor& ex)
    {
        return ncclBroadcast(values, values, static_cast<std::size_t>(bytes), ncclUint8, root, h, ex.stream());
    }
    template <class T>
    static status all_reduce(T* values, int64_t n, handle h, cuda_executor& ex)
    {
        return ncclAllReduce(values, values, static_cast<std::size_t>(n), type_of<T>(), ncclSum, h, ex.stream());
    }
    template <class T>
    static status reduce_scatter(const T* from, T* to, int64_t n, handle h, cuda_executor& ex)
    {
        return ncclReduceScatter(from, to, static_cast<std::size_t>(n), type_of<T>(), ncclSum, h, ex.stream());
    }
    static status enroll(handle h, void* memory, int64_t bytes, void*& token)
    {
        return ncclCommRegister(h, memory, static_cast<std::size_t>(bytes), &token);
    }
    static status dismiss(handle h, void* token) { return ncclCommDeregister(h, token); }

    static void copy(cuda_executor& ex, void* to, const void* from, int64_t bytes) { ex.copy(to, from, bytes); }
    /// Whether the stream has nothing left to do. @throws cuda_error for what the device reports
    static bool idle(cuda_executor& ex)
    {
        return ex.idle();
    }

private:
    static ncclConfig_t non_blocking()
    {
        ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
        config.blocking = 0;
        return config;
    }
    template <class T>
    static constexpr ncclDataType_t type_of()
    {
        if constexpr (std::is_same_v<T, double>) return ncclFloat64;
        else if constexpr (std::is_same_v<T, float>) return ncclFloat32;
        else if constexpr (std::is_same_v<T, bfloat16>) return ncclBfloat16;
        else if constexpr (std::is_same_v<T, half>) return ncclFloat16;
        else if constexpr (std::is_same_v<T, int64_t>) return ncclInt64;
        else {
            static_assert(std::is_same_v<T, int32_t>);
            return ncclInt32;
        }
    }
};

/// Ranks are processes or threads, each with a GPU of its own, which is current when its communicator is made.
using nccl = nccl_ranks<nccl_api>;

static_assert(communicator<nccl, cuda_executor>);

} // namespace fastmoe::inline FASTMOE_ABI::inline FASTMOE_CUDA_ABI

namespace fastmoe::inline FASTMOE_ABI::detail::inline FASTMOE_CUDA_ABI {

/// NCCL's id from rank 0, by share(id), and then its communicator.
template <class Share>
nccl begin_nccl(int rank, int ranks, const nccl_options& options, const Share& share)
{
    ncclUniqueId id{};
    if (rank == 0) id = nccl_api::fresh_id();
    share(id);
    return nccl(id, rank, ranks, options);
}

} // namespace fastmoe::inline FASTMOE_ABI::detail::inline FASTMOE_CUDA_ABI

namespace fastmoe::inline FASTMOE_ABI::inline FASTMOE_CUDA_ABI {

/// All ranks of a job that torchrun, or whoever sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, has started. The id goes
/// over TCP, by port MASTER_PORT + 1 of rank 0. @throws invalid_argument naming a variable, comm_error
inline nccl nccl_from_environment(const nccl_options& options = {})
{
    const auto me = launched_process::from_environment();
    return detail::begin_nccl(me.rank, me.ranks, options, [&](ncclUniqueId& id) { share_by_tcp(me, id, options.deadline); });
}

/// The id goes through a file that all ranks see. @throws comm_error
inline nccl nccl_from_file(const std::string& path, int rank, int ranks, const nccl_options& options = {})
{
    return detail::begin_nccl(rank, ranks, options, [&](ncclUniqueId& id) { share_by_file(rank, ranks, path, id, options.deadline); });
}

/// The ranks of another communicator, e.g. MPI's. @param ex  an executor of it whose memory the host reads
template <executor Executor, class Communicator>
nccl nccl_over(Executor& ex, const Communicator& ranks, const nccl_options& options = {})
{
    return detail::begin_nccl(ranks.rank(), ranks.size(), options, [&](ncclUniqueId& id) { share_over(ex, ranks, id); });
}

} // namespace fastmoe::inline FASTMOE_ABI::inline FASTMOE_CUDA_ABI
