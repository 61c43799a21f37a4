// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The program's body for one type and executor, and the library's policy for its products: oneDNN on the host where the
/// build has found it.
#pragma once

#include <cstdio>

#include <fastmoe/gemm/portable.hpp>
#if defined(TRAIN_GPT_ONEDNN)
#include <fastmoe/gemm/onednn.hpp>
#endif

#include "train_gpt/demo.hpp"

namespace train_gpt {

#if defined(TRAIN_GPT_ONEDNN)
template <class Executor>
using products = std::conditional_t<std::is_same_v<Executor, fm::host_executor>, fm::gemm::onednn, fm::gemm::portable>;
#else
template <class Executor>
using products = fm::gemm::portable;
#endif

/// Trains one model, from the start or from a checkpoint.
template <class T, class Executor, class Ranks>
int run_training(Executor& ex, program_options& o, const corpus& text, const Ranks& ranks)
{
    trainer<T, Executor, products<Executor>, Ranks> t(ex, o.config, text, ranks);
    introduce(t, o.config.dense ? "dense" : "MoE");
    if (o.resume) {
        t.load(*o.resume);
        o.resume.reset(); // it is as large as the model
        if (ranks.speaks()) std::printf("resumed after step %lld\n", static_cast<long long>(t.steps_done()));
    }
    const int signal = train(t, o.loop).signal;
    if (ranks.speaks() && (signal != 0 || !t.finished()))
        std::printf("stopped after step %lld of %lld; --resume goes on\n", static_cast<long long>(t.steps_done()),
                    static_cast<long long>(o.config.steps));
    if (signal != 0) return 128 + signal;
    const auto measured = t.validate(8 * o.loop.validation_windows);
    if (ranks.speaks()) {
        std::printf("validation loss %.4f nats per byte\n", measured.loss);
        if (!o.config.dense) std::printf("%s", load_bars(measured.load).c_str());
    }
    if (!o.prompt) return 0;
    const std::string more = generate(ex, t.model(), *o.prompt, o.sample, ranks);
    if (ranks.speaks())
        std::printf("----\n%s%s\n----\n", printable(*o.prompt).c_str(), printable(more).c_str());
    return 0;
}

/// @return the exit status
template <class T, class Executor, class Ranks>
int run(Executor& ex, program_options& o, const corpus& text, const Ranks& ranks)
{
    if (o.demo) return run_demo<T, products<Executor>>(ex, o, text, ranks);
    return o.config.dense ? run_training<T>(ex, o, text, ranks.without_experts()) : run_training<T>(ex, o, text, ranks);
}

} // namespace train_gpt
