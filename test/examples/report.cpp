// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// What the training program tells a person: the log across a resume, the line on a terminal and its silence elsewhere,
/// the summary, the bars and the plots.
#include <cmath>
#include <cstdlib>
#include <string>
#include <vector>

#include <doctest/doctest.h>

#include <fcntl.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <nlohmann/json.hpp>

#include "support/random.hpp"
#include "support/temporary_folder.hpp"
#include "train_gpt/plot.hpp"
#include "train_gpt/report.hpp"

namespace {

using namespace train_gpt;
using support::temporary_folder;

log_row row_of(std::int64_t step)
{
    const auto s = static_cast<double>(step);
    return {.step = step,
            .tokens = step * 4096,
            .seconds = s / 8,
            .loss = 5.5 / s,
            .val_loss = step % 5 == 0 ? 6.0 / s : NAN,
            .balance = 1.25,
            .learning_rate = 1e-3 / s,
            .gradient_norm = 0.1 * s,
            .tokens_per_second = 32768};
}

bool close(double a, double b) { return std::abs(a - b) <= 1e-8 * std::abs(b) || (std::isnan(a) && std::isnan(b)); }

bool same(const log_row& a, const log_row& b)
{
    return a.step == b.step && a.tokens == b.tokens && std::abs(a.seconds - b.seconds) < 6e-4 &&
           close(a.loss, b.loss) && close(a.val_loss, b.val_loss) && close(a.balance, b.balance) &&
           close(a.learning_rate, b.learning_rate) && close(a.gradient_norm, b.gradient_norm) &&
           std::abs(a.tokens_per_second - b.tokens_per_second) < 0.06;
}

void write_rows(csv_log& log, std::int64_t first, std::int64_t last)
{
    for (std::int64_t s = first; s <= last; ++s) log.write(row_of(s));
}

/// Both ends of a terminal with so many columns.
struct terminal {
    int master;
    std::FILE* out;
    explicit terminal(unsigned short columns)
    {
        master = ::posix_openpt(O_RDWR | O_NOCTTY);
        REQUIRE(master >= 0);
        REQUIRE(::grantpt(master) == 0);
        REQUIRE(::unlockpt(master) == 0);
        out = std::fopen(::ptsname(master), "r+");
        REQUIRE(out != nullptr);
        winsize size{};
        size.ws_row = 24;
        size.ws_col = columns;
        REQUIRE(::ioctl(::fileno(out), TIOCSWINSZ, &size) == 0);
    }
    ~terminal()
    {
        std::fclose(out);
        ::close(master);
    }
    /// What was written up to the end of the first line. The kernel hands it over when it gets to it, in pieces.
    std::string seen()
    {
        std::string all;
        pollfd wait{master, POLLIN, 0};
        while ((all.empty() || all.back() != '\n') && ::poll(&wait, 1, 10000) == 1) {
            char piece[4096];
            const ssize_t n = ::read(master, piece, sizeof piece);
            REQUIRE(n > 0);
            all.append(piece, static_cast<std::size_t>(n));
        }
        return all;
    }
};

bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

int count(const std::string& text, const std::string& part)
{
    int n = 0;
    for (std::size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) ++n;
    return n;
}

/// The value of an attribute in an element's text.
std::string attribute(const std::string& element, const std::string& name)
{
    const std::size_t at = element.find(" " + name + "=\"");
    REQUIRE(at != std::string::npos);
    const std::size_t begin = at + name.size() + 3;
    return element.substr(begin, element.find('"', begin) - begin);
}

struct element {
    std::string tag;  ///< with its attributes
    std::string text; ///< up to the next tag
};

/// A small XML reader: every element in order; requires that all are closed in order and that quotes are whole.
std::vector<element> elements_of(const std::string& svg)
{
    std::vector<element> out;
    std::vector<std::string> open;
    std::size_t at = svg.find('<');
    CHECK(at == 0);
    while (at != std::string::npos) {
        const std::size_t end = svg.find('>', at);
        REQUIRE(end != std::string::npos);
        const std::string tag = svg.substr(at + 1, end - at - 1);
        CHECK(count(tag, "\"") % 2 == 0);
        CHECK_FALSE(contains(tag, "<"));
        const std::size_t next = svg.find('<', end);
        const std::string text = svg.substr(end + 1, next == std::string::npos ? next : next - end - 1);
        for (std::size_t amp = text.find('&'); amp != std::string::npos; amp = text.find('&', amp + 1))
            CHECK(text.find(';', amp) != std::string::npos);
        if (tag[0] == '/') {
            REQUIRE_FALSE(open.empty());
            CHECK(open.back() == tag.substr(1));
            open.pop_back();
        } else {
            out.push_back({tag, text});
            if (tag.back() != '/') open.push_back(tag.substr(0, tag.find(' ')));
        }
        at = next;
    }
    CHECK(open.empty());
    return out;
}

/// Every text of a picture with its place; and no number that is not finite anywhere.
std::vector<std::pair<std::string, std::pair<double, double>>> texts_of(const std::string& svg)
{
    CHECK_FALSE(contains(svg, "nan"));
    CHECK_FALSE(contains(svg, "inf"));
    std::vector<std::pair<std::string, std::pair<double, double>>> out;
    for (const element& e : elements_of(svg))
        if (e.tag.starts_with("text "))
            out.push_back({e.text, {std::stod(attribute(e.tag, "x")), std::stod(attribute(e.tag, "y"))}});
    return out;
}

bool has_text(const std::string& svg, const std::string& wanted)
{
    for (const auto& [text, at] : texts_of(svg))
        if (text == wanted) return true;
    return false;
}

/// A box around each text, by a generous guess of its width. True if no two meet.
bool labels_are_apart(const std::string& svg)
{
    struct box {
        double left, right, top, bottom;
        std::string text;
    };
    std::vector<box> boxes;
    for (const element& e : elements_of(svg)) {
        if (!e.tag.starts_with("text ") || e.text.empty() || contains(e.tag, "rotate")) continue;
        const double size = std::stod(attribute(e.tag, "font-size"));
        const double x = std::stod(attribute(e.tag, "x")), y = std::stod(attribute(e.tag, "y"));
        const double width = 0.56 * size * static_cast<double>(e.text.size());
        const std::string anchor = attribute(e.tag, "text-anchor");
        const double left = anchor == "start" ? x : anchor == "end" ? x - width : x - width / 2;
        boxes.push_back({left, left + width, y - 0.75 * size, y + 0.2 * size, e.text});
    }
    for (std::size_t i = 0; i < boxes.size(); ++i)
        for (std::size_t j = 0; j < i; ++j) {
            const box &a = boxes[i], &b = boxes[j];
            if (a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom) {
                MESSAGE("'" << a.text << "' meets '" << b.text << "'");
                return false;
            }
        }
    return true;
}

std::vector<log_row> invented(support::random& draw, std::int64_t steps, double floor)
{
    std::vector<log_row> rows;
    for (std::int64_t s = 1; s <= steps; ++s) {
        log_row r;
        r.step = s;
        r.tokens = s * 4096;
        const double mean = floor + (5.55 - floor) / (1 + 50.0 * static_cast<double>(s) / static_cast<double>(steps));
        r.loss = mean + draw.normal(0.05);
        if (s % (steps / 10 + 1) == 0 || s == steps) r.val_loss = mean + 0.03;
        rows.push_back(r);
    }
    return rows;
}

} // namespace

