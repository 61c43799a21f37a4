// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// From measurements to predictions: the fit, its score on shapes that it has not seen, and steps at ranks that nobody has.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "loads.hpp"
#include "results.hpp"

namespace scaling {

/// How well one way to predict does on a set of points.
struct score {
    double linear, logarithmic; ///< R^2 of seconds, and of their logarithms
    double typical, worst;      ///< median and largest of max(p/m, m/p) - 1
    int points;
};

template <class Predict>
score score_of(const std::vector<point>& points, const Predict& predict)
{
    std::vector<double> predicted, measured, off;
    for (const point& p : points) {
        predicted.push_back(predict(p));
        measured.push_back(p.seconds);
        off.push_back(std::max(predicted.back() / p.seconds, p.seconds / predicted.back()) - 1);
    }
    std::sort(off.begin(), off.end());
    return {r_squared(predicted, measured), r_squared_of_logarithms(predicted, measured), off[off.size() / 2], off.back(),
            static_cast<int>(points.size())};
}

class predictor {
public:
    /// Fits on every second shape.
    explicit predictor(const measurements& m) : measured_(m)
    {
        std::vector<std::vector<double>> x;
        std::vector<double> y, known;
        for (const point& p : half(true)) {
            const rates r = m.rates_of(p.busiest.ranks, p.over);
            x.push_back(terms_of(p.sizes, p.busiest, r));
            y.push_back(p.seconds);
            known.push_back(known_seconds(p.sizes, p.busiest, r));
        }
        coefficients_ = fit_relative(x, y, known);
    }

    const std::vector<double>& coefficients() const { return coefficients_; }

    /// Seconds, when each rank has a processor to itself.
    double fitted(const shape& s, const load& l, const std::string& over) const
    {
        const rates r = measured_.rates_of(l.ranks, over);
        return known_seconds(s, l, r) + predict(coefficients_, terms_of(s, l, r));
    }
    /// FasterMoE's equations with the rates as they were measured, and nothing fitted.
    double unfitted(const shape& s, const load& l, const std::string& over) const
    {
        return step_seconds(s, l, measured_.rates_of(l.ranks, over));
    }
    /// The fitted time when R ranks take turns on fewer processors.
    double shared(const shape& s, const load& l, const std::string& over) const
    {
        return fitted(s, l, over) * std::max(1.0, static_cast<double>(l.ranks) / measured_.cores);
    }

    /// The points that were fitted on, or the others. Shapes are numbered in the order in which they first come.
    std::vector<point> half(bool fitted_on) const
    {
        std::vector<point> out;
        std::vector<shape> seen;
        for (const point& p : measured_.shapes) {
            const auto same = [&](const shape& s) {
                return s.tokens == p.sizes.tokens && s.width == p.sizes.width && s.hidden == p.sizes.hidden &&
                       s.experts == p.sizes.experts && s.k == p.sizes.k;
            };
            const auto at = static_cast<std::size_t>(std::find_if(seen.begin(), seen.end(), same) - seen.begin());
            if (at == seen.size()) seen.push_back(p.sizes);
            if (is_fitted_on(at) == fitted_on) out.push_back(p);
        }
        return out;
    }
    score score_fitted(bool fitted_on) const
    {
        return score_of(half(fitted_on), [&](const point& p) { return fitted(p.sizes, p.busiest, p.over); });
    }
    score score_unfitted(bool fitted_on) const
    {
        return score_of(half(fitted_on), [&](const point& p) { return unfitted(p.sizes, p.busiest, p.over); });
    }

private:
    measurements measured_;
    std::vector<double> coefficients_;
};

/// A step of the weak scaling with `ranks` ranks whose tokens choose at random.
struct prediction {
    int ranks;
    load busiest;
    double seconds, exchanges, router, ratio; ///< all; parts of it; R_CC
};

inline std::vector<prediction> predict_weak(const predictor& p, const measurements& m, const std::string& over, int most)
{
    std::vector<prediction> out;
    for (int ranks = 1; ranks <= most; ranks *= 2) {
        const shape s = weak_shape(ranks);
        const load l = draw_choices(s, ranks, 7).busiest();
        const rates r = m.rates_of(ranks, over);
        out.push_back({ranks, l, p.fitted(s, l, over), exchanges_seconds(s, l, r), router_seconds(s, r),
                       ranks > 1 ? compute_to_exchange(s, l, r) : 0});
    }
    return out;
}

} // namespace scaling
