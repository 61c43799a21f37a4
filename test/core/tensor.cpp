// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Views, what converts to them, their checks, and index arithmetic beyond 2^31 elements.
#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <sys/mman.h>

#include <cuda/std/span>

#include <doctest/doctest.h>

#include <fastmoe/core/indexed_rows.hpp>
#include <fastmoe/core/tensor.hpp>

namespace fm = fastmoe;
using std::int32_t;
using std::int64_t;

namespace {

std::string message_of(const auto& f)
{
    try {
        f();
    } catch (const fm::invalid_argument& e) {
        return e.what();
    }
    return "nothing was thrown";
}

bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

/// A verb's signature: T comes from the output, so that a mutable view can be given as input.
template <class T>
T first_plus_last(fm::type_identity_t<fm::matrix_view<const T>> x, fm::vector_view<T> y)
{
    y(0) = x(0, 0) + x(x.extent(0) - 1, x.extent(1) - 1);
    return y(0);
}

/// Address space without memory; only pages that are touched exist.
struct reservation {
    explicit reservation(std::size_t n)
        : bytes(n), base(mmap(nullptr, n, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0))
    {
        REQUIRE(base != MAP_FAILED);
    }
    ~reservation() { munmap(base, bytes); }
    /// Makes the last page usable.
    void open_end() { REQUIRE(mprotect(static_cast<char*>(base) + bytes - 4096, 4096, PROT_READ | PROT_WRITE) == 0); }
    std::size_t bytes;
    void* base;
};

} // namespace

TEST_CASE("views are row-major, and rows and slices are where they should be")
{
    std::vector<int> v(24);
    for (int i = 0; i < 24; ++i) v[i] = i;
    const auto m = fm::as_matrix(v, 4, 6);
    CHECK(m(2, 3) == 15);
    CHECK(fm::row(m, 3).extent(0) == 6);
    CHECK(fm::row(m, 3)(5) == 23);
    const auto middle = fm::slice_rows(m, 1, 2);
    CHECK(middle.extent(0) == 2);
    CHECK(middle.extent(1) == 6);
    CHECK(middle(1, 0) == 12);
    CHECK(fm::slice_rows(m, 4, 0).extent(0) == 0);
    const auto part = fm::slice(fm::as_vector(v), 20, 4);
    CHECK(part.extent(0) == 4);
    CHECK(part(0) == 20);
    // Of views without memory, as measuring has them, in constant expressions, where a null pointer that moves does not compile.
    constexpr auto none = fm::slice(fm::vector_view<const int>(nullptr, 24), 20, 4);
    constexpr auto no_rows = fm::slice_rows(fm::matrix_view<const int>(nullptr, 4, 6), 1, 2);
    CHECK(none.data_handle() == nullptr);
    CHECK(none.extent(0) == 4);
    CHECK(no_rows.data_handle() == nullptr);
    CHECK(no_rows.extent(1) == 6);
    const fm::tensor_view<int, 3> cube(v.data(), 2, 3, 4);
    CHECK(cube(1, 2, 3) == 23);
    CHECK(cube(1, 0, 1) == 13);
}

TEST_CASE("containers become views of their own memory, const ones of const elements")
{
    std::vector<float> v(6, 1.0f);
    const std::vector<float>& constant = v;
    std::array<float, 6> a{};
    const auto owned = std::make_unique<float[]>(6);
    cuda::std::span<float> s(v.data(), v.size());
    static_assert(std::is_same_v<decltype(fm::as_vector(v)), fm::vector_view<float>>);
    static_assert(std::is_same_v<decltype(fm::as_vector(constant)), fm::vector_view<const float>>);
    static_assert(std::is_same_v<decltype(fm::as_matrix(s, 2, 3)), fm::matrix_view<float>>);
    CHECK(fm::as_vector(v).data_handle() == v.data());
    CHECK(fm::as_vector(constant).extent(0) == 6);
    CHECK(fm::as_matrix(a, 3, 2).data_handle() == a.data());
    CHECK(fm::as_vector(s).extent(0) == 6);
    CHECK(fm::as_matrix(cuda::std::span<const float>(s), 2, 3).data_handle() == v.data());
    CHECK(fm::raw_pointer(owned) == owned.get());
    CHECK(fm::raw_pointer(v.begin()) == v.data());
    CHECK(fm::raw_pointer(v.data()) == v.data());
    const fm::vector_view<const float> converted = fm::as_vector(v);
    CHECK(converted.data_handle() == v.data());
}

TEST_CASE("a mutable view passes where a const one is read")
{
    std::vector<double> x{1, 2, 3, 4}, y(1);
    CHECK(first_plus_last(fm::as_matrix(x, 2, 2), fm::as_vector(y)) == 5);
    const auto& constant = x;
    CHECK(first_plus_last(fm::as_matrix(constant, 2, 2), fm::as_vector(y)) == 5);
}

