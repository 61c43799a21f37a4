// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The program run_block on blocks of published models, against what the transformers package computes for the same
/// weights; see make_vectors.py.
#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include <doctest/doctest.h>

#include "models/block_scene.hpp"
#include "support/compare.hpp"

namespace {

using models_test::scene;
namespace io = fastmoe::io;
namespace fm = fastmoe;

constexpr const char* all_cases[] = {
    "dbrx",      "dbrx_norm2",       "dbrx_raw",          "deepseek_v2",          "deepseek_v2_greedy",  "deepseek_v3",
    "glm4_moe",  "deepseek_v3_raw",  "deepseek_v3_top1",  "ernie4_5_moe",         "ernie4_5_moe_biases", "ernie4_5_moe_clamped",
    "gpt_oss",   "granitemoe",       "jamba",             "llama4",               "llama4_top2",         "minimax",
    "mixtral",   "minimax_m2",       "olmoe",             "phimoe",               "qwen2_moe",           "qwen2_moe_normalized",
    "qwen3_moe"};

/// How far y may be from the expected y, in norm and in the greatest element.
void expect_close(const io::safetensors_file& got, const io::safetensors_file& expected, double bound)
{
    const auto y = got.view<float, 2>("y"), want = expected.view<float, 2>("y");
    REQUIRE(y.extent(0) == want.extent(0));
    REQUIRE(y.extent(1) == want.extent(1));
    double off = 0, norm = 0, most_off = 0, most = 0;
    for (std::int64_t t = 0; t < y.extent(0); ++t)
        for (std::int64_t d = 0; d < y.extent(1); ++d) {
            const double e = want(t, d), difference = std::fabs(double(y(t, d)) - e);
            off += difference * difference;
            norm += e * e;
            most_off = std::max(most_off, difference);
            most = std::max(most, std::fabs(e));
        }
    CHECK(std::sqrt(off / norm) <= bound);
    CHECK(most_off / most <= bound);
}

void expect_same_experts(const io::safetensors_file& got, const io::safetensors_file& expected)
{
    const auto ids = got.view<std::int32_t, 2>("experts"), want = expected.view<std::int32_t, 2>("experts");
    REQUIRE(ids.extent(0) == want.extent(0));
    REQUIRE(ids.extent(1) == want.extent(1));
    for (std::int64_t t = 0; t < ids.extent(0); ++t)
        for (std::int64_t j = 0; j < ids.extent(1); ++j) REQUIRE(ids(t, j) == want(t, j));
}

void expect_close_weights(const io::safetensors_file& got, const io::safetensors_file& expected, double bound)
{
    const auto w = got.view<float, 2>("weights"), want = expected.view<float, 2>("weights");
    REQUIRE(w.extent(0) == want.extent(0));
    REQUIRE(w.extent(1) == want.extent(1));
    for (std::int64_t t = 0; t < w.extent(0); ++t)
        for (std::int64_t j = 0; j < w.extent(1); ++j)
            CHECK(std::fabs(double(w(t, j)) - want(t, j)) <= bound * std::fabs(double(want(t, j))));
}

} // namespace

TEST_CASE("every family's y and weights are the reference's to 1e-5 in float32, and its experts are the same")
{
    for (const std::string name : all_cases) {
        CAPTURE(name);
        const scene s(name);
        const auto r = s.run();
        REQUIRE_MESSAGE(r.status == 0, r.out);
        CHECK(r.out.empty());
        const io::safetensors_file got(s.output()), expected(s.vector("expected.safetensors"));
        CHECK(got.tensors().size() == 3);
        expect_close(got, expected, 1e-5);
        expect_same_experts(got, expected);
        expect_close_weights(got, expected, 1e-5);
    }
}

TEST_CASE("in bfloat16 the router is that of float32, and y is as far off as so many roundings may take it")
{
    // On the way of y: x, the matrix, pre-activation, activation, the second matrix, row, sum of rows, sum with the
    // shared expert. A gated activation has two factors that carry the first three.
    constexpr double u = support::roundoff<fm::bfloat16>;
    for (const std::string name : all_cases) {
        CAPTURE(name);
        const scene s(name);
        const auto r = s.run({"--dtype", "bfloat16"});
        REQUIRE_MESSAGE(r.status == 0, r.out);
        const io::safetensors_file got(s.output()), expected(s.vector("expected.safetensors"));
        expect_close(got, expected, 11 * u);
        expect_same_experts(got, expected);
        expect_close_weights(got, expected, 1e-5);
    }
}

TEST_CASE("the number of threads does not change a bit of the output")
{
    for (const std::string name : {"deepseek_v2", "gpt_oss", "qwen2_moe", "llama4"})
        for (const char* type : {"float32", "bfloat16"}) {
            CAPTURE(name);
            const scene s(name);
            REQUIRE(s.run({"--dtype", type, "--threads", "1"}).status == 0);
            const std::string one = support::read_file(s.output());
            for (const char* threads : {"2", "5"}) {
                REQUIRE(s.run({"--dtype", type, "--threads", threads}).status == 0);
                CHECK(support::read_file(s.output()) == one);
            }
        }
}

