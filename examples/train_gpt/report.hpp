// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// What a person sees of a run: the progress line, the log, the summary and the bars of expert load.
#pragma once

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <limits>
#include <numeric>
#include <string>
#include <vector>

#include <sys/ioctl.h>
#include <unistd.h>

#include <nlohmann/json.hpp>

#include <fastmoe/core/error.hpp>
#include <fastmoe/io/replace_file.hpp>

namespace train_gpt {

/// One row of the log.
struct log_row {
    std::int64_t step = 0;
    std::int64_t tokens = 0;                                    ///< seen so far
    double seconds = 0;                                         ///< of training so far
    double loss = 0;                                            ///< nats per byte, mean of the step's batch
    double val_loss = std::numeric_limits<double>::quiet_NaN(); ///< NaN where it was not measured
    double balance = 0;                                         ///< balance loss, mean over layers; 1 is uniform
    double learning_rate = 0;
    double gradient_norm = 0;
    double tokens_per_second = 0;
};

namespace detail {

template <class... Args>
std::string format(const char* pattern, Args... args)
{
    const int size = std::snprintf(nullptr, 0, pattern, args...);
    std::string out(static_cast<std::size_t>(size) + 1, '\0');
    std::snprintf(out.data(), out.size(), pattern, args...);
    out.pop_back();
    return out;
}

inline constexpr const char* log_header =
    "step,tokens,seconds,loss,val_loss,balance,learning_rate,gradient_norm,tokens_per_second\n";

inline std::string log_line(const log_row& r)
{
    const std::string val = std::isnan(r.val_loss) ? "" : format("%.9g", r.val_loss);
    return format("%lld,%lld,%.3f,%.9g,%s,%.9g,%.9g,%.9g,%.1f\n", static_cast<long long>(r.step),
                  static_cast<long long>(r.tokens), r.seconds, r.loss, val.c_str(), r.balance, r.learning_rate,
                  r.gradient_norm, r.tokens_per_second);
}

/// Nine numbers with commas between; the val_loss may be empty. False for anything else.
inline bool parse_log_line(const std::string& line, log_row& row)
{
    double field[9];
    const char* p = line.c_str();
    for (int i = 0; i < 9; ++i) {
        char* end = nullptr;
        field[i] = std::strtod(p, &end);
        if (end == p && i != 4) return false;
        if (end == p) field[i] = std::numeric_limits<double>::quiet_NaN();
        if (*end != (i == 8 ? '\0' : ',')) return false;
        p = end + 1;
    }
    row = {static_cast<std::int64_t>(field[0]),
           static_cast<std::int64_t>(field[1]),
           field[2],
           field[3],
           field[4],
           field[5],
           field[6],
           field[7],
           field[8]};
    return true;
}

} // namespace detail

/// The rows of a log. A last row without its end of line, as a killed process leaves it, is not one.
/// @throws invalid_argument if the file cannot be read, format_error that names the line if it is no such log
inline std::vector<log_row> read_log(const std::string& path)
{
    std::ifstream in(path, std::ios::binary);
    fastmoe::expects(in.is_open(), "path", "'" + path + "'", "a readable log");
    std::vector<log_row> out;
    std::string line;
    for (int number = 1; std::getline(in, line) && !in.eof(); ++number) {
        log_row row;
        const bool fits = number == 1 ? line + "\n" == detail::log_header : detail::parse_log_line(line, row);
        if (!fits)
            fastmoe::raise<fastmoe::format_error>("'" + path + "': line " + std::to_string(number) + " is no " +
                                                  (number == 1 ? "header" : "row") + " of this program's log");
        if (number > 1) out.push_back(row);
    }
    return out;
}

/// The log, one row a step, on disk (in the system's hands) when write() returns.
class csv_log {
public:
    /// @param resumed_step  rows past it, which the resumed run writes again, are dropped; 0 starts a new file
    explicit csv_log(const std::string& path, std::int64_t resumed_step = 0) : path_(path)
    {
        std::string kept = detail::log_header;
        if (resumed_step > 0 && ::access(path.c_str(), F_OK) == 0)
            for (const log_row& row : read_log(path))
                if (row.step <= resumed_step) kept += detail::log_line(row);
        fastmoe::io::replace_file file(path);
        file.write(kept);
        file.commit();
        out_ = std::fopen(path.c_str(), "ab");
        if (out_ == nullptr) fail();
    }

