// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The command line. Only main.cpp includes this: the rest of the program knows no CLI11.
#pragma once

#include <map>
#include <optional>
#include <string>

#include <CLI/CLI.hpp>

#include "train_gpt/launch.hpp"
#include "train_gpt/program.hpp"

namespace train_gpt {

namespace detail {

/// Takes over the configuration of a checkpoint. What the command line says must agree with it.
inline void resume_config(run_config& asked, const std::map<std::string, CLI::Option*>& options, const run_state& state)
{
    run_config stored = parse_config(state.config);
    const auto before = to_json(stored), now = to_json(asked);
    for (const auto& [name, option] : options)
        fm::expects(option->count() == 0 || before.at(name) == now.at(name), ("--" + name).c_str(), now.at(name).dump(),
                    before.at(name).dump(), ", as in the run that is resumed");
    asked = stored;
}

inline std::map<std::string, CLI::Option*> add_config(CLI::App& app, run_config& c)
{
    std::map<std::string, CLI::Option*> out;
    for_each_field(c, [&](const char* name, auto& field, const char* help) {
        const std::string flag = std::string("--") + name;
        using type = std::remove_reference_t<decltype(field)>;
        if constexpr (std::is_same_v<type, bool>) out[name] = app.add_flag(flag, field, help);
        else if constexpr (std::is_same_v<type, dtype>)
            out[name] = app.add_option(flag, field, help)
                            ->transform(CLI::CheckedTransformer(std::map<std::string, dtype>{
                                {"float32", dtype::float32}, {"bfloat16", dtype::bfloat16}}))
                            ->default_str("float32");
        else out[name] = app.add_option(flag, field, help)->capture_default_str();
    });
    return out;
}

} // namespace detail

/// Reads the command line. @return the exit status where there is nothing left to do (help, a wrong option)
/// @param place  what mpirun says, if it has started this process: rank 0 prints
inline std::optional<int> parse_options(int argc, char** argv, program_options& o, const std::optional<launched>& place)
{
    CLI::App app("Trains a small GPT, whose MLPs are mixtures of experts, on bytes of text.");
    app.footer("SIGINT, SIGTERM or SIGUSR1 (which mpirun passes on) saves a checkpoint and stops after the step.");
    app.option_defaults()->multi_option_policy(CLI::MultiOptionPolicy::TakeLast)->group("Model, text and training");
    const auto options = detail::add_config(app, o.config);

    app.option_defaults()->group("This run");
    app.add_option("--out", o.loop.out, "Folder for the checkpoint, the log and the report")->capture_default_str();
    app.add_option("--log", o.loop.log, "CSV of all steps; by default log.csv in the folder");
    std::string path;
    auto* resume = app.add_option("--resume", path,
                                  "Go on from a checkpoint, by default the folder's, bit for bit as if "
                                  "never stopped. It may be of any number of ranks")
                       ->expected(0, 1);
    app.add_option("--checkpoint-every", o.loop.checkpoint_every, "Steps; 0: at the end only")->capture_default_str();
    app.add_option("--validate-every", o.loop.validate_every, "Steps; 0: at the end only")->capture_default_str();
    app.add_option("--validation-windows", o.loop.validation_windows,
                   "Windows of text that a validation reads; the last "
                   "one reads eight times as many")
        ->capture_default_str();
    app.add_option("--stop-at", o.loop.stop_at, "Stop after this step as if interrupted");
    auto* seconds = app.add_option("--seconds", o.loop.seconds, "Stop as if interrupted when the steps have taken this "
                                                                "long; 0: never. For the demo: each model, 120");
    app.add_option("--threads", o.threads, "Threads of a rank; 0: all that the machine has. The numbers do not depend on it")->capture_default_str();

    app.add_option("--device", o.on, "Where to train: cpu, or cuda, a GPU. Ranks of --ranks share one; under "
                                       "mpirun each takes the next one of its machine")
        ->transform(CLI::CheckedTransformer(std::map<std::string, device>{{"cpu", device::cpu}, {"cuda", device::cuda}}))
        ->default_str("cpu");

    app.option_defaults()->group("Ranks");
    auto* ranks = app.add_option("--ranks", o.parallel.ranks,
                                 "Train over this many ranks, threads of this process. Under mpirun, its processes are the "
                                 "ranks. The numbers are those of one rank but for rounding")
                      ->check(CLI::Range(1, 64));
    app.add_option("--expert-parallel", o.parallel.expert_parallel,
                   "Ranks that share the experts of a layer, a divisor of all; the others are replicas. 0: all")
        ->capture_default_str();
    app.add_option("--exchange", o.parallel.exchange,
                   "How tokens travel: exact (counts first), padded (room for all, no counts) or gathered (all to all)")
        ->transform(CLI::CheckedTransformer(std::map<std::string, exchange_kind>{{"exact", exchange_kind::exact},
                                                                                 {"padded", exchange_kind::padded},
                                                                                 {"gathered", exchange_kind::gathered}}))
        ->default_str("exact");
    app.add_option("--chunks", o.parallel.chunks,
                   "Pieces of the tokens' exchange: one travels while another is worked on")
        ->capture_default_str();

    app.option_defaults()->group("Text from the model");
    std::string prompt;
    auto* sample = app.add_option("--sample", prompt, "At the end, continue this text (may be empty)")->expected(0, 1);
    app.add_option("--sample-length", o.sample.length, "Bytes, at most")->capture_default_str();
    app.add_option("--temperature", o.sample.temperature, "0: always the likeliest byte")->capture_default_str();

    auto* demo = app.add_subcommand("demo", "Trains the model and its dense twin on the same text and compares them");
    app.fallthrough();
    demo->fallthrough();
    try {
        app.parse(argc, argv);
    } catch (const CLI::ParseError& e) {
        // Help is for one to print; what is wrong is said by all, since mpirun ends the others when the first has ended.
        if (place && place->rank > 0 && e.get_exit_code() == 0) return 0;
        return app.exit(e);
    }
    fm::expects(!place || ranks->count() == 0, "--ranks", "given under mpirun", "none: the ranks are its processes");
    o.parallel.ranks = place ? place->size : std::max(1, o.parallel.ranks);
    o.parallel.check(o.parallel.ranks);
    o.demo = demo->parsed();
    if (o.demo && seconds->count() == 0) o.loop.seconds = 120;
    if (sample->count() > 0) o.prompt = prompt;
    if (resume->count() > 0) {
        fm::expects(!o.demo, "--resume", "given to the demo", "a run of one model");
        o.resume.emplace(path.empty() ? saved_run::newest(o.loop.checkpoint_path(), o.loop.parts_path()) : path);
        detail::resume_config(o.config, options, o.resume->state());
    } else if (o.config.text.empty()) {
        o.config.text = default_text_path();
        fm::expects(!o.config.text.empty(), "--text", "not given",
                    "a path: this machine has no C++ standard library headers");
    }
    o.sample.seed = o.config.seed;
    return std::nullopt;
}

} // namespace train_gpt
