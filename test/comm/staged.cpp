// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Collectives for an executor whose memory the host cannot read, by communicators that move host memory.
#include <doctest/doctest.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include <fastmoe/comm/hierarchical.hpp>
#include <fastmoe/comm/staged.hpp>
#include <fastmoe/comm/threads.hpp>

#include "support/communicator_cases.hpp"
#include "support/compare.hpp"
#include "support/counting_communicator.hpp"
#include "support/counting_memory.hpp"
#include "support/queued.hpp"
#include "support/scratch.hpp"

namespace fm = fastmoe;
using fm::int64_t;
using std::chrono::milliseconds;
using support::queued;

namespace {

using staged_threads = fm::staged<fm::threads>;

/// A device with a queue of copies, as CUDA has one: says what was copied, and may fail.
struct streamed : queued {
    struct log {
        const std::byte* stage = nullptr; ///< (bytes)
        int64_t bytes = 0, down = 0, up = 0, within = 0, copies = 0, outside = 0;
        int64_t fail_at = -1; ///< the copy that fails
    } seen;

    void copy(void* to, const void* from, int64_t n)
    {
        if (seen.copies++ == seen.fail_at) throw std::domain_error("the device has failed");
        const bool up = staged(from, n), down = staged(to, n);
        seen.up += up ? n : 0;
        seen.down += down ? n : 0;
        seen.within += up || down ? 0 : n;
        struct bytes {
            void* to;
            const void* from;
            int64_t n;
            void operator()(int64_t) const { std::memcpy(to, from, static_cast<std::size_t>(n)); }
        };
        for_each(1, bytes{to, from, n});
    }

private:
    bool staged(const void* p, int64_t n)
    {
        const auto* at = static_cast<const std::byte*>(p);
        if (at + n <= seen.stage || at >= seen.stage + seen.bytes) return false;
        seen.outside += at < seen.stage || at + n > seen.stage + seen.bytes;
        return true;
    }
};

static_assert(fm::communicator<staged_threads, queued>);
static_assert(fm::communicator<staged_threads, streamed>);
static_assert(fm::communicator<staged_threads, fm::host_executor>);
static_assert(fm::communicator<fm::staged<fm::self>, queued>);
static_assert(fm::communicator<fm::staged<fm::hierarchical<fm::threads, fm::threads>>, queued>);
static_assert(fm::sums_over_ranks<staged_threads, queued, double>);
static_assert(fm::exchanges_rows<staged_threads, queued, fm::bfloat16>);
static_assert(fm::exchanges_blocks<staged_threads, queued, std::byte>);
static_assert(fm::queues_copies<streamed> && !fm::queues_copies<queued>);

fm::host_memory heap;

/// Staging memory of a test, poisoned.
class stage {
public:
    explicit stage(int64_t bytes) : data_(static_cast<std::byte*>(heap.allocate(bytes))), bytes_(bytes)
    {
        std::memset(static_cast<void*>(data_), support::poison_byte, static_cast<std::size_t>(bytes));
    }
    stage(const stage&) = delete;
    stage& operator=(const stage&) = delete;
    ~stage() { heap.deallocate(data_, bytes_); }

    fm::vector_view<std::byte> view() const { return fm::vector_view<std::byte>(data_, bytes_); }
    bool is_untouched() const
    {
        for (int64_t i = 0; i < bytes_; ++i)
            if (!support::is_poison(data_[i])) return false;
        return true;
    }

private:
    std::byte* data_;
    int64_t bytes_;
};

/// body(staged communicator, plain one[, staging memory]) on each rank, with so many bytes of staging memory, and none beyond.
template <class Body>
void on_ranks(int ranks, int64_t bytes, const Body& body, milliseconds deadline = milliseconds(20000))
{
    fm::run_ranks(
        ranks,
        [&](const fm::threads& c) {
            const stage memory(bytes + 64);
            const staged_threads s(c, fm::slice(memory.view(), 0, bytes));
            if constexpr (std::is_invocable_v<Body, const staged_threads&, const fm::threads&, std::byte*>)
                body(s, c, memory.view().data_handle());
            else body(s, c);
            for (int64_t i = bytes; i < bytes + 64; ++i) CHECK(support::is_poison(memory.view()(i)));
        },
        {.deadline = deadline});
}

/// What each rank is told: the text of its exception.
template <class Error = fm::comm_error, class Body>
std::vector<std::string> texts(int ranks, const Body& body, milliseconds deadline = milliseconds(20000))
{
    std::vector<std::string> out(ranks, "nothing was thrown");
    on_ranks(
        ranks, 4096,
        [&](const staged_threads& s, const fm::threads& c) {
            out[c.rank()] = support::message_of<Error>([&] { body(s, c); });
        },
        deadline);
    return out;
}

} // namespace