    csv_log(const csv_log&) = delete;
    csv_log& operator=(const csv_log&) = delete;
    ~csv_log()
    {
        if (out_ != nullptr) std::fclose(out_);
    }

    /// @throws error if the disk refuses
    void write(const log_row& row)
    {
        const std::string line = detail::log_line(row);
        if (std::fwrite(line.data(), 1, line.size(), out_) != line.size() || std::fflush(out_) != 0) fail();
    }

private:
    [[noreturn]] void fail() const
    {
        fastmoe::raise<fastmoe::error>("cannot write '" + path_ + "': " + std::strerror(errno));
    }

    std::string path_;
    std::FILE* out_ = nullptr;
};

/// One line on a terminal, rewritten at most ten times a second; nothing at all where `out` is no terminal.
class progress_line {
public:
    explicit progress_line(std::int64_t steps, std::FILE* out = stderr)
        : steps_(steps), out_(out), terminal_(::isatty(::fileno(out)) == 1), started_(clock::now())
    {}

    progress_line(const progress_line&) = delete;
    progress_line& operator=(const progress_line&) = delete;
    ~progress_line() { finish(); }

    void show(const log_row& row)
    {
        if (!terminal_) return;
        const auto now = clock::now();
        if (first_ < 0) first_ = row.step - 1;
        line_ = text(row, std::chrono::duration<double>(now - started_).count());
        if (shown_ && now - last_ < std::chrono::milliseconds(100)) return;
        last_ = now;
        print();
    }

    /// Shows the last row for good and ends the line.
    void finish()
    {
        if (line_.empty()) return;
        print();
        std::fputc('\n', out_);
        std::fflush(out_);
        line_.clear();
        shown_ = false;
    }

private:
    using clock = std::chrono::steady_clock;

    /// The words of the line; the time left is that of the steps this process has done.
    std::string text(const log_row& row, double seconds) const
    {
        const auto done = static_cast<double>(row.step - first_);
        const double left = static_cast<double>(steps_ - row.step) * seconds / done;
        const auto s = static_cast<long long>(left + 0.5);
        const std::string time = s >= 3600 ? detail::format("%lld:%02lld:%02lld", s / 3600, s / 60 % 60, s % 60)
                                           : detail::format("%lld:%02lld", s / 60, s % 60);
        return detail::format("step %lld/%lld  loss %.3f  %.0f tokens/s  %s left  balance %.2f",
                              static_cast<long long>(row.step), static_cast<long long>(steps_), row.loss,
                              row.tokens_per_second, time.c_str(), row.balance);
    }

    void print()
    {
        winsize size{};
        const bool known = ::ioctl(::fileno(out_), TIOCGWINSZ, &size) == 0 && size.ws_col > 1;
        // A line that wraps could not be rewritten.
        const std::string fits = line_.substr(0, known ? size.ws_col - 1u : 79u);
        std::fprintf(out_, "\r%s\x1b[K", fits.c_str());
        std::fflush(out_);
        shown_ = true;
    }

    std::int64_t steps_;
    std::FILE* out_;
    bool terminal_;
    bool shown_ = false;
    clock::time_point started_;
    clock::time_point last_{};
    std::int64_t first_ = -1;
    std::string line_;
};

/// What one trained model is worth.
struct model_report {
    double val_loss = 0; ///< nats per byte
    std::int64_t active_params = 0;
    std::int64_t total_params = 0;
    double tokens_per_second = 0; ///< of training
};

/// Choices that fell on each expert of each layer.                                // layers x experts
using expert_load = std::vector<std::vector<std::int64_t>>;

/// Standard deviation of the counts over their mean: 0 is uniform, sqrt(E - 1) is all on one. 0 if nothing was counted.
inline double load_cv(const std::vector<std::int64_t>& counts)
{
    const auto total = static_cast<double>(std::accumulate(counts.begin(), counts.end(), std::int64_t{0}));
    if (total == 0) return 0;
    const double mean = total / static_cast<double>(counts.size());
    double squares = 0;
    for (const auto n : counts) squares += (static_cast<double>(n) - mean) * (static_cast<double>(n) - mean);
    return std::sqrt(squares / static_cast<double>(counts.size())) / mean;
}

namespace detail {

/// n choices as percent of all of a layer's; 0 if nothing was counted.
inline double share(const std::vector<std::int64_t>& counts, std::int64_t n)
{
    const std::int64_t total = std::accumulate(counts.begin(), counts.end(), std::int64_t{0});
    return total == 0 ? 0 : 100.0 * static_cast<double>(n) / static_cast<double>(total);
}

} // namespace detail

/// The comparison that the demo ends with.
struct demo_summary {
    std::int64_t corpus_bytes = 0;
    std::int64_t tokens = 0; ///< that each model trained on
    double seconds = 0;      ///< of training both
    model_report moe;
    model_report dense;
    expert_load load; ///< of the MoE