TEST_CASE("experts one by one and stacked, under either name of their matrices, give the same bits")
{
    for (const std::string name : {"deepseek_v2", "deepseek_v3", "ernie4_5_moe", "glm4_moe", "jamba", "minimax", "minimax_m2",
                             "mixtral", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe"}) {
        CAPTURE(name);
        scene s(name);
        REQUIRE(s.run().status == 0);
        const std::string before = support::read_file(s.output());
        s.stack_experts();
        CHECK(s.block.tensors.contains("experts.gate_up_proj"));
        REQUIRE(s.run().status == 0);
        CHECK(support::read_file(s.output()) == before);
    }
    for (const std::string name : {"granitemoe", "llama4"})
        for (const bool numbered : {false, true}) {
            CAPTURE(name);
            scene s(name);
            REQUIRE(s.run().status == 0);
            const std::string before = support::read_file(s.output());
            s.unstack_experts(numbered);
            CHECK(s.block.tensors.contains(numbered ? "experts.0.w1.weight" : "experts.0.gate_proj.weight"));
            const auto r = s.run();
            REQUIRE_MESSAGE(r.status == 0, r.out);
            CHECK(support::read_file(s.output()) == before);
        }
}

TEST_CASE("names that newer and older code of a model have for a tensor or a key give the same bits")
{
    struct renaming {
        std::string name, from, to;
    };
    const renaming tensors[] = {
        {"granitemoe", "router.layer.weight", "router.weight"},
        {"granitemoe", "input_linear.weight", "experts.gate_up_proj"},
        {"granitemoe", "output_linear.weight", "experts.down_proj"},
        {"ernie4_5_moe", "moe_statics.e_score_correction_bias", "gate.moe_statics.e_score_correction_bias"},
        {"phimoe", "gate.weight", "router.weight"},
        {"minimax_m2", "e_score_correction_bias", "gate.e_score_correction_bias"},
    };
    for (const auto& [name, from, under] : tensors) {
        const std::string& to = under; // clang++ 14 has no lambdas, as CAPTURE's, that take structured bindings
        CAPTURE(to);
        scene s(name);
        REQUIRE(s.run().status == 0);
        const std::string before = support::read_file(s.output());
        s.rename(from, to);
        REQUIRE(s.run().status == 0);
        CHECK(support::read_file(s.output()) == before);
    }
    scene s("qwen3_moe");
    REQUIRE(s.run().status == 0);
    const std::string before = support::read_file(s.output());
    s.config["num_experts"] = s.config.at("num_local_experts");
    s.config.erase("num_local_experts");
    REQUIRE(s.run().status == 0);
    CHECK(support::read_file(s.output()) == before);

    scene whole("llama4"); // a model that sees holds one that reads
    REQUIRE(whole.run().status == 0);
    const std::string text = support::read_file(whole.output());
    whole.config = {{"model_type", "llama4"}, {"text_config", whole.config}};
    REQUIRE(whole.run().status == 0);
    CHECK(support::read_file(whole.output()).size() == text.size());
    const io::safetensors_file got(whole.output()), expected(whole.vector("expected.safetensors"));
    expect_close(got, expected, 1e-5);
}

TEST_CASE("a file of bfloat16 and the same numbers as float32 or float16 give the same bits")
{
    scene s("mixtral");
    REQUIRE(s.run().status == 0);
    const std::string before = support::read_file(s.output());
    s.convert<float>();
    CHECK(s.block.tensors.at("gate.weight").type == io::element_type::f32);
    REQUIRE(s.run().status == 0);
    CHECK(support::read_file(s.output()) == before);

    scene half("llama4_top2"); // float32, and so rounded first
    half.convert<fm::half>();
    REQUIRE(half.run().status == 0);
    const std::string rounded = support::read_file(half.output());
    half.convert<float>();
    REQUIRE(half.run().status == 0);
    CHECK(support::read_file(half.output()) == rounded);
}

TEST_CASE("no tokens are an output of no rows")
{
    for (const std::string name : {"mixtral", "qwen2_moe", "gpt_oss", "llama4"}) {
        CAPTURE(name);
        scene s(name);
        auto& x = s.input.tensors.at("x");
        x.shape[0] = 0;
        const auto r = s.run();
        REQUIRE_MESSAGE(r.status == 0, r.out);
        const io::safetensors_file got(s.output());
        CHECK(got.view<float, 2>("y").extent(0) == 0);
        CHECK(got.view<float, 2>("y").extent(1) == x.shape[1]);
        CHECK(got.view<std::int32_t, 2>("experts").extent(0) == 0);
    }
}

TEST_CASE("a token's row does not depend on the tokens beside it")
{
    for (const std::string name : {"deepseek_v3", "gpt_oss", "qwen2_moe"}) {
        CAPTURE(name);
        scene s(name);
        REQUIRE(s.run().status == 0);
        const io::safetensors_file all(s.output());
        const auto y = all.view<float, 2>("y");
        auto& x = s.input.tensors.at("x");
        const std::int64_t width = x.shape[1];
        std::vector<float> row(reinterpret_cast<const float*>(x.data) + 5 * width, reinterpret_cast<const float*>(x.data) + 6 * width);
        x = io::as_safetensor(fm::as_matrix(row, 1, width));
        REQUIRE(s.run().status == 0);
        const io::safetensors_file one(s.output());
        double most = 0, off = 0;
        for (std::int64_t d = 0; d < width; ++d) {
            off = std::max(off, std::fabs(double(one.view<float, 2>("y")(0, d)) - y(5, d)));
            most = std::max(most, std::fabs(double(y(5, d))));
        }
        CHECK(off <= 1e-6 * most); // products of other shapes may sum in another order
    }
}