TEST_CASE_TEMPLATE("each collective is its definition, whether its data fit into the staging memory or go in parts", T,
                   FASTMOE_ELEMENTS)
{
    for (int ranks = 1; ranks <= 4; ++ranks) {
        const auto run = [&](int64_t bytes, std::vector<int64_t> sizes) {
            on_ranks(ranks, bytes, [&](const staged_threads& s, const fm::threads&) {
                queued ex;
                for (int64_t n : sizes) support::all_collectives<T>(s, ex, n);
            });
        };
        run(1 << 18, {0, 1, 700});
        run(1000, {0, 3, 300});
        run(staged_threads::least_bytes(ranks), {1, 5});
    }
}

TEST_CASE_TEMPLATE("rows of random counts arrive in whole, whatever the staging memory, and the rest is left alone", T,
                   FASTMOE_ELEMENTS)
{
    FASTMOE_SEEDED(rng, 71);
    for (int i = 0; i < 12; ++i) {
        const auto seed = rng.bits();
        const int ranks = static_cast<int>(rng.integer(1, 4));
        const int64_t bytes = i % 3 ? rng.integer(staged_threads::least_bytes(ranks) * 4, 20000) : 1 << 20;
        INFO(ranks, " ranks, ", bytes, " bytes");
        on_ranks(ranks, bytes, [&](const staged_threads& s, const fm::threads&) {
            queued ex;
            for (int64_t width : {1, 17, 0}) support::all_rows<T>(s, ex, support::random(seed), width);
        });
    }
}

TEST_CASE("ranks may have staging memory of different sizes")
{
    FASTMOE_SEEDED(rng, 72);
    const auto seed = rng.bits();
    fm::run_ranks(3, [&](const fm::threads& c) {
        const staged_threads s(c, 100 + 900 * c.rank() * c.rank(), heap);
        queued ex;
        for (int64_t n : {1, 90}) support::all_collectives<double>(s, ex, n);
        support::all_rows<float>(s, ex, support::random(seed), 9);
    });
}

TEST_CASE("a skewed exchange takes as many parts as its busiest rank needs, and no more")
{
    // 4 ranks; rank 0 sends 60 elements to rank 1, everybody else 2 to each.
    using counting = support::counting_communicator<fm::threads>;
    const auto parts = [](int64_t bytes) {
        int64_t calls = 0;
        fm::run_ranks(4, [&](const fm::threads& c) {
            const counting counted(c);
            const fm::staged<counting> s(counted, bytes, heap);
            queued ex;
            const auto count = [](int from, int to) -> int64_t { return from == 0 && to == 1 ? 60 : 2; };
            std::vector<int64_t> out, in;
            int64_t sends = 0, comes = 0;
            for (int r = 0; r < 4; ++r) {
                out.push_back(count(c.rank(), r)), sends += out.back();
                in.push_back(count(r, c.rank())), comes += in.back();
            }
            auto from = support::upload(ex, support::values_of<double>(c.rank(), sends));
            fm::buffer<double, queued> to(ex, comes);
            s.all_to_all_v(ex, from.matrix(sends, 1), fm::as_vector(out), to.matrix(comes, 1), fm::as_vector(in));
            support::is(ex, to.view(), [&](int64_t i) {
                int r = 0;
                int64_t at = i;
                for (; at >= in[r]; ++r) at -= in[r];
                for (int other = 0; other < c.rank(); ++other) at += count(r, other);
                return support::value_of<double>(r, at);
            });
            if (c.rank() == 0) calls = counted.log().calls("all_to_all_v");
        });
        return calls;
    };
    CHECK_EQ(parts(2 * 64 * 8), 1);     // all 64 that rank 0 sends
    CHECK_EQ(parts(2 * 63 * 8), 2);     // 59 of the 60, and of them whole cache lines: 56
    CHECK_EQ(parts(2 * 26 * 8), 4);     // of 22, 16 at a time
    CHECK_EQ(parts(2 * 4 * 8), 60);     // 1 at a time
}

