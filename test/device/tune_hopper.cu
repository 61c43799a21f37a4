// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Which tunings gemm::hopper should have: every candidate of every product, for layers of published sizes and for decoding.
/// Prints a table a product, fastest first, and at the end what hopper_default() would hold. Ends with 77, skipped, where
/// gemm::hopper does not run; with 1 if a result is unlike gemm::portable's.
///
///     tune_hopper [figures.json [seconds]]    nothing is begun after so many
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <map>
#include <stdexcept>
#include <utility>

#include "tune_hopper.cuh"

namespace tune {

namespace {

constexpr int rounds = 5;
constexpr int64_t flushed_bytes = int64_t{192} << 20; // more than caches hold

struct count_unlike {
    const bfloat16 *expected, *found;
    unsigned long long* wrong;

    FASTMOE_HOST_DEVICE void operator()(int64_t i) const
    {
        const float e = float(expected[i]), f = float(found[i]);
        const float off = e < f ? f - e : e - f, size = e < 0 ? -e : e;
        if (off <= 0.02f + 0.03f * size) return; // NaN is unlike everything
#ifdef __CUDA_ARCH__
        atomicAdd(wrong, 1ull);
#else
        ++*wrong;
#endif
    }
};

template <class T>
fm::buffer<T, fm::cuda_executor> on_device(fm::cuda_executor& ex, const std::vector<T>& from)
{
    fm::buffer<T, fm::cuda_executor> to(ex, static_cast<int64_t>(from.size()));
    ex.copy(to.data(), from.data(), to.size() * static_cast<int64_t>(sizeof(T)));
    ex.synchronize();
    return to;
}

layer::words random_words(fm::cuda_executor& ex, int64_t count, double scale)
{
    layer::words to(ex, count);
    fm::for_each(ex, count, timing::fill_values{to.data(), static_cast<float>(scale)});
    return to;
}

void print(const comparison& c)
{
    for (const candidate& t : c.tried) {
        std::printf("    %9.1f %s %9.4f ms  %s", c.work / t.ms() * (c.is_bytes ? 1e-6 : 1e-9), c.is_bytes ? "GB/s  " : "TFLOPS", t.ms(),
                    initializer(t.how).c_str());
        if (t.wrong > 0) std::printf("  WRONG in %llu elements", t.wrong);
        std::printf("\n");
    }
    std::fflush(stdout);
}

/// The candidates of a slot by what they reach of the best of each comparison, in the geometric mean.
void print_choice(const std::string& slot, const std::vector<comparison>& all)
{
    struct score {
        double logs = 0;
        int found = 0;
    };
    std::map<std::string, score> scores;
    int comparisons = 0;
    for (const comparison& c : all) {
        if (c.slot != slot) continue;
        ++comparisons;
        double best = INFINITY;
        for (const candidate& t : c.tried)
            if (t.wrong == 0) best = std::min(best, t.ms());
        for (const candidate& t : c.tried) {
            if (t.wrong > 0) continue;
            if (slot == "narrow rows" && t.how.columns > 128) continue; // up to this width a product is narrow
            score& s = scores[initializer(t.how)];
            s.logs += std::log(best / t.ms()), ++s.found;
        }
    }
    if (comparisons == 0) return;
    std::vector<std::pair<double, std::string>> order;
    for (const auto& [how, s] : scores)
        if (s.found == comparisons) order.emplace_back(std::exp(s.logs / comparisons), how);
    std::sort(order.rbegin(), order.rend());
    std::printf("\n%s, over %d products:\n", slot.c_str(), comparisons);
    for (const auto& [share, how] : order) std::printf("    %5.1f %% of the best of each  %s\n", 100 * share, how.c_str());
    if (order.empty()) std::printf("    no candidate was right throughout\n");
}

bool write_json(const char* path, const std::vector<comparison>& all)
{
    std::FILE* file = std::fopen(path, "w");
    if (!file) return false;
    const char* between = "[";
    for (const comparison& c : all)
        for (const candidate& t : c.tried) {
            std::fprintf(file, "%s\n  {\"slot\": \"%s\", \"name\": \"%s\", \"tuning\": \"%s\", \"ms\": %.6g, \"gb_per_s\": %.5g, \"tflops\": %.5g, \"wrong\": %llu}",
                         between, c.slot.c_str(), c.name.c_str(), initializer(t.how).c_str(), t.ms(), c.is_bytes ? c.work / t.ms() * 1e-6 : 0,
                         c.is_bytes ? 0 : c.work / t.ms() * 1e-9, t.wrong);
            between = ",";
        }
    std::fprintf(file, "%s\n]\n", all.empty() ? "[" : "");
    return std::fclose(file) == 0;
}

int run(const char* path, double seconds)
{
    fm::cuda_executor ex;
    if (!timing::runs_hopper(ex)) {
        std::printf("skipped: no GPU of 9.x, or not compiled for 9.0a\n");
        return 77;
    }
    const shape layers[] = {{32768, 4096, 2048, 64, 4},  {32768, 4096, 1024, 128, 8}, {32768, 4096, 256, 256, 16}, {24576, 1536, 256, 128, 8},
                            {4096, 4096, 14336, 8, 2},   {32768, 1024, 64, 64, 8}};
    const shape decoding[] = {{8, 4096, 14336, 8, 2}, {64, 4096, 14336, 8, 2}};
    session to(ex, 8 * static_cast<int>(std::size(layers)) + 4 * static_cast<int>(std::size(decoding)));
    bool is_whole = true;
    const auto begun = std::chrono::steady_clock::now();
    // What has been measured is in the file before the next begins.
    const auto next = [&](const auto& tune, layer& l) {
        if (std::chrono::duration<double>(std::chrono::steady_clock::now() - begun).count() > seconds) return;
        tune(to, l);
        if (path && !write_json(path, to.all())) throw std::runtime_error(std::string(path) + " cannot be written");
    };
    try {
        for (const shape& s : layers) {
            layer l(ex, s);
            next(tune_rows, l);
            next(tune_gradients, l);
            next(tune_codes, l);
        }
        for (const shape& s : decoding) {
            layer l(ex, s);
            next(tune_few_rows, l);
            next(tune_few_codes, l);
        }
    } catch (const std::exception& e) { // after most of them the device takes no more
        std::printf("stopped: %s\n", e.what());
        is_whole = false;
    }
    for (const char* slot : {"wide rows", "narrow rows", "few rows", "wide gradients", "narrow gradients", "rows of codes", "few rows of codes"})
        print_choice(slot, to.all());
    for (const comparison& c : to.all())
        for (const candidate& t : c.tried)
            if (t.wrong > 0) return 1;
    return is_whole ? 0 : 1;
}

} // namespace

layer::layer(fm::cuda_executor& ex, const shape& of) : s(of)
{
    // K experts of each token, all different and all alike; rows of an expert in the order of their tokens.
    std::mt19937 random(1);
    const auto draw = [&](int64_t below) { return static_cast<int64_t>(random() % static_cast<std::uint32_t>(below)); };
    std::vector<std::vector<std::int32_t>> choices(static_cast<std::size_t>(s.experts));
    std::vector<std::size_t> numbers(choices.size());
    for (std::size_t e = 0; e < numbers.size(); ++e) numbers[e] = e;
    for (int64_t t = 0; t < s.tokens; ++t)
        for (int64_t i = 0; i < s.k; ++i) {
            std::swap(numbers[static_cast<std::size_t>(i)], numbers[static_cast<std::size_t>(i + draw(s.experts - i))]);
            choices[numbers[static_cast<std::size_t>(i)]].push_back(static_cast<std::int32_t>(t * s.k + i));
        }
    std::vector<std::int32_t> tokens, chosen, rows;
    std::vector<int64_t> begins{0};
    for (const auto& of_expert : choices) {
        for (const std::int32_t c : of_expert) tokens.push_back(c / static_cast<std::int32_t>(s.k)), chosen.push_back(c);
        rows.push_back(static_cast<std::int32_t>(of_expert.size()));
        begins.push_back(static_cast<int64_t>(chosen.size()));
        active += !of_expert.empty();
    }
    index = on_device(ex, tokens), choice_of = on_device(ex, chosen), counts = on_device(ex, rows), offsets = on_device(ex, begins);
    weights = on_device(ex, std::vector<float>(static_cast<std::size_t>(slots()), 1.0f / static_cast<float>(s.k)));
    dweights = fm::buffer<float, fm::cuda_executor>(ex, slots());

    const auto fan = [](int64_t in) { return std::sqrt(3.0 / static_cast<double>(in)); };
    x = random_words(ex, s.tokens * s.width, 1);
    up = random_words(ex, s.experts * 2 * s.hidden * s.width, fan(s.width));
    down = random_words(ex, s.experts * s.width * s.hidden, fan(s.hidden));
    pre = random_words(ex, slots() * 2 * s.hidden, 1);
    dpre = random_words(ex, slots() * 2 * s.hidden, 1);
    a = random_words(ex, slots() * s.hidden, 1);
    y = random_words(ex, slots() * s.width, 1);
}

session::session(fm::cuda_executor& ex, int comparisons)
    : ex_(ex), progress_(comparisons), from_(ex, flushed_bytes), to_(ex, flushed_bytes), wrong_(ex, 1)
{
}

void session::compare(comparison what, const std::function<void(fm::arena&)>& reference, fm::vector_view<bfloat16> result)
{
    progress_.next(what.slot + ": " + what.name);
    std::printf("%s: %s\n", what.slot.c_str(), what.name.c_str()); // first, to be there if a candidate never ends
    std::fflush(stdout);
    fm::arena measure;
    reference(measure);
    for (const candidate& c : what.tried) {
        fm::arena one;
        c.run(one);
        if (one.bytes() > measure.bytes()) measure = one;
    }
    fm::buffer<std::byte, fm::cuda_executor> scratch(ex_, measure.bytes());
    const auto run = [&](const std::function<void(fm::arena&)>& f) {
        fm::arena memory(scratch.view());
        f(memory);
    };
    const int64_t count = result.extent(0), bytes = count * static_cast<int64_t>(sizeof(bfloat16));
    layer::words expected(ex_, count);
    run(reference);
    ex_.copy(expected.data(), result.data_handle(), bytes);
    ex_.synchronize();
    for (candidate& c : what.tried) {
        fm::for_each(ex_, count, timing::fill_values{result.data_handle(), 64.0f}); // what is left unwritten is found
        const unsigned long long none = 0;
        ex_.copy(wrong_.data(), &none, sizeof none);
        try {
            run(c.run);
            fm::for_each(ex_, count, count_unlike{expected.data(), result.data_handle(), wrong_.data()});
            ex_.copy_to_host(&c.wrong, wrong_.data(), sizeof c.wrong);
            ex_.synchronize();
        } catch (const std::exception& e) {
            throw std::runtime_error(initializer(c.how) + ": " + e.what());
        }
    }
    timing::stopwatch watch(ex_);
    for (int round = 0; round < rounds; ++round)
        for (candidate& c : what.tried) {
            ex_.copy(to_.data(), from_.data(), flushed_bytes);
            c.times.push_back(watch([&] { run(c.run); }));
        }
    for (candidate& c : what.tried) c.run = nullptr;
    std::sort(what.tried.begin(), what.tried.end(), [](const candidate& l, const candidate& r) { return l.ms() < r.ms(); });
    print(what);
    all_.push_back(std::move(what));
}

std::string initializer(const hopper_tuning& how)
{
    std::string text = "{.rows = " + std::to_string(how.rows) + ", .columns = " + std::to_string(how.columns) + ", .stages = " + std::to_string(how.stages);
    if (how.cluster != 1) text += ", .cluster = " + std::to_string(how.cluster);
    if (how.schedule == hopper_schedule::ping_pong) text += ", .schedule = hopper_schedule::ping_pong";
    if (how.band != hopper_tuning{}.band) text += ", .band = " + std::to_string(how.band);
    if (how.turned) text += ", .turned = true";
    return text + (how.fences_lines ? "}" : ", .fences_lines = false}");
}

} // namespace tune

int main(int count, char** arguments)
{
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
        std::printf("skipped: no GPU\n");
        return 77;
    }
    try {
        return tune::run(count > 1 ? arguments[1] : nullptr, count > 2 ? std::atof(arguments[2]) : INFINITY);
    } catch (const std::exception& e) {
        std::printf("%s\n", e.what());
        return 1;
    }
}
