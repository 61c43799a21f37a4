// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// First values of weights: uniform draws that depend on the seed and the element alone, and zeros.
#pragma once

#include <fastmoe/exec/random.hpp>
#include <fastmoe/gemm/grouped_gemm.hpp>

namespace fastmoe::inline FASTMOE_ABI {

namespace detail {

template <class T>
struct draw_uniform {
    weight_view<T> w;                   // (E,out,in)
    vector_view<const int32_t> numbers; // (E)  empty: 0, 1, 2, ...
    std::uint64_t seed;
    std::uint32_t which;
    float bound;

    FASTMOE_HOST_DEVICE void operator()(int64_t n) const
    {
        const int64_t matrix = w.out * w.in;
        const int64_t number = numbers.extent(0) ? numbers(n / matrix) : n / matrix;
        const auto position = static_cast<std::uint64_t>(number * matrix + n % matrix);
        const random_words r = philox({{static_cast<std::uint32_t>(position), static_cast<std::uint32_t>(position >> 32),
                                        which, static_cast<std::uint32_t>(random_stream::weights)}},
                                      seed);
        const float unit = (static_cast<float>(r.word[0] >> 8) + 0.5f) * 0x1p-24f; // in (0, 1]: the sum rounds to even above 2^23
        w(n / matrix, n % matrix / w.in, n % w.in) = T((2.0f * unit - 1.0f) * bound);
    }
};

template <class T>
struct set_zero {
    using vectorized = void;
    T* to;

    FASTMOE_HOST_DEVICE void operator()(int64_t i) const { to[i] = T(0); }
};

} // namespace detail

/// A seed for part number `which` of something that has a seed: consecutive seeds and numbers share no draws, which sums
/// of them would.
inline std::uint64_t seed_of_part(std::uint64_t seed, std::uint32_t which) noexcept
{
    // The fourth word keeps these apart from the draws, whose fourth word is a small number.
    const random_words r = philox({{which, 0, 0, 0xffffffffu}}, seed);
    return std::uint64_t{r.word[0]} << 32 | r.word[1];
}

/// Uniform in +-1/sqrt(in), the upper bound included. The values depend on (seed, which, expert, row, column), not on
/// strides or the executor.
/// @param which    tells apart the matrices that one seed fills
/// @param fan_in   instead of in, where a matrix holds some columns of a whole one; 0: in
/// @param numbers  which expert each is, where ranks hold a part of them; empty: 0, 1, 2, ...   // (E)
/// @throws invalid_argument if the matrices have no memory or overlap
template <executor Executor, class T>
void fill_uniform(Executor& ex, const weight_view<T>& w, std::uint64_t seed, std::uint32_t which,
                  vector_view<const int32_t> numbers = {}, int64_t fan_in = 0)
{
    if (numbers.extent(0) > 0) expects_shape(numbers, "numbers (E)", w.experts);
    detail::expects_memory(w, "w (E,out,in)");
    detail::expects_pointers<Executor>(w, "w (E,out,in)");
    detail::expects_apart(w, "w (E,out,in)");
    if (fan_in == 0) fan_in = w.in;
    const float bound = fan_in > 0 ? 1.0f / std::sqrt(static_cast<float>(fan_in)) : 0.0f;
    fastmoe::for_each(ex, w.experts * w.out * w.in, detail::draw_uniform<T>{w, numbers, seed, which, bound});
}

/// Zeros; nothing where the view has no memory.
template <executor Executor, class T>
void fill_zero(Executor& ex, matrix_view<T> m)
{
    if (m.data_handle()) fastmoe::for_each(ex, m.extent(0) * m.extent(1), detail::set_zero<T>{m.data_handle()});
}

} // namespace fastmoe::inline FASTMOE_ABI
