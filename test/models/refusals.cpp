// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// What run_block refuses: files that are not a block of the model that the configuration names. Each time the status is
/// not zero, the message names the tensor or the key and what was expected, and there is no output file.
#include <algorithm>
#include <functional>
#include <string>
#include <vector>

#include <doctest/doctest.h>

#include "models/block_scene.hpp"

namespace {

using models_test::scene;
namespace io = fastmoe::io;

void expect_refused(const scene& s, const support::finished_process& r, const std::vector<std::string>& parts)
{
    CAPTURE(r.out);
    CHECK(r.status == 1);
    CHECK(r.out.starts_with("run_block: "));
    CHECK(std::count(r.out.begin(), r.out.end(), '\n') == 1);
    for (const auto& part : parts) CHECK_MESSAGE(r.out.find(part) != std::string::npos, part);
    CHECK(!s.has_output());
    CHECK(!std::filesystem::exists(s.output() + ".partial"));
}

std::string shape_text(const std::vector<std::int64_t>& shape)
{
    std::string out;
    for (const std::int64_t n : shape) out += (out.empty() ? "(" : ",") + std::to_string(n);
    return out + ")";
}

/// A safetensors file with this header and data; `length` replaces the true header length.
std::string file_of(const std::string& header, const std::string& data, std::uint64_t length)
{
    std::string out;
    for (int i = 0; i < 8; ++i) out += static_cast<char>(length >> 8 * i);
    return out + header + data;
}

/// One case of each set of names and layouts.
constexpr const char* all_kinds[] = {"qwen2_moe_normalized", "deepseek_v3_raw", "ernie4_5_moe", "gpt_oss", "dbrx_raw", "granitemoe",
                                     "llama4_top2",          "mixtral",         "minimax_m2"};

} // namespace

TEST_CASE("a block without one of its tensors is refused, and the message names it and its shape")
{
    for (const std::string name : all_kinds) {
        CAPTURE(name);
        const scene whole(name);
        int seen = 0;
        for (const auto& [key, t] : whole.block.tensors) {
            const std::string missing = key;
            // Of many experts, the first, the last and one between.
            if (missing.starts_with("experts.") && missing[8] >= '0' && missing[8] <= '9' && missing[8] != '0' && missing[8] != '5')
                continue;
            CAPTURE(missing);
            scene s(name);
            s.block.tensors.erase(missing);
            expect_refused(s, s.run(), {"'" + missing + "'", "is missing; expected ", shape_text(t.shape), s.path("block.safetensors")});
            ++seen;
        }
        CHECK(seen >= 3);
    }
}

TEST_CASE("a tensor of another shape or type is refused, and the message has what it is and what was expected")
{
    for (const std::string name : all_kinds) {
        CAPTURE(name);
        const scene whole(name);
        int seen = 0;
        for (const auto& entry : whole.block.tensors) {
            const std::string changed = entry.first;
            const io::safetensor& t = entry.second;
            if (changed.starts_with("experts.") && changed[8] > '0' && changed[8] <= '9') continue;
            CAPTURE(changed);
            const auto refused = [&](io::safetensor other) {
                scene s(name);
                s.block.tensors[changed] = other;
                expect_refused(s, s.run(), {"'" + changed + "'",
                                            std::string("is ") + io::name_of(other.type) + " of shape " + shape_text(other.shape),
                                            "; expected F32, BF16 or F16 of shape " + shape_text(t.shape)});
            };
            io::safetensor other = t;
            std::reverse(other.shape.begin(), other.shape.end());
            if (other.shape != t.shape) refused(other); // transposed
            other = t;
            other.shape.insert(other.shape.begin(), 1);
            refused(other); // of a higher rank
            other = t;
            other.type = io::bytes_of(t.type) == 4 ? io::element_type::i32 : io::element_type::u16;
            refused(other); // no floats
            ++seen;
        }
        CHECK(seen >= 3);
    }
}

