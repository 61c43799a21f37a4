// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Everything that decides the numbers of a run, and its JSON text in the checkpoint: two runs with the same text and
/// the same corpus have the same bits.
#pragma once

#include <string>

#include <nlohmann/json.hpp>

#include "train_gpt/adamw.hpp"
#include "train_gpt/gpt_config.hpp"

namespace train_gpt {

enum class dtype : std::uint8_t { float32, bfloat16 };

struct run_config {
    gpt_config model;        ///< the MoE, also for a dense run: see shape()
    bool dense = false;      ///< train the twin instead
    dtype type = dtype::float32;
    int64_t batch = 8;       ///< sequences a step
    int64_t steps = 1600;
    int64_t warmup = 100;    ///< steps
    double learning_rate = 1.5e-3;
    double weight_decay = 0.1;
    double clip = 1.0;
    std::uint64_t seed = 1;
    std::string text;        ///< file or folder
    int64_t max_bytes = 0;   ///< of text; 0: all

    gpt_config shape() const { return dense ? model.dense() : model; }
    adamw_options optimizer() const { return {.weight_decay = weight_decay, .clip = clip}; }
    learning_rate_schedule schedule() const { return {.peak = learning_rate, .warmup = warmup, .steps = steps}; }
    int64_t tokens_per_step() const { return batch * model.context; }

    void check() const
    {
        shape().check();
        fm::expects(batch >= 1, "--batch", batch, "1 or more");
        fm::expects(steps >= 1, "--steps", steps, "1 or more");
        fm::expects(warmup >= 0, "--warmup", warmup, "0 or more");
        fm::expects(learning_rate > 0, "--learning-rate", learning_rate, "more than 0");
        fm::expects(weight_decay >= 0, "--weight-decay", weight_decay, "0 or more");
        fm::expects(clip >= 0, "--clip", clip, "0 or more");
        fm::expects(model.balance >= 0, "--balance", model.balance, "0 or more");
    }
};

/// f(name of the option without its dashes, the field, what it is) for every field, in the order of the help text.
template <class Config, class F>
void for_each_field(Config& c, const F& f)
{
    f("text", c.text, "File or folder to learn from; by default the headers of the C++ standard library");
    f("max-bytes", c.max_bytes, "Read no more text than this; 0: all");
    f("width", c.model.width, "Width of the model");
    f("layers", c.model.layers, "Blocks of attention and MLP");
    f("heads", c.model.heads, "Attention heads; must divide the width");
    f("experts", c.model.experts, "Experts of each layer");
    f("k", c.model.k, "Experts that a token meets");
    f("hidden", c.model.hidden, "Hidden width of one expert");
    f("context", c.model.context, "Bytes that the model sees");
    f("dense", c.dense, "Train the dense twin: one MLP of k * hidden, the same active parameters");
    f("balance", c.model.balance, "Coefficient of the balance loss");
    f("batch", c.batch, "Sequences of a step");
    f("steps", c.steps, "Steps of the whole run, which the learning rate's schedule spans");
    f("warmup", c.warmup, "Steps in which the learning rate rises");
    f("learning-rate", c.learning_rate, "The highest learning rate");
    f("weight-decay", c.weight_decay, "Decay of matrices (AdamW)");
    f("clip", c.clip, "Largest norm of the gradient; 0: any");
    f("seed", c.seed, "Of the first weights, the order of the text and the sample");
    f("dtype", c.type, "Of weights and activations in the products; sums and the optimizer are in float32");
}

inline nlohmann::ordered_json to_json(const run_config& c)
{
    nlohmann::ordered_json out;
    for_each_field(c, [&](const char* name, const auto& field, const char*) {
        if constexpr (std::is_same_v<std::remove_cvref_t<decltype(field)>, dtype>)
            out[name] = field == dtype::float32 ? "float32" : "bfloat16";
        else out[name] = field;
    });
    return out;
}

/// @throws format_error if the text is not the JSON of a configuration
inline run_config parse_config(const std::string& text)
{
    run_config c;
    try {
        const auto json = nlohmann::ordered_json::parse(text);
        for_each_field(c, [&](const char* name, auto& field, const char*) {
            using type = std::remove_reference_t<decltype(field)>;
            if constexpr (std::is_same_v<type, dtype>)
                field = json.at(name) == "float32" ? dtype::float32 : dtype::bfloat16;
            else field = json.at(name).template get<type>();
        });
    } catch (const nlohmann::json::exception& e) {
        fm::raise<fm::format_error>(std::string("the checkpoint's configuration cannot be read: ") + e.what());
    }
    return c;
}

} // namespace train_gpt
