// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// What the gates of a pass have chosen and lost, layer by layer.
#pragma once

#include "train_gpt/parameters.hpp"

namespace train_gpt {

namespace detail {

struct add_counts {
    const int32_t* from; // (L)
    int32_t* to;         // (L)

    FASTMOE_HOST_DEVICE void operator()(int64_t e) const { to[e] += from[e]; }
};

struct clear_counts {
    int32_t* counts; // (N)

    FASTMOE_HOST_DEVICE void operator()(int64_t i) const { counts[i] = 0; }
};

/// total += the losses, in their order; of one element.
template <class Real>
struct add_losses {
    vector_view<const Real> losses; // (any)
    Real* total;                    // (1)

    FASTMOE_HOST_DEVICE void operator()(int64_t) const
    {
        for (int64_t i = 0; i < losses.extent(0); ++i) *total += losses(i);
    }
};

/// What a layer's experts here have counted: f(plan), once for each chunk of an exchange.
template <class Parallel, class Saved, class F>
void for_each_plan(const Parallel& parallel, const Saved& saved, const F& f)
{
    if constexpr (std::is_same_v<Parallel, fm::self>) f(saved.plan());
    else
        for (int i = 0; i < parallel.chunks; ++i) f(saved.plan(i));
}

} // namespace detail

/// total = 0 and counts = 0, unless these are without memory.                       // (1), (layers,E)
template <class Executor, class Real>
void clear_report(Executor& ex, vector_view<Real> total, matrix_view<int32_t> counts)
{
    fm::for_each(ex, 1, detail::set_elements<Real>{total.data_handle(), Real(0)});
    if (counts.data_handle())
        fm::for_each(ex, counts.extent(0) * counts.extent(1), detail::clear_counts{counts.data_handle()});
}

/// Adds one layer's losses to the total and, unless there is no memory for them, the choices that its experts here got.
/// @param total   added to                                                             // (1)
/// @param counts  of all the model's experts: those that are here are added to         // (E)
template <class Executor, class Layer, class Saved, class Real>
void add_report(Executor& ex, const Layer& layer, const Saved& saved, vector_view<Real> total, vector_view<int32_t> counts,
                expert_range own)
{
    fm::for_each(ex, 1, detail::add_losses<Real>{saved.losses(), total.data_handle()});
    if (!counts.data_handle()) return;
    detail::for_each_plan(layer.communicator, saved, [&](const fm::plan& plan) {
        fm::for_each(ex, plan.counts.extent(0),
                     detail::add_counts{plan.counts.data_handle(), counts.data_handle() + own.first});
    });
}

} // namespace train_gpt