TEST_CASE("sums have the bits that the communicator gives on the host, in whole and in parts, flat and of two levels")
{
    FASTMOE_SEEDED(rng, 73);
    const int ranks = 4;
    const int64_t n = 1000;
    std::vector<std::vector<fm::bfloat16>> values(ranks);
    for (auto& v : values) v = support::normal_vector<fm::bfloat16>(rng, n, 100);
    fm::run_ranks(ranks, [&](const fm::threads& c) {
        auto host = support::executor_of_rank<fm::host_executor>();
        const auto compare = [&](const auto& inner) {
            auto mine = values[c.rank()];
            std::vector<fm::bfloat16> share(n / ranks);
            inner.reduce_scatter(host, fm::as_vector(values[c.rank()]), fm::as_vector(share));
            inner.all_reduce(host, fm::as_vector(mine));
            for (int64_t bytes : {int64_t{1} << 16, int64_t{300}}) {
                queued ex;
                const fm::staged<std::remove_cvref_t<decltype(inner)>> s(inner, bytes, heap);
                const auto own = support::upload(ex, values[c.rank()]);
                auto all = support::upload(ex, values[c.rank()]);
                fm::buffer<fm::bfloat16, queued> part(ex, n / ranks);
                s.reduce_scatter(ex, own.view(), part.view());
                s.all_reduce(ex, all.view());
                CHECK(support::same_bits(support::download(ex, all.view()), mine));
                CHECK(support::same_bits(support::download(ex, part.view()), share));
            }
        };
        compare(c);
        compare(fm::make_hierarchical(c, 2));
    });
}

TEST_CASE("what crosses over is what other ranks get, once, by way of the staging memory alone")
{
    fm::run_ranks(3, [](const fm::threads& c) {
        const stage memory(6000);
        const staged_threads s(c, memory.view());
        streamed ex;
        ex.seen.stage = memory.view().data_handle(), ex.seen.bytes = 6000;
        const int64_t n = 500; // 2000 bytes of int32
        fm::buffer<int32_t, streamed> one(ex, n), three(ex, 3 * n), other(ex, 3 * n);
        const auto moved = [&](int64_t down, int64_t up, int64_t within, auto collective) {
            const auto before = ex.seen;
            collective();
            CHECK_EQ(ex.seen.down - before.down, 4 * down);
            CHECK_EQ(ex.seen.up - before.up, 4 * up);
            CHECK_EQ(ex.seen.within - before.within, 4 * within);
        };
        moved(n, n, 0, [&] { s.all_reduce(ex, one.view()); });
        moved(3 * n, n, 0, [&] { s.reduce_scatter(ex, three.view(), one.view()); });
        moved(n, 2 * n, n, [&] { s.all_gather(ex, one.view(), three.view()); });
        moved(2 * n, 2 * n, n, [&] { s.all_to_all(ex, three.view(), other.view()); });
        moved(c.rank() == 1 ? n : 0, c.rank() == 1 ? 0 : n, 0, [&] { s.broadcast(ex, one.view(), 1); });
        moved(0, 0, 0, [&] { s.barrier(ex); });
        // (r + 1) * 10 rows of 4 go from each rank to rank r.
        const std::vector<int64_t> out{10, 20, 30}, in(3, 10 * (c.rank() + 1));
        const int64_t keeps = in[0] * 4;
        moved(60 * 4 - keeps, 2 * keeps, keeps, [&] {
            s.all_to_all_v(ex, three.matrix(60, 4), fm::as_vector(out), other.matrix(90, 4), fm::as_vector(in));
        });
        CHECK_EQ(ex.seen.outside, 0);
        const auto copies = ex.seen.copies;
        s.all_to_all(ex, fm::slice(three.view(), 0, 3 * 20), fm::slice(other.view(), 0, 3 * 20));
        // One within, and as many to and fro as the own block cuts the others into.
        CHECK_EQ(ex.seen.copies - copies, c.rank() == 1 ? 5 : 3);
    });
}

