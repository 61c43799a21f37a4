// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The main job: the mixture of experts and its dense twin, trained on the same tokens in the same order, compared. Over
/// ranks, the mixture's experts are shared, and the twin, which has none, is replicated.
#pragma once

#include <cstdio>

#include "train_gpt/loop.hpp"
#include "train_gpt/plot.hpp"
#include "train_gpt/sample.hpp"

namespace train_gpt {

/// The number in millions, as text.
inline std::string millions(int64_t n) { return detail::format("%.2f M", double(n) / 1e6); }

/// One line about what is about to be trained.
template <class Trainer>
void introduce(Trainer& t, const char* what)
{
    const auto& c = t.model().config();
    if (!t.ranks().speaks()) return;
    std::printf("%s: %lld layers, width %lld, %s; %s parameters, %s of them active for a token\n", what,
                static_cast<long long>(c.layers), static_cast<long long>(c.width),
                c.experts == 1 ? detail::format("one MLP of %lld", static_cast<long long>(c.hidden)).c_str()
                               : detail::format("%lld experts of %lld, %lld chosen", static_cast<long long>(c.experts),
                                                static_cast<long long>(c.hidden), static_cast<long long>(c.k))
                                     .c_str(),
                millions(t.model().total_params()).c_str(), millions(t.model().active_params()).c_str());
    if constexpr (std::remove_cvref_t<decltype(t.ranks())>::many) {
        const int ranks = t.ranks().size(), group = t.ranks().expert_parallel();
        if (group == 1) std::printf("%d ranks, each with the whole model\n", ranks);
        else std::printf("%d ranks: the experts of a layer lie on %d, each on one of them%s\n", ranks, group,
                         ranks == group ? "" : detail::format("; %d replicas", ranks / group).c_str());
    }
    std::fflush(stdout);
}

struct trained_model {
    model_report report;
    loss_curve curve;
    expert_load load;
    double seconds = 0;
    std::string sample;
    int signal = 0; ///< that has stopped it; 0: none
};

/// Trains one of the two and measures it.
template <class T, class Gemm, class Executor, class Ranks>
trained_model train_one(Executor& ex, const program_options& o, const corpus& text, bool dense, const Ranks& ranks)
{
    run_config config = o.config;
    config.dense = dense;
    loop_options loop = o.loop;
    loop.out = (std::filesystem::path(o.loop.out) / (dense ? "dense" : "moe")).string();
    loop.log.clear();
    trainer<T, Executor, Gemm, Ranks> t(ex, config, text, ranks);
    introduce(t, dense ? "dense" : "MoE");
    const auto run = train(t, loop);
    if (!t.finished() && run.signal == 0 && ranks.speaks())
        std::printf("%s: the time was over after step %lld of %lld\n", dense ? "dense" : "MoE",
                    static_cast<long long>(t.steps_done()), static_cast<long long>(config.steps));
    trained_model out;
    out.signal = run.signal;
    if (out.signal != 0) return out;
    const auto measured = t.validate(8 * loop.validation_windows);
    const auto c = t.model().config();
    out.report = {measured.loss, t.model().active_params(), t.model().total_params(), run.tokens_per_second};
    out.curve = {dense ? "dense twin"
                       : detail::format("MoE, %lld experts, %lld chosen", static_cast<long long>(c.experts),
                                        static_cast<long long>(c.k)),
                 run.rows};
    out.load = measured.load;
    out.seconds = run.seconds;
    if (!dense) {
        const std::string prompt = o.prompt.value_or("namespace std\n{\n  template<typename _Tp>\n    ");
        out.sample = prompt + generate(ex, t.model(), prompt, o.sample, ranks);
    }
    out.signal = t.agree(false).signal;
    return out;
}

/// The exit status of a comparison that the mixture has lost.
inline constexpr int moe_is_not_better = 3;

/// @return the exit status: 0 if the mixture's validation loss is the lower one, else moe_is_not_better
template <class T, class Gemm, class Executor, class Ranks>
int run_demo(Executor& ex, program_options o, const corpus& text, const Ranks& ranks)
{
    const auto moe = train_one<T, Gemm>(ex, o, text, false, ranks);
    if (moe.signal != 0) return 128 + moe.signal;
    o.loop.stop_at = moe.curve.rows.back().step; // the same steps, also where the time ran out before the last
    o.loop.seconds = 0;
    const auto dense = train_one<T, Gemm>(ex, o, text, true, ranks.without_experts());
    if (dense.signal != 0) return 128 + dense.signal;
    const int status = moe.report.val_loss < dense.report.val_loss ? 0 : moe_is_not_better;
    if (!ranks.speaks()) return status;

    demo_summary summary;
    summary.corpus_bytes = text.bytes;
    summary.tokens = moe.curve.rows.back().tokens;
    summary.seconds = moe.seconds + dense.seconds;
    summary.moe = moe.report;
    summary.dense = dense.report;
    summary.load = moe.load;
    const auto at = [&](const char* name) { return (std::filesystem::path(o.loop.out) / name).string(); };
    const std::string subtitle = detail::format("%.1f MB of %s, %.2f M tokens each", double(text.bytes) / 1e6,
                                                text.path.c_str(), double(summary.tokens) / 1e6);
    write_summary(at("summary.json"), summary);
    write_text(at("loss.svg"), loss_svg({moe.curve, dense.curve}, subtitle));
    write_text(at("load.svg"), load_svg(moe.load, subtitle));

    std::printf("\n%s\n", load_bars(moe.load).c_str());
    std::printf("a sample of the MoE's text:\n----\n%s\n----\n\n", printable(moe.sample).c_str());
    std::printf("%-8s%18s%18s%18s%12s\n", "", "validation loss", "active params", "total params", "tokens/s");
    const auto line = [](const char* name, const model_report& m) {
        std::printf("%-8s%18.4f%18lld%18lld%12.0f\n", name, m.val_loss, static_cast<long long>(m.active_params),
                    static_cast<long long>(m.total_params), m.tokens_per_second);
    };
    line("MoE", moe.report);
    line("dense", dense.report);
    std::printf("(nats per byte, on text that neither has seen; %lld tokens each, %.0f s in all)\n",
                static_cast<long long>(summary.tokens), summary.seconds);
    std::printf("wrote %s, loss.svg and load.svg\n", at("summary.json").c_str());
    if (status == 0) return status;
    std::fflush(stdout);
    std::fprintf(stderr,
                 "The MoE's validation loss, %.4f, is not lower than its dense twin's, %.4f: the comparison did not show what "
                 "it is for.\n",
                 moe.report.val_loss, dense.report.val_loss);
    return status;
}

} // namespace train_gpt
