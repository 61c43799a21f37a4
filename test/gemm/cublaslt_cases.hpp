// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The products of a policy over cuBLAS against sums in double, on an executor whose stream is a queue of the host's.
#pragma once

#include "support/fake_cuda.hpp"

#include "portable_cases.hpp"

#include <fastmoe/cuda/cublaslt.cuh>

namespace {

using support::fake_cuda;
using support::start;

/// The fake's program, as nobody has used it yet.
inline fake_cuda& fresh_cuda()
{
    fake_cuda::of_program().start();
    return fake_cuda::of_program();
}

/// The first complaint of the libraries, if any.
inline std::string complaint_of(const fake_cuda& cuda) { return cuda.complaints.empty() ? "" : cuda.complaints.front(); }

/// What f throws, as Error; its text.
template <class Error, class F>
std::string text_thrown(const F& f)
{
    try {
        f();
    } catch (const Error& e) {
        return e.what();
    }
    return "nothing";
}

inline bool has(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

/// A shape with rows and matrices in a storage, and all that the three verbs need.
template <class Types>
struct lt_case {
    using X = typename Types::X;
    using W = typename Types::W;
    using B = typename Types::B;
    using Y = typename Types::Y;

    shape c;
    weight_storage storage;
    start begin;
    ragged g;
    test_rows<X> x, dy;
    test_weights<W> w;
    std::vector<B> bias;
    std::vector<Y> before; // (E,out,in), what a gradient is added to
    mutable fm::vector_view<const int32_t> counts;

    lt_case(support::random& r, const shape& of, weight_storage in, start at)
        : c(of), storage(in), begin(at), g(ragged::of(r, c.counts, 3)), x(r, g, c.in, at), dy(r, g, c.out, at),
          w(in, g.experts(), c.out, c.in, at), bias(support::normal_vector<B>(r, g.experts() * c.out)),
          before(support::normal_vector<Y>(r, g.experts() * c.out * c.in))
    {
        w.fill(r);
    }

    std::string text() const { return text_of(g, c, storage) + (begin == start::odd ? ", odd" : ", aligned"); }
    fm::weight_view<const W> weights() const { return w.view(); }
    support::reference_weights old() const
    {
        return [this](int64_t e, int64_t o, int64_t i) { return w(e, o, i); };
    }

    /// forward with a bias and plain rows, or without and through an index.
    template <class Gemm>
    void check_forward(fm::cuda_executor& ex, const Gemm& gemm) const
    {
        const fm::matrix_view<const B> terms(bias.data(), g.experts(), c.out);
        check_rows(ex, c.out, c.in, support::reference_forward(g, x.plain_reference(), old(), support::widened(bias), c.out, c.in),
                   [&](auto y, const auto& epilogue, fm::arena& memory) {
                       gemm.forward(ex, g.view(), x.plain(), weights(), terms, y, epilogue, memory);
                   });
        check_rows(ex, c.out, c.in, support::reference_forward(g, x.indexed_reference(), old(), {}, c.out, c.in),
                   [&](auto y, const auto& epilogue, fm::arena& memory) {
                       gemm.forward(ex, g.view(), x.indexed(), weights(), fm::matrix_view<const B>{}, y, epilogue, memory);
                   });
    }
    template <class Gemm>
    void check_dgrad(fm::cuda_executor& ex, const Gemm& gemm) const
    {
        check_rows(ex, c.in, c.out, support::reference_dgrad(g, dy.plain_reference(), old(), c.out, c.in),
                   [&](auto dx, const auto& epilogue, fm::arena& memory) { gemm.dgrad(ex, g.view(), dy.plain(), weights(), dx, epilogue, memory); });
        check_rows(ex, c.in, c.out, support::reference_dgrad(g, dy.indexed_reference(), old(), c.out, c.in),
                   [&](auto dx, const auto& epilogue, fm::arena& memory) { gemm.dgrad(ex, g.view(), dy.indexed(), weights(), dx, epilogue, memory); });
    }
    /// Overwriting what is poison and adding to what was there; groups without rows get exact zeros, or nothing.
    template <class Gemm>
    void check_wgrad(fm::cuda_executor& ex, const Gemm& gemm) const
    {
        check_gradients(ex, gemm, fm::write_mode::overwrite, dy.plain(), x.plain(), dy.plain_reference(), x.plain_reference());
        check_gradients(ex, gemm, fm::write_mode::accumulate, dy.indexed(), x.plain(), dy.indexed_reference(), x.plain_reference());
        check_gradients(ex, gemm, fm::write_mode::accumulate, dy.plain(), x.indexed(), dy.plain_reference(), x.indexed_reference());
    }

private:
    template <class Multiply>
    void check_rows(fm::cuda_executor& ex, int64_t width, int64_t depth, const product& expected, const Multiply& multiply) const
    {
        const auto inside = [&](int64_t i) { return g.expert_of(i / width) >= 0; };
        const auto got = lt_rows(ex, width, multiply);
        CHECK(got.complaint == "");
        CHECK(first_wrong<typename Types::Real>(got.values, expected, depth + 1, inside) == "");
    }

    /// rows_outcome, into rows that begin as this case's memory does.
    template <class Multiply>
    outcome<Y> lt_rows(fm::cuda_executor& ex, int64_t width, const Multiply& multiply) const
    {
        if (begin == start::odd) return rows_outcome<Y>(ex, g, width, multiply);
        std::vector<Y> y(static_cast<std::size_t>(g.slots * width + 16));
        support::poison(fm::as_vector(y));
        std::vector<int> calls(g.slots);
        std::vector<int64_t> experts(g.slots, -1);
        std::vector<Y> ends(2 * g.slots);
        const fm::matrix_view<Y> view(y.data() + 8, g.slots, width);
        const record_row<Y> record{view, calls.data(), experts.data(), ends.data()};
        support::in_workspace(ex, [&](fm::arena& memory) {
            multiply(view, record, memory);
            CHECK(memory.used() == 0);
            ex.synchronize();
        });
        outcome<Y> out{std::vector<Y>(y.begin() + 8, y.end() - 8), ""};
        for (int64_t s = 0; s < g.slots; ++s) {
            if (calls[s] != (g.expert_of(s) >= 0) || experts[s] != g.expert_of(s)) out.complaint = "the epilogue was not called once, for its expert";
            if (g.expert_of(s) < 0 && support::poisoned(fm::vector_view<Y>(y.data() + 8 + s * width, width)) != width)
                out.complaint = "padding was written";
        }
        if (support::poisoned(fm::vector_view<Y>(y.data(), 8)) != 8 || support::poisoned(fm::vector_view<Y>(y.data() + y.size() - 8, 8)) != 8)
            out.complaint = "memory beside the rows was written";
        return out;
    }

    template <class Gemm, class DyRows, class XRows>
    void check_gradients(fm::cuda_executor& ex, const Gemm& gemm, fm::write_mode mode, const DyRows& dy_rows, const XRows& x_rows,
                         const support::reference_rows& dy_reference, const support::reference_rows& x_reference) const
    {
        const bool adds = mode == fm::write_mode::accumulate;
        const std::vector<double> wide = support::widened(before);
        const product expected = support::reference_wgrad(
            g, dy_reference, x_reference,
            [&](int64_t e, int64_t o, int64_t i) { return adds ? wide[static_cast<std::size_t>((e * c.out + o) * c.in + i)] : 0.0; }, c.out, c.in);
        test_weights<Y> dw(storage, g.experts(), c.out, c.in, begin);
        each(dw, [&](Y& value, std::size_t at) {
            if (adds) value = before[at];
        });
        support::in_workspace(ex, [&](fm::arena& memory) {
            gemm.wgrad(ex, g.view(), dy_rows, x_rows, dw.view(), mode, memory);
            CHECK(memory.used() == 0);
            ex.synchronize();
        });
        CHECK(dw.accounted() == static_cast<int64_t>(dw.memory().size()));
        std::vector<Y> got(before.size());
        each(dw, [&](Y& value, std::size_t at) { got[at] = value; });
        int64_t depth = 1;
        for (const int32_t n : c.counts) depth = std::max<int64_t>(depth, n + 1);
        CHECK(first_wrong<typename Types::Real>(got, expected, depth, [](int64_t) { return true; }) == "");
        const auto matrix = static_cast<std::size_t>(c.out * c.in);
        for (std::size_t e = 0; e < c.counts.size(); ++e) {
            if (c.counts[e] > 0) continue;
            const auto part = [&](const std::vector<Y>& all) {
                return std::vector<Y>(all.begin() + static_cast<int64_t>(e * matrix), all.begin() + static_cast<int64_t>((e + 1) * matrix));
            };
            CHECK(support::same_bits(part(got), adds ? part(before) : std::vector<Y>(matrix, Y(0.0f))));
        }
    }

    template <class F>
    void each(const test_weights<Y>& dw, const F& f) const
    {
        std::size_t at = 0;
        for (int64_t e = 0; e < g.experts(); ++e)
            for (int64_t o = 0; o < c.out; ++o)
                for (int64_t i = 0; i < c.in; ++i) f(dw.view()(e, o, i), at++);
    }
};

/// A policy's three verbs over shapes, storages and beginnings.
template <class Types, class Gemm>
void check_products(const Gemm& gemm, std::uint64_t seed, const std::vector<shape>& some)
{
    fake_cuda& cuda = fresh_cuda();
    support::random r(seed);
    fm::cuda_executor ex;
    for (const shape& c : some)
        for (const weight_storage storage : {weight_storage::stacked, weight_storage::padded, weight_storage::transposed, weight_storage::pointers})
            for (const start begin : {start::odd, start::aligned}) {
                const lt_case<Types> one(r, c, storage, begin);
                INFO(one.text());
                one.check_forward(ex, gemm);
                one.check_dgrad(ex, gemm);
                one.check_wgrad(ex, gemm);
                CHECK(complaint_of(cuda) == "");
            }
}

/// Empty groups, single rows, no rows at all, no experts, widths that nothing divides and such that sixteen bytes do, and a
/// depth at which sums in parts would show.
[[maybe_unused]] std::vector<shape> lt_shapes()
{
    return {{{3, 0, 17}, 1, 1}, {{0, 5}, 9, 0},   {{4, 12}, 0, 9},        {{0, 0, 0}, 16, 8}, {{}, 7, 5},
            {{8, 1, 0, 24}, 24, 40}, {{0, 30, 2}, 21, 34}, {{5, 8, 0, 0}, 8, 600}, {{1, 300}, 16, 8}};
}

} // namespace