TEST_CASE("when a collective returns, nothing that is queued will read or write the staging memory")
{
    on_ranks(3, 2000, [](const staged_threads& s, const fm::threads& c, std::byte* memory) {
        queued ex;
        const int64_t n = 300;
        const auto own = support::upload(ex, support::values_of<int32_t>(c.rank(), 3 * n));
        auto out = support::upload(ex, support::values_of<int32_t>(c.rank(), 3 * n));
        const auto all = [&](auto collective, int64_t count, auto expected) {
            collective();
            std::memset(static_cast<void*>(memory), support::poison_byte, 2000);
            support::is(ex, fm::slice(out.view(), 0, count), expected);
        };
        const auto value = [](int rank, int64_t i) { return support::value_of<int32_t>(rank, i); };
        const auto sum = [&](int64_t i) { return value(0, i) + value(1, i) + value(2, i); };
        all([&] { s.all_reduce(ex, fm::slice(out.view(), 0, n)); }, n, sum);
        all([&] { s.reduce_scatter(ex, own.view(), fm::slice(out.view(), 0, n)); }, n,
            [&](int64_t i) { return sum(c.rank() * n + i); });
        all([&] { s.all_gather(ex, fm::slice(own.view(), 0, n), out.view()); }, 3 * n,
            [&](int64_t i) { return value(static_cast<int>(i / n), i % n); });
        all([&] { s.all_to_all(ex, own.view(), out.view()); }, 3 * n,
            [&](int64_t i) { return value(static_cast<int>(i / n), c.rank() * n + i % n); });
        auto mine = support::upload(ex, support::values_of<int32_t>(c.rank(), n));
        s.broadcast(ex, mine.view(), 2);
        std::memset(static_cast<void*>(memory), support::poison_byte, 2000);
        support::is(ex, mine.view(), [&](int64_t i) { return value(2, i); });
    });
}

TEST_CASE("before a collective a rank tells each other 88 bytes, and what data it then moves is what was asked")
{
    using counting = support::counting_communicator<fm::threads>;
    fm::run_ranks(4, [](const fm::threads& c) {
        const counting counted(c);
        const fm::staged<counting> s(counted, 1 << 16, heap);
        queued ex;
        fm::buffer<float, queued> a(ex, 400), b(ex, 400);
        s.all_gather(ex, fm::slice(a.view(), 0, 100), b.view());
        CHECK_EQ(counted.log().of(), support::traffic{3 * (88 + 400), 6});
        counted.log().reset();
        s.barrier(ex);
        CHECK_EQ(counted.log().of(), support::traffic{3 * 88, 3});
        counted.log().reset();
        const std::vector<int64_t> counts(4, 25);
        s.all_to_all_v(ex, a.matrix(100, 4), fm::as_vector(counts), b.matrix(100, 4), fm::as_vector(counts));
        CHECK_EQ(counted.log().of(), support::traffic{3 * (88 + 88 + 400), 9});
        counted.log().reset();
        // The host's memory goes by the other communicator, as if this one were not there.
        fm::host_executor host({.threads = 1});
        std::vector<float> mine(100), all(400);
        s.all_gather(host, fm::as_vector(mine), fm::as_vector(all));
        CHECK_EQ(counted.log().of(), support::traffic{3 * 400, 3});
        counted.log().reset();
        s.barrier(host);
        CHECK_EQ(counted.log().of(), support::traffic{});
    });
}

TEST_CASE("memory that the host reads is not staged")
{
    fm::run_ranks(2, [](const fm::threads& c) {
        const stage memory(4096);
        const staged_threads s(c, memory.view());
        auto host = support::executor_of_rank<fm::host_executor>();
        support::all_collectives<float>(s, host, 50);
        support::all_rows<float>(s, host, support::random(74), 5);
        CHECK(memory.is_untouched());
        queued ex;
        support::all_collectives<float>(s, ex, 50);
        CHECK_FALSE(memory.is_untouched());
    });
}

