// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Experts other than an mlp: a user's own, linear ones, one that all tokens share.
#include <doctest/doctest.h>

#include "support/compare_layer.hpp"
#include "support/layer_step.hpp"

using namespace fastmoe;
using compare_layer::check;
using compare_layer::run;
using compare_layer::setting;
namespace oracle = support::reference;

namespace {

using gate_type = top_k_gate<softmax_score>;

/// A user's expert: y = s * x with a scale per expert and column. It reads rows through the plan, knows nothing of
/// routing weights, and keeps nothing.
template <class T>
struct scale_weights {
    matrix_view<T> scale; // (E,D)
    template <std::same_as<const T> U>
    operator scale_weights<U>() const
    {
        return {scale};
    }
};

template <class T, class W, class Out>
struct scale_row {
    row_groups groups;
    indexed_rows<T> x;
    matrix_view<W> scale;
    Out y;

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t e) const
    {
        const auto& self = *this;
        for (int64_t s = groups.offsets(e); s < groups.offsets(e) + groups.counts(e); ++s)
            team.for_each(scale.extent(1), [&self, s, e](int64_t d) {
                using real = accumulate_t<T>;
                self.y(s, d) = T(real(self.x.row(s)[d]) * real(self.scale(e, d)));
            });
    }
};

template <class T, class G>
struct scale_gradient {
    row_groups groups;
    indexed_rows<T> x, dy;
    matrix_view<G> scale;
    write_mode mode;

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t e) const
    {
        const auto& self = *this;
        team.for_each(scale.extent(1), [&self, e](int64_t d) {
            accumulate_t<T> total = self.mode == write_mode::accumulate ? accumulate_t<T>(self.scale(e, d)) : 0;
            for (int64_t s = self.groups.offsets(e); s < self.groups.offsets(e) + self.groups.counts(e); ++s)
                total += accumulate_t<T>(self.x.row(s)[d]) * accumulate_t<T>(self.dy.row(s)[d]);
            self.scale(e, d) = G(total);
        });
    }
};

struct scale_expert {
    int64_t width = 0;
    static constexpr bool applies_weights = false;
    static bool weighs_output() { return true; }
    int64_t model_width() const { return width; }
    template <class T>
    using weights = scale_weights<T>;

    template <class T>
    weights<T> reserve_weights(arena& memory, int64_t experts) const
    {
        return {memory.matrix<T>(experts, width)};
    }
    template <class T>
    nothing_saved reserve_saved(arena&, int64_t) const
    {
        return {};
    }
    template <class T>
    nothing_saved reserve_pending(arena&, int64_t) const
    {
        return {};
    }
    template <class Executor, class T>
    void infer(Executor& ex, const expert_input<T>& in, const weights<const T>& w, matrix_view<T> y, arena& scratch) const
    {
        if (!scratch.measuring())
            for_each_row(ex, in.groups.experts(), scale_row<T, const T, matrix_view<T>>{in.groups, in.x, w.scale, y}, {.width = width});
    }
    template <class Executor, class T>
    void forward(Executor& ex, const expert_input<T>& in, const weights<const T>& w, const nothing_saved&, matrix_view<T> y,
                 arena& scratch) const
    {
        infer(ex, in, w, y, scratch);
    }
    template <class Executor, class T>
    void backward(Executor& ex, const expert_input<T>& in, const weights<const T>& w, const nothing_saved&,
                  const indexed_rows<T>& dy, const nothing_saved&, matrix_view<T> dx, vector_view<accumulate_t<T>>,
                  arena& scratch) const
    {
        if (!scratch.measuring())
            for_each_row(ex, in.groups.experts(), scale_row<T, const T, matrix_view<T>>{in.groups, dy, w.scale, dx}, {.width = width});
    }
    template <class Executor, class T, class G>
    void weight_gradients(Executor& ex, const expert_input<T>& in, const nothing_saved&, const indexed_rows<T>& dy,
                          const nothing_saved&, const weights<G>& g, write_mode mode, arena& scratch) const
    {
        if (!scratch.measuring())
            for_each_row(ex, in.groups.experts(), scale_gradient<T, G>{in.groups, in.x, dy, g.scale, mode}, {.width = width});
    }
};

} // namespace

/// In the oracle, a linear expert with a diagonal matrix is the same function.
template <class T, class Executor>
class support::expert_memory<T, scale_expert, Executor> {
public:
    static std::vector<reference::expert> draw(random& r, const scale_expert& e, std::int64_t count)
    {
        auto experts = random_experts<T>(r, count, reference::expert_kind::linear, {}, e.width, 0, false);
        for (auto& one : experts)
            for (std::int64_t i = 0; i < e.width * e.width; ++i)
                if (i / e.width != i % e.width) one.down[i] = 0;
        return experts;
    }
    static reference::weight_at where(const scale_expert&) { return reference::weight_at::output; }