TEST_CASE("The log gives back its rows, and a new run starts it anew")
{
    temporary_folder folder;
    {
        csv_log log(folder / "log.csv");
        write_rows(log, 1, 12);
    }
    auto rows = read_log(folder / "log.csv");
    REQUIRE(rows.size() == 12);
    for (std::int64_t s = 1; s <= 12; ++s) CHECK(same(rows[static_cast<std::size_t>(s - 1)], row_of(s)));
    CHECK(std::isnan(rows[3].val_loss));
    CHECK(support::read_file(folder / "log.csv").starts_with("step,tokens,seconds,loss,val_loss,"));
    csv_log log(folder / "log.csv");
    log.write(row_of(1));
    CHECK(read_log(folder / "log.csv").size() == 1);
}

TEST_CASE("A resumed log is byte for byte that of a run that never stopped, also after a torn last row")
{
    temporary_folder folder;
    {
        csv_log log(folder / "whole.csv");
        write_rows(log, 1, 20);
    }
    {
        csv_log log(folder / "resumed.csv");
        write_rows(log, 1, 13);
    }
    const std::string torn = support::read_file(folder / "resumed.csv") + "14,57344,1.7";
    for (const std::int64_t step : {13, 10, 1}) {
        support::write_file(folder / "resumed.csv", torn);
        csv_log log(folder / "resumed.csv", step);
        CHECK(read_log(folder / "resumed.csv").size() == static_cast<std::size_t>(step));
        write_rows(log, step + 1, 20);
        CHECK(support::read_file(folder / "resumed.csv") == support::read_file(folder / "whole.csv"));
    }
    csv_log missing(folder / "new.csv", 5); // the log was lost: it goes on from here
    missing.write(row_of(6));
    CHECK(read_log(folder / "new.csv").size() == 1);
}