TEST_CASE("ranks that disagree all throw a comm_error that names the collective, the rank and the values, and may go on")
{
    support::disagreements<staged_threads, queued>([](auto body, const char* text) {
        const auto all = texts(3, [&](const staged_threads& s, const fm::threads&) {
            queued ex;
            std::vector<float> a(12, 1.f), b(36, 7.f);
            try {
                body(s, ex, a, b);
            } catch (...) {
                ex.synchronize();
                CHECK_EQ(a, std::vector<float>(12, 1.f));
                CHECK_EQ(b, std::vector<float>(36, 7.f));
                support::all_collectives<float>(s, ex, 20);
                throw;
            }
        });
        for (const auto& t : all) {
            INFO(t);
            CHECK(support::has(t, text));
        }
    });
}

TEST_CASE("a rank whose argument is refused says so to itself, the others hear its number, and all may go on")
{
    std::vector<std::string> told(3);
    on_ranks(3, 4096, [&](const staged_threads& s, const fm::threads& c) {
        queued ex;
        fm::buffer<float, queued> a(ex, 12), b(ex, 12);
        const std::vector<int64_t> good(3, 2), bad{2, -1, 2};
        try {
            s.all_to_all_v(ex, a.matrix(6, 2), fm::as_vector(c.rank() == 1 ? bad : good), b.matrix(6, 2), fm::as_vector(good));
        } catch (const fm::error& e) {
            told[c.rank()] = e.what();
        }
        support::all_collectives<float>(s, ex, 20);
    });
    CHECK(support::has(told[1], "sent_rows (R) is -1"));
    for (int r : {0, 2}) CHECK(support::has(told[r], "all_to_all_v: rank 1 of 3 failed"));
}

TEST_CASE("a fault of the work before is thrown on its own rank before anything is sent, and the others hear of it")
{
    struct record_one {
        fm::fault_recorder faults;
        void operator()(int64_t) const { faults.record(fm::fault_kind::expert_out_of_range, 5, 77); }
    };
    std::vector<std::string> told(3);
    on_ranks(3, 4096, [&](const staged_threads& s, const fm::threads& c) {
        queued ex;
        auto v = support::upload(ex, std::vector<float>(4, 1.f));
        if (c.rank() == 2) fm::for_each(ex, 1, record_one{ex.faults()});
        try {
            s.all_reduce(ex, v.view());
        } catch (const fm::error& e) {
            told[c.rank()] = e.what();
        }
        support::is(ex, v.view(), [](int64_t) { return 1.f; });
        s.all_reduce(ex, v.view());
        support::is(ex, v.view(), [](int64_t) { return 3.f; });
    });
    CHECK(support::has(told[2], "routing.experts(5) is 77"));
    for (int r : {0, 1}) CHECK(support::has(told[r], "all_reduce: rank 2 of 3 failed"));
}

TEST_CASE_TEMPLATE("blocks that the host needs to know arrive on the device and in its arrays, and pass through it once", T, FASTMOE_ELEMENTS)
{
    for (int ranks = 1; ranks <= 4; ++ranks)
        for (int64_t n : {0, 1, 70}) {
            INFO(ranks, " ranks, ", n, " elements");
            on_ranks(ranks, staged_threads::least_bytes(ranks), [&](const staged_threads& s, const fm::threads& c) {
                streamed ex;
                auto sent = support::upload(ex, support::values_of<T>(c.rank(), ranks * n));
                fm::buffer<T, streamed> received(ex, ranks * n);
                std::vector<T> out(ranks * n), in(ranks * n);
                ex.seen = {};
                s.all_to_all_known(ex, fm::vector_view<const T>(sent.view()), received.view(), fm::as_vector(out), fm::as_vector(in));
                CHECK_EQ(ex.seen.copies, n > 0 ? 2 : 0);
                CHECK_EQ(ex.seen.within, 2 * ranks * n * int64_t{sizeof(T)}); // to the host's arrays and from them: none is staging
                const auto expected = [&](int64_t i) { return support::value_of<T>(static_cast<int>(i / n), c.rank() * n + i % n); };
                support::is(ex, received.view(), expected);
                for (int64_t i = 0; i < ranks * n; ++i) {
                    CHECK(out[i] == support::value_of<T>(c.rank(), i));
                    CHECK(in[i] == expected(i));
                }
            });
        }
}

