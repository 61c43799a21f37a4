// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// What the benchmarks feed to the library: random numbers from a counter, buffers of them, rows in even groups.
#pragma once

#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include <fastmoe/exec/host_executor.hpp>
#include <fastmoe/gemm/grouped_gemm.hpp>

namespace bench {

namespace fm = fastmoe;
using fm::int32_t;
using fm::int64_t;

template <class T>
using memory = fm::buffer<T, fm::host_executor>;

/// Element i is uniform in [-scale, scale), a hash of (seed, i).
template <class T>
struct fill_random {
    using vectorized = void;
    T* data;
    std::uint32_t seed;
    float scale;

    void operator()(int64_t i) const
    {
        auto h = static_cast<std::uint32_t>(i) * 0x9e3779b1u ^ seed;
        h = (h ^ h >> 16) * 0x7feb352du;
        h = (h ^ h >> 15) * 0x846ca68bu;
        h ^= h >> 16;
        data[i] = T((static_cast<float>(h >> 8) * 0x1p-23f - 1.0f) * scale);
    }
};

template <class T>
memory<T> random_buffer(fm::host_executor& ex, int64_t count, std::uint32_t seed, float scale = 1.0f)
{
    memory<T> out(ex, count);
    fm::for_each(ex, count, fill_random<T>{out.data(), seed, scale});
    return out;
}

/// The same number of rows for every expert.
class even_groups {
public:
    even_groups(int64_t experts, int64_t rows) : counts_(experts, static_cast<int32_t>(rows)), offsets_(experts + 1)
    {
        for (int64_t e = 0; e <= experts; ++e) offsets_[e] = e * rows;
    }
    fm::row_groups view() const
    {
        return {fm::vector_view<const int32_t>(counts_.data(), static_cast<int64_t>(counts_.size())),
                fm::vector_view<const int64_t>(offsets_.data(), static_cast<int64_t>(offsets_.size())), offsets_.back()};
    }

private:
    std::vector<int32_t> counts_;
    std::vector<int64_t> offsets_;
};

/// A workspace of the size that `query` takes from a measuring arena.
template <class F>
memory<std::byte> workspace_for(fm::host_executor& ex, F query)
{
    fm::arena measure;
    query(measure);
    return memory<std::byte>(ex, measure.bytes());
}

/// max |a - b| / max |b|. Both are whole outputs, so a scale for all elements is fair.
template <class A, class B>
double difference(const A* a, const B* b, int64_t n)
{
    double worst = 0, largest = 0;
    for (int64_t i = 0; i < n; ++i) {
        const double d = std::abs(double(a[i]) - double(b[i]));
        worst = d > worst || std::isnan(d) ? d : worst;
        largest = std::max(largest, std::abs(double(b[i])));
    }
    return worst / largest;
}

/// Refuses to time what computes something else.
inline void same(const std::string& what, double difference, double bound)
{
    if (!(difference <= bound))
        throw std::runtime_error(what + " differs by " + std::to_string(difference) + ", at most " + std::to_string(bound));
}

/// How much two results in T may differ, relative to the largest element.
template <class T>
inline constexpr double bound = sizeof(T) == 2 ? 3e-2 : 1e-4;

} // namespace bench