    expert_memory(Executor& ex, const scale_expert& e, const std::vector<reference::expert>& experts, const weight_layout&)
        : width_(e.width), scale_(ex, 0)
    {
        reference::numbers all;
        for (const auto& one : experts)
            for (std::int64_t d = 0; d < width_; ++d) all.push_back(one.down[d * width_ + d]);
        scale_ = upload(ex, narrowed<T>(all));
        views_ = {scale_.matrix(static_cast<std::int64_t>(experts.size()), width_)};
    }
    const scale_weights<T>& views() const { return views_; }
    /// Zero off the diagonal, which a scale has no gradient for.
    reference::numbers read(reference::numbers reference::expert::*member) const
    {
        if (member != &reference::expert::down) return {};
        reference::numbers out(scale_.size() * width_);
        for (std::int64_t n = 0; n < scale_.size(); ++n) out[n * width_ + n % width_] = double(scale_.data()[n]);
        return out;
    }
    static bool gaps_kept() { return true; }

private:
    std::int64_t width_;
    fastmoe::buffer<T, Executor> scale_;
    scale_weights<T> views_;
};

TEST_CASE_TEMPLATE("a user's expert makes a layer that trains", Cell, FASTMOE_COLUMN(host_executor), support::cell<support::lanes, float>)
{
    using T = typename Cell::type;
    FASTMOE_SEEDED(r, 51);
    const auto on_diagonal = [](auto outcome, int64_t width) {
        for (auto& result : outcome.gradients)
            if (std::string(result.name) == "down's gradient")
                for (std::size_t i = 0; i < result.found.size(); ++i)
                    if (int64_t(i) / width % width != int64_t(i) % width) result.expected[i] = double(result.found[i]);
        return outcome;
    };
    for (const int64_t width : {1, 9, 30}) {
        const gate_type gate{.experts = 4, .k = 2, .balance = {0.1}};
        check(on_diagonal(run<Cell>(r, gate, scale_expert{width}, {.tokens = 23, .gate_bias = true}), width));
        check(on_diagonal(run<Cell, accumulate_t<T>>(r, gate, scale_expert{width}, {.tokens = 23, .gradients = write_mode::accumulate}), width));
    }
}

TEST_CASE_TEMPLATE("linear experts give the oracle's values and gradients in every layout of their weights", T, FASTMOE_DTYPES)
{
    FASTMOE_SEEDED(r, 55);
    for (const bool biases : {false, true})
        compare_layer::layouts<support::cell<host_executor, T>>(r, gate_type{.experts = 5, .k = 2, .capacity = {0.8}}, [&](int64_t width, int64_t) {
            return linear<>{.width = width, .biases = biases};
        });
}

TEST_CASE("linear experts give the oracle's values and gradients on lanes")
{
    FASTMOE_SEEDED(r, 56);
    using cell = support::cell<support::lanes, float>;
    check(run<cell>(r, gate_type{.experts = 5, .k = 2}, linear<>{.width = 12, .biases = true}, {.tokens = 11}));
}

namespace {

/// A shared expert beside a layer, with its own weights, in exactly the memory that it asks for.
template <class T, class G, class Expert, class Executor>
struct shared_beside {
    Executor& own;
    shared_expert<Expert> shared;
    std::vector<oracle::expert> model, before;
    write_mode mode;
    support::expert_memory<T, Expert, Executor> w;
    support::expert_memory<G, Expert, Executor> g;
    std::unique_ptr<support::workspace<Executor>> kept_memory, scratch;
    shared_parts<T, Expert> kept{};

    shared_beside(Executor& ex, support::random& r, const Expert& expert, write_mode m)
        : own(ex), shared{expert}, model(support::expert_memory<T, Expert, Executor>::draw(r, expert, 1)),
          before(m == write_mode::accumulate ? support::redrawn<G>(r, model) : support::poisoned(model)), mode(m),
          w(ex, expert, model), g(ex, expert, before)
    {
    }
    const std::vector<oracle::expert>& experts() const { return model; }

    void forward(Executor& ex, matrix_view<T> x, matrix_view<T> y)
    {
        arena measure;
        shared.forward(ex, x, w.views(), y, measure);
        kept_memory = std::make_unique<support::workspace<Executor>>(own, measure.bytes()); // outlives the layer's executor
        kept = shared.forward(ex, x, w.views(), y, kept_memory->arena());
        CHECK(kept_memory->arena().used() == measure.used());
    }
    void backward(Executor& ex, matrix_view<T> dy, matrix_view<T> dx)
    {
        arena measure;
        shared.backward(ex, kept, dy, w.views(), dx, g.views(), mode, measure);
        support::workspace lent(ex, measure.bytes());
        shared.backward(ex, kept, dy, w.views(), dx, g.views(), mode, lent.arena());
        CHECK(lent.arena().used() == 0);
    }
    void infer(Executor& ex, matrix_view<T> x, matrix_view<T> y)
    {
        support::in_workspace(ex, [&](arena& memory) { shared.infer(ex, x, w.views(), y, memory); });
    }

