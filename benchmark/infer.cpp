// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// One token: reading the weights of its experts is the floor. Raced against a plain streaming read of those very bytes
/// by the same threads. T 1, D 2048, H 8192, E 8, K 2, GELU.

#include <algorithm>
#include <atomic>

#include <fastmoe/gemm/onednn.hpp>
#include <fastmoe/gemm/portable.hpp>

#include "moe_setup.hpp"
#include "race.hpp"
#include "streaming_read.hpp"

namespace {

using namespace bench;

/// The memory that a call for this token must read: both matrices of each chosen expert, and the router.
template <class T, class Gemm>
std::vector<block> weights_read(moe_setup<T, Gemm>& moe)
{
    const auto& w = moe.weights.view();
    const int64_t matrix = moe.sizes.width * moe.sizes.hidden * static_cast<int64_t>(sizeof(T));
    std::vector<block> blocks;
    const auto bytes = [](int64_t n) { return n * static_cast<int64_t>(sizeof(T)); };
    cut(blocks, w.gate.data_handle(), bytes(moe.sizes.experts * moe.sizes.width), int64_t{1} << 20);
    moe.forward([&](const auto& saved) {
        for (int64_t c = 0; c < moe.sizes.choices(); ++c) {
            const int64_t e = saved.routing().experts(c);
            cut(blocks, w.expert.up.base(e), matrix, int64_t{1} << 20);
            cut(blocks, w.expert.down.base(e), matrix, int64_t{1} << 20);
        }
    });
    return blocks;
}

template <class T, class Gemm>
standing hold(const std::string& gemm)
{
    fm::host_executor ex;
    moe_setup<T, Gemm> moe(ex, {1, 2048, 8192, 8, 2});
    const auto blocks = weights_read(moe);
    int64_t bytes = 0;
    for (const block& b : blocks) bytes += b.bytes;

    std::atomic<std::uint64_t> sink{0};
    race r;
    const int infer = r.add([&] { moe.infer(); });
    const int read = r.add([&] { sink += streaming_read(ex, blocks); });
    r.run(budget(4), 31);
    const double size = static_cast<double>(bytes) * 1e-9;
    return {{{.text = std::string("infer, one token, ") + type_name<T>() + ", " + gemm + ": bandwidth / streaming read",
              .ratio = r.ratio(read, infer),
              .kind = target::at_least,
              .value = 0.90,
              .seconds_a_call = r.time(infer).middle,
              .also = {{"infer_GB_per_s", size / r.time(infer).middle}, {"read_GB_per_s", size / r.time(read).middle}}}},
            r.rounds()};
}

template <class T, class Gemm>
void add(const std::string& gemm)
{
    register_lines({std::string("infer/") + type_name<T>() + "/" + gemm}, [=] { return hold<T, Gemm>(gemm); });
}

} // namespace

int main(int argc, char** argv)
{
    add<float, fm::gemm::onednn>("onednn");
    add<fm::bfloat16, fm::gemm::onednn>("onednn");
    add<float, fm::gemm::portable>("portable");
    add<fm::bfloat16, fm::gemm::portable>("portable");
    return run_all(argc, argv);
}