TEST_CASE("A file that is no log is refused by its line, and is not overwritten by a resume")
{
    temporary_folder folder;
    support::write_file(folder / "a", "some,other\n1,2\n");
    CHECK_THROWS_WITH_AS(read_log(folder / "a"), doctest::Contains("line 1 is no header"),
                         const fastmoe::format_error&);
    CHECK_THROWS_AS(csv_log(folder / "a", 3), const fastmoe::format_error&);
    CHECK(support::read_file(folder / "a") == "some,other\n1,2\n");
    for (const char* line : {"1,2,3,4,5,6,7,8", "1,2,3,4,5,6,7,8,9,10", "1,2,3,x,5,6,7,8,9", ",2,3,4,5,6,7,8,9", ""}) {
        support::write_file(folder / "a",
                            std::string(train_gpt::detail::log_header) + "1,2,3,4,,6,7,8,9\n" + line + "\n");
        CHECK_THROWS_WITH_AS(read_log(folder / "a"), doctest::Contains("line 3 is no row"),
                             const fastmoe::format_error&);
    }
    CHECK_THROWS_AS(read_log(folder / "none"), const fastmoe::invalid_argument&);
    CHECK_THROWS_AS(csv_log(folder / "no/such"), const fastmoe::error&);
}

TEST_CASE("The progress line rewrites itself on a terminal, fits it, and ends with the last row")
{
    terminal screen(200);
    {
        progress_line line(500, screen.out);
        for (std::int64_t s = 1; s <= 300; ++s) line.show(row_of(s));
    }
    const std::string seen = screen.seen();
    CHECK(contains(seen, "step 1/500  loss 5.500  32768 tokens/s  "));
    CHECK(contains(seen, " left  balance 1.25"));
    CHECK(contains(seen, "step 300/500  loss 0.018"));
    CHECK(count(seen, "\n") == 1);
    CHECK(seen.back() == '\n');
    CHECK(count(seen, "\r") < 50); // three hundred rows in no time are not three hundred lines

    terminal narrow(30);
    {
        progress_line line(500, narrow.out);
        line.show(row_of(100));
    }
    const std::string cut = narrow.seen();
    CHECK(contains(cut, "step 100/500"));
    CHECK_FALSE(contains(cut, "tokens/s"));
}

TEST_CASE("The progress line writes nothing where there is no terminal")
{
    temporary_folder folder;
    std::FILE* out = std::fopen((folder / "out").c_str(), "w");
    REQUIRE(out != nullptr);
    {
        progress_line line(10, out);
        for (std::int64_t s = 1; s <= 10; ++s) line.show(row_of(s));
    }
    std::fclose(out);
    CHECK(support::read_file(folder / "out").empty());
}

TEST_CASE("The coefficient of variation is that of closed forms")
{
    CHECK(load_cv({5, 5, 5, 5}) == 0.0);
    CHECK(load_cv({0, 0, 0, 20}) == doctest::Approx(std::sqrt(3.0)));
    CHECK(load_cv({1, 3}) == doctest::Approx(0.5));
    CHECK(load_cv({0, 0, 0}) == 0.0);
    CHECK(load_cv({7}) == 0.0);
}

TEST_CASE("The summary holds what was given under the documented names, and null for what is not a number")
{
    temporary_folder folder;
    const demo_summary given{.corpus_bytes = 11678899,
                             .tokens = 3000000,
                             .seconds = 123.5,
                             .moe = {1.25, 800000, 2400000, 31000.5},
                             .dense = {NAN, 800001, 800002, 40000},
                             .load = {{1, 3}, {2, 2}}};
    write_summary(folder / "summary.json", given);
    const auto read = nlohmann::json::parse(support::read_file(folder / "summary.json"));
    CHECK(read["corpus_bytes"] == 11678899);
    CHECK(read["tokens"] == 3000000);
    CHECK(read["seconds"] == 123.5);
    CHECK(read["moe"] == nlohmann::json{{"val_loss", 1.25},
                                        {"active_params", 800000},
                                        {"total_params", 2400000},
                                        {"tokens_per_second", 31000.5}});
    CHECK(read["dense"]["val_loss"].is_null());
    CHECK(read["dense"]["total_params"] == 800002);
    CHECK(read["expert_load_cv"] == nlohmann::json{0.5, 0.0});
    CHECK(read["moe_val_loss_is_lower"] == false); // nothing is lower than what is not a number
}

