// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// One line about a long measurement where a person watches, and nothing in a pipe; and which machine this is.
#pragma once

#include <cstdio>
#include <fstream>
#include <string>

#include <unistd.h>

namespace scaling {

class progress {
public:
    explicit progress(int steps, std::FILE* out = stderr) : steps_(steps), out_(out), shown_(::isatty(::fileno(out)) == 1) {}
    progress(const progress&) = delete;
    progress& operator=(const progress&) = delete;
    ~progress()
    {
        if (shown_) std::fputs("\r\033[K", out_);
    }

    void next(const std::string& what)
    {
        if (shown_) std::fprintf(out_, "\r\033[K%d/%d %s", ++step_, steps_, what.c_str());
        if (shown_) std::fflush(out_);
    }

private:
    int steps_, step_ = 0;
    std::FILE* out_;
    bool shown_;
};

inline std::string processor_name()
{
    std::ifstream file("/proc/cpuinfo");
    for (std::string line; std::getline(file, line);)
        if (line.rfind("model name", 0) == 0) return line.substr(line.find(':') + 2);
    return "unknown processor";
}

/// How many programs wanted a core, over the last minute.
inline double load_average()
{
    std::ifstream file("/proc/loadavg");
    double load = 0;
    file >> load;
    return load;
}

} // namespace scaling