TEST_CASE("blocks that the host needs to know are refused and fail as all others")
{
    std::vector<std::string> told(3);
    on_ranks(3, 4096, [&](const staged_threads& s, const fm::threads& c) {
        queued ex;
        auto sent = support::upload(ex, std::vector<int64_t>(6, 1));
        fm::buffer<int64_t, queued> received(ex, 6);
        std::vector<int64_t> out(6), in(6), few(c.rank() == 1 ? 5 : 6);
        const fm::vector_view<const int64_t> from(sent.view());
        try {
            s.all_to_all_known(ex, from, received.view(), fm::as_vector(out), fm::as_vector(few));
        } catch (const fm::error& e) {
            told[c.rank()] = e.what();
        }
        s.all_to_all_known(ex, from, received.view(), fm::as_vector(out), fm::as_vector(in));
        CHECK_EQ(in, std::vector<int64_t>(6, 1));
    });
    CHECK(support::has(told[1], "in (R*N) is of shape (5); expected (6)"));
    for (int r : {0, 2}) CHECK(support::has(told[r], "all_to_all: rank 1 of 3 failed"));
    static_assert(fm::exchanges_known_blocks<staged_threads, queued, int64_t>);
    static_assert(!fm::exchanges_known_blocks<staged_threads, fm::host_executor, int64_t>); // whose memory is no secret
    static_assert(!fm::exchanges_known_blocks<fm::threads, queued, int64_t>);
}

TEST_CASE("a rank that throws is named to the others at once, and every later call says the same")
{
    const auto start = std::chrono::steady_clock::now();
    std::vector<std::string> told(4), again(4);
    const auto run = [&] {
        on_ranks(4, 4096, [&](const staged_threads& s, const fm::threads& c) {
            queued ex;
            fm::buffer<float, queued> v(ex, 3000);
            s.barrier(ex);
            if (c.rank() == 2) throw std::domain_error("of its own");
            told[c.rank()] = support::message_of<fm::comm_error>([&] { s.all_reduce(ex, v.view()); });
            again[c.rank()] = support::message_of<fm::comm_error>([&] { s.broadcast(ex, v.view(), 0); });
            CHECK_THROWS_AS(static_cast<void>(s.inner()), fm::comm_error);
        });
    };
    CHECK_THROWS_WITH_AS(run(), "of its own", std::domain_error);
    for (int r : {0, 1, 3}) {
        CHECK(support::has(told[r], "all_reduce, staged: all_to_all: rank 2 of 4 has left"));
        CHECK_EQ(again[r].substr(0, again[r].rfind('[')), told[r].substr(0, told[r].rfind('[')));
    }
    CHECK(std::chrono::steady_clock::now() - start < milliseconds(5000));
}

TEST_CASE("a rank whose device fails between two parts leaves, and the others learn it at once")
{
    std::vector<std::string> told(3);
    const auto start = std::chrono::steady_clock::now();
    fm::run_ranks(3, [&](const fm::threads& c) {
        const stage memory(800);
        // Nobody else holds the communicator of this part.
        const staged_threads s(c.split(0, c.rank()), memory.view());
        streamed ex;
        auto v = support::upload(ex, std::vector<float>(1000, 1.f));
        ex.seen.fail_at = c.rank() == 1 ? 4 : -1; // on its way down in the third part of 5
        try {
            s.all_reduce(ex, v.view());
        } catch (const std::exception& e) {
            told[c.rank()] = e.what();
        }
        CHECK(support::has(support::message_of<fm::comm_error>([&] { s.barrier(ex); }), "all_reduce, staged: "));
    });
    CHECK_EQ(told[1], "the device has failed");
    for (int r : {0, 2}) CHECK(support::has(told[r], "all_reduce, staged: all_reduce: rank 1 of 3 has left"));
    CHECK(std::chrono::steady_clock::now() - start < milliseconds(5000));
}

TEST_CASE("a rank that does not come is named when the deadline has passed")
{
    std::vector<std::string> told(3);
    fm::run_ranks(
        3,
        [&](const fm::threads& c) {
            const staged_threads s(c, 4096, heap);
            queued ex;
            if (c.rank() == 1) std::this_thread::sleep_for(milliseconds(600));
            told[c.rank()] = support::message_of<fm::comm_error>([&] { s.barrier(ex); });
        },
        {.deadline = milliseconds(200)});
    for (const auto& t : told) CHECK(support::has(t, "barrier, staged: all_to_all: rank 1 of 3 did not come within 200 ms"));
}

