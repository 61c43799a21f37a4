// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// A program run to its end: its exit status and what it said.
#pragma once

#include <string>
#include <vector>

#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "temporary_folder.hpp"

namespace support {

struct finished_process {
    int status;       ///< minus the signal that ended it, if one did
    std::string out;  ///< of both streams
};

/// @param arguments  the program's path first
inline finished_process run_process(std::vector<std::string> arguments)
{
    const temporary_folder folder;
    const std::string said = folder / "said";
    std::vector<char*> argv;
    for (std::string& word : arguments) argv.push_back(word.data());
    argv.push_back(nullptr);
    const pid_t id = ::fork();
    if (id == 0) {
        const int file = ::open(said.c_str(), O_CREAT | O_TRUNC | O_WRONLY | O_APPEND, 0600);
        ::dup2(file, 1);
        ::dup2(file, 2);
        ::execv(argv[0], argv.data());
        ::_exit(99);
    }
    int status = 0;
    if (id < 0 || ::waitpid(id, &status, 0) != id) return {98, "cannot fork"};
    return {WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status), read_file(said)};
}

} // namespace support
