// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The command line. Only main.cpp includes this: the rest of the program knows no CLI11.
#pragma once

#include <optional>
#include <string>

#include <CLI/CLI.hpp>

#include "run_block/program.hpp"

namespace run_block {

/// Reads the command line. @return the exit status where there is nothing left to do (help, a wrong option)
inline std::optional<int> parse_options(int argc, char** argv, program_options& o)
{
    CLI::App app("Runs one mixture-of-experts block of a published model from files in the Hugging Face layout.");
    app.option_defaults()->multi_option_policy(CLI::MultiOptionPolicy::TakeLast);
    app.add_option("--config", o.config, "The model's config.json; model_type chooses the family")->required();
    app.add_option("--weights", o.weights, "Safetensors file with the block's tensors, under the names that the model has "
                                           "below its MLP module")
        ->required();
    app.add_option("--input", o.input, "Safetensors file with the tensor x (tokens, width)")->required();
    app.add_option("--output", o.output, "File to write: y (tokens, width) and weights (tokens, k) as float32, experts "
                                         "(tokens, k) as int32. It is written as a whole or not at all")
        ->required();
    app.add_option("--dtype", o.dtype, "Of the experts' weights and activations. Sums and the whole "
                                          "router are in float32")
        ->check(CLI::IsMember({"float32", "bfloat16"}))
        ->capture_default_str();
    app.add_option("--threads", o.threads, "Threads; 0: all. The numbers do not depend on it")
        ->check(CLI::Range(0, 4096))
        ->capture_default_str();
    app.footer("docs/models.md lists the families, their tensors and the keys that are read.");
    try {
        app.parse(argc, argv);
    } catch (const CLI::ParseError& e) {
        return app.exit(e);
    }
    return std::nullopt;
}

} // namespace run_block
