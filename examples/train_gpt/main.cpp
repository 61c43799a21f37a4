// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// train_gpt: trains a GPT with mixture-of-experts layers on the bytes of any text. `train_gpt --help` says how.
#include <cstdio>
#include <exception>
#include <thread>

#include "train_gpt/options.hpp"
#include "train_gpt/signals.hpp"

namespace {

using namespace train_gpt;

/// Threads of each rank, if this many share the machine.
int threads_each(int asked, int ranks)
{
    if (asked != 0 || ranks == 1) return asked;
    return std::max(1, static_cast<int>(std::thread::hardware_concurrency()) / ranks);
}

int run_over_ranks(const program_options& o, const corpus& text, const std::optional<launched>& place)
{
    const int threads = threads_each(o.threads, place ? place->neighbours : o.parallel.ranks);
    const rank_body body = [&](const host_ranks& world) {
        fm::host_executor ex({.threads = threads});
        return o.config.type == dtype::float32 ? run_team_float32(ex, o, text, world)
                                               : run_team_bfloat16(ex, o, text, world);
    };
    if (!place) return run_on_threads(o.parallel.ranks, body);
#if defined(TRAIN_GPT_MPI)
    return run_on_mpi(body);
#else
    fm::raise<fm::error>("mpirun has started this process, but it was built without MPI; --ranks needs none");
#endif
}

int run_program(int argc, char** argv, const std::optional<launched>& place)
{
    program_options o;
    if (const auto status = parse_options(argc, argv, o, place)) return *status;
    o.config.check();
    const corpus text = read_corpus(o.config.text, o.config.max_bytes);
    if (!place || place->rank == 0)
        std::printf("text: %lld files of %s, %.1f MB to train on and %.1f MB to validate\n",
                    static_cast<long long>(text.files), text.path.c_str(), double(text.train.size()) / 1e6,
                    double(text.validation.size()) / 1e6);
    catch_signals();
    if (o.on == device::cuda) {
#if defined(TRAIN_GPT_CUDA)
        return o.parallel.ranks > 1 ? run_team_on_cuda(o, text, place) : run_on_cuda(o, text);
#else
        fm::raise<fm::error>("--device cuda: this program was built without CUDA (FASTMOE_TRAIN_GPT_CUDA)");
#endif
    }
    if (o.parallel.ranks > 1) return run_over_ranks(o, text, place);
    fm::host_executor ex({.threads = o.threads});
    return o.config.type == dtype::float32 ? run_float32(ex, o, text) : run_bfloat16(ex, o, text);
}

} // namespace

int main(int argc, char** argv)
{
    const auto place = launched::find();
    const bool named = place && place->size > 1;
    try {
        return run_program(argc, argv, place);
    } catch (const std::exception& e) {
        std::fprintf(stderr, "train_gpt: %s%s\n", named ? ("rank " + std::to_string(place->rank) + ": ").c_str() : "",
                     e.what());
        return 1;
    }
}