TEST_CASE("a tensor that is no part of the block is refused by its name")
{
    const auto refused = [](const std::string& name, const std::string& extra, const std::vector<std::int64_t>& shape) {
        CAPTURE(name);
        CAPTURE(extra);
        scene s(name);
        const std::vector<float> values(1000);
        s.block.tensors[extra] = {io::element_type::f32, shape, reinterpret_cast<const std::byte*>(values.data())};
        expect_refused(s, s.run(), {"is not a part of a block of ", "expected no such tensor", extra.size() < 50 && extra.find('\n') == std::string::npos ? "'" + extra + "'" : "'"});
    };
    refused("mixtral", "experts.8.w1.weight", {40, 25});
    refused("mixtral", "gate.bias", {8});
    refused("mixtral", "experts.gate_up_proj", {8, 5, 5}); // beside experts one by one
    refused("qwen3_moe", "shared_expert.up_proj.weight", {24, 40});
    refused("gpt_oss", "experts.gate_up_proj_blocks", {16, 2});
    refused("dbrx", "experts.0.w1.weight", {24, 40});
    refused("ernie4_5_moe_clamped", "shared_experts.up_proj.weight", {1, 2});
    refused("mixtral", "a name\nof two lines", {1});
    refused("mixtral", std::string(5000, 'x'), {1});
}

TEST_CASE("an input without x, with another shape of it, or with more than it, is refused")
{
    const auto refused = [](const std::function<void(scene&)>& change, const std::vector<std::string>& parts) {
        scene s("mixtral");
        change(s);
        auto all = parts;
        all.push_back(s.path("in.safetensors"));
        expect_refused(s, s.run(), all);
    };
    refused([](scene& s) { s.input.tensors.clear(); }, {"'x'", "is missing; expected F32, BF16 or F16 of rank 2"});
    refused([](scene& s) { s.input.tensors["x"].shape = {32, 24}; }, {"'x'", "of shape (32,24); expected F32, BF16 or F16 of shape (32,32)"});
    refused([](scene& s) { s.input.tensors["x"].shape = {1, 24, 32}; }, {"'x'", "of shape (1,24,32); expected F32, BF16 or F16 of rank 2"});
    refused([](scene& s) { s.input.tensors["x"].type = io::element_type::i32; }, {"'x'", "is I32 of shape (24,32); expected F32"});
    refused([](scene& s) { s.input.tensors["y"] = s.input.tensors["x"]; }, {"'y'", "is not a part of the input"});
}