TEST_CASE("staging memory of a resource comes back with the last copy, unless late messages may still be written to it")
{
    support::counting_memory memory;
    struct keeping final : fm::memory_resource {
        fm::host_memory heap;
        void* kept = nullptr;
        int given_back = 0;
        void* allocate(int64_t bytes) override { return kept = heap.allocate(bytes); }
        void deallocate(void*, int64_t) noexcept override { ++given_back; }
        ~keeping() override { heap.deallocate(kept, 0); }
    } lost;
    {
        std::optional<fm::staged<fm::self>> one(std::in_place, fm::self{}, 512, memory);
        const auto two = one->split(0, 0);
        CHECK_EQ(memory.calls(), 1);
        one.reset();
        CHECK_EQ(memory.live(), 512);
    }
    CHECK_EQ(memory.live(), 0);
    {
        const fm::staged<fm::self> s(fm::self{}, 512, lost);
        streamed ex;
        fm::buffer<float, streamed> a(ex, 4), b(ex, 4);
        ex.seen.fail_at = 0;
        CHECK_THROWS_AS(s.all_gather(ex, a.view(), b.view()), std::domain_error);
    }
    CHECK_EQ(lost.given_back, 0);
}

TEST_CASE("a communicator splits, and its parts share the staging memory")
{
    on_ranks(4, 2048, [](const staged_threads& s, const fm::threads&) {
        queued ex;
        const auto half = s.split(s.rank() % 2, -s.rank());
        CHECK_EQ(half.size(), 2);
        CHECK_EQ(half.rank(), 1 - s.rank() / 2);
        auto sum = support::upload(ex, std::vector<int32_t>(200, 1 << s.rank()));
        half.all_reduce(ex, sum.view());
        support::is(ex, sum.view(), [&](int64_t) { return s.rank() % 2 ? 0b1010 : 0b0101; });
        support::all_collectives<float>(s, ex, 90);
        support::all_collectives<float>(half.split(0, 0), ex, 90);
        support::all_rows<double>(s, ex, support::random(75), 3);
    });
}

TEST_CASE("a second call before the first has ended is refused by name")
{
    const fm::staged<fm::self> s(fm::self{}, 512, heap);
    struct nested : queued {
        const fm::staged<fm::self>* ranks = nullptr;
        std::string told;
        void synchronize()
        {
            if (const auto* c = std::exchange(ranks, nullptr))
                told = support::message_of<fm::comm_error>([&] { c->barrier(*this); });
            queued::synchronize();
        }
    } ex;
    fm::buffer<float, nested> v(ex, 4);
    ex.ranks = &s;
    s.all_reduce(ex, v.view());
    CHECK(support::has(ex.told, "barrier: the staging memory is in use by all_reduce; expected one call at a time"));
    CHECK_NOTHROW(s.barrier(ex));
}

TEST_CASE("staging memory and options that make no sense are refused by name")
{
    const auto says = [](const char* text, const auto& make) {
        const std::string got = support::message_of<fm::invalid_argument>(make);
        INFO(got);
        CHECK(support::has(got, text));
    };
    const stage memory(1024);
    const auto part = [&](int64_t first, int64_t n) { return fm::slice(memory.view(), first, n); };
    says("staging is 15; expected 16 bytes or more for 1 ranks", [&] { fm::staged<fm::self>(fm::self{}, part(0, 15)); });
    says("staging is 15; expected 16 bytes or more for 1 ranks", [&] { fm::staged<fm::self>(fm::self{}, 15, heap); });
    says("a pointer aligned to 256 bytes", [&] { fm::staged<fm::self>(fm::self{}, part(8, 512)); });
    says("options.rows is always; expected if_reached or never", [&] {
        fm::staged<fm::self>(fm::self{}, part(0, 512), {.rows = fm::direct_rows::always});
    });
    CHECK_NOTHROW(fm::staged<fm::self>(fm::self{}, part(0, 512), {.rows = fm::direct_rows::never}));
}
