// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// What device_bench measured: a line for a person, and a file of JSON that is whole after each of them.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>

namespace timing {

/// A layer and its tokens.
struct shape {
    std::int64_t tokens, width, hidden, experts, k;
    int rounds;

    std::string name() const
    {
        return "T " + std::to_string(tokens) + " D " + std::to_string(width) + " H " + std::to_string(hidden) + " E " + std::to_string(experts) +
               " K " + std::to_string(k);
    }
};

enum class wanted { at_least, at_most };

class figures {
public:
    /// @param path  null: no file
    explicit figures(const char* path) : path_(path) {}

    double copy_gb_per_s = 0; ///< of a device copy in this run, counting both directions

    /// @param bytes, operations  moved and done in that time; 0: not said
    void add(const std::string& name, double ms, double bytes = 0, double operations = 0)
    {
        std::printf("%-76s %10.4f ms", name.c_str(), ms);
        if (bytes > 0) std::printf(" %8.1f GB/s", bytes / ms * 1e-6);
        if (operations > 0) std::printf(" %8.1f TFLOPS", operations / ms * 1e-9);
        std::printf("\n");
        char line[512];
        std::snprintf(line, sizeof line, "{\"name\": \"%s\", \"ms\": %.6g, \"gb_per_s\": %.5g, \"tflops\": %.5g}", name.c_str(), ms,
                      bytes / ms * 1e-6, operations / ms * 1e-9);
        write(line);
    }
    /// A figure that is held to a target.
    void claim(const std::string& name, double measured, wanted how, double target)
    {
        const bool holds = how == wanted::at_least ? measured >= target : measured <= target;
        const char* const sign = how == wanted::at_least ? ">=" : "<=";
        std::printf("  %-74s %10.3f %s %g %s\n", name.c_str(), measured, sign, target, holds ? "ok" : "short");
        char line[512];
        std::snprintf(line, sizeof line, "{\"claim\": \"%s\", \"measured\": %.5g, \"target\": \"%s %g\", \"holds\": %s}", name.c_str(), measured,
                      sign, target, holds ? "true" : "false");
        write(line);
    }

private:
    void write(const char* line)
    {
        std::fflush(stdout);
        json_ += json_.empty() ? "\n  " : ",\n  ";
        json_ += line;
        if (!path_) return;
        std::FILE* file = std::fopen(path_, "w");
        if (!file) {
            std::fprintf(stderr, "cannot write '%s'\n", path_);
            std::exit(1);
        }
        std::fprintf(file, "[%s\n]\n", json_.c_str());
        std::fclose(file);
    }

    const char* path_;
    std::string json_;
};

} // namespace timing
