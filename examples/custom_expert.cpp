// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// An expert of your own: y = x * scale, a vector an expert. It reads its rows through the plan, knows nothing of routing
/// weights (the layer applies them when it combines) and keeps nothing for its backward.
#include <fastmoe/moe.hpp>

#include <cmath>
#include <cstdio>
#include <vector>

namespace fm = fastmoe;

template <class T>
struct scale_weights {
    fm::matrix_view<T> scale; // (E,D)

    template <std::same_as<const T> U>
    operator scale_weights<U>() const noexcept
    {
        return {scale};
    }
};

// [heart]
/// out(s) = rows(s) * scale(e), for all rows of expert e: the forward pass, and with dy for x the gradient of x.
template <class T>
struct scale_rows {
    fm::row_groups groups;
    fm::indexed_rows<T> rows;           // (S,D)
    fm::matrix_view<const T> scale;     // (E,D)
    fm::matrix_view<T> out;             // (S,D)

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, fm::int64_t e) const
    {
        const auto& self = *this;
        for (fm::int64_t s = groups.offsets(e); s < groups.offsets(e) + groups.counts(e); ++s)
            team.for_each(scale.extent(1), [&self, s, e](fm::int64_t d) {
                using real = fm::accumulate_t<T>;
                self.out(s, d) = T(real(self.rows.row(s)[d]) * real(self.scale(e, d)));
            });
    }
};

// [heart]
/// dscale(e) (+)= sum over its rows of x * dy.
template <class T, class G>
struct scale_gradient {
    fm::row_groups groups;
    fm::indexed_rows<T> x, dy;          // (S,D)
    fm::matrix_view<G> dscale;          // (E,D)
    fm::write_mode mode;

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, fm::int64_t e) const
    {
        const auto& self = *this;
        team.for_each(dscale.extent(1), [&self, e](fm::int64_t d) {
            using real = fm::accumulate_t<T>;
            real sum = self.mode == fm::write_mode::accumulate ? real(self.dscale(e, d)) : real(0);
            for (fm::int64_t s = self.groups.offsets(e); s < self.groups.offsets(e) + self.groups.counts(e); ++s)
                sum += real(self.x.row(s)[d]) * real(self.dy.row(s)[d]);
            self.dscale(e, d) = G(sum);
        });
    }
};

struct scale_expert {
    fm::int64_t width = 0;

    static constexpr bool applies_weights = false;
    static constexpr bool weighs_output() { return true; }
    template <class T>
    using weights = scale_weights<T>;

    template <class T>
    weights<T> reserve_weights(fm::arena& memory, fm::int64_t experts) const
    {
        return {memory.matrix<T>(experts, width)};
    }
    template <class T>
    fm::nothing_saved reserve_saved(fm::arena&, fm::int64_t) const
    {
        return {};
    }
    template <class T>
    fm::nothing_saved reserve_pending(fm::arena&, fm::int64_t) const
    {
        return {};
    }

    template <class Executor, class T>
    void infer(Executor& ex, const fm::expert_input<T>& in, const weights<const T>& w, fm::matrix_view<T> y,
               fm::arena& scratch) const
    {
        if (!scratch.measuring())
            fm::for_each_row(ex, in.groups.experts(), scale_rows<T>{in.groups, in.x, w.scale, y}, {.width = width});
    }
    template <class Executor, class T>
    void forward(Executor& ex, const fm::expert_input<T>& in, const weights<const T>& w, const fm::nothing_saved&,
                 fm::matrix_view<T> y, fm::arena& scratch) const
    {
        infer(ex, in, w, y, scratch);
    }
    template <class Executor, class T>
    void backward(Executor& ex, const fm::expert_input<T>& in, const weights<const T>& w, const fm::nothing_saved&,
                  const fm::indexed_rows<T>& dy, const fm::nothing_saved&, fm::matrix_view<T> dx,
                  fm::vector_view<fm::accumulate_t<T>>, fm::arena& scratch) const
    {
        if (!scratch.measuring())
            fm::for_each_row(ex, in.groups.experts(), scale_rows<T>{in.groups, dy, w.scale, dx}, {.width = width});
    }
    template <class Executor, class T, class G>
    void weight_gradients(Executor& ex, const fm::expert_input<T>& in, const fm::nothing_saved&,
                          const fm::indexed_rows<T>& dy, const fm::nothing_saved&, const weights<G>& gradients,
                          fm::write_mode mode, fm::arena& scratch) const
    {
        if (!scratch.measuring())
            fm::for_each_row(ex, in.groups.experts(),
                             scale_gradient<T, G>{in.groups, in.x, dy, gradients.scale, mode}, {.width = width});
    }
};

int main()
{
    constexpr int tokens = 50, width = 16, experts = 4;
    fm::host_executor ex;
    fm::moe_layer layer{fm::top_k_gate<fm::softmax_score>{.experts = experts, .k = 2}, scale_expert{.width = width},
                        fm::self{}};
    using weights = fm::moe_weights<float, scale_expert>;
    std::vector<float> gate(experts * width, 0.1f), scale(experts * width, 3.0f), dgate(gate.size()), dscale(scale.size());
    std::vector<float> x(tokens * width), y(x.size()), dy(x.size(), 1.0f), dx(x.size());
    for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i % 13) - 6.0f;
    const weights w{fm::as_matrix(gate, experts, width), {}, {fm::as_matrix(scale, experts, width)}};
    const weights g{fm::as_matrix(dgate, experts, width), {}, {fm::as_matrix(dscale, experts, width)}};
    const auto matrix = [](auto& v) { return fm::as_matrix(v, tokens, width); };

    auto saved = layer.forward(ex, matrix(x), w, matrix(y));
    layer.backward(ex, saved, matrix(dy), w, matrix(dx), g);

    // Weights sum to 1 and every expert triples its rows, so the layer does.
    float worst = 0;
    for (std::size_t i = 0; i < x.size(); ++i) worst = std::fmax(worst, std::fabs(y[i] - 3.0f * x[i]));
    std::printf("y = 3 x within %g\n", worst);
    return worst < 1e-5f ? 0 : 1;
}
