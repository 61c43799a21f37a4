// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// How the program is asked to save and stop.
#pragma once

#include <atomic>
#include <csignal>

namespace train_gpt {

/// The signal that asks the loop to save and stop; 0 while there is none. Read by the threads of all ranks.
inline std::atomic<int> caught_signal = 0;
static_assert(std::atomic<int>::is_always_lock_free, "a signal's handler writes it");

/// From now on the first SIGINT, SIGTERM or SIGUSR1 (which mpirun passes on) is noted for the loop; a second one ends the
/// process at once.
inline void catch_signals()
{
    struct sigaction action{};
    action.sa_handler = [](int number) { caught_signal = number; };
    action.sa_flags = static_cast<int>(SA_RESETHAND | SA_RESTART);
    for (const int number : {SIGINT, SIGTERM, SIGUSR1}) sigaction(number, &action, nullptr);
}

} // namespace train_gpt
