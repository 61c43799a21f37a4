// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The oracle of the grouped GEMM tests: the three products as plain loops in double, ragged groups with padding, and
/// weights in every layout, with poison wherever nobody may look.
#pragma once

#include <cmath>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include <fastmoe/gemm/grouped_gemm.hpp>

#include "support/compare.hpp"
#include "support/poison.hpp"
#include "support/random.hpp"

namespace support {

using fastmoe::int32_t;
using fastmoe::int64_t;

/// Groups of rows with padding before, between and after them.
struct ragged {
    std::vector<int32_t> counts;
    std::vector<int64_t> offsets;
    int64_t slots = 0;

    /// @param padding  at most this many rows of padding after each group
    static ragged of(random& r, std::vector<int32_t> counts, int64_t padding)
    {
        ragged out{std::move(counts), {}, r.integer(0, padding)};
        for (int32_t n : out.counts) {
            out.offsets.push_back(out.slots);
            out.slots += n + r.integer(0, padding);
        }
        out.offsets.push_back(out.slots);
        return out;
    }
    int64_t experts() const { return static_cast<int64_t>(counts.size()); }
    fastmoe::row_groups view() const
    {
        return {fastmoe::as_vector(counts), fastmoe::as_vector(offsets), slots};
    }
    /// The expert of a row, -1 for padding.
    int64_t expert_of(int64_t row) const
    {
        for (int64_t e = 0; e < experts(); ++e)
            if (row >= offsets[e] && row < offsets[e] + counts[e]) return e;
        return -1;
    }
};

/// A mixture of empty groups, single rows, odd counts and one group that holds most rows.
inline std::vector<int32_t> random_counts(random& r, int64_t experts, int64_t most)
{
    std::vector<int32_t> out;
    for (int64_t e = 0; e < experts; ++e)
        out.push_back(static_cast<int32_t>(r.one_of<int64_t>(0, 1, 2 * r.integer(0, 10) + 1, r.integer(0, most / 4))));
    if (experts > 0) out[r.integer(0, experts - 1)] = static_cast<int32_t>(most);
    return out;
}

/// A product and, for each of its sums, the sum of the absolute terms.
struct product {
    std::vector<double> value, magnitude;

    explicit product(int64_t n) : value(n), magnitude(n) {}
    void add(int64_t at, double term)
    {
        value[at] += term;
        magnitude[at] += std::fabs(term);
    }
};

/// A row of a matrix in double; null for a row of zeros.
using reference_rows = std::function<const double*(int64_t)>;
using reference_weights = std::function<double(int64_t e, int64_t o, int64_t i)>;

/// y[s] = x[s] w[e]^T + bias[e]; zeros where no group is.                                   // (S,out)
inline product reference_forward(const ragged& g, const reference_rows& x, const reference_weights& w,
                                 const std::vector<double>& bias, int64_t out, int64_t in)
{
    product y(g.slots * out);
    for (int64_t e = 0; e < g.experts(); ++e)
        for (int64_t s = g.offsets[e]; s < g.offsets[e] + g.counts[e]; ++s)
            for (int64_t o = 0; o < out; ++o) {
                if (!bias.empty()) y.add(s * out + o, bias[e * out + o]);
                for (int64_t i = 0; x(s) && i < in; ++i) y.add(s * out + o, x(s)[i] * w(e, o, i));
            }
    return y;
}

/// dx[s] = dy[s] w[e].                                                                       // (S,in)
inline product reference_dgrad(const ragged& g, const reference_rows& dy, const reference_weights& w, int64_t out, int64_t in)
{
    product dx(g.slots * in);
    for (int64_t e = 0; e < g.experts(); ++e)
        for (int64_t s = g.offsets[e]; s < g.offsets[e] + g.counts[e]; ++s)
            for (int64_t i = 0; i < in; ++i)
                for (int64_t o = 0; dy(s) && o < out; ++o) dx.add(s * in + i, dy(s)[o] * w(e, o, i));
    return dx;
}

/// dw[e] = old + dy_e^T x_e.                                                                 // (E,out,in)
inline product reference_wgrad(const ragged& g, const reference_rows& dy, const reference_rows& x,
                               const reference_weights& old, int64_t out, int64_t in)
{
    product dw(g.experts() * out * in);
    for (int64_t e = 0; e < g.experts(); ++e)
        for (int64_t o = 0; o < out; ++o)
            for (int64_t i = 0; i < in; ++i) {
                const int64_t at = (e * out + o) * in + i;
                dw.add(at, old(e, o, i));
                for (int64_t s = g.offsets[e]; s < g.offsets[e] + g.counts[e]; ++s)
                    if (dy(s) && x(s)) dw.add(at, dy(s)[o] * x(s)[i]);
            }
    return dw;
}

/// Whether an element of T lies within the error of a sum of `length` terms in Real that is rounded once. The roundings
/// of a sum are independent enough to grow with the root of its length (Higham and Mary 2019); 4 is the factor at which a
/// sum errs once in thousands of millions.
template <class Real, class T>
bool near(T actual, double expected, double magnitude, int64_t length)
{
    const double sums = (4 * std::sqrt(static_cast<double>(length)) + 2) * roundoff<Real> * magnitude;
    const double a = static_cast<double>(actual);
    return std::fabs(a - expected) <= sums + roundoff<T> * (std::fabs(expected) + sums) + smallest<T>;
}

enum class weight_storage { stacked, padded, transposed, pointers };

/// Where memory begins: an element after a place that 16 bytes divide, or at one, with gaps that keep it so.
enum class start { odd, aligned };

/// The experts' matrices in one of the layouts that a weight_view describes. Memory starts as poison, gaps stay poison,
/// and no pointer is aligned to more than an element unless asked for.
template <class T>
class test_weights {
public:
    test_weights(weight_storage storage, int64_t experts, int64_t out, int64_t in, start begin = start::odd)
        : first_(begin == start::odd ? 1 : 8), view_{nullptr, nullptr, experts, out, in, 0, in, 1}
    {
        const int64_t gap = storage == weight_storage::stacked ? 0 : begin == start::odd ? 3 : 8;
        if (storage == weight_storage::transposed) view_.row_stride = 1, view_.col_stride = out + gap;
        else view_.row_stride = in + gap;
        view_.expert_stride = (storage == weight_storage::transposed ? in * (out + gap) : out * (in + gap)) + gap;
        if (storage == weight_storage::stacked) view_.expert_stride = out * in;
        memory_.resize(static_cast<std::size_t>(experts * view_.expert_stride + first_));
        poison(fastmoe::as_vector(memory_));
        view_.data = memory_.data() + first_;
        if (storage != weight_storage::pointers) return;
        for (int64_t e = 0; e < experts; ++e) pointers_.push_back(view_.data + (experts - 1 - e) * view_.expert_stride);
        view_.pointers = pointers_.data();
        view_.data = nullptr;
        view_.expert_stride = 0;
    }
    test_weights(const test_weights&) = delete;

