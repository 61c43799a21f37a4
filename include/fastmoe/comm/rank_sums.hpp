// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Sums over ranks, element by element and in rank order, so that every communicator gets the same bits. Part of
/// threads.hpp and mpi.hpp.
#pragma once

#include <cstdint>
#include <type_traits>

#include <fastmoe/core/config.hpp>
#include <fastmoe/core/dtype.hpp>
#include <fastmoe/core/error.hpp>

namespace fastmoe::inline FASTMOE_ABI::detail {

/// The most ranks of one process: so many pointers travel inside of a functor.
inline constexpr int most_ranks = 64;

/// What a rank's values are summed in: float for half types, and unsigned integers, whose overflow is defined.
template <class T, bool Integral = std::is_integral_v<T>>
struct rank_sum {
    using type = accumulate_t<T>;
};
template <class T>
struct rank_sum<T, true> {
    using type = std::make_unsigned_t<T>;
};

/// Adds `ranks` blocks in rank order, rounds once, and writes the sum to `copies` places.
template <class T>
struct sum_rank_blocks {
    using vectorized = void;
    using sum = typename rank_sum<T>::type;
    const T* from[most_ranks];
    T* to[most_ranks];
    int ranks, copies;
    int64_t count;

    static constexpr int64_t size = 1024; ///< elements of a team
    static constexpr int64_t scratch_bytes = size * static_cast<int64_t>(sizeof(sum));

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t b) const
    {
        const int64_t begin = b * size, n = count - begin < size ? count - begin : size;
        sum* total = team.template scratch<sum>(size);
        const T* first = from[0] + begin;
        team.for_each(n, [=](int64_t i) { total[i] = static_cast<sum>(first[i]); });
        for (int r = 1; r < ranks; ++r) {
            const T* own = from[r] + begin;
            team.for_each(n, [=](int64_t i) { total[i] += static_cast<sum>(own[i]); });
        }
        for (int r = 0; r < copies; ++r) {
            T* out = to[r] + begin;
            team.for_each(n, [=](int64_t i) { out[i] = static_cast<T>(total[i]); });
        }
    }
};

/// The same sum over blocks that came by message: block r lies at stacked + r * stride, the one of `rank` at own.
template <class T>
struct sum_stacked_blocks {
    using vectorized = void;
    using sum = typename rank_sum<T>::type;
    const T* stacked;  // (R,stride)
    const T* own;      // (count)
    T* to;             // (count)  may be own
    int rank, ranks;
    int64_t stride, count;

    static constexpr int64_t size = 1024; ///< elements of a team
    static constexpr int64_t scratch_bytes = size * static_cast<int64_t>(sizeof(sum));

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t b) const
    {
        const int64_t begin = b * size, n = count - begin < size ? count - begin : size;
        sum* total = team.template scratch<sum>(size);
        for (int r = 0; r < ranks; ++r) {
            const T* from = (r == rank ? own : stacked + r * stride) + begin;
            if (r == 0) team.for_each(n, [=](int64_t i) { total[i] = static_cast<sum>(from[i]); });
            else team.for_each(n, [=](int64_t i) { total[i] += static_cast<sum>(from[i]); });
        }
        T* out = to + begin;
        team.for_each(n, [=](int64_t i) { out[i] = static_cast<T>(total[i]); });
    }
};

} // namespace fastmoe::inline FASTMOE_ABI::detail