TEST_CASE("The summary says that the mixture's loss is lower only if it is")
{
    temporary_folder folder;
    for (const double dense : {1.2, 1.25, 1.3}) {
        demo_summary given;
        given.moe.val_loss = 1.25;
        given.dense.val_loss = dense;
        write_summary(folder / "summary.json", given);
        const auto read = nlohmann::json::parse(support::read_file(folder / "summary.json"));
        CHECK(read["moe_val_loss_is_lower"] == (dense == 1.3));
    }
}

TEST_CASE("The bars are as long as the shares and no line is wider than asked")
{
    const expert_load load{{10, 30, 0, 40}, {20, 20, 20, 20}, {0, 0, 0, 0}, {1, 0, 0, 0}, {1, 1, 1, 1}};
    const std::string wide = load_bars(load, 200), narrow = load_bars(load, 60);
    CHECK(contains(wide, "uniform: 25.0 %"));
    for (const char* part : {"layer 0", "layer 4", " 12.5 %", " 37.5 %", " 50.0 %", "100.0 %", "0.79"}) {
        CHECK(contains(wide, part));
        CHECK(contains(narrow, part));
    }
    CHECK(count(wide, "\n") == 1 + 6);
    CHECK(count(narrow, "\n") == 1 + 3 * 6);
    std::size_t start = 0;
    for (std::size_t end = narrow.find('\n'); end != std::string::npos;
         start = end + 1, end = narrow.find('\n', start)) {
        int characters = 0;
        for (std::size_t i = start; i < end; ++i) characters += (narrow[i] & 0xc0) != 0x80;
        CHECK(characters <= 60);
    }
    // One scale for all: the widest bar, 100 %, has twelve full blocks, a half has six, a quarter has three.
    const auto blocks = [](const std::string& bars, std::size_t line) {
        std::size_t at = 0;
        for (std::size_t i = 0; i < line; ++i) at = bars.find('\n', at) + 1;
        return count(bars.substr(at, bars.find('\n', at) - at), "█");
    };
    CHECK(blocks(load_bars({{1, 0, 0, 0}}), 2) == 12);
    CHECK(blocks(load_bars({{1, 0, 0, 0}, {1, 1, 1, 1}}), 2) == 12 + 3);
    CHECK(blocks(load_bars({{1, 0, 0, 0}, {2, 2, 0, 0}}), 3) == 0 + 6);
}

TEST_CASE("Ticks are at 1, 2 or 5 times a power of ten, inside of the axis, and few")
{
    FASTMOE_SEEDED(draw, 2501);
    for (int round = 0; round < 2000; ++round) {
        const double low = draw.uniform(-10, 10) * std::pow(10, draw.uniform(-3, 6));
        const double high = low + std::pow(10, draw.uniform(-3, 6));
        for (const bool rounded : {false, true}) {
            const auto a = train_gpt::detail::axis::over(low, high, 100, 500, 6, rounded);
            CAPTURE(low);
            CAPTURE(high);
            int ticks = 0;
            const double lead = a.step / std::pow(10, std::floor(std::log10(a.step) + 1e-9));
            CHECK((std::abs(lead - 1) < 1e-6 || std::abs(lead - 2) < 1e-6 || std::abs(lead - 5) < 1e-6));
            a.each([&](double v) {
                ++ticks;
                CHECK(a(v) > 99.9);
                CHECK(a(v) < 500.1);
                CHECK(std::abs(v / a.step - std::round(v / a.step)) < 1e-3);
                CHECK(std::abs(std::stod(a.label(v)) - v) < a.step * 1e-3 + 1e-9);
            });
            CHECK(ticks >= 2);
            CHECK(ticks <= 9);
            CHECK(a.low <= low + 1e-8 * (high - low));
            CHECK(a.high >= high - 1e-8 * (high - low));
        }
    }
}