TEST_CASE("a container of the wrong size does not become a matrix")
{
    std::vector<float> v(6);
    CHECK(contains(message_of([&] { fm::as_matrix(v, 2, 4); }), "container size is 6; expected rows * cols = 2 * 4"));
    CHECK_THROWS_AS(fm::as_matrix(v, 1, 5), fm::invalid_argument);
    CHECK_THROWS_AS(fm::as_matrix(v, -2, -3), fm::invalid_argument);
    CHECK_THROWS_AS(fm::as_matrix(v, 0, 5), fm::invalid_argument);
    CHECK_THROWS_AS(fm::as_matrix(v, int64_t{1} << 32, int64_t{1} << 32), fm::invalid_argument);
    std::vector<float> none;
    CHECK_THROWS_AS(fm::as_matrix(none, int64_t{1} << 32, int64_t{1} << 32), fm::invalid_argument);
    CHECK(fm::as_matrix(none, 0, 7).extent(1) == 7);
    CHECK(fm::as_matrix(none, 7, 0).extent(0) == 7);
}

TEST_CASE("a wrong shape is refused with the argument's name, its shape and the one expected")
{
    std::vector<float> v(6);
    const auto m = fm::as_matrix(v, 2, 3);
    CHECK_NOTHROW(fm::expects_shape(m, "x (T,D)", 2, 3));
    CHECK(contains(message_of([&] { fm::expects_shape(m, "x (T,D)", 3, int64_t{2}); }),
                   "x (T,D) is of shape (2,3); expected (3,2)"));
    CHECK(contains(message_of([&] { fm::expects_shape(fm::as_vector(v), "ids (C)", 5); }),
                   "ids (C) is of shape (6); expected (5)"));
    const fm::tensor_view<const float, 3> cube(v.data(), 1, 2, 3);
    CHECK(contains(message_of([&] { fm::expects_shape(cube, "w (E,H,D)", 1, 3, 2); }),
                   "w (E,H,D) is of shape (1,2,3); expected (1,3,2)"));
}

TEST_CASE("a null pointer is refused unless the view is empty")
{
    const fm::matrix_view<float> null(nullptr, 2, 3);
    CHECK(contains(message_of([&] { fm::expects_shape(null, "y (T,D)", 2, 3); }),
                   "y (T,D) is a null pointer; expected memory for shape (2,3)"));
    CHECK_NOTHROW(fm::expects_shape(fm::matrix_view<float>(nullptr, 0, 3), "y (T,D)", 0, 3));
    CHECK_NOTHROW(fm::expects_shape(fm::matrix_view<float>(nullptr, 3, 0), "y (T,D)", 3, 0));
    CHECK_NOTHROW(fm::expects_shape(fm::vector_view<float>(), "bias (E)", 0));
}

TEST_CASE("a misaligned pointer is refused, natural alignment is enough")
{
    alignas(64) char bytes[128];
    const fm::vector_view<float> odd(reinterpret_cast<float*>(bytes + 1), 4);
    CHECK(contains(message_of([&] { fm::expects_shape(odd, "y (T)", 4); }), "y (T) is 0x"));
    CHECK(contains(message_of([&] { fm::expects_shape(odd, "y (T)", 4); }), "; expected a pointer aligned to 4 bytes"));
    CHECK_NOTHROW(fm::expects_shape(fm::vector_view<float>(reinterpret_cast<float*>(bytes + 4), 4), "y (T)", 4));
    const fm::vector_view<double> half_way(reinterpret_cast<double*>(bytes + 4), 4);
    CHECK_THROWS_AS(fm::expects_shape(half_way, "y (T)", 4), fm::invalid_argument);
}

TEST_CASE("rows and slices of a matrix with more than 2^31 elements, and 2^32 bytes, lie where they should")
{
    const int64_t C = 70000, D = 40960; // C*D = 2.87e9
    reservation space(static_cast<std::size_t>(C * D) * sizeof(float));
    auto* base = static_cast<float*>(space.base);
    const fm::matrix_view<float> m(base, C, D);
    REQUIRE(C * D > (int64_t{1} << 31));
    CHECK_NOTHROW(fm::expects_shape(m, "rows (S,D)", C, D));
    CHECK(m.size() == static_cast<std::size_t>(C * D));
    CHECK(fm::row(m, C - 1).data_handle() - base == (C - 1) * D);
    CHECK(fm::slice_rows(m, C - 2, 2).data_handle() - base == (C - 2) * D);
    CHECK(fm::slice(fm::vector_view<float>(base, C * D), C * D - 5, 5).data_handle() - base == C * D - 5);
    space.open_end();
    m(C - 1, D - 1) = 42;
    CHECK(base[C * D - 1] == 42);
    CHECK(fm::row(m, C - 1)(D - 1) == 42);
    CHECK(fm::slice_rows(m, C - 1, 1)(0, D - 1) == 42);

    const std::vector<int32_t> ids{static_cast<int32_t>(C - 1), -1, 0};
    const fm::indexed_rows<float> indexed{m, fm::as_vector(ids)};
    CHECK(indexed.row(0) - base == (C - 1) * D);
    CHECK(indexed.row(0)[D - 1] == 42);
    CHECK(indexed.row(1) == nullptr);
    CHECK(indexed.row(2) == base);
    CHECK(indexed.extent(0) == 3);
    CHECK(indexed.extent(1) == D);
    const fm::plain_rows<float> plain{m};
    CHECK(plain.row(C - 1) - base == (C - 1) * D);
    CHECK(plain.extent(0) == C);
    CHECK(plain.extent(1) == D);
}
