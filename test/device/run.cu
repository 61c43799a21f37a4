// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The quickstart on a GPU, held to the host: forward, backward and inference, eager and as a replayed graph, in three dtypes, with
/// gemm::portable and gemm::hopper, whose graph is replayed a thousand times; faults; and ranks whose messages are staged. Prints which
/// policy's kernels ran: on a device of 9.0, gemm::portable in the place of gemm::hopper is a failure. Ends with 77, skipped, where
/// there is no GPU; there it shows that an executor cannot be made, and says why.
///
///     device_run                        everything, the simplest first
///     device_run --replays 2 hopper     these parts, with so many replays of each graph at most: portable faults staged hopper
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include <fastmoe/cuda.cuh>

#include "run_steps.cuh"
#include "staged_ranks.cuh"

namespace {

namespace fm = fastmoe;
using device_run::check;
using fm::int64_t;

struct record_fault {
    fm::fault_recorder faults;
    FASTMOE_HOST_DEVICE void operator()(int64_t i) const { faults.record(fm::fault_kind::expert_out_of_range, 7 + i, 99); }
};

void faults()
{
    fm::cuda_executor ex;
    fm::for_each(ex, 1000, record_fault{ex.faults()});
    std::string text = "nothing";
    try {
        ex.synchronize();
    } catch (const fm::invalid_argument& e) {
        text = e.what();
    }
    check(text.find("routing.experts(7) is 99") != std::string::npos, text.c_str());
    check(!ex.fault(), "a fault is thrown once");
}

void portable()
{
    device_run::portable_float();
    device_run::portable_bfloat16();
    device_run::portable_half();
}
void all_faults() { device_run::guarded("faults", faults); }
void staged()
{
    device_run::guarded("staged ranks", [] {
        check(staged_ranks::count_wrong_elements(int64_t{1} << 20) == 0, "staged ranks, in whole");
        check(staged_ranks::count_wrong_elements(4096) == 0, "staged ranks, in parts");
    });
}
void hopper()
{
#if defined(FASTMOE_TEST_CUDA) // minutes of compiling, for who can run it
    device_run::hopper_bfloat16();
    device_run::hopper_half();
#else
    std::printf("gemm::hopper was not compiled: FASTMOE_TEST_CUDA is off\n");
#endif
}

constexpr struct {
    const char* name;
    void (*run)();
} parts[] = {{"portable", portable}, {"faults", all_faults}, {"staged", staged}, {"hopper", hopper}};

} // namespace

int main(int count, char** arguments)
{
    std::setvbuf(stdout, nullptr, _IOLBF, 0); // what is stopped has said how far it came
    std::vector<std::string> asked;
    for (int i = 1; i < count; ++i) {
        const std::string word = arguments[i];
        bool known = false;
        for (const auto& part : parts) known = known || word == part.name;
        if (known) asked.push_back(word);
        else if (word == "--replays" && i + 1 < count && std::atoi(arguments[i + 1]) > 0) device_run::most_replays = std::atoi(arguments[++i]);
        else {
            std::fprintf(stderr, "device_run [--replays n] [portable faults staged hopper]: what is '%s'?\n", arguments[i]);
            return 2;
        }
    }
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
        try {
            fm::cuda_executor ex;
        } catch (const fm::cuda_error& e) {
            std::printf("skipped: no GPU: %s\n", e.what());
            return 77;
        }
        std::printf("FAILED: without a GPU an executor was made\n");
        return 1;
    }
    for (const auto& part : parts) {
        bool runs = asked.empty();
        for (const std::string& name : asked) runs = runs || name == part.name;
        if (runs) part.run();
    }
    return device_run::wrong == 0 ? 0 : 1;
}
