// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Runs verbs on one CUDA stream. Everything is queued and nothing waits, except where a name says so.
#pragma once

#include <memory>
#include <mutex>
#include <optional>

#include <fastmoe/cuda/cuda_block.cuh>
#include <fastmoe/cuda/cuda_cluster.cuh>
#include <fastmoe/cuda/cuda_memory.cuh>
#include <fastmoe/cuda/cuda_team.cuh>
#include <fastmoe/exec/executor.hpp>

namespace fastmoe::inline FASTMOE_ABI::inline FASTMOE_CUDA_ABI {

struct cuda_options {
    /// Let a kernel be launched while the one before it ends, so that less time passes between them: what CUDA calls
    /// programmatic dependent launch. Results and order are the same. Of compute capability 9.0 and later, where no earlier
    /// architecture is compiled for; without effect elsewhere.
    bool programmatic_launch = false;
};

/// The GPU executor: a stream of the device that is current when it is made, memory in the order of that stream, and a
/// record of faults. Several live side by side, on streams and devices of their own; nothing is shared between them.
///
///     fastmoe::cuda_executor ex{stream};
///     layer.infer(ex, x, weights, y, workspace);   // queued: capturable in a graph
///     ex.synchronize();                            // waits, and throws what the work has found
///
/// Calls queue work and return; with the caller's workspace they neither allocate nor wait, so that a CUDA graph can capture
/// them. Make the executor, and free it, outside of a capture. Sums have one order for one shape (see wide_team), so the
/// same inputs give the same bits on every run; the host's order is another one. Threads may share an executor as they may
/// share a stream: their work is queued in the order in which they call, and the faults of all are in one record.
class cuda_executor {
public:
    /// @param stream  the caller's, and of the current device; outlives the executor. Null: the default stream of that device.
    ///                cudaStreamPerThread is another one for each thread that calls: such an executor is one thread's
    /// @param memory  null: a pool of the executor's own (cuda_memory). Must give memory of the device in the order of the
    ///                stream, and outlive the executor
    /// @throws cuda_error, out_of_memory
    explicit cuda_executor(cudaStream_t stream = nullptr, memory_resource* memory = nullptr, const cuda_options& options = {})
        : stream_(stream), memory_(memory)
    {
        detail::cuda_check(cudaGetDevice(&device_), "cudaGetDevice");
        int major = 0;
        detail::cuda_check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device_), "cudaDeviceGetAttribute");
        detail::cuda_check(cudaDeviceGetAttribute(&multiprocessors_, cudaDevAttrMultiProcessorCount, device_), "cudaDeviceGetAttribute");
        detail::cuda_check(cudaDeviceGetAttribute(&most_shared_bytes_, cudaDevAttrMaxSharedMemoryPerBlockOptin, device_), "cudaDeviceGetAttribute");
        has_blocks_ = major >= 8;
        has_warpgroups_ = major == 9;
        overlaps_ = options.programmatic_launch && detail::compiled_for(900);
        if (has_warpgroups_) encoder_ = detail::find_tensor_map_encoder();
        if (!memory_) memory_ = &pool_.emplace(stream);
        void* pinned = nullptr;
        detail::cuda_check(cudaMallocHost(&pinned, sizeof(fault_words)), "cudaMallocHost");
        seen_.reset(static_cast<fault_words*>(pinned));
        record_ = buffer<fault_words, cuda_executor>(*this, 2);
        clear();
    }
    /// Waits for nothing: what was queued still runs. Faults that nobody asked for are lost.
    ~cuda_executor() = default;
    cuda_executor(const cuda_executor&) = delete;
    cuda_executor& operator=(const cuda_executor&) = delete;

    cudaStream_t stream() const noexcept { return stream_; }
    int device() const noexcept { return device_; }

    /// In the order of the stream. @throws out_of_memory, cuda_error
    void* allocate(int64_t bytes)
    {
        const detail::on_device here(device_);
        return memory_->allocate(bytes);
    }
    void deallocate(void* memory, int64_t bytes) noexcept
    {
        int before = device_; // without exceptions: a device that has failed gives its memory back on its own
        (void)cudaGetDevice(&before);
        if (before != device_) (void)cudaSetDevice(device_);
        memory_->deallocate(memory, bytes);
        if (before != device_) (void)cudaSetDevice(before);
    }

    /// Queues a copy between any two places that this device reaches; host memory that is not pinned may make it wait.
    void copy(void* to, const void* from, int64_t bytes)
    {
        if (bytes <= 0) return;
        const detail::on_device here(device_);
        detail::cuda_check(cudaMemcpyAsync(to, from, static_cast<std::size_t>(bytes), cudaMemcpyDefault, stream_),
                           "cudaMemcpyAsync");
    }

    /// Waits until the bytes are on the host. Not during a capture.
    void copy_to_host(void* to, const void* from, int64_t bytes)
    {
        copy(to, from, bytes);
        wait();
    }
    /// Waits for all that was queued, and asks for no fault. Not during a capture.
    void wait() const
    {
        const detail::on_device here(device_); // whose default stream is meant, if it is that one
        detail::cuda_check(cudaStreamSynchronize(stream_), "cudaStreamSynchronize");
    }
    /// Whether nothing is left to do of what was queued. @throws cuda_error for what the device reports
    bool idle() const
    {
        const detail::on_device here(device_);
        const cudaError_t status = cudaStreamQuery(stream_);
        if (status == cudaErrorNotReady) {
            (void)cudaGetLastError();
            return false;
        }
        detail::cuda_check(status, "cudaStreamQuery");
        return true;
    }

    template <class F>
    void for_each(int64_t n, const F& f)
    {
        constexpr int64_t block = 256, each = 4 * block;
        launch(detail::run_elements<F>, (n + each - 1) / each, static_cast<int>(block), 0, f, n);
    }

    template <class F>
    void for_each_row(int64_t n, const F& f, row_hint hint)
    {
        const team_shape shape = team_shape::of(hint);
        const int64_t shared = shape.teams * shape.scratch_bytes + (shape.teams == 1 ? detail::device_lanes::slot_bytes : 0);
        launch(detail::run_rows<F>, (n + shape.teams - 1) / shape.teams, shape.teams * shape.lanes, shared, f, n, shape.lanes,
               shape.scratch_bytes);
    }

    /// As runs_blocks says: all that can run at one time, or fewer.
    template <class F>
    void for_each_block(int64_t tasks, const F& f, int64_t shared_bytes)
    {
        const int64_t most = F::resident * int64_t{multiprocessors_};
        launch(detail::run_blocks<F>, tasks < most ? tasks : most, block_threads, shared_bytes, f);
    }
    /// Whether the device is of compute capability 8.0 or later. Compiled for no other, there is no code for others.
    bool has_blocks() const noexcept { return has_blocks_; }
    static constexpr bool always_has_blocks = detail::compiled_for(800);

    /// As runs_clusters says.
    using box_map = CUtensorMap;
    box_map describe(const box_source& source) const { return detail::tensor_map(encoder_, source); }
    /// Whether the device is of compute capability 9.x and F was compiled for sm_90a.
    template <class F>
    bool has_clusters() const
    {
        if (!has_warpgroups_) return false;
        const detail::on_device here(device_);
        cudaFuncAttributes is{};
        detail::cuda_check(cudaFuncGetAttributes(&is, detail::run_clusters<F>), "cudaFuncGetAttributes");
        return is.maxThreadsPerBlock == cluster_block_threads;
    }
    template <class F>
    void for_each_cluster(int64_t tasks, const F& f, int64_t shared_bytes)
    {
        const int64_t most = multiprocessors_ < F::cluster ? 1 : multiprocessors_ / F::cluster; // a device that has no room for one says so
        launch_clusters(F::cluster, detail::run_clusters<F>, F::cluster * (tasks < most ? tasks : most), cluster_block_threads, shared_bytes + 1024, f);
    }

    /// Where the work of this executor records faults: memory of the device.
    fault_recorder faults() noexcept { return {record_.data()}; }
    /// Nothing: the work has not ended yet. synchronize() throws.
    void deliver_faults() const noexcept {}

    /// Waits for all that was queued, throws what it has found, and forgets it. Not during a capture.
    /// @throws invalid_argument for a fault, cuda_error for what the device reports
    void synchronize()
    {
        if (const std::optional<fastmoe::fault> found = fault()) detail::raise_fault(*found);
    }
    /// The same without the exception: what was found, if anything. It is forgotten.
    /// @throws cuda_error
    std::optional<fastmoe::fault> fault()
    {
        const std::lock_guard lock(mutex_);
        // Between a copy and a memset the work of another thread could record what the memset would wipe.
        this->for_each(static_cast<int64_t>(fault_kind::count_), detail::take_faults{record_.data(), record_.data() + 1});
        copy(seen_.get(), record_.data() + 1, sizeof(fault_words));
        wait();
        fastmoe::fault found;
        if (!detail::first_fault(*seen_, found)) return std::nullopt;
        return found;
    }

