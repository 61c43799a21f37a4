// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Synchronized gradients against those of the joined batch, and what ranks that disagree are told.
#include <doctest/doctest.h>

#include <atomic>
#include <chrono>
#include <string>
#include <vector>

#include <fastmoe/parallel/broadcast_parameters.hpp>

#include "scene.hpp"
#include "support/executors.hpp"
#include "support/scratch.hpp"

namespace fm = fastmoe;
using fm::int64_t;
using fm::parameter_tag;

namespace {

using views = std::vector<fm::parameter_view>;

fm::vector_view<const fm::parameter_view> listed(const views& v) { return fm::as_vector(v); }

/// One gradient of a type, for lists that are made by hand.
template <class G>
fm::parameter_view view_of(std::vector<G>& g, parameter_tag tag)
{
    return fm::as_parameter(fm::as_vector(g), fm::as_vector(g), tag);
}

/// `threads` as a library that rounds every partial sum to the elements' type, and that counts.
struct rounding {
    const fm::threads& inner;
    std::vector<int64_t>* bytes;

    int rank() const { return inner.rank(); }
    int size() const { return inner.size(); }
    template <fm::executor Executor, class T>
    void all_reduce(Executor& ex, fm::vector_view<T> values) const
    {
        if constexpr (!std::is_integral_v<T>) bytes->push_back(values.extent(0) * static_cast<int64_t>(sizeof(T)));
        const int64_t n = values.extent(0);
        std::vector<T> all(static_cast<std::size_t>(n * size()));
        inner.all_gather(ex, values, fm::as_vector(all));
        for (int64_t i = 0; i < n; ++i) {
            T sum = all[i];
            for (int r = 1; r < size(); ++r) {
                if constexpr (std::is_integral_v<T>) sum = static_cast<T>(sum + all[r * n + i]);
                else sum = static_cast<T>(static_cast<fm::accumulate_t<T>>(sum) + static_cast<fm::accumulate_t<T>>(all[r * n + i]));
            }
            values(i) = sum;
        }
    }
};

/// What each of R ranks says when it calls body, within a short deadline.
template <class Body>
std::vector<std::string> all_say(int ranks, const Body& body)
{
    std::vector<std::string> said(ranks);
    fm::run_ranks(
        ranks,
        [&](const fm::threads& c) {
            said[c.rank()] = support::message_of<fm::comm_error>([&] { body(c); });
            // All of them may go on.
            fm::host_executor ex({.threads = 1});
            c.barrier(ex);
        },
        {.deadline = std::chrono::milliseconds(20000)});
    return said;
}

} // namespace

TEST_CASE_TEMPLATE("gradients of R ranks with unequal tokens become those of the joined batch, for every grid and type",
                   Cell, FASTMOE_EXECUTORS)
{
    FASTMOE_NEEDS(Cell);
    FASTMOE_SEEDED(rng, 501);
    for (int ranks : {1, 2, 3, 4, 8})
        for (const scene::grid g : scene::grids(ranks)) {
            if (std::is_same_v<typename Cell::executor, support::lanes> && (ranks > 4 || g.columns == ranks)) continue;
            const std::uint64_t seed = rng.bits();
            const scene::tokens all(rng, ranks);
            for (auto accumulate : {fm::gradient_accumulation::as_stored, fm::gradient_accumulation::float32}) {
                const fm::synchronize_options options{.bucket_bytes = rng.one_of(8, 64, 300, 1 << 20), .accumulate = accumulate};
                INFO("ranks ", ranks, ", columns ", g.columns, ", bucket ", options.bucket_bytes);
                std::vector<std::string> wrong(ranks);
                fm::run_ranks(ranks, [&](const fm::threads& world) {
                    auto ex = Cell::make();
                    const fm::threads data = g.data_of(world);
                    const int r = world.rank();
                    scene::gradients own(seed, g, all, r, scene::members_of(seed, g, r));
                    const views list = own.views();
                    support::in_workspace(ex, [&](fm::arena& scratch) {
                        fm::synchronize_gradients(ex, listed(list), world, data, options, scratch);
                    });
                    ex.synchronize();
                    wrong[r] = scene::compare(seed, g, all, own);
                });
                for (const std::string& text : wrong) CHECK_EQ(text, "");
            }
        }
}

