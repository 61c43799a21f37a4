// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Started by mpirun with two ranks: a message whose bytes 32 bits cannot count.
#include <doctest/doctest.h>

#include <cstddef>
#include <cstdio>
#include <string>
#include <vector>

#include <sys/mman.h>
#include <unistd.h>

#include <fastmoe/exec/host_executor.hpp>

#include "world.hpp"

namespace fm = fastmoe;
using fm::int64_t;

namespace {

constexpr int64_t width = 3, rows = (int64_t{1} << 31) / width + 1000;

/// Memory that takes none until it is written.
class sparse_bytes {
public:
    sparse_bytes()
    {
        void* p = ::mmap(nullptr, rows * width, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (p != MAP_FAILED) data_ = static_cast<std::byte*>(p);
    }
    sparse_bytes(const sparse_bytes&) = delete;
    sparse_bytes& operator=(const sparse_bytes&) = delete;
    ~sparse_bytes()
    {
        if (data_) ::munmap(data_, rows * width);
    }
    std::byte* data() const { return data_; }
    fm::matrix_view<std::byte> matrix(int64_t r) const { return fm::matrix_view<std::byte>(data_, r, width); }

private:
    std::byte* data_ = nullptr;
};

} // namespace

TEST_CASE("rows of more than 2^31 bytes arrive, the last ones too")
{
    const fm::mpi& c = support::mpi_world();
    REQUIRE_EQ(c.size(), 2);
    fm::host_executor ex({.threads = 1});
    const auto free = static_cast<int64_t>(::sysconf(_SC_AVPHYS_PAGES)) * ::sysconf(_SC_PAGESIZE);
    const sparse_bytes sent, received;
    std::vector<int64_t> lacking{free < (int64_t{5} << 30) || !sent.data() || !received.data()};
    c.all_reduce(ex, fm::as_vector(lacking));
    if (lacking[0] != 0) {
        std::printf("skipped: needs 5 GB of free memory\n");
        return;
    }
    // From rank 0 to rank 1 only.
    const bool sends = c.rank() == 0;
    const std::vector<int64_t> none{0, 0}, to_one{0, rows}, from_zero{rows, 0};
    const int64_t places[] = {0, (int64_t{1} << 30) - 1, int64_t{1} << 30, (int64_t{1} << 31) - 1, int64_t{1} << 31, rows * width - 1};
    for (int64_t at : places)
        if (sends) sent.data()[at] = static_cast<std::byte>(at % 251 + 1);
    c.all_to_all_v(ex, sent.matrix(sends ? rows : 0), fm::as_vector(sends ? to_one : none), received.matrix(sends ? 0 : rows),
                   fm::as_vector(sends ? none : from_zero));
    for (int64_t at : places)
        if (!sends) CHECK(received.data()[at] == static_cast<std::byte>(at % 251 + 1));
    if (!sends) CHECK(received.data()[rows * width - 2] == std::byte{0});
}