TEST_CASE("a configuration without a key that decides, or with a value that cannot be, is refused by the key")
{
    const auto refused = [](const std::string& name, const std::function<void(nlohmann::json&)>& change, const std::vector<std::string>& parts) {
        CAPTURE(name);
        scene s(name);
        change(s.config);
        auto all = parts;
        all.push_back(s.path("config.json"));
        expect_refused(s, s.run(), all);
    };
    const std::vector<std::pair<std::string, std::vector<std::string>>> needed{
        {"mixtral", {"model_type", "hidden_size", "intermediate_size", "num_local_experts", "num_experts_per_tok"}},
        {"qwen2_moe", {"moe_intermediate_size", "num_experts_per_tok", "norm_topk_prob", "shared_expert_intermediate_size"}},
        {"qwen3_moe", {"norm_topk_prob"}},
        {"olmoe", {"intermediate_size", "norm_topk_prob"}},
        {"deepseek_v2", {"n_group", "topk_group", "routed_scaling_factor"}},
        {"deepseek_v3", {"n_group", "topk_group", "routed_scaling_factor", "norm_topk_prob"}},
        {"glm4_moe", {"n_group", "topk_group", "routed_scaling_factor", "norm_topk_prob"}},
        {"ernie4_5_moe", {"hidden_size", "moe_intermediate_size"}},
        {"gpt_oss", {"hidden_size", "intermediate_size", "num_local_experts"}},
        {"llama4", {"hidden_size", "intermediate_size", "num_local_experts"}},
        {"granitemoe", {"hidden_size", "intermediate_size"}},
        {"dbrx", {"d_model", "ffn_config"}},
    };
    for (const auto& [name, keys] : needed)
        for (const auto& key : keys) refused(name, [&key](nlohmann::json& c) { c.erase(key); }, {"'" + key + "' is missing; expected "});
    for (const char* key : {"ffn_hidden_size", "moe_num_experts", "moe_top_k"})
        refused("dbrx", [key](nlohmann::json& c) { c["ffn_config"].erase(key); }, {std::string("'ffn_config.") + key + "' is missing; expected "});

    const auto set = [](const char* key, const nlohmann::json& value) { return [key, value](nlohmann::json& c) { c[key] = value; }; };
    refused("mixtral", set("model_type", "bert"), {"'model_type' is \"bert\"; expected one of ", "mixtral", "ernie4_5_moe"});
    refused("mixtral", set("model_type", "a\nb\x1b"), {"'model_type' is \"a\\nb\\u001b\"; expected one of "});
    refused("mixtral", set("model_type", 7), {"'model_type' is 7; expected a string"});
    refused("mixtral", set("num_experts_per_tok", 9), {"'num_experts_per_tok' is 9; expected 1 to the number of experts, 8"});
    refused("mixtral", set("num_experts_per_tok", 0), {"'num_experts_per_tok' is 0; expected a whole number from 1 on"});
    refused("mixtral", set("num_experts_per_tok", -1), {"'num_experts_per_tok' is -1; expected a whole number from 1 on"});
    refused("mixtral", set("num_experts_per_tok", nullptr), {"'num_experts_per_tok' is null; expected a whole number"});
    refused("mixtral", set("hidden_size", 32.5), {"'hidden_size' is 32.5; expected a whole number"});
    refused("mixtral", set("hidden_size", 1e300), {"'hidden_size' is 1e+300; expected a whole number"});
    refused("mixtral", set("hidden_size", std::uint64_t(-1)), {"'hidden_size' is 18446744073709551615; expected a whole number"});
    refused("mixtral", set("hidden_size", INT64_MIN), {"'hidden_size' is -9223372036854775808; expected a whole number"});
    refused("mixtral", set("hidden_size", "32"), {"'hidden_size' is \"32\"; expected a whole number"});
    refused("mixtral", set("hidden_size", nlohmann::json::array({32})), {"'hidden_size' is an array; expected a whole number"});
    refused("mixtral", set("hidden_act", "gelu"), {"'hidden_act' is \"gelu\"; expected \"silu\""});
    refused("qwen3_moe", set("norm_topk_prob", 1), {"'norm_topk_prob' is 1; expected true or false"});
    refused("deepseek_v3", set("n_group", 5), {"'n_group' is 5; expected a divisor of the 32 experts"});
    refused("deepseek_v3", [](nlohmann::json& c) { c["n_group"] = c["topk_group"] = 32; }, {"'n_group' is 32; expected groups of 2 experts or more"});
    refused("deepseek_v3", set("topk_group", 9), {"'topk_group' is 9; expected at most n_group = 8"});
    refused("deepseek_v3", set("topk_group", 1), {"'num_experts_per_tok' is 8; expected at most the 4 experts"});
    refused("deepseek_v3", set("n_shared_experts", -1), {"'n_shared_experts' is -1; expected a whole number from 0 on"});
    refused("phimoe", set("num_experts_per_tok", 1), {"'num_experts_per_tok' is 1; expected 2"});
    refused("phimoe", set("router_jitter_noise", -0.5), {"'router_jitter_noise' is -0.5; expected 0 or more"});
    refused("deepseek_v2", set("topk_method", "noaux_tc"), {"'topk_method' is \"noaux_tc\"; expected \"greedy\" or"});
    refused("ernie4_5_moe", set("moe_k", 17), {"'moe_k' is 17; expected 1 to the number of experts, 16"});
    refused("ernie4_5_moe", set("moe_norm_min", -1), {"'moe_norm_min' is -1; expected 0 or more"});
    refused("dbrx", [](nlohmann::json& c) { c["ffn_config"]["moe_normalize_expert_weights"] = 0; },
            {"'ffn_config.moe_normalize_expert_weights' is 0; expected more than 0"});
    refused("dbrx", [](nlohmann::json& c) { c["ffn_config"]["moe_top_k"] = 17; }, {"'ffn_config.moe_top_k' is 17; expected 1 to"});
    refused("dbrx", set("ffn_config", 3), {"'ffn_config' is 3; expected an object"});
}