TEST_CASE("the size of buckets and the number of threads do not change a bit, and all holders have the same ones")
{
    FASTMOE_SEEDED(rng, 502);
    const scene::grid g{4, 2};
    const std::uint64_t seed = rng.bits();
    const scene::tokens all(rng, 4);
    using bytes = std::vector<std::vector<std::byte>>;
    std::vector<bytes> first(4);
    for (int64_t bucket : {8, 24, 96, 1000, 1 << 20})
        for (int threads : {1, 3}) {
            std::vector<bytes> now(4);
            std::vector<std::vector<scene::member>> lists(4);
            fm::run_ranks(4, [&](const fm::threads& world) {
                fm::host_executor ex({.threads = threads});
                const fm::threads data = g.data_of(world);
                const int r = world.rank();
                lists[r] = scene::members_of(seed, g, r);
                scene::gradients own(seed, g, all, r, lists[r]);
                const views list = own.views();
                fm::synchronize_gradients(ex, listed(list), world, data, {.bucket_bytes = bucket});
                now[r] = own.bytes();
            });
            if (first[0].empty()) first = now;
            for (int r = 0; r < 4; ++r) CHECK(now[r] == first[r]);
            for (std::size_t p = 0; p < now[0].size(); ++p) {
                const bool dense = lists[0][p].tag == parameter_tag::world;
                for (int r = 1; r < 4; ++r)
                    if (dense || g.column(r) == 0) CHECK(now[r][p] == now[0][p]);
            }
        }
}

TEST_CASE("with 100, 3 and 1 tokens the sum of globally divided losses is the joined gradient, and a mean of means is not")
{
    FASTMOE_SEEDED(rng, 503);
    // loss = the mean over tokens of (w x - y)^2 / 2, so dloss/dw = the mean of (w x - y) x
    const scene::tokens all(std::vector<int64_t>{100, 3, 1});
    const double w = 0.7;
    const std::vector<double> x = rng.normals(all.all()), y = rng.normals(all.all());
    const auto gradient = [&](int64_t begin, int64_t end, double count) {
        double sum = 0;
        for (int64_t t = begin; t < end; ++t) sum += (w * x[t] - y[t]) * x[t];
        return sum / count;
    };
    const double joined = gradient(0, all.all(), double(all.all()));
    double mean_of_means = 0;
    for (int r = 0; r < 3; ++r) mean_of_means += gradient(all.cuts[r], all.cuts[r + 1], double(all.count(r))) / 3;
    CHECK(std::fabs(mean_of_means - joined) > 0.05); // or the data would show nothing
    std::vector<double> got(3);
    const auto refused = all_say(3, [&](const fm::threads& c) {
        fm::host_executor ex({.threads = 1});
        const int r = c.rank();
        std::vector<double> g{gradient(all.cuts[r], all.cuts[r + 1], double(all.all()))};
        views list{view_of(g, parameter_tag::world)};
        fm::synchronize_gradients(ex, listed(list), c, fm::self{});
        got[r] = g[0];
        g[0] = gradient(all.cuts[r], all.cuts[r + 1], double(all.count(r)));
        fm::synchronize_gradients(ex, listed(list), c, fm::self{},
                                  {.reduce = fm::gradient_reduction::mean_of_equal_counts, .tokens = all.count(r)});
    });
    CHECK(support::close(got, std::vector<double>(3, joined), {.length = 200, .magnitude = 1}));
    for (const std::string& text : refused)
        CHECK_MESSAGE(support::has(text, "the number of tokens of rank 1 is 3; expected 100, as on rank 0"), text);
}

