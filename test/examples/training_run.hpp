// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The training program as a child process in a folder of its own, and what it leaves behind.
#pragma once

#include <cmath>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include <fcntl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <doctest/doctest.h>

#include "support/random.hpp"
#include "train_gpt/report.hpp"

namespace training_run {

namespace fs = std::filesystem;
using words = std::vector<std::string>;

/// A folder of its own for a test case, with a small text in two files.
struct place {
    fs::path folder;

    place()
    {
        std::string name = (fs::temp_directory_path() / "train_gpt.XXXXXX").string();
        REQUIRE(::mkdtemp(name.data()) != nullptr);
        folder = name;
        fs::create_directory(folder / "text");
        support::random draw(1);
        for (const char* file : {"text/a.txt", "text/b.txt"}) {
            std::ofstream out(folder / file);
            for (int line = 0; line < 60; ++line) {
                for (int word = 0; word < 8; ++word) out << draw.one_of("alpha ", "beta ", "gamma ", "delta ");
                out << '\n';
            }
        }
    }
    ~place() { fs::remove_all(folder); }

    std::string at(const char* name) const { return (folder / name).string(); }
    std::string bytes(const char* name) const
    {
        std::ifstream in(folder / name, std::ios::binary);
        REQUIRE(in.is_open());
        return {std::istreambuf_iterator<char>(in), {}};
    }
    /// The options of a model that trains in milliseconds.
    words tiny(const char* out) const
    {
        return {"--text",  at("text"), "--out",     at(out), "--width", "16", "--layers",  "2",  "--heads",
                "2",       "--experts", "4",        "--hidden", "24",   "--context", "16", "--batch", "3",
                "--steps", "12",       "--warmup",  "3",     "--validate-every", "5", "--validation-windows", "2"};
    }
    /// The same run, resumed.
    words resumed(const char* out) const
    {
        return {"--out", at(out), "--resume", "--validate-every", "5", "--validation-windows", "2"};
    }
};

inline words operator+(words a, const words& b)
{
    a.insert(a.end(), b.begin(), b.end());
    return a;
}

/// The program as a child process, its output in files.
/// @param launcher  what starts it, e.g. mpirun and its options
class child {
public:
    child(const place& where, const words& arguments, rlim_t largest_file = RLIM_INFINITY, const words& launcher = {})
    {
        words all = launcher + words{FASTMOE_TRAIN_GPT} + arguments;
        std::vector<char*> argv;
        for (std::string& word : all) argv.push_back(word.data());
        argv.push_back(nullptr);
        const std::string out = where.at("stdout"), err = where.at("stderr");
        id_ = ::fork();
        REQUIRE(id_ >= 0);
        if (id_ != 0) return;
        ::dup2(::open(out.c_str(), O_CREAT | O_TRUNC | O_WRONLY, 0600), 1);
        ::dup2(::open(err.c_str(), O_CREAT | O_TRUNC | O_WRONLY, 0600), 2);
        if (largest_file != RLIM_INFINITY) {
            const rlimit limit{largest_file, largest_file};
            ::setrlimit(RLIMIT_FSIZE, &limit);
            ::signal(SIGXFSZ, SIG_IGN);
        }
        ::execv(argv[0], argv.data());
        ::_exit(99);
    }
    void send(int signal) const
    {
        if (!ended_) ::kill(id_, signal);
    }
    /// Whether it has ended by itself.
    bool ended()
    {
        ended_ = ended_ || ::waitpid(id_, &status_, WNOHANG) == id_;
        return ended_;
    }
    /// Its exit status, or minus the signal that ended it.
    int wait()
    {
        if (!ended_) REQUIRE(::waitpid(id_, &status_, 0) == id_);
        return WIFEXITED(status_) ? WEXITSTATUS(status_) : -WTERMSIG(status_);
    }

private:
    pid_t id_ = 0;
    int status_ = 0;
    bool ended_ = false;
};

inline int run(const place& p, const words& arguments) { return child(p, arguments).wait(); }

/// The log without its two columns of time.
inline std::vector<std::vector<double>> numbers(const std::string& path)
{
    std::vector<std::vector<double>> out;
    for (const auto& r : train_gpt::read_log(path))
        out.push_back({double(r.step), double(r.tokens), r.loss, std::isnan(r.val_loss) ? -1 : r.val_loss, r.balance,
                       r.learning_rate, r.gradient_norm});
    return out;
}

} // namespace training_run