TEST_CASE("The loss plot is well-formed, has units, a legend and both last losses, and no labels that overlap")
{
    FASTMOE_SEEDED(draw, 2502);
    for (const std::int64_t steps : {1, 2, 40, 800, 20000}) {
        INFO("steps ", steps);
        const std::vector<loss_curve> curves{{"MoE <8 experts> & 2", invented(draw, steps, 1.2)},
                                             {"dense twin", invented(draw, steps, 1.21)}};
        const std::string svg = loss_svg(curves, "a subtitle");
        CHECK(labels_are_apart(svg));
        CHECK(has_text(svg, "cross-entropy (nats per byte)"));
        CHECK(has_text(svg, steps > 488 ? "training tokens seen (millions)" : "training tokens seen (thousands)"));
        CHECK(has_text(svg, "MoE &lt;8 experts&gt; &amp; 2: validation"));
        CHECK(has_text(svg, "dense twin: training, smoothed"));
        CHECK(has_text(svg, "a subtitle"));
        for (const auto& c : curves) CHECK(has_text(svg, train_gpt::detail::format("%.3f", c.rows.back().val_loss)));
        CHECK(svg.size() < 300000);
        for (const element& e : elements_of(svg))
            if (e.tag.starts_with("circle")) {
                CHECK(std::stod(attribute(e.tag, "cy")) > 70);
                CHECK(std::stod(attribute(e.tag, "cy")) < 450);
                CHECK(std::stod(attribute(e.tag, "cx")) < 830);
            }
    }
    // A lower loss is a lower point, at a larger y: of the two strong lines, the first ends below the second.
    std::vector<double> ends;
    for (const element& e : elements_of(loss_svg({{"a", invented(draw, 100, 1.2)}, {"b", invented(draw, 100, 1.8)}})))
        if (e.tag.starts_with("path") && attribute(e.tag, "stroke-width") == "2") {
            const std::string d = attribute(e.tag, "d");
            ends.push_back(std::stod(d.substr(d.rfind(' '))));
        }
    REQUIRE(ends.size() == 2);
    CHECK(ends[0] > ends[1] + 20);
    texts_of(loss_svg({}));
    texts_of(loss_svg({{"empty", {}}}));
}

TEST_CASE("A run that diverged still has a plot")
{
    std::vector<log_row> rows;
    for (int s = 1; s <= 100; ++s) rows.push_back({.step = s, .tokens = s, .loss = s < 50 ? 3.0 : NAN});
    texts_of(loss_svg({{"not a number", rows}}));
    for (auto& r : rows) r.loss = r.val_loss = INFINITY;
    texts_of(loss_svg({{"beyond all", rows}}));
}

TEST_CASE("The load plot has a bar for each expert of each layer, as tall as its share, and no labels that overlap")
{
    FASTMOE_SEEDED(draw, 2503);
    for (const auto& [layers, experts] : {std::pair{1, 4}, {2, 8}, {4, 8}, {3, 16}, {6, 128}, {12, 64}, {1, 1}}) {
        const int wide = experts, deep = layers; // clang 14 captures no structured binding
        INFO(deep, " layers of ", wide);
        expert_load load(static_cast<std::size_t>(layers));
        for (auto& layer : load)
            for (int e = 0; e < experts; ++e) layer.push_back(draw.integer(1000, 2000));
        const std::string svg = load_svg(load, "a subtitle");
        CHECK(labels_are_apart(svg));
        CHECK(has_text(svg, "share of choices (%)"));
        CHECK(has_text(svg, "Layer " + std::to_string(layers - 1)));
        std::vector<double> tall;
        for (const element& e : elements_of(svg))
            if (e.tag.starts_with("rect") && attribute(e.tag, "fill") == train_gpt::detail::palette[0])
                tall.push_back(std::stod(attribute(e.tag, "height")));
        REQUIRE(std::ssize(tall) == layers * experts);
        const double scale = tall[0] / train_gpt::detail::share(load[0], load[0][0]);
        for (std::size_t l = 0; l < load.size(); ++l)
            for (std::size_t e = 0; e < load[l].size(); ++e)
                CHECK(std::abs(tall[l * load[l].size() + e] - scale * train_gpt::detail::share(load[l], load[l][e])) <
                      0.2 + 0.01 * tall[0]);
    }
    texts_of(load_svg({}));
    texts_of(load_svg({{0, 0}}));
}