TEST_CASE("a configuration whose numbers are not those of the tensors is refused by the tensor")
{
    const auto refused = [](const std::string& name, const std::string& key, int value, const std::string& tensor) {
        CAPTURE(name);
        CAPTURE(key);
        scene s(name);
        s.config[key] = value;
        expect_refused(s, s.run(), {"'" + tensor + "'", "; expected F32, BF16 or F16 of shape"});
    };
    refused("mixtral", "hidden_size", 33, "x");
    refused("mixtral", "intermediate_size", 41, "experts.0.w1.weight");
    refused("mixtral", "num_local_experts", 9, "gate.weight");
    refused("gpt_oss", "intermediate_size", 2147483647, "experts.gate_up_proj");
    refused("llama4", "num_local_experts", 7, "router.weight");
    refused("qwen2_moe", "shared_expert_intermediate_size", 71, "shared_expert.gate_proj.weight");
    refused("deepseek_v3", "n_shared_experts", 2147483647, "shared_experts.gate_proj.weight");
    refused("ernie4_5_moe", "moe_num_shared_experts", 3, "shared_experts.gate_proj.weight");
}

TEST_CASE("a configuration that is no JSON object in UTF-8 is refused with the place")
{
    const auto refused = [](const std::string& text, const char* said) {
        CAPTURE(text);
        scene s("mixtral");
        REQUIRE(s.run().status == 0);
        std::filesystem::remove(s.output());
        support::write_file(s.path("config.json"), text);
        expect_refused(s, s.run_files(), {said, s.path("config.json")});
    };
    refused("", "byte 1 is not valid JSON in UTF-8");
    refused("{\"model_type\": \"mixtral\"", "is not valid JSON in UTF-8");
    refused("{\"model_type\": \"mix\xfftral\"}", "is not valid JSON in UTF-8");
    refused("{\"model_type\": \"\\ud800\"}", "is not valid JSON in UTF-8");
    refused("{'model_type': 'mixtral'}", "byte 2 is not valid JSON in UTF-8");
    refused("{} {}", "is not valid JSON in UTF-8");
    refused(std::string("{}\0{", 4), "it holds a zero byte");
    refused("{\"hidden_size\": 1e999}", "it holds a number that no double can hold");
    refused("[1]", "it is an array; expected a JSON object");
    refused("7", "it is 7; expected a JSON object");
    refused("{}", "'model_type' is missing");
    refused(std::string(100000, '['), "is not valid JSON in UTF-8");
    scene s("mixtral");
    REQUIRE(s.run().status == 0);
    std::filesystem::remove(s.output());
    std::filesystem::remove(s.path("config.json"));
    expect_refused(s, s.run_files(), {s.path("config.json"), "No such file"});
    std::filesystem::create_directory(s.path("config.json"));
    expect_refused(s, s.run_files(), {s.path("config.json"), "it is a folder or a device"});
}