    bool moe_is_lower() const { return moe.val_loss < dense.val_loss; }
};

/// Writes summary.json, as a whole or not at all. A value that is not finite becomes null.
inline void write_summary(const std::string& path, const demo_summary& summary)
{
    using json = nlohmann::ordered_json;
    const auto model = [](const model_report& m) {
        return json{{"val_loss", m.val_loss},
                    {"active_params", m.active_params},
                    {"total_params", m.total_params},
                    {"tokens_per_second", m.tokens_per_second}};
    };
    json out{{"corpus_bytes", summary.corpus_bytes}, {"tokens", summary.tokens},
             {"seconds", summary.seconds},           {"moe", model(summary.moe)},
             {"dense", model(summary.dense)},        {"moe_val_loss_is_lower", summary.moe_is_lower()},
             {"expert_load_cv", json::array()}};
    for (const auto& layer : summary.load) out["expert_load_cv"].push_back(load_cv(layer));
    fastmoe::io::replace_file file(path);
    file.write(out.dump(4) + "\n");
    file.commit();
}

namespace detail {

/// A bar of `length` characters, in eighths of one, filled up with blanks to `width`.
inline std::string bar(double length, int width)
{
    static constexpr const char* part[] = {"", "▏", "▎", "▍", "▌", "▋", "▊", "▉"};
    const int eighths = static_cast<int>(std::lround(length * 8));
    std::string out;
    for (int i = 0; i < eighths / 8; ++i) out += "█";
    out += part[eighths % 8];
    const int used = eighths / 8 + (eighths % 8 > 0);
    return out + std::string(static_cast<std::size_t>(std::max(0, width - used)), ' ');
}

} // namespace detail

/// The load as bars for a terminal: a row an expert, the layers side by side as far as `columns` reach.
/// All bars have one scale, so that layers compare.
inline std::string load_bars(const expert_load& load, int columns = 100)
{
    constexpr int bar_width = 12;
    constexpr int cell = bar_width + 9; // the bar, " 12.3 %" and two blanks
    const std::size_t experts = load.empty() ? 0 : load[0].size();
    double most = 1e-9;
    for (const auto& layer : load)
        for (const auto n : layer) most = std::max(most, detail::share(layer, n));

    std::string out =
        detail::format("share of choices per expert (uniform: %.1f %%)\n", 100.0 / static_cast<double>(experts));
    const std::size_t abreast = static_cast<std::size_t>(std::max(1, (columns - 8) / cell));
    for (std::size_t first = 0; first < load.size(); first += abreast) {
        const std::size_t last = std::min(load.size(), first + abreast);
        const auto line = [&](const std::string& begin, auto&& text) {
            out += begin;
            for (std::size_t l = first; l < last; ++l) out += text(l);
            out.erase(out.find_last_not_of(' ') + 1);
            out += "\n";
        };
        line("expert  ",
             [&](std::size_t l) { return detail::format("%-*s", cell, ("layer " + std::to_string(l)).c_str()); });
        for (std::size_t e = 0; e < experts; ++e)
            line(detail::format("%6zu  ", e), [&](std::size_t l) {
                const double percent = detail::share(load[l], load[l][e]);
                return detail::bar(percent / most * bar_width, bar_width) + detail::format("%5.1f %%  ", percent);
            });
        line("    cv  ", [&](std::size_t l) { return detail::format("%-*.2f", cell, load_cv(load[l])); });
    }
    return out;
}

} // namespace train_gpt
