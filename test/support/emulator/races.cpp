// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include "support/emulator/races.hpp"

#include <algorithm>
#include <bit>

namespace emulator {

race_check::race_check(cluster& c) : c_(c)
{
    const unsigned threads = c.shape.threads[0] * c.shape.threads[1] * c.shape.threads[2];
    warps_ = (threads + 31) / 32;
    lanes_ = c.shape.cluster * threads <= 1024;
    first_products_ = c.shape.cluster * warps_ * (lanes_ ? 32 : 1);
    first_barrier_ = first_products_ + c.shape.cluster * warps_;
    agents_ = (first_barrier_ + most_barriers + 15) / 16 * 16;
}
void race_check::begin()
{
    begin_ = ++now_;
    known_.assign(first_products_ * agents_, 0);
    gathered_.assign(agents_, 0);
    over_.assign(agents_, 0);
    words_.clear();
    barriers_used_ = 0;
    for (const auto& cells : shared_)
        if (!cells.empty())
            std::erase_if(lists_, [&](const auto& l) { return l.first >= cells.data() && l.first < cells.data() + cells.size(); });
    shared_.clear();
    for (const block& b : c_.blocks) shared_.emplace_back(b.shared_bytes);
}

race_check::cell* race_check::find(const std::byte* at)
{
    for (const block& b : c_.blocks) {
        if (at >= b.shared && at < b.shared + b.shared_bytes) return shared_[b.rank].data() + (at - b.shared);
        if (!b.local.empty() && at >= b.local.data() && at < b.local.data() + b.local.size()) return nullptr;
    }
    if (at >= c_.parameters && at < c_.parameters + c_.code->parameter_bytes) return nullptr;
    const std::uintptr_t address = reinterpret_cast<std::uintptr_t>(at), number = address / page;
    if (number != last_number_ || !last_page_) {
        auto& p = pages_[number];
        if (!p) p = std::make_unique<cell[]>(page);
        last_number_ = number;
        last_page_ = p.get();
    }
    return last_page_ + address % page;
}

void race_check::join(moment* into, const moment* from, std::size_t n)
{
    for (std::size_t i = 0; i < n; ++i) into[i] = std::max(into[i], from[i]);
}
template <class F>
void race_check::each_agent(const warp& w, std::uint32_t lanes, F&& f) const
{
    if (!lanes_) {
        f(of_lane(w, 0));
        return;
    }
    for (std::uint32_t left = lanes; left; left &= left - 1) f(of_lane(w, std::countr_zero(left)));
}

// -- who touched what ----------------------------------------------------------------------------------------------------

race_check::readers race_check::group_of(agent a, moment when) const
{
    if (a >= first_products_) return {static_cast<agent>(other_group | a), when, 1};
    return lanes_ ? readers{static_cast<agent>(a / 32), when, 1u << a % 32} : readers{a, when, 1};
}
bool race_check::knows(const moment* row, agent self, const readers& r) const
{
    if (r.when < begin_) return false;
    if (r.group & other_group) return row[r.group & agent_bits] >= r.when;
    for (std::uint32_t left = r.lanes; left; left &= left - 1) {
        const auto a = static_cast<agent>(lanes_ ? r.group * 32 + std::countr_zero(left) : r.group);
        if (a != self && row[a] < r.when) return false;
    }
    return true;
}
/// What a cell keeps of its readers: all that a later write may not know of.
void race_check::add_reader(cell& c, agent by, const moment* row)
{
    const moment when = now_;
    if (c.reader != several) {
        if (c.read && c.read < begin_) return; // of another cluster: no write may follow in any case
        if (c.read == 0 || c.reader == by || (row && row[c.reader] >= c.read)) {
            c.reader = by;
            c.read = when;
            return;
        }
        lists_[&c] = {group_of(c.reader, c.read)};
        c.reader = several;
    }
    if (c.read < begin_) return;
    c.read = when;
    auto& list = lists_[&c];
    const readers r = group_of(by, when);
    for (std::size_t n = list.size(); n > 0 && (r.group & other_group || n + 4 > list.size()); --n)
        if (list[n - 1].group == r.group && (list[n - 1].when == when || r.group & other_group)) {
            list[n - 1].when = when;
            list[n - 1].lanes |= r.lanes;
            return;
        }
    if (row && list.size() >= 8 && std::has_single_bit(list.size()))
        std::erase_if(list, [&](const readers& old) { return knows(row, by, old); });
    list.push_back(r);
}

std::string race_check::line_of(const cell& c) const
{
    return ", line " + std::to_string(c.line) + ": " + std::string(c_.text->line(c.line));
}
std::string race_check::name(agent a, moment when) const
{
    if (when < begin_) return "a thread of another cluster";
    if (a >= first_barrier_) return "a copy that tells a barrier";
    if (a >= first_products_) {
        a = static_cast<agent>(a - first_products_);
        return "products of block " + std::to_string(c_.blocks[a / warps_].index) + ", warp " + std::to_string(a % warps_);
    }
    const unsigned warp_number = lanes_ ? a / 32 : a;
    return "block " + std::to_string(c_.blocks[warp_number / warps_].index) + ", warp " + std::to_string(warp_number % warps_) +
           (lanes_ ? ", lane " + std::to_string(a % 32) : "");
}
void race_check::report(warp& w, const instruction& i, int lane, const std::byte* at, const std::string& what)
{
    std::string where = "global memory";
    for (const block& b : c_.blocks)
        if (at >= b.shared && at < b.shared + b.shared_bytes) where = "shared address " + std::to_string(at - b.shared + shared_window);
    fail(w, i, "a race at " + where + ", lane " + std::to_string(lane) + ": " + what);
}
void race_check::check_written(warp& w, const instruction& i, int lane, const cell& c, const std::byte* at, access_kind kind,
                               const moment* row, agent self)
{
    if (c.changed && kind != access_kind::atomic && !knows(row, self, c.changer, c.changed))
        report(w, i, lane, at, name(c.changer, c.changed) + " has changed it by an atomic" + line_of(c));
    if (c.written == 0) return;
    const auto writer = static_cast<agent>(c.writer & agent_bits);
    if (c.writer & open_bit && c.written >= begin_)
        report(w, i, lane, at, "a copy that " + name(writer, c.written) + " asked for may not be there" + line_of(c));
    if (knows(row, self, writer, c.written)) return;
    report(w, i, lane, at, name(writer, c.written) + " wrote there" + line_of(c));
}
void race_check::check_readers(warp& w, const instruction& i, int lane, cell& c, const std::byte* at, const moment* row, agent self)
{
    if (c.read == 0) return;
    if (c.reader != several) {
        if (!knows(row, self, c.reader, c.read)) report(w, i, lane, at, name(c.reader, c.read) + " has read there");
    } else {
        const auto list = lists_.find(&c);
        for (const readers& r : list->second)
            if (!knows(row, self, r)) {
                const auto first = static_cast<agent>(r.group & other_group ? r.group & agent_bits
                                                      : lanes_              ? r.group * 32 + std::countr_zero(r.lanes)
                                                                            : r.group);
                report(w, i, lane, at, name(first, r.when) + " has read there");
            }
        lists_.erase(list);
    }
    c.read = 0;
    c.reader = 0;
}
void race_check::access(warp& w, const instruction& i, int lane, const std::byte* at, std::uint32_t bytes, access_kind kind)
{
    cell* const first = find(at);
    if (!first) return;
    const agent self = of_lane(w, lane);
    const moment* const mine = row(self);
    for (std::uint32_t n = 0; n < bytes; ++n) {
        cell& c = first[n];
        check_written(w, i, lane, c, at + n, kind, mine, self);
        if (kind == access_kind::read) {
            add_reader(c, self, mine);
        } else {
            check_readers(w, i, lane, c, at + n, mine, self);
            if (kind == access_kind::atomic) {
                c.changed = now_;
                c.changer = self;
            } else {
                c.written = now_;
                c.writer = self;
                c.changed = 0;
            }
            c.line = i.line;
        }
    }
}
void race_check::look(warp& w, const instruction& i, int lane, const std::byte* at, std::uint32_t bytes)
{
    const agent self = of_lane(w, lane);
    for (std::uint32_t n = 0; n < bytes; ++n) // a row of a box may lie on two pages
        if (const cell* const c = find(at + n)) check_written(w, i, lane, *c, at + n, access_kind::read, row(self), self);
}
void race_check::open(warp& w, const instruction& i, int lane, const std::byte* at, std::uint32_t bytes)
{
    access(w, i, lane, at, bytes, access_kind::write);
    cell* const first = find(at);
    for (std::uint32_t n = 0; first && n < bytes; ++n) first[n].writer |= open_bit;
}
void race_check::close(agent by, const std::byte* at, std::uint32_t bytes, std::uint32_t line)
{
    cell* const first = find(at);
    for (std::uint32_t n = 0; first && n < bytes; ++n) {
        first[n].writer = by;
        first[n].written = now_;
        first[n].line = line;
    }
}
void race_check::note_read(agent by, const std::byte* at, std::uint32_t bytes)
{
    for (std::uint32_t n = 0; n < bytes; ++n) // rows of boxes cross pages
        if (cell* const c = find(at + n)) add_reader(*c, by, nullptr);
}

// -- products ------------------------------------------------------------------------------------------------------------

void race_check::read_by_products(warp& w, const instruction& i, const std::byte* at, std::uint32_t bytes, moment since)
{
    cell* const first = find(at);
    const agent self = of_products(w);
    for (std::uint32_t n = 0; first && n < bytes; ++n) {
        const cell& c = first[n];
        if (c.written > since || c.writer & open_bit)
            report(w, i, 0, at + n, "the operand of a product that nobody has waited for was written" + line_of(c));
        add_reader(first[n], self, nullptr);
    }
}
void race_check::end_products(const warp& w)
{
    each_agent(w, ~0u, [&](agent a) { row(a)[of_products(w)] = now_; });
    ++now_;
}

// -- what orders ---------------------------------------------------------------------------------------------------------

void race_check::meet(const std::vector<std::pair<const warp*, std::uint32_t>>& all)
{
    std::vector<moment> joined(agents_, 0);
    const auto each = [&](auto&& f) {
        for (const auto& [w, lanes] : all) each_agent(*w, lanes, f);
    };
    each([&](agent a) { join(joined.data(), row(a), agents_); });
    each([&](agent a) { joined[a] = now_; });
    each([&](agent a) { std::copy(joined.begin(), joined.end(), row(a)); });
    ++now_;
}
void race_check::meet(warp& w, std::uint32_t lanes)
{
    if (lanes_) meet({{&w, lanes}});
}
void race_check::arrive_cluster(const warp& w, std::uint32_t lanes)
{
    each_agent(w, lanes, [&](agent a) {
        join(gathered_.data(), row(a), agents_);
        gathered_[a] = now_;
    });
    ++now_;
}
void race_check::end_cluster_phase() { over_ = gathered_; }
void race_check::leave_cluster_barrier(const warp& w, std::uint32_t lanes)
{
    each_agent(w, lanes, [&](agent a) { join(row(a), over_.data(), agents_); });
}

race_check::barrier& race_check::at(const std::byte* word)
{
    barrier& b = words_[word];
    if (b.gathered.empty()) {
        b.gathered.assign(agents_, 0);
        b.over.assign(agents_, 0);
        if (barriers_used_ == most_barriers) throw kernel_error("more barriers than races are looked for at: " + c_.code->name);
        b.copies = static_cast<agent>(first_barrier_ + barriers_used_++);
    }
    return b;
}
void race_check::init(warp& w, const instruction& i, int lane, const std::byte* word)
{
    access(w, i, lane, word, 8, access_kind::write);
    (void)at(word);
}
void race_check::arrive(warp& w, const instruction& i, int lane, const std::byte* word, bool all)
{
    access(w, i, lane, word, 8, access_kind::atomic);
    barrier& b = at(word);
    const agent a = of_lane(w, lane);
    const std::size_t from = all ? 0 : first_products_;
    join(b.gathered.data() + from, row(a) + from, agents_ - from);
    if (all) b.gathered[a] = now_;
    ++now_;
}
void race_check::end_phase(const std::byte* word)
{
    barrier& b = at(word);
    b.over = b.gathered;
}
void race_check::wait(warp& w, const instruction& i, int lane, const std::byte* word)
{
    access(w, i, lane, word, 8, access_kind::atomic);
    join(row(of_lane(w, lane)), at(word).over.data(), agents_);
}
race_check::agent race_check::of_barrier(const std::byte* word) { return at(word).copies; }
void race_check::tell(const std::byte* word)
{
    barrier& b = at(word);
    b.gathered[b.copies] = now_++;
}

} // namespace emulator
