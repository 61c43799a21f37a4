// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The rows of a cosine gate: to unit length and back, the temperature, and first values. Parts of cosine_gate.hpp,
/// where the formulas stand.
#pragma once

#include <fastmoe/exec/executor.hpp>
#include <fastmoe/exec/memory.hpp>
#include <fastmoe/exec/random.hpp>
#include <fastmoe/ops/reduce.hpp>
#include <fastmoe/routing/score.hpp>

namespace fastmoe::inline FASTMOE_ABI::detail {

/// Rows of unit length, or zeros where a row has no direction.
template <class Real>
struct unit_rows {
    matrix_view<Real> rows;    // (n,N)
    vector_view<Real> inverse; // (n)    1 / norm; 0 for a row without direction, NaN for one that is not finite
};

template <class Real>
FASTMOE_HOST_DEVICE constexpr Real or_zero(Real x) noexcept
{
    return x == x ? x : Real(0);
}

template <class Real>
unit_rows<Real> reserve_unit_rows(arena& memory, int64_t count, int64_t width)
{
    return {memory.matrix<Real>(count, width), memory.vector<Real>(count)};
}

/// to.rows = from / |from|; from may be to.rows.
template <class T, class Real>
struct normalize_row {
    using vectorized = void;
    matrix_view<const T> from; // (n,N)
    unit_rows<Real> to;

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t i) const
    {
        const int64_t width = from.extent(1);
        const T* a = from.data_handle() + i * width;
        Real* out = to.rows.data_handle() + i * width;
        const Real square = team.reduce(width, Real(0), adds{}, [a](int64_t n) { return Real(a[n]) * Real(a[n]); });
        const bool finite = math::is_finite(square), has_direction = square >= Real(1e-24);
        const Real inverse = finite && has_direction ? Real(1) / std::sqrt(square) : Real(0);
        team.sync(); // every lane has read
        team.for_each(width, [=](int64_t n) { out[n] = inverse != Real(0) ? Real(a[n]) * inverse : Real(0); });
        if (team.lane() == 0) to.inverse(i) = finite ? inverse : not_a_number<Real>;
    }
};

/// With u the unit row and g the gradient of a product with it, before sharpness: da (+)= (g - <g, u> u) sharpness / |a|.
template <class Real, class G>
struct normalize_row_backward {
    using vectorized = void;
    unit_rows<Real> units;        // (n,N)
    matrix_view<const Real> from; // (n,N)
    matrix_view<G> to;            // (n,N)  may be from
    const Real* sharpness;        // (2)
    write_mode mode;

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t i) const
    {
        const int64_t width = from.extent(1);
        const Real *u = units.rows.data_handle() + i * width, *g = from.data_handle() + i * width;
        G* out = to.data_handle() + i * width;
        const Real sharp = or_zero(units.inverse(i)) * sharpness[0], factor = or_zero(sharp);
        const Real along = team.reduce(width, Real(0), adds{}, [=](int64_t n) { return g[n] * u[n]; });
        const bool add = mode == write_mode::accumulate;
        team.sync(); // every lane has read
        team.for_each(width, [=](int64_t n) {
            const Real value = factor != Real(0) ? (g[n] - along * u[n]) * factor : Real(0);
            out[n] = G(add ? Real(out[n]) + value : value);
        });
    }
};

/// exp(min(tau, ln 100)), and its slope in tau: itself, or 0 above the limit.
template <class T, class Real>
struct sharpen {
    const T* temperature; // (1)
    Real* sharpness;      // (2)

    FASTMOE_HOST_DEVICE void operator()(int64_t) const
    {
        constexpr Real most = Real(4.605170185988091);
        const Real tau = Real(temperature[0]);
        sharpness[0] = math::exp(tau > most ? most : tau);
        sharpness[1] = tau > most ? Real(0) : sharpness[0];
    }
};

/// Logits from products of unit rows.
template <class Real>
struct sharpen_row {
    using vectorized = void;
    matrix_view<Real> logits; // (T,E)
    unit_rows<Real> tokens, embeddings;
    const Real* sharpness; // (2)

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t t) const
    {
        const int64_t experts = logits.extent(1);
        Real* l = logits.data_handle() + t * experts;
        const Real* each = embeddings.inverse.data_handle();
        // An inverse norm that is NaN makes the sum of two NaN: what is added is 0 otherwise.
        const Real token = tokens.inverse(t), factor = sharpness[0], own = token == token ? Real(0) : token;
        team.for_each(experts, [=](int64_t e) { l[e] = l[e] * factor + (each[e] == each[e] ? own : each[e]); });
    }
};

/// d loss / d (ln sharpness) of a token: <dl, l>, where l is finite.
template <class Real>
struct temperature_row {
    using vectorized = void;
    matrix_view<const Real> logits, dlogits; // (T,E)
    Real* slopes;                            // (T)

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t t) const
    {
        const int64_t experts = logits.extent(1);
        const Real *l = logits.data_handle() + t * experts, *dl = dlogits.data_handle() + t * experts;
        const Real sum =
            team.reduce(experts, Real(0), adds{}, [=](int64_t e) { return l[e] == l[e] ? l[e] * dl[e] : Real(0); });
        if (team.lane() == 0) slopes[t] = sum;
    }
};

/// dtau (+)= the sum over tokens, 0 above the limit.
template <class Real, class G>
struct temperature_sum {
    vector_view<const Real> slopes; // (T)
    const Real* sharpness;          // (2)
    G* gradient;                    // (1)
    write_mode mode;

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t) const
    {
        const Real* from = slopes.data_handle();
        const double sum =
            team.reduce(slopes.extent(0), 0.0, adds{}, [from](int64_t t) { return static_cast<double>(from[t]); });
        if (team.lane() != 0) return;
        const Real value = sharpness[1] != Real(0) ? static_cast<Real>(sum) : Real(0);
        gradient[0] = G(mode == write_mode::accumulate ? Real(gradient[0]) + value : value);
    }
};

enum class first_values : std::uint8_t { uniform, normal };

/// First values of a matrix: a function of the seed, the matrix and the element alone.
template <class T>
struct draw_first {
    T* to; // (n)
    std::uint64_t seed_and_matrix[2];
    first_values values;
    double reach; ///< half the width of the interval, or the deviation

    FASTMOE_HOST_DEVICE void operator()(int64_t i) const
    {
        const random_source random{seed_and_matrix, random_stream::weights};
        const auto at = static_cast<std::uint64_t>(i);
        const float unit = values == first_values::uniform ? 2 * random.uniform<float>(at) - 1 : random.normal<float>(at);
        to[i] = T(static_cast<float>(reach) * unit);
    }
};

} // namespace fastmoe::inline FASTMOE_ABI::detail