    void check_gradients(const std::vector<support::expected_gradients<T>>& expected)
    {
        using sums = support::expected_gradients<T>;
        const auto judge = [&](const char* name, oracle::numbers oracle::expert::*member, typename sums::sums sums::*of) {
            auto all = expected.at(0).*of;
            for (std::size_t i = 0; mode == write_mode::accumulate && i < all.size(); ++i) all[i].add((before[0].*member)[i]);
            const auto verdict = support::within(support::narrowed<G>(g.read(member)), totals(all));
            CHECK_MESSAGE(verdict, name, ": ", verdict);
        };
        judge("the shared up", &oracle::expert::up, &sums::up);
        judge("the shared down", &oracle::expert::down, &sums::down);
        judge("the shared up's bias", &oracle::expert::up_bias, &sums::up_bias);
        judge("the shared down's bias", &oracle::expert::down_bias, &sums::down_bias);
    }
};

template <class Cell, class G, class Expert>
void check_shared_expert(support::random& r, const Expert& shared, write_mode mode)
{
    using T = typename Cell::type;
    auto ex = Cell::make();
    shared_beside<T, G, Expert, typename Cell::executor> beside(ex, r, shared, mode);
    const auto out = run<Cell>(r, gate_type{.experts = 4, .k = 2}, linear<>{.width = 10, .biases = true}, {.tokens = 19}, beside);
    check(out);
    beside.check_gradients(out.shared);
}

} // namespace

TEST_CASE_TEMPLATE("a shared expert adds its output to y and its gradient to dx", Cell, FASTMOE_COLUMN(host_executor),
                   support::cell<support::lanes, float>)
{
    using real = accumulate_t<typename Cell::type>;
    FASTMOE_SEEDED(r, 54);
    const mlp<swiglu> gated{.width = 10, .hidden = 6, .biases = true, .weigh = r.one_of(weigh_at::output, weigh_at::activation, weigh_at::input)};
    check_shared_expert<Cell, typename Cell::type>(r, gated, write_mode::overwrite);
    check_shared_expert<Cell, real>(r, gated, write_mode::accumulate);
    const linear<> plain{.width = 10, .biases = true};
    check_shared_expert<Cell, typename Cell::type>(r, plain, write_mode::overwrite);
    check_shared_expert<Cell, real>(r, plain, write_mode::accumulate);
}

TEST_CASE("what is saved for each kind of expert is what it declares, and Y where it does not apply the weights, to the byte")
{
    const gate_type gate{.experts = 6, .k = 2};
    const int64_t tokens = 512, slots = 1024, width = 64, rest = support::routing_bytes<float>(gate, tokens), y = slots * width * 4;
    CHECK(moe_layer{gate, linear<>{.width = width}, self{}}.saved_bytes<float>(tokens, width) == rest + y);
    CHECK(moe_layer{gate, scale_expert{width}, self{}}.saved_bytes<float>(tokens, width) == rest + y);

    host_executor ex({.threads = 1});
    const mlp<swiglu> expert{.width = width, .hidden = 32};
    arena measure;
    const matrix_view<float> x(nullptr, tokens, width);
    const auto w = expert.reserve_weights<float>(measure, 1);
    arena kept;
    shared_expert{expert}.forward(ex, x, w, x, kept);
    // Row numbers and weights of one a token, the one group, and the pre-activation.
    CHECK(kept.used() == tokens * 4 + tokens * 4 + 256 + 256 + tokens * 2 * 32 * 4);
    CHECK(kept.bytes() > kept.used()); // the rows and the activation were lent
}

TEST_CASE_TEMPLATE("layers of linear and of a user's experts take the memory that they say, and with the caller's none", T, float, bfloat16)
{
    support::check_memory<T>(linear<>{.width = 24, .biases = true}, 4);
    support::check_memory<T>(scale_expert{24}, 4);
}

TEST_CASE_TEMPLATE("a shared expert allocates nothing", T, float, bfloat16)
{
    FASTMOE_SEEDED(r, 58);
    host_executor ex({.threads = 2});
    const mlp<swiglu> expert{.width = 10, .hidden = 6, .biases = true, .weigh = weigh_at::input};
    shared_beside<T, accumulate_t<T>, mlp<swiglu>, host_executor> beside(ex, r, expert, write_mode::overwrite);
    support::guarded<T> x(40, 10), y(40, 10), dy(40, 10), dx(40, 10);
    for (auto* v : {&x, &y, &dy, &dx}) support::fill_normal(r, v->view());
    support::workspace kept(ex, 1 << 18), lent(ex, 1 << 18);
    const auto& shared = beside.shared;
    const support::allocations before;
    const auto parts = shared.forward(ex, x.view(), beside.w.views(), y.view(), kept.arena());
    shared.backward(ex, parts, dy.view(), beside.w.views(), dx.view(), beside.g.views(), write_mode::accumulate, lent.arena());
    shared.infer(ex, x.view(), beside.w.views(), y.view(), lent.arena());
    CHECK(before.since() == 0);
    CHECK(before.mallocs() == 0);
}