TEST_CASE("a block or an input that is truncated, hostile or no safetensors file is refused")
{
    const std::string eight(8, '\0');
    const auto tensor = [](const std::string& name, const char* shape, const char* at) {
        return std::string("\"") + name + R"(":{"dtype":"F32","shape":)" + shape + R"(,"data_offsets":)" + at + "}";
    };
    const auto file = [&](const std::string& header) { return file_of("{" + header + "}", eight, header.size() + 2); };
    struct hostile {
        std::string bytes;
        const char* said;
    };
    const hostile all[] = {
        {"", "it has 0 bytes; expected at least 8"},
        {file_of("{}", "", 1000), "header length is 1000; expected at most 2"},
        {file_of("{}", "", ~std::uint64_t{0}), "header length is 18446744073709551615"},
        {file_of("[]", "", 2), "does not begin with '{'"},
        {file_of("{]", "", 2), "is not valid JSON in UTF-8"},
        {file_of("{\"\xff\":{}}", "", 8), "is not valid JSON in UTF-8"},
        {file(tensor("gate.weight", "[2]", "[0,8]") + "," + tensor("more", "[1]", "[4,8]")), "'more': its data begins at 4; expected 8"},
        {file(tensor("gate.weight", "[3]", "[0,12]")), "'gate.weight': data_offsets are [0,12]; expected a range inside of the 8 bytes"},
        {file(tensor("gate.weight", "[2]", "[8,0]")), "'gate.weight': data_offsets are [8,0]"},
        {file(tensor("gate.weight", "[4611686018427387904,4]", "[0,8]")), "holds more bytes than 63 bits can count"},
        {file(tensor("gate.weight", "[9223372036854775808]", "[0,8]")), "a number beyond 63 bits"},
        {file(tensor("gate.weight", "[-2]", "[0,8]")), "a negative number"},
        {file(tensor("gate.weight", "[1]", "[0,4]")), "8 bytes of data; expected 4"},
    };
    for (const char* which : {"block.safetensors", "in.safetensors"}) {
        scene s("mixtral");
        REQUIRE(s.run().status == 0);
        std::filesystem::remove(s.output());
        const std::string good = support::read_file(s.path(which));
        const auto refused = [&](const std::string& bytes, const std::string& said) {
            CAPTURE(said);
            support::write_file(s.path(which), bytes);
            expect_refused(s, s.run_files(), {said, s.path(which)});
        };
        for (const hostile& h : all) refused(h.bytes, h.said);
        refused(good.substr(0, good.size() - 1), "data_offsets are [");
        refused(good.substr(0, 40), "expected at most 32: it is truncated");
        refused(good + "x", "bytes of data; expected ");
        std::filesystem::remove(s.path(which));
        expect_refused(s, s.run_files(), {s.path(which), "No such file"});
    }
}

TEST_CASE("a wrong command line ends at once, and help names every option")
{
    scene s("mixtral");
    REQUIRE(s.run().status == 0);
    std::filesystem::remove(s.output());
    for (const std::vector<std::string>& more :
         {std::vector<std::string>{"--dtype", "float64"}, {"--threads", "-1"}, {"--threads", "many"}, {"--no-such-option"}, {"another"}}) {
        const auto r = s.run_files(more);
        CAPTURE(r.out);
        CHECK(r.status != 0);
        CHECK(r.out.find(more.front()) != std::string::npos);
        CHECK(!s.has_output());
    }
    CHECK(support::run_process({FASTMOE_RUN_BLOCK}).status != 0);
    const auto help = support::run_process({FASTMOE_RUN_BLOCK, "--help"});
    CHECK(help.status == 0);
    for (const char* option : {"--config", "--weights", "--input", "--output", "--dtype", "--threads"})
        CHECK(help.out.find(option) != std::string::npos);
}

TEST_CASE("an output that cannot be written is an error, and a file that stood there before a refused run is whole")
{
    scene s("mixtral");
    REQUIRE(s.run().status == 0);
    const std::string before = support::read_file(s.output());
    auto without = s.block;
    s.block.tensors.erase("gate.weight");
    CHECK(s.run().status == 1);
    CHECK(support::read_file(s.output()) == before);
    s.block = without;
    CHECK(s.run({"--output", s.path("block.safetensors")}).out.find("expected a file that is not read") != std::string::npos);
    CHECK(support::read_file(s.path("block.safetensors")).find("gate.weight") != std::string::npos);
    const auto r = s.run({"--output", s.path("nowhere/out.safetensors")});
    CHECK(r.status != 0);
    CHECK(r.out.find("nowhere/out.safetensors") != std::string::npos);
}