TEST_CASE("a mean of equal counts divides every tag by the number of all ranks: that of an expert with replicas, or without")
{
    FASTMOE_SEEDED(rng, 504);
    for (const scene::grid g : {scene::grid{6, 3}, scene::grid{3, 3}, scene::grid{3, 1}}) {
        const std::uint64_t seed = rng.bits();
        const int64_t each = 7;
        const scene::tokens all(std::vector<int64_t>(g.ranks, each));
        std::vector<std::string> wrong(g.ranks);
        fm::run_ranks(g.ranks, [&](const fm::threads& world) {
            fm::host_executor ex({.threads = 1});
            const fm::threads data = g.data_of(world);
            const int r = world.rank();
            // The rank's own loss is divided by its own count, which leaves its gradients as they are here, times 1/each.
            scene::gradients own(seed, g, all, r, scene::members_of(seed, g, r));
            const views list = own.views();
            fm::synchronize_gradients(ex, listed(list), world, data,
                                      {.bucket_bytes = 128, .reduce = fm::gradient_reduction::mean_of_equal_counts, .tokens = each});
            wrong[r] = scene::compare(seed, g, all, own, g.ranks);
        });
        for (const std::string& text : wrong) CHECK_EQ(text, "");
    }
}

TEST_CASE_TEMPLATE("float32 accumulation rounds the exact sum of small types once, where the communicator would round often",
                   G, fm::bfloat16, fm::half)
{
    FASTMOE_SEEDED(rng, 505);
    const int ranks = 8;
    const int64_t n = 300;
    std::vector<std::vector<G>> values(ranks);
    for (auto& v : values) v = support::normal_vector<G>(rng, n);
    std::vector<G> once; // sums of eight such numbers are exact in double, and their float sum has errors below its rounding
    std::vector<double> magnitude;
    for (int64_t i = 0; i < n; ++i) {
        float sum = float(values[0][i]);
        for (int r = 1; r < ranks; ++r) sum += float(values[r][i]);
        once.push_back(G(sum));
    }
    for (auto accumulate : {fm::gradient_accumulation::float32, fm::gradient_accumulation::as_stored}) {
        int64_t differing = 0;
        std::vector<int64_t> bytes;
        fm::run_ranks(ranks, [&](const fm::threads& c) {
            fm::host_executor ex({.threads = 1});
            std::vector<G> own = values[c.rank()];
            views list{view_of(own, parameter_tag::world)};
            std::vector<int64_t> moved;
            fm::synchronize_gradients(ex, listed(list), rounding{c, &moved}, fm::self{},
                                      {.bucket_bytes = 400, .accumulate = accumulate});
            if (c.rank() != 0) return;
            bytes = moved;
            for (int64_t i = 0; i < n; ++i) differing += own[i].bits != once[i].bits;
        });
        if (accumulate == fm::gradient_accumulation::float32) {
            CHECK_EQ(differing, 0);
            CHECK(bytes == std::vector<int64_t>{400, 400, 400});
        } else {
            CHECK(differing > 0);
            CHECK(bytes == std::vector<int64_t>{400, 200});
        }
    }
}

TEST_CASE("buckets hold gradients of one tag and type, are full but for the last of each, and move every byte once")
{
    std::vector<float> a(10), b(7), c(200);
    std::vector<double> d(5);
    std::vector<fm::half> e(9);
    std::vector<int64_t> world_bytes, data_bytes;
    fm::run_ranks(2, [&](const fm::threads& w) {
        fm::host_executor ex({.threads = 1});
        auto own_a = a, own_b = b, own_c = c;
        auto own_d = d;
        auto own_e = e;
        views list{view_of(own_a, parameter_tag::world), view_of(own_e, parameter_tag::data),
                   view_of(own_d, parameter_tag::world), view_of(own_b, parameter_tag::data),
                   view_of(own_c, parameter_tag::world)};
        std::vector<int64_t> in_world, in_data;
        const fm::threads group = w.split(0, w.rank());
        fm::synchronize_gradients(ex, listed(list), rounding{w, &in_world}, rounding{group, &in_data}, {.bucket_bytes = 256});
        if (w.rank() == 0) world_bytes = in_world, data_bytes = in_data;
    });
    CHECK(world_bytes == std::vector<int64_t>{40, 256, 256, 256, 72}); // 5 doubles; 210 floats
    CHECK(data_bytes == std::vector<int64_t>{28, 18});
}

