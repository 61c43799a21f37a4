// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Every collective over NCCL, against what it must give. One rank by itself; as many as RANK, WORLD_SIZE, MASTER_ADDR and
/// MASTER_PORT say where a launcher has set them. Ends with 77, skipped, where there is no GPU.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include <fastmoe/cuda.cuh>
#include <fastmoe/cuda/nccl.cuh>

namespace {

namespace fm = fastmoe;
using fm::int64_t;

int wrong = 0;

template <class T>
struct on_device {
    fm::cuda_executor& ex;
    fm::buffer<T, fm::cuda_executor> memory;

    on_device(fm::cuda_executor& e, const std::vector<T>& values) : ex(e), memory(e, static_cast<int64_t>(values.size()))
    {
        ex.copy(memory.data(), values.data(), bytes());
        ex.synchronize();
    }
    int64_t bytes() const { return memory.size() * static_cast<int64_t>(sizeof(T)); }
    fm::vector_view<T> view() { return memory.view(); }
    void expect(const std::vector<T>& expected, const char* verb, int rank)
    {
        std::vector<T> got(expected.size());
        ex.copy(got.data(), memory.data(), bytes());
        ex.synchronize();
        for (std::size_t i = 0; i < got.size(); ++i)
            if (static_cast<float>(got[i]) != static_cast<float>(expected[i])) {
                std::printf("FAILED: %s on rank %d: element %zu is %g, expected %g\n", verb, rank, i, static_cast<double>(got[i]),
                            static_cast<double>(expected[i]));
                ++wrong;
                return;
            }
    }
};

/// Small integers, so that sums are exact in every type.
template <class T>
std::vector<T> numbers(int64_t n, int64_t first)
{
    std::vector<T> out;
    for (int64_t i = 0; i < n; ++i) out.push_back(static_cast<T>(static_cast<float>((first + i) % 5)));
    return out;
}

template <class T>
void check(fm::cuda_executor& ex, const fm::nccl& c)
{
    using E = fm::cuda_executor;
    const int ranks = c.size(), me = c.rank();
    for (const int64_t n : {1, 100, 4096}) {
        std::vector<T> sum(n), gathered, exchanged, part(n);
        const auto blocks = [&](int r) { return numbers<T>(ranks * n, 3 * r); };
        for (int64_t i = 0; i < n; ++i) {
            float all = 0, own = 0;
            for (int r = 0; r < ranks; ++r) {
                all += static_cast<float>(numbers<T>(n, r)[i]);
                own += static_cast<float>(blocks(r)[me * n + i]);
            }
            sum[i] = static_cast<T>(all);
            part[i] = static_cast<T>(own);
        }
        for (int r = 0; r < ranks; ++r) {
            const auto theirs = numbers<T>(n, r), sent = blocks(r);
            gathered.insert(gathered.end(), theirs.begin(), theirs.end());
            exchanged.insert(exchanged.end(), sent.begin() + me * n, sent.begin() + (me + 1) * n);
        }
        on_device<T> own(ex, numbers<T>(n, me)), values(ex, numbers<T>(n, me)), many(ex, blocks(me)), one(ex, part), all(ex, exchanged);
        c.all_reduce(ex, values.view());
        values.expect(sum, "all_reduce", me);
        c.template reduce_scatter<E, T>(ex, many.view(), one.view());
        one.expect(part, "reduce_scatter", me);
        c.template all_gather<E, T>(ex, own.view(), all.view());
        all.expect(gathered, "all_gather", me);
        c.template all_to_all<E, T>(ex, many.view(), all.view());
        all.expect(exchanged, "all_to_all", me);
        c.broadcast(ex, own.view(), ranks - 1);
        own.expect(numbers<T>(n, ranks - 1), "broadcast", me);
        on_device<T> free_order(ex, numbers<T>(n, me));
        c.all_reduce_in_any_order(ex, free_order.view());
        free_order.expect(sum, "all_reduce_in_any_order", me);
    }
    // Rank r sends r rows to those of even number, none to the others.
    constexpr int64_t width = 24;
    std::vector<int64_t> to(ranks), from(ranks);
    int64_t out = 0, in = 0;
    std::vector<T> expected;
    for (int r = 0; r < ranks; ++r) {
        out += to[r] = r % 2 == 0 ? me : 0;
        in += from[r] = me % 2 == 0 ? r : 0;
        const auto rows = numbers<T>(from[r] * width, r);
        expected.insert(expected.end(), rows.begin(), rows.end());
    }
    std::vector<T> rows;
    for (int r = 0; r < ranks; ++r) {
        const auto mine = numbers<T>(to[r] * width, me);
        rows.insert(rows.end(), mine.begin(), mine.end());
    }
    on_device<T> sent(ex, rows), received(ex, expected);
    c.template all_to_all_v<E, T>(ex, fm::matrix_view<const T>(sent.view().data_handle(), out, width), fm::as_vector(to),
                                  fm::matrix_view<T>(received.view().data_handle(), in, width), fm::as_vector(from));
    received.expect(expected, "all_to_all_v", me);
}

} // namespace

int main()
{
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
        std::printf("skipped: no GPU\n");
        return 77;
    }
    std::setvbuf(stdout, nullptr, _IOLBF, 0); // what is stopped has said how far it came
    const bool launched = std::getenv("RANK") != nullptr;
    if (launched) fm::detail::cuda_check(cudaSetDevice(fm::launched_process::from_environment().rank % devices), "cudaSetDevice");
    fm::cuda_executor ex;
    const fm::nccl_options options{.deadline = fm::milliseconds(30000)};
    const std::string path = "/tmp/fastmoe-nccl-" + std::to_string(::getpid());
    const fm::nccl c = launched ? fm::nccl_from_environment(options) : fm::nccl_from_file(path, 0, 1, options);
    check<double>(ex, c);
    check<float>(ex, c);
    check<fm::bfloat16>(ex, c);
    check<fm::half>(ex, c);
    check<int>(ex, c);
    check<int64_t>(ex, c);
    c.barrier(ex);
    const auto half = c.split(c.rank() % 2, -c.rank());
    on_device<int> count(ex, {1});
    half.all_reduce(ex, count.view());
    count.expect({(c.size() + 1 - c.rank() % 2) / 2}, "split", c.rank());
    std::printf("rank %d of %d: %s\n", c.rank(), c.size(), wrong == 0 ? "every collective is right" : "FAILED");
    return wrong == 0 ? 0 : 1;
}
