// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The families: how each model's config.json becomes a description. docs/models.md has the same as a table.
#pragma once

#include <map>
#include <string>
#include <string_view>

#include "run_block/config_file.hpp"
#include "run_block/description.hpp"

namespace run_block {

namespace families {

/// What all have in common, under the usual keys.
/// @param hidden  the key of a routed expert's hidden width
inline description usual(const config_file& c, const char* hidden)
{
    description d;
    d.model_type = c.text("model_type");
    d.numbers.width = c.whole("hidden_size");
    d.numbers.hidden = c.whole(hidden);
    d.numbers.experts = c.whole({"num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"});
    const char* k = c.has("moe_k") ? "moe_k" : "num_experts_per_tok";
    d.numbers.k = c.whole(k);
    if (d.numbers.k > d.numbers.experts)
        c.refuse(k, "1 to the number of experts, " + std::to_string(d.numbers.experts));
    const std::string act = c.text_or("hidden_act", "silu");
    if (act != "silu" && act != "swish") c.refuse("hidden_act", "\"silu\", which all these models have");
    return d;
}

inline void share(description& d, int64_t hidden, const char* name, sharing how = sharing::plain)
{
    d.numbers.shared_hidden = hidden;
    d.sharing = hidden > 0 ? how : sharing::none;
    d.shared = name;
}

inline description mixtral(const config_file& c) // also MiniMax-Text-01
{
    description d = usual(c, "intermediate_size");
    d.division = division::sum;
    d.numbered = true;
    return d;
}

inline description granitemoe(const config_file& c)
{
    description d = mixtral(c);
    d.router = {"router.layer.weight", "router.weight"};
    d.gate_up = {"input_linear.weight", "experts.gate_up_proj"};
    d.down = {"output_linear.weight", "experts.down_proj"};
    return d;
}

inline description phimoe(const config_file& c)
{
    description d = usual(c, "intermediate_size");
    d.model = model::phimoe;
    d.numbers.mask_epsilon = c.number_or("router_jitter_noise", 0.01);
    if (!(d.numbers.mask_epsilon >= 0))
        c.refuse("router_jitter_noise", "0 or more");
    if (d.numbers.k != 2)
        c.refuse("num_experts_per_tok", "2: the model's code has that many rounds");
    d.router = {"gate.weight", "router.weight"};
    d.numbered = true;
    return d;
}

inline description jamba(const config_file& c)
{
    description d = usual(c, "intermediate_size");
    d.router = {"router.weight"};
    return d;
}

inline description olmoe(const config_file& c)
{
    description d = usual(c, "intermediate_size");
    d.division = c.truth("norm_topk_prob") ? division::sum : division::none;
    return d;
}

inline description qwen3_moe(const config_file& c)
{
    description d = usual(c, "moe_intermediate_size");
    d.division = c.truth("norm_topk_prob") ? division::sum : division::none;
    return d;
}

inline description qwen2_moe(const config_file& c)
{
    description d = qwen3_moe(c);
    share(d, c.whole("shared_expert_intermediate_size"), "shared_expert", sharing::gated);
    return d;
}

/// Groups, scale and shared experts of DeepSeek's line.
inline void read_groups(description& d, const config_file& c)
{
    auto& n = d.numbers;
    n.groups = c.whole("n_group");
    n.keep = c.whole("topk_group");
    if (n.experts % n.groups != 0)
        c.refuse("n_group", "a divisor of the " + std::to_string(n.experts) + " experts");
    if (n.keep > n.groups) c.refuse("topk_group", "at most n_group = " + std::to_string(n.groups));
    if (n.k > n.keep * (n.experts / n.groups))
        c.refuse("num_experts_per_tok",
                 "at most the " + std::to_string(n.keep * (n.experts / n.groups)) + " experts of topk_group groups");
}

inline description deepseek(const config_file& c)
{
    description d = usual(c, "moe_intermediate_size");
    d.numbers.scale = c.number("routed_scaling_factor");
    const int64_t shared = c.whole_or("n_shared_experts", 0, 0);
    share(d, shared * d.numbers.hidden, "shared_experts");
    return d;
}

inline description deepseek_v2(const config_file& c)
{
    description d = deepseek(c);
    d.model = model::deepseek_v2;
    d.shared_biases = c.truth_or("mlp_bias", false);
    const std::string method = c.text_or("topk_method", "greedy");
    if (method == "group_limited_greedy") read_groups(d, c);
    else if (method != "greedy") c.refuse("topk_method", "\"greedy\" or \"group_limited_greedy\"");
    return d;
}

inline description deepseek_v3(const config_file& c) // also Kimi K2 and GLM-4.5
{
    description d = deepseek(c);
    d.model = model::deepseek_v3;
    read_groups(d, c);
    if (d.numbers.experts / d.numbers.groups < 2)
        c.refuse("n_group", "groups of 2 experts or more, whose best 2 are added");
    d.division = c.truth("norm_topk_prob") ? division::sum : division::none;
    d.correction_bias = {"gate.e_score_correction_bias"};
    return d;
}

inline description minimax_m2(const config_file& c)
{
    description d = usual(c, "intermediate_size");
    d.model = model::minimax_m2;
    d.division = division::sum;
    d.correction_bias = {"e_score_correction_bias", "gate.e_score_correction_bias"};
    d.numbered = true;
    return d;
}

inline description ernie4_5_moe(const config_file& c)
{
    description d = usual(c, "moe_intermediate_size");
    d.model = model::ernie4_5;
    d.division = division::sum;
    d.numbers.least_sum = c.number_or("moe_norm_min", 1e-12);
    if (!(d.numbers.least_sum >= 0)) c.refuse("moe_norm_min", "0 or more");
    d.correction_bias = {"moe_statics.e_score_correction_bias", "gate.moe_statics.e_score_correction_bias"};
    d.correction_in_row = true;
    d.shared_biases = c.truth_or("use_bias", false);
    share(d, c.whole_or("moe_num_shared_experts", 0, 0) * d.numbers.hidden, "shared_experts");
    return d;
}

inline description llama4(const config_file& file)
{
    const config_file c = file.has("text_config") ? file.inside("text_config") : file; // a model that sees holds one that reads
    description d = usual(c, "intermediate_size");
    d.model = model::llama4;
    d.router = {"router.weight"};
    d.stacking = stacking::in_out;
    share(d, d.numbers.hidden, "shared_expert");
    return d;
}

inline description gpt_oss(const config_file& c)
{
    description d = usual(c, "intermediate_size");
    d.model = model::gpt_oss;
    d.numbers.activation.alpha = c.number_or("swiglu_alpha", 1.702);
    d.numbers.activation.limit = c.number_or("swiglu_limit", 7.0);
    if (!(d.numbers.activation.limit >= 0))
        c.refuse("swiglu_limit", "0 or more");
    d.router = {"router.weight"};
    d.router_bias = "router.bias";
    d.stacking = stacking::in_out_in_turns;
    return d;
}

inline description dbrx(const config_file& file)
{
    const config_file c = file.inside("ffn_config");
    description d;
    d.model_type = file.text("model_type");
    auto& n = d.numbers;
    n.width = file.whole("d_model");
    n.hidden = c.whole("ffn_hidden_size");
    n.experts = c.whole("moe_num_experts");
    n.k = c.whole("moe_top_k");
    if (n.k > n.experts) c.refuse("moe_top_k", "1 to moe_num_experts = " + std::to_string(n.experts));
    if (c.has("ffn_act_fn")) {
        const std::string act = c.inside("ffn_act_fn").text_or("name", "silu");
        if (act != "silu") c.inside("ffn_act_fn").refuse("name", "\"silu\"");
    }
    if (c.has("moe_normalize_expert_weights")) {
        n.norm_power = c.number("moe_normalize_expert_weights");
        if (!(n.norm_power > 0)) c.refuse("moe_normalize_expert_weights", "more than 0, or null");
        d.division = division::norm;
    }
    d.router = {"router.layer.weight"};
    d.stacking = stacking::flat;
    return d;
}

} // namespace families

/// @throws format_error if the model is none of these, or a key is missing or not what it must be
inline description describe(const config_file& c)
{
    using reader = description (*)(const config_file&);
    static const std::map<std::string_view, reader> known{
        {"dbrx", families::dbrx},
        {"deepseek_v2", families::deepseek_v2},
        {"deepseek_v3", families::deepseek_v3},
        {"ernie4_5_moe", families::ernie4_5_moe},
        {"glm4_moe", families::deepseek_v3},
        {"gpt_oss", families::gpt_oss},
        {"granitemoe", families::granitemoe},
        {"jamba", families::jamba},
        {"kimi_k2", families::deepseek_v3},
        {"llama4", families::llama4},
        {"llama4_text", families::llama4},
        {"minimax", families::mixtral},
        {"minimax_m2", families::minimax_m2},
        {"mixtral", families::mixtral},
        {"olmoe", families::olmoe},
        {"phimoe", families::phimoe},
        {"qwen2_moe", families::qwen2_moe},
        {"qwen3_moe", families::qwen3_moe},
    };
    const std::string type = c.text("model_type");
    const auto found = known.find(type);
    if (found == known.end()) {
        std::string all;
        for (const auto& [name, read] : known) all += (all.empty() ? "" : ", ") + std::string(name);
        c.refuse("model_type", "one of " + all);
    }
    return found->second(c);
}

} // namespace run_block