TEST_CASE("ranks whose lists or options differ are an error on all of them that names one, and they may go on")
{
    struct fault {
        const char* says;
        void (*spoil)(views&, fm::synchronize_options&);
    };
    const fault faults[] = {
        {"the number of parameters tagged world of rank 2 is 1; expected 2, as on rank 0",
         [](views& v, fm::synchronize_options&) { v.erase(v.begin()); }},
        {"the number of elements tagged world of rank 2 is 11; expected 12, as on rank 0",
         [](views& v, fm::synchronize_options&) { --v[0].count; }},
        {"the types, sizes, order or options (a hash) tagged world of rank 2",
         [](views& v, fm::synchronize_options&) { std::swap(v[0], v[1]); }},
        {"the types, sizes, order or options (a hash) tagged world of rank 2",
         [](views& v, fm::synchronize_options&) { v[0].gradient_type = fm::scalar_type::bfloat16; }},
        {"the types, sizes, order or options (a hash) tagged world of rank 2",
         [](views&, fm::synchronize_options& o) { o.bucket_bytes = 64; }},
        {"the types, sizes, order or options (a hash) tagged world of rank 2",
         [](views&, fm::synchronize_options& o) { o.accumulate = fm::gradient_accumulation::float32; }},
    };
    for (const fault& f : faults) {
        const auto said = all_say(4, [&](const fm::threads& c) {
            fm::host_executor ex({.threads = 1});
            std::vector<float> a(5, 1.f), b(7, 1.f);
            views list{view_of(a, parameter_tag::world), view_of(b, parameter_tag::world)};
            fm::synchronize_options options;
            if (c.rank() == 2) f.spoil(list, options);
            try {
                fm::synchronize_gradients(ex, listed(list), c, fm::self{}, options);
            } catch (...) {
                for (float v : a) CHECK_EQ(v, 1.f); // nothing was written
                throw;
            }
        });
        for (const std::string& text : said) CHECK_MESSAGE(support::has(text, f.says), text);
    }
}

TEST_CASE("a group of replicas that disagrees is an error on the ranks of other groups too, and no wait")
{
    const auto said = all_say(6, [&](const fm::threads& world) {
        fm::host_executor ex({.threads = 1});
        const fm::threads data = world.split(world.rank() % 3, world.rank()); // 0 3, 1 4, 2 5
        std::vector<float> a(5), b(world.rank() == 4 ? 8 : 7);
        views list{view_of(a, parameter_tag::world), view_of(b, parameter_tag::data)};
        fm::synchronize_gradients(ex, listed(list), world, data);
    });
    for (int r : {1, 4})
        CHECK_MESSAGE(support::has(said[r], "the number of elements tagged data of rank 1 is 8; expected 7, as on rank 0 of its group"),
                      said[r]);
    for (int r : {0, 2, 3, 5}) CHECK_MESSAGE(support::has(said[r], "the group of replicas of rank 1 does not agree"), said[r]);
}

