// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// train_gpt: trains a GPT with mixture-of-experts layers on the bytes of any text. `train_gpt --help` says how.
#include <cstdio>
#include <exception>

#include "train_gpt/options.hpp"

int main(int argc, char** argv)
try {
    using namespace train_gpt;
    program_options o;
    if (const auto status = parse_options(argc, argv, o)) return *status;
    o.config.check();
    const corpus text = read_corpus(o.config.text, o.config.max_bytes);
    std::printf("text: %lld files of %s, %.1f MB to train on and %.1f MB to validate\n",
                static_cast<long long>(text.files), text.path.c_str(), double(text.train.size()) / 1e6,
                double(text.validation.size()) / 1e6);
    fastmoe::host_executor ex({.threads = o.threads});
    return o.config.type == dtype::float32 ? run_float32(ex, o, text) : run_bfloat16(ex, o, text);
} catch (const std::exception& e) {
    std::fprintf(stderr, "train_gpt: %s\n", e.what());
    return 1;
}
