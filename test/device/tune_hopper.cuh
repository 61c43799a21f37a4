// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Candidates for gemm::hopper's tunings, against each other: what they multiply, how their times are taken, how results are held
/// to gemm::portable's. Which candidates: tune_hopper_*.cu.
#pragma once

#include <functional>
#include <memory>
#include <random>
#include <string>
#include <utility>

#include "scaling/progress.hpp"
#include "timing.cuh"

namespace tune {

namespace fm = fastmoe;
using fm::bfloat16;
using fm::int64_t;
using fm::gemm::hopper_product;
using fm::gemm::hopper_schedule;
using fm::gemm::hopper_tuning;

/// One tuning for every product.
template <hopper_tuning how>
struct always {
    static_assert(how.fits());
    static constexpr hopper_tuning of(hopper_product, bool) noexcept { return how; }
};
template <hopper_tuning how>
using policy = fm::gemm::hopper_with<always<how>>;

template <hopper_tuning... hows>
struct candidates {};

struct shape {
    int64_t tokens, width, hidden, experts, k;

    std::string name() const
    {
        const auto text = [](int64_t n) { return std::to_string(n); };
        return "T " + text(tokens) + " D " + text(width) + " H " + text(hidden) + " E " + text(experts) + " K " + text(k);
    }
};

/// What the products of a layer read and write: gate and up interleaved, K experts of each token drawn alike.
struct layer {
    using words = fm::buffer<bfloat16, fm::cuda_executor>;

    layer(fm::cuda_executor& ex, const shape& s);

    int64_t slots() const noexcept { return s.tokens * s.k; }
    fm::row_groups groups() { return {counts.view(), offsets.view(), slots()}; }
    fm::indexed_rows<bfloat16> gathered() { return {x.matrix(s.tokens, s.width), index.view()}; }
    fm::expert_input<bfloat16> input() { return {gathered(), groups(), weights.view(), choice_of.view()}; }
    /// (E,out,in)
    static fm::weight_view<bfloat16> stack(words& of, int64_t experts, int64_t out, int64_t in)
    {
        return fm::stacked(fm::tensor_view<bfloat16, 3>(of.data(), experts, out, in));
    }

    shape s;
    words x, up, down, pre, a, dpre, y; // (T,D) (E,2H,D) (E,D,H) (S,2H) (S,H) (S,2H) (S,D); x is the gradient of the output, too
    fm::buffer<float, fm::cuda_executor> weights, dweights;                 // (C)
    fm::buffer<std::int32_t, fm::cuda_executor> index, choice_of, counts;   // (S) (S) (E)
    fm::buffer<int64_t, fm::cuda_executor> offsets;                         // (E+1)
    int64_t active = 0;                                                     ///< experts with rows
};

struct candidate {
    hopper_tuning how;
    std::function<void(fm::arena&)> run;
    std::vector<float> times = {};
    unsigned long long wrong = 0; ///< elements unlike gemm::portable's

    double ms() const { return timing::median(times); }
};

/// One product of one class, and how long each candidate took.
struct comparison {
    std::string slot;    ///< what hopper_default() is asked for
    std::string name;
    double work = 0;     ///< operations, or bytes
    bool is_bytes = false;
    int64_t columns = 0; ///< of the result
    std::vector<candidate> tried = {};
};

class session {
public:
    session(fm::cuda_executor& ex, int comparisons);

    fm::cuda_executor& executor() noexcept { return ex_; }

    /// Times `what.tried` in turns, prints a table, keeps it.
    /// @param reference  the same product by gemm::portable
    /// @param result     what is held to the reference
    void compare(comparison what, const std::function<void(fm::arena&)>& reference, fm::vector_view<bfloat16> result);

    const std::vector<comparison>& all() const noexcept { return all_; }

private:
    fm::cuda_executor& ex_;
    scaling::progress progress_;
    fm::buffer<std::byte, fm::cuda_executor> from_, to_; // copied before each time: the host is ahead then, and caches are cold
    fm::buffer<unsigned long long, fm::cuda_executor> wrong_;
    std::vector<comparison> all_;
};

/// @param run  run(gemm, memory) with a policy
template <hopper_tuning... hows, class Run>
void compare(session& to, candidates<hows...>, comparison what, fm::vector_view<bfloat16> result, const Run& run)
{
    (what.tried.push_back({hows, [&run](fm::arena& memory) { run(policy<hows>{}, memory); }}), ...);
    to.compare(std::move(what), [&run](fm::arena& memory) { run(fm::gemm::portable{}, memory); }, result);
}

std::string initializer(const hopper_tuning& how);

/// Each adds comparisons: 4, and 2 all others.
void tune_rows(session& to, layer& l);
void tune_few_rows(session& to, layer& l);
void tune_gradients(session& to, layer& l);
void tune_codes(session& to, layer& l);
void tune_few_codes(session& to, layer& l);

} // namespace tune