TEST_CASE("broadcast gives all holders the values of the first, and leaves what one rank has, and gradients, alone")
{
    const int ranks = 6;
    fm::run_ranks(ranks, [&](const fm::threads& world) {
        fm::host_executor ex({.threads = 1});
        const fm::threads data = world.split(world.rank() % 2, world.rank());
        const float own = float(world.rank() + 1);
        std::vector<float> gate(300, own), expert(20, own), slice(3, own), gradient(300, own);
        std::vector<fm::bfloat16> small(9, fm::bfloat16(own));
        std::vector<float> master(9, own);
        views list{fm::as_parameter(fm::as_vector(expert), fm::as_vector(expert), parameter_tag::data),
                   fm::as_parameter(fm::as_vector(gate), fm::as_vector(gradient), parameter_tag::world),
                   fm::as_parameter(fm::as_vector(small), fm::as_vector(master), parameter_tag::world),
                   fm::as_parameter(fm::as_vector(slice), fm::as_vector(slice), parameter_tag::none)};
        // Ranks need not list tags in the same order.
        if (world.rank() % 2 == 1) std::swap(list[0], list[1]);
        support::in_workspace(ex, [&](fm::arena& scratch) { fm::broadcast_parameters(ex, listed(list), world, data, scratch); });
        CHECK(gate == std::vector<float>(300, 1.f));
        CHECK(support::same_bits(small, std::vector<fm::bfloat16>(9, fm::bfloat16(1.f))));
        CHECK(expert == std::vector<float>(20, float(world.rank() % 2 + 1)));
        CHECK(slice == std::vector<float>(3, own));
        CHECK(gradient == std::vector<float>(300, own));
        CHECK(master == std::vector<float>(9, own));
    });
    const auto said = all_say(3, [&](const fm::threads& c) {
        fm::host_executor ex({.threads = 1});
        std::vector<float> a(c.rank() == 1 ? 4 : 5);
        views list{view_of(a, parameter_tag::world)};
        fm::broadcast_parameters(ex, listed(list), c, fm::self{});
    });
    for (const std::string& text : said) CHECK_MESSAGE(support::has(text, "of rank 1 is 4; expected 5"), text);
}

TEST_CASE("what is no list of gradients is refused at the door, and so is a workspace that is a byte short")
{
    fm::host_executor ex({.threads = 1});
    const auto says = [&](const fm::parameter_view& p, const char* part) {
        const views list{p};
        const std::string text = support::message_of<fm::invalid_argument>(
            [&] { fm::synchronize_gradients(ex, listed(list), fm::self{}, fm::self{}); });
        CHECK_MESSAGE(support::has(text, part), text);
    };
    std::vector<float> g(4);
    const fm::parameter_view good = view_of(g, parameter_tag::world);
    auto bad = good;
    bad.gradient = nullptr;
    says(bad, "a parameter's gradient (N) is a null pointer");
    bad = good, bad.gradient = reinterpret_cast<char*>(g.data()) + 2;
    says(bad, "aligned to 4 bytes");
    bad = good, bad.count = -1;
    says(bad, "count is -1");
    bad = good, bad.tag = static_cast<parameter_tag>(7);
    says(bad, "tag is 7; expected world, data or none");
    bad = good, bad.gradient_type = static_cast<fm::scalar_type>(9);
    says(bad, "type is 9");
    std::vector<float> m(6);
    CHECK(support::has(support::message_of<fm::invalid_argument>([&] {
                           fm::as_parameter(fm::as_matrix(m, 2, 3), fm::as_matrix(m, 3, 2), parameter_tag::world);
                       }),
                       "gradient is of shape (3,2); expected (2,3)"));
    const views list{good};
    for (const fm::synchronize_options& o :
         {fm::synchronize_options{.bucket_bytes = 7},
          fm::synchronize_options{.reduce = fm::gradient_reduction::mean_of_equal_counts}})
        CHECK(support::has(support::message_of<fm::invalid_argument>(
                               [&] { fm::synchronize_gradients(ex, listed(list), fm::self{}, fm::self{}, o); }),
                           "options."));
    fm::arena measure;
    fm::synchronize_gradients(ex, listed(list), fm::self{}, fm::self{}, {}, measure);
    std::atomic<int> refused{0};
    fm::run_ranks(2, [&](const fm::threads& c) {
        fm::host_executor own({.threads = 1});
        std::vector<float> mine(4, 3.f);
        const views both{view_of(mine, parameter_tag::world)};
        fm::arena needed;
        fm::synchronize_gradients(own, listed(both), c, fm::self{}, {}, needed);
        support::workspace memory(own, needed.bytes() - 1);
        refused += support::has(support::message_of<fm::out_of_memory>([&] {
                                    fm::synchronize_gradients(own, listed(both), c, fm::self{}, {}, memory);
                                }),
                                "workspace is");
        CHECK_EQ(mine[0], 3.f);
    });
    CHECK_EQ(refused, 2);
}
