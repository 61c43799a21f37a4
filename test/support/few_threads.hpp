// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// A process that the system starts two threads for, and no third.
#pragma once

#include <pthread.h>
#include <sys/resource.h>
#include <unistd.h>

#include <cstdlib>
#include <fstream>

namespace support {

/// While this lives, each thread asks for a stack of 1 GiB, and the process may grow by two and a half of them.
class few_threads {
public:
    few_threads()
    {
        pthread_attr_t large;
        long pages = 0;
        std::ifstream("/proc/self/statm") >> pages;
        if (pthread_getattr_default_np(&before_) != 0 || pthread_getattr_default_np(&large) != 0 ||
            pthread_attr_setstacksize(&large, std::size_t{1} << 30) != 0 || getrlimit(RLIMIT_AS, &limit_) != 0)
            std::abort();
        const auto page = static_cast<rlim_t>(sysconf(_SC_PAGESIZE));
        const rlimit narrow{static_cast<rlim_t>(pages) * page + (rlim_t{5} << 29), limit_.rlim_max};
        pthread_setattr_default_np(&large);
        setrlimit(RLIMIT_AS, &narrow);
    }
    few_threads(const few_threads&) = delete;
    few_threads& operator=(const few_threads&) = delete;
    ~few_threads()
    {
        setrlimit(RLIMIT_AS, &limit_);
        pthread_setattr_default_np(&before_);
    }

private:
    pthread_attr_t before_{};
    rlimit limit_{};
};

} // namespace support
