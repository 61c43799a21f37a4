// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The executors and dtypes that tests are typed over. A cell is one executor with one dtype:
///
///     TEST_CASE_TEMPLATE("combine is the adjoint of dispatch", Cell, FASTMOE_CELLS)
///     {
///         using T = typename Cell::type;
///         FASTMOE_EXECUTOR(ex, Cell);                 // declares ex, or reports the cell as skipped
///         auto x = support::upload(ex, values);       // a buffer; download(ex, view) brings it back
///     }
#pragma once

#include <cstring>
#include <string>
#include <type_traits>
#include <vector>

#include <fastmoe/core/dtype.hpp>
#include <fastmoe/exec/host_executor.hpp>
#include <fastmoe/exec/memory.hpp>

#include "lanes.hpp"
#include "random.hpp"
#include "skip.hpp"
#if defined(FASTMOE_TEST_CUDA)
#include "cuda_column.cuh"
#else
#include "late.hpp"
#endif

namespace support {

/// Whether lanes of a team take turns, so that a test had better be small.
template <class Executor>
inline constexpr bool takes_turns = false;
template <>
inline constexpr bool takes_turns<lanes> = true;

/// Whether calls queue work that somebody has to wait for, and one record has the faults of all threads.
template <class Executor>
inline constexpr bool is_stream = false;
#if defined(FASTMOE_TEST_CUDA)
template <>
inline constexpr bool is_stream<fastmoe::cuda_executor> = true;
#else
template <>
inline constexpr bool is_stream<late> = true;
#endif

/// How the tests make an executor, and whether this machine can.
template <class Executor>
struct column;

template <>
struct column<fastmoe::host_executor> {
    static constexpr const char* name = "host";
    static bool available() { return true; }
    static fastmoe::host_executor make() { return fastmoe::host_executor({.threads = 2}); }
};

template <>
struct column<lanes> {
    static constexpr const char* name = "lanes";
    static bool available() { return true; }
    static lanes make() { return lanes(); }
};

#if defined(FASTMOE_TEST_CUDA)
template <>
struct column<fastmoe::cuda_executor> : cuda_column {};
#else
template <>
struct column<late> {
    static constexpr const char* name = "late";
    static bool available() { return true; }
    static late make() { return late(); }
};
#endif

template <class Executor, class T>
struct cell : column<Executor> {
    using executor = Executor;
    using type = T;
};

/// What a column that is not available lacks.
template <class Column>
std::string missing()
{
    std::string what = "no device";
    if constexpr (requires { Column::missing(); }) what = Column::missing();
    return what + " for " + Column::name;
}

/// The executor of a rank that is a thread.
template <class Executor>
Executor executor_of_thread(int threads = 1)
{
    if constexpr (std::is_same_v<Executor, fastmoe::host_executor>) return fastmoe::host_executor({.threads = threads});
    else if constexpr (requires { column<Executor>::make_for_rank(); }) return column<Executor>::make_for_rank();
    else return column<Executor>::make();
}

/// f() may touch the executor's memory, which only its own loops may touch otherwise.
template <class Executor, class F>
void on_host(Executor& ex, const F& f)
{
    if constexpr (requires { ex.touch(f); }) ex.touch(f);
    else f();
}

template <class T, class Executor>
fastmoe::buffer<T, Executor> upload(Executor& ex, const std::vector<T>& values)
{
    fastmoe::buffer<T, Executor> out(ex, static_cast<int64_t>(values.size()));
    on_host(ex, [&] {
        if (!values.empty()) std::memcpy(static_cast<void*>(out.data()), values.data(), sizeof(T) * values.size());
    });
    return out;
}

template <class Executor, class T, class Shape>
std::vector<std::remove_const_t<T>> download(Executor& ex, ::cuda::std::mdspan<T, Shape> view)
{
    ex.synchronize();
    std::vector<std::remove_const_t<T>> out;
    on_host(ex, [&] { out.assign(view.data_handle(), view.data_handle() + size_of(view)); });
    return out;
}

} // namespace support

/// An executor with every dtype. A further executor is a column<> above and one line in each of the next two lists; one that
/// needs a device, and nvcc, joins them with FASTMOE_TEST_CUDA. Elsewhere one with its ways stands for it.
#if defined(FASTMOE_TEST_CUDA)
#define FASTMOE_STREAM_COLUMN FASTMOE_COLUMN(::fastmoe::cuda_executor)
#define FASTMOE_STREAM_EXECUTOR ::support::cell<::fastmoe::cuda_executor, float>
#else
#define FASTMOE_STREAM_COLUMN ::support::cell<::support::late, float>
#define FASTMOE_STREAM_EXECUTOR ::support::cell<::support::late, float>
#endif

/// Sanitizers look at accesses, which are those of the other dtypes, too; they would take longest to compile all.
#if defined(FASTMOE_TEST_FEW_DTYPES)
#define FASTMOE_DTYPES float, ::fastmoe::bfloat16
#define FASTMOE_DTYPES_OF_16_BITS ::fastmoe::bfloat16
#define FASTMOE_COLUMN(...) ::support::cell<__VA_ARGS__, float>, ::support::cell<__VA_ARGS__, ::fastmoe::bfloat16>
#define FASTMOE_WIDEST_AND_NARROW(...) ::support::cell<__VA_ARGS__, ::fastmoe::bfloat16>
#else
#define FASTMOE_DTYPES double, float, ::fastmoe::bfloat16, ::fastmoe::half
#define FASTMOE_DTYPES_OF_16_BITS ::fastmoe::bfloat16, ::fastmoe::half
#define FASTMOE_COLUMN(...)                                                                                           \
    ::support::cell<__VA_ARGS__, double>, ::support::cell<__VA_ARGS__, float>,                                        \
        ::support::cell<__VA_ARGS__, ::fastmoe::bfloat16>, ::support::cell<__VA_ARGS__, ::fastmoe::half>
#define FASTMOE_WIDEST_AND_NARROW(...) ::support::cell<__VA_ARGS__, double>, ::support::cell<__VA_ARGS__, ::fastmoe::bfloat16>
#endif

#define FASTMOE_CELLS                                                                                                 \
    FASTMOE_COLUMN(::fastmoe::host_executor),                                                                         \
    FASTMOE_COLUMN(::support::lanes), FASTMOE_STREAM_COLUMN

/// The executors alone, each in a cell with float.
#define FASTMOE_EXECUTORS                                                                                             \
    ::support::cell<::fastmoe::host_executor, float>,                                                                 \
    ::support::cell<::support::lanes, float>, FASTMOE_STREAM_EXECUTOR

/// Without the cell's device the test case ends here and counts as skipped.
#define FASTMOE_NEEDS(...)                                                                                            \
    if (!__VA_ARGS__::available()) FASTMOE_SKIP(::support::missing<__VA_ARGS__>())

/// The same, and declares the cell's executor.
#define FASTMOE_EXECUTOR(ex, ...)                                                                                     \
    FASTMOE_NEEDS(__VA_ARGS__);                                                                                       \
    auto ex = __VA_ARGS__::make()
