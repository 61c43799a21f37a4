// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// A program that handles signals while it multiplies by oneDNN, whose kernels move the stack pointer into the heap.
#include <doctest/doctest.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <thread>
#include <vector>

#include <pthread.h>
#include <signal.h>

#include <fastmoe/gemm/onednn.hpp>

#include "support/random.hpp"
#include "support/scratch.hpp"

namespace {

namespace fm = fastmoe;
using std::int32_t;
using std::int64_t;

/// The stack of the thread that multiplies, and how often a handler ran on it and elsewhere.
std::atomic<std::uintptr_t> stack_begin, stack_end;
std::atomic<int> handled, elsewhere;
static_assert(std::atomic<std::uintptr_t>::is_always_lock_free && std::atomic<int>::is_always_lock_free);

void handler(int)
{
    const char here = 0;
    const auto address = reinterpret_cast<std::uintptr_t>(&here);
    (address >= stack_begin && address < stack_end ? handled : elsewhere) += 1;
}

void find_stack()
{
    pthread_attr_t attributes;
    void* begin = nullptr;
    std::size_t size = 0;
    REQUIRE(::pthread_getattr_np(::pthread_self(), &attributes) == 0);
    REQUIRE(::pthread_attr_getstack(&attributes, &begin, &size) == 0);
    ::pthread_attr_destroy(&attributes);
    stack_begin = reinterpret_cast<std::uintptr_t>(begin);
    stack_end = stack_begin + size;
}

} // namespace

TEST_CASE_TEMPLATE("a signal's handler runs on the stack of its thread, whatever oneDNN takes for a stack", T, float, fm::bfloat16)
{
    FASTMOE_SEEDED(draw, 1602);
    constexpr int64_t in = 256, out = 48, tokens = 160;
    const auto x = support::normal_vector<T>(draw, tokens * in), dy = support::normal_vector<T>(draw, tokens * out);
    const auto w = support::normal_vector<T>(draw, 2 * out * in);
    const std::vector<int32_t> counts{100, tokens - 100};
    const std::vector<int64_t> offsets{0, 100, tokens};
    const fm::row_groups groups{fm::as_vector(counts), fm::as_vector(offsets), tokens};
    struct products {
        std::vector<T> y = std::vector<T>(tokens * out), dx = std::vector<T>(tokens * in), dw = std::vector<T>(2 * out * in);
    } quiet, disturbed;

    struct sigaction action{}, before{};
    action.sa_handler = handler;
    action.sa_flags = static_cast<int>(SA_RESTART); // on the thread's own stack, as most programs do
    REQUIRE(::sigaction(SIGURG, &action, &before) == 0);
    handled = elsewhere = 0;

    std::atomic<bool> ready = false, done = false;
    std::thread works([&] {
        find_stack();
        fm::host_executor ex({.threads = 1});
        constexpr fm::gemm::onednn itself{.limits = {0, 0, 0}}; // nothing is left to portable
        const auto multiply = [&](products& into) {
            const fm::plain_rows<T> rows{fm::as_matrix(x, tokens, in)}, gradients{fm::as_matrix(dy, tokens, out)};
            const fm::weight_view<const T> weights = fm::stacked(fm::tensor_view<const T, 3>(w.data(), 2, out, in));
            support::in_workspace(ex, [&](fm::arena& memory) {
                itself.forward(ex, groups, rows, weights, fm::matrix_view<const T>(),
                               fm::matrix_view<T>(into.y.data(), tokens, out), fm::no_epilogue(), memory);
                itself.dgrad(ex, groups, gradients, weights, fm::matrix_view<T>(into.dx.data(), tokens, in),
                             fm::no_epilogue(), memory);
                itself.wgrad(ex, groups, gradients, rows, fm::stacked(fm::tensor_view<T, 3>(into.dw.data(), 2, out, in)),
                             fm::write_mode::overwrite, memory);
            });
        };
        multiply(quiet);
        ready = true;
        const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(20); // signals are slow in some builds
        while (handled + elsewhere < 4000 && std::chrono::steady_clock::now() < end) multiply(disturbed);
        done = true;
    });
    while (!ready) std::this_thread::yield();
    while (!done) {
        ::pthread_kill(works.native_handle(), SIGURG);
        std::this_thread::sleep_for(std::chrono::microseconds(20));
    }
    works.join();
    ::sigaction(SIGURG, &before, nullptr);
    CHECK(elsewhere == 0);
    CHECK(handled > 100);
    const auto same = [](const std::vector<T>& a, const std::vector<T>& b) {
        return std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
    };
    CHECK(same(quiet.y, disturbed.y));
    CHECK(same(quiet.dx, disturbed.dx));
    CHECK(same(quiet.dw, disturbed.dw));
}
