// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Matrices larger than memory of which a test touches little: for offsets beyond 2^31, which 32 bits would wrap around.
#pragma once

#include <cstddef>
#include <cstdint>

#include <sys/mman.h>

#include <fastmoe/core/tensor.hpp>
#include <fastmoe/exec/executor.hpp>

#include "skip.hpp"

namespace support {

/// A matrix of zeros in address space alone, with as much before it that may not be touched: an offset that turned negative
/// ends the test. A column whose loops do not reach that has zeros of its own.
template <class Column, class T>
class sparse {
    static constexpr bool of_column = requires { Column::take_zeros(std::size_t{}); };

public:
    sparse(std::int64_t rows, std::int64_t cols) : rows_(rows), cols_(cols)
    {
        if constexpr (of_column) {
            data_ = static_cast<T*>(Column::take_zeros(bytes()));
        } else {
            const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
            void* all = ::mmap(nullptr, 2 * bytes(), PROT_NONE, flags, -1, 0);
            if (all == MAP_FAILED) return;
            memory_ = static_cast<std::byte*>(all);
            if (::mprotect(memory_ + bytes(), bytes(), PROT_READ | PROT_WRITE) == 0) data_ = reinterpret_cast<T*>(memory_ + bytes());
        }
    }
    sparse(const sparse&) = delete;
    sparse& operator=(const sparse&) = delete;
    ~sparse()
    {
        if constexpr (of_column) {
            if (data_) Column::give_zeros(data_);
        } else if (memory_) {
            ::munmap(memory_, 2 * bytes());
        }
    }

    /// Whether there was room.
    explicit operator bool() const { return data_ != nullptr; }
    T* data() { return data_; }
    fastmoe::matrix_view<T> view() { return fastmoe::matrix_view<T>(data_, rows_, cols_); }
    T& operator()(std::int64_t row, std::int64_t col) { return data_[row * cols_ + col]; }

private:
    std::size_t bytes() const { return (static_cast<std::size_t>(rows_ * cols_) * sizeof(T) + 4095) / 4096 * 4096; }

    std::int64_t rows_, cols_;
    std::byte* memory_ = nullptr;
    T* data_ = nullptr;
};

/// More elements than 31 bits count.
inline constexpr std::int64_t huge_rows = 65540, huge_cols = 32768;
static_assert((huge_rows - 1) * huge_cols > INT32_MAX);

/// A row functor for one row alone: the whole loop would touch all the memory.
template <class F>
struct only_row {
    F f;
    std::int64_t row;
    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, std::int64_t) const
    {
        f(team, row);
    }
};
template <class Executor, class F>
void run_row(Executor& ex, const F& f, std::int64_t row)
{
    fastmoe::for_each_row(ex, 1, only_row<F>{f, row}, {.width = huge_cols});
    ex.synchronize();
}

} // namespace support

/// Declares a huge matrix of T by the name, for a column, or reports the test as skipped.
#define FASTMOE_HUGE(Column, T, name)                                                                                 \
    support::sparse<Column, T> name(support::huge_rows, support::huge_cols);                                          \
    if (!name) FASTMOE_SKIP("no room for a huge matrix")