private:
    void clear()
    {
        const detail::on_device here(device_);
        detail::cuda_check(cudaMemsetAsync(record_.data(), 0xff, sizeof(fault_words), stream_), "cudaMemsetAsync");
    }

    template <class F, class... Sizes>
    void launch(void (*kernel)(F, Sizes...), int64_t blocks, int threads, int64_t shared, const F& f,
                type_identity_t<Sizes>... sizes)
    {
        launch_clusters(1, kernel, blocks, threads, shared, f, sizes...);
    }
    template <class F, class... Sizes>
    void launch_clusters(int cluster, void (*kernel)(F, Sizes...), int64_t blocks, int threads, int64_t shared, const F& f,
                         type_identity_t<Sizes>... sizes)
    {
        static_assert(std::is_trivially_copyable_v<F>, "a functor is copied to the device byte by byte");
        if (blocks <= 0) return;
        const detail::on_device here(device_);
        // More than a kernel has without asking. It is asked for all that the device has: another thread may launch the same
        // kernel with more in between.
        if (shared > team_scratch_bytes)
            detail::cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most_shared_bytes_),
                               "cudaFuncSetAttribute");
        cudaLaunchConfig_t how{};
        how.gridDim = dim3(static_cast<unsigned>(blocks < INT32_MAX ? blocks : INT32_MAX));
        how.blockDim = dim3(static_cast<unsigned>(threads));
        how.dynamicSmemBytes = static_cast<std::size_t>(shared);
        how.stream = stream_;
        cudaLaunchAttribute said[2] = {};
        how.attrs = said;
        if (cluster > 1) {
            cudaLaunchAttribute& shape = said[how.numAttrs++];
            shape.id = cudaLaunchAttributeClusterDimension;
            shape.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
        }
        if (overlaps_) {
            cudaLaunchAttribute& early = said[how.numAttrs++];
            early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
            early.val.programmaticStreamSerializationAllowed = 1;
        }
        detail::cuda_check(cudaLaunchKernelEx(&how, kernel, f, sizes...), "a kernel launch");
    }

    cudaStream_t stream_;
    memory_resource* memory_;
    int device_ = 0, multiprocessors_ = 0, most_shared_bytes_ = 0;
    bool has_blocks_ = false, has_warpgroups_ = false, overlaps_ = false;
    detail::tensor_map_encoder* encoder_ = nullptr; ///< where there are warpgroups
    std::optional<cuda_memory> pool_;
    buffer<fault_words, cuda_executor> record_; ///< and what fault() took of it
    std::mutex mutex_; // guards seen_
    struct free_pinned {
        void operator()(fault_words* words) const noexcept { (void)cudaFreeHost(words); }
    };
    std::unique_ptr<fault_words, free_pinned> seen_;
};

static_assert(executor<cuda_executor> && runs_blocks<cuda_executor> && runs_clusters<cuda_executor>);

} // namespace fastmoe::inline FASTMOE_ABI::inline FASTMOE_CUDA_ABI