    void fill(random& r, double deviation = 1)
    {
        for_each([&](T& v) { v = narrow<T>(r.normal(deviation)); });
    }
    const fastmoe::weight_view<T>& view() const { return view_; }
    double operator()(int64_t e, int64_t o, int64_t i) const { return static_cast<double>(view_(e, o, i)); }
    /// All memory, gaps included.
    std::vector<T>& memory() { return memory_; }
    /// How many elements of the gaps are still poison, plus how many elements the matrices have.
    int64_t accounted()
    {
        std::vector<T> copy = memory_;
        int64_t elements = 0;
        for_each([&](T& v) {
            std::memset(static_cast<void*>(&v), 0, sizeof(T));
            ++elements;
        });
        const int64_t gaps = poisoned(fastmoe::as_vector(memory_));
        memory_ = copy;
        view_.data = view_.pointers ? nullptr : memory_.data() + first_;
        return gaps + elements;
    }

private:
    template <class F>
    void for_each(F f)
    {
        for (int64_t e = 0; e < view_.experts; ++e)
            for (int64_t o = 0; o < view_.out; ++o)
                for (int64_t i = 0; i < view_.in; ++i) f(view_(e, o, i));
    }

    int64_t first_;
    std::vector<T> memory_;
    std::vector<T*> pointers_;
    fastmoe::weight_view<T> view_;
};

/// Rows of T for the groups, as plain or as indexed rows. Rows of padding are poison, or have an index far outside.
template <class T>
class test_rows {
public:
    test_rows(random& r, const ragged& g, int64_t width, start begin = start::odd)
        : width_(width), first_(begin == start::odd ? 1 : 8), plain_(g.slots * width + first_)
    {
        poison(fastmoe::as_vector(plain_));
        const int64_t sources = g.slots + 3;
        data_.resize(sources * width + first_);
        poison(fastmoe::as_vector(data_));
        for (int64_t s = 0; s < g.slots; ++s) {
            const bool inside = g.expert_of(s) >= 0;
            index_.push_back(inside ? static_cast<int32_t>(r.coin(0.1) ? -1 : r.integer(0, sources - 1)) : INT32_MAX);
            if (inside)
                for (int64_t i = 0; i < width; ++i) plain_[first_ + s * width + i] = narrow<T>(r.normal());
            if (inside && index_[s] >= 0)
                for (int64_t i = 0; i < width; ++i) data_[first_ + index_[s] * width + i] = narrow<T>(r.normal());
        }
        plain_wide_ = widened(plain_);
        data_wide_ = widened(data_);
    }
    test_rows(const test_rows&) = delete;

    fastmoe::plain_rows<T> plain() const
    {
        return {fastmoe::matrix_view<const T>(plain_.data() + first_, static_cast<int64_t>(index_.size()), width_)};
    }
    fastmoe::indexed_rows<T> indexed() const
    {
        return {fastmoe::matrix_view<const T>(data_.data() + first_, static_cast<int64_t>(index_.size()) + 3, width_),
                fastmoe::as_vector(index_)};
    }
    reference_rows plain_reference() const
    {
        return [this](int64_t s) { return plain_wide_.data() + first_ + s * width_; };
    }
    reference_rows indexed_reference() const
    {
        return [this](int64_t s) { return index_[s] < 0 ? nullptr : data_wide_.data() + first_ + index_[s] * width_; };
    }

private:
    int64_t width_, first_;
    std::vector<T> plain_, data_;
    std::vector<int32_t> index_;
    std::vector<double> plain_wide_, data_wide_;
};

} // namespace support
