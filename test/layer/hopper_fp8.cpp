// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// A layer whose experts multiply codes of eight bits, on warpgroups' instructions without a GPU: near a layer in double, the same
/// bits from weights that are stored as codes, and never more memory than it asked for.
#include <fastmoe/gemm/hopper_fp8.hpp>

#include "support/compare_layer.hpp"
#include "support/fiber_clusters.hpp"

using namespace fastmoe;

namespace {

using clusters = support::fiber_clusters<support::lanes>;
using gate_type = top_k_gate<softmax_score>;

/// The root of the mean square of the difference, in those of the expected numbers.
template <class T, class Bounded>
double distance(const std::vector<T>& found, const std::vector<Bounded>& expected)
{
    double off = 0, all = 0;
    for (std::size_t i = 0; i < found.size(); ++i) {
        const double wanted = static_cast<double>(expected[i].value);
        off += (static_cast<double>(found[i]) - wanted) * (static_cast<double>(found[i]) - wanted), all += wanted * wanted;
    }
    return std::sqrt(off / (all + 1e-30));
}

template <class Executor>
struct cell {
    using executor = Executor;
    using type = bfloat16;
    static Executor make()
    {
        if constexpr (std::is_same_v<Executor, host_executor>) return host_executor({.threads = 2});
        else return Executor(2, 7);
    }
};

template <class Executor>
void is_near(unsigned seed)
{
    FASTMOE_SEEDED(r, seed);
    for (const auto layout : {gated_layout::interleaved, gated_layout::concatenated})
        for (const int64_t tokens : {int64_t{5}, r.integer(60, 90)}) { // few rows an expert, and many
            const mlp<swiglu, gemm::hopper_fp8> expert{.width = 144, .hidden = 272, .biases = true, .layout = layout};
            const auto o = compare_layer::run<cell<Executor>, float>(r, gate_type{.experts = 3, .k = 2}, expert, {.tokens = tokens, .aligned = true});
            for (const auto& complaint : o.complaints) CHECK_EQ(complaint, "");
            for (const auto& each : o.tensors) CHECK_MESSAGE(distance(each.found, each.expected) < 0.08, each.name);
            for (const auto& each : o.gradients) CHECK_MESSAGE(distance(each.found, each.expected) < 0.08, each.name);
            CHECK(distance(o.tensors[0].found, o.tensors[0].expected) > 0.005); // so they were codes
        }
}

/// A layer and all that its inference reads and writes.
template <class Gemm>
struct inference {
    moe_layer<gate_type, mlp<swiglu, Gemm>, self> layer;
    support::guarded<bfloat16> y;

    inference(int64_t tokens, int64_t width, int64_t hidden)
        : layer{gate_type{.experts = 4, .k = 2}, mlp<swiglu, Gemm>{.width = width, .hidden = hidden}, self{}}, y(tokens, width)
    {
    }
};

} // namespace

TEST_CASE("a layer of codes is near what it is in double, on warpgroups and on the host")
{
    is_near<clusters>(111);
    is_near<host_executor>(112);
}

TEST_CASE_TEMPLATE("weights that are stored as codes give the bits of those that are quantized in the call", Executor, clusters, host_executor)
{
    FASTMOE_SEEDED(r, 113);
    const int64_t width = 144, hidden = 160;
    for (const int64_t tokens : {int64_t{6}, int64_t{90}}) {
        Executor ex = cell<Executor>::make();
        inference<gemm::hopper_fp8> numbers(tokens, width, hidden);
        inference<gemm::hopper_fp8_stored> codes(tokens, width, hidden);
        std::vector<bfloat16> x(static_cast<std::size_t>(tokens * width)), up(static_cast<std::size_t>(4 * 2 * hidden * width)), down(static_cast<std::size_t>(4 * width * hidden)),
            router(static_cast<std::size_t>(4 * width));
        for (auto* each : {&x, &up, &down, &router})
            for (auto& v : *each) v = bfloat16(static_cast<float>(r.normal(0.3)));
        const matrix_view<const bfloat16> in(x.data(), tokens, width), gate(router.data(), 4, width);

        typename decltype(numbers.layer)::template weights<const bfloat16> w{};
        w.gate = gate;
        w.expert.up = stacked(tensor_view<const bfloat16, 3>(up.data(), 4, 2 * hidden, width));
        w.expert.down = stacked(tensor_view<const bfloat16, 3>(down.data(), 4, width, hidden));
        support::workspace memory(ex, numbers.layer.template infer_bytes<bfloat16>(ex, tokens, width, w));
        numbers.layer.infer(ex, in, w, numbers.y.view(), memory.arena());

        std::vector<std::byte> room(1 << 20);
        const auto first = (256 - reinterpret_cast<std::uintptr_t>(room.data()) % 256) % 256;
        arena kept(vector_view<std::byte>(room.data() + first, static_cast<int64_t>(room.size() - 256)));
        auto stored = codes.layer.template reserve_weights<bfloat16>(kept, width);
        quantize_weights(ex, w.expert.up, stored.expert.up);
        quantize_weights(ex, w.expert.down, stored.expert.down);
        typename decltype(codes.layer)::template weights<const bfloat16> read{};
        read.gate = gate;
        read.expert = stored.expert;
        support::workspace less(ex, codes.layer.template infer_bytes<bfloat16>(ex, tokens, width, read));
        codes.layer.infer(ex, in, read, codes.y.view(), less.arena());
        ex.synchronize();
        CHECK(numbers.y.damage() == "");
        CHECK(codes.y.damage() == "");
        CHECK(support::same_bits(support::download(ex, numbers.y.view()), support::download(ex, codes.y.view())));
    }
}
