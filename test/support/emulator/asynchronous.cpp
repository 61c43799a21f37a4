// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// Copies that go on while threads do something else, barriers that count them, and products of matrices. Whatever may be late is
// late here, and in any order: who looks too early finds what was there before.
#include <algorithm>
#include <bit>
#include <cstring>

#include "support/emulator/device.hpp"
#include "support/emulator/numbers.hpp"
#include "support/emulator/races.hpp"
#include "support/emulator/tensor_map.hpp"

namespace emulator {

namespace {

std::uint64_t uniform_wide(const warp& w, const instruction& i, slot s, std::uint32_t lanes)
{
    const auto* v = w.at<std::uint64_t>(s);
    const int first = std::countr_zero(lanes);
    for (std::uint32_t left = lanes; left; left &= left - 1)
        if (v[std::countr_zero(left)] != v[first]) fail(w, i, "a descriptor that has to be the same in all lanes");
    return v[first];
}

// -- barriers in shared memory -----------------------------------------------------------------------------------------

/// Eight bytes: arrivals that a phase takes, those still due, bytes still due, and the phase's parity.
struct barrier_state {
    std::uint32_t expected : 20, parity : 1, valid : 11;
    std::uint32_t pending_and_bytes[1]; // 11 bits of arrivals, 21 of bytes with a sign
    int pending() const { return static_cast<int>(pending_and_bytes[0] >> 21); }
    int bytes() const { return static_cast<int>(pending_and_bytes[0] << 11) >> 11; }
    void set(int pending, int bytes)
    {
        pending_and_bytes[0] = static_cast<std::uint32_t>(pending) << 21 | (static_cast<std::uint32_t>(bytes) & 0x1fffffu);
    }
};
static_assert(sizeof(barrier_state) == 8);
constexpr std::uint32_t valid_barrier = 0x5a5;

barrier_state barrier_at(warp& w, const instruction& i, std::uint32_t address)
{
    check_align(w, i, address, 8);
    barrier_state b;
    std::memcpy(&b, shared_place(w, i, address, 8), 8);
    if (b.valid != valid_barrier) fail(w, i, "there is no barrier at shared address " + std::to_string(address));
    return b;
}
/// Counts, and ends the phase where all is there.
void count(warp& w, const instruction& i, std::uint32_t address, int arrivals, int bytes)
{
    barrier_state b = barrier_at(w, i, address);
    int pending = b.pending() - arrivals, due = b.bytes() + bytes;
    if (pending < 0) fail(w, i, "more arrivals than the barrier expects");
    if (due >= 1 << 20 || due <= -(1 << 20)) fail(w, i, "more bytes than a barrier counts");
    if (pending == 0 && due == 0) {
        pending = static_cast<int>(b.expected);
        b.parity = b.parity ^ 1u;
        if (race_check* const races = w.home->home->races) races->end_phase(shared_place(w, i, address, 8));
    }
    b.set(pending, due);
    std::memcpy(shared_place(w, i, address, 8), &b, 8);
}

void init_barrier(warp& w, const instruction& i, std::uint32_t lanes)
{
    for (std::uint32_t left = lanes; left; left &= left - 1) {
        const int l = std::countr_zero(left);
        const std::uint32_t address = w.at<std::uint32_t>(i.a)[l] + static_cast<std::uint32_t>(i.offset),
                            arrivals = w.at<std::uint32_t>(i.b)[l];
        check_align(w, i, address, 8);
        if (arrivals < 1 || arrivals >= 1 << 11) fail(w, i, "a barrier of " + std::to_string(arrivals) + " arrivals");
        if (race_check* const races = w.home->home->races) races->init(w, i, l, shared_place(w, i, address, 8));
        barrier_state b{};
        b.expected = arrivals;
        b.valid = valid_barrier;
        b.set(static_cast<int>(arrivals), 0);
        std::memcpy(shared_place(w, i, address, 8), &b, 8);
    }
}
void arrive(warp& w, const instruction& i, std::uint32_t lanes)
{
    for (std::uint32_t left = lanes; left; left &= left - 1) {
        const int l = std::countr_zero(left);
        const std::uint32_t address = w.at<std::uint32_t>(i.a)[l] + static_cast<std::uint32_t>(i.offset);
        if (race_check* const races = w.home->home->races) {
            const std::byte* const there = shared_place(w, i, address, 8);
            const bool own = there >= w.home->shared && there < w.home->shared + w.home->shared_bytes;
            races->arrive(w, i, l, there, own || i.variant & 2);
        }
        if (i.variant & 1) { // expect_tx, then arrive
            const auto bytes = static_cast<int>(w.at<std::uint32_t>(i.b)[l]);
            barrier_state b = barrier_at(w, i, address);
            b.set(b.pending(), b.bytes() + bytes);
            std::memcpy(shared_place(w, i, address, 8), &b, 8);
        }
        count(w, i, address, 1, 0);
    }
}

} // namespace

std::uint32_t attempt(warp& w, const instruction& i, std::uint32_t lanes)
{
    std::uint32_t over = 0;
    for (std::uint32_t left = lanes; left; left &= left - 1) {
        const int l = std::countr_zero(left);
        const std::uint32_t address = w.at<std::uint32_t>(i.a)[l] + static_cast<std::uint32_t>(i.offset);
        const barrier_state b = barrier_at(w, i, address);
        if (b.parity == (w.at<std::uint32_t>(i.b)[l] & 1)) continue;
        over |= 1u << l;
        if (race_check* const races = w.home->home->races) races->wait(w, i, l, shared_place(w, i, address, 8));
    }
    return over;
}

namespace {

// -- copies ------------------------------------------------------------------------------------------------------------

/// @param by      the warp that waited for it; -1: none
/// @param barrier  that hears of it, else
void copy_now(warp& w, const line_copy& c, int by, const std::byte* barrier = nullptr)
{
    const instruction& i = w.code->code[static_cast<std::size_t>(c.line)];
    std::byte* to = shared_place(w, i, c.to, 16);
    if (race_check* const races = w.home->home->races) {
        const race_check::agent who = barrier ? races->of_barrier(barrier) : races->of_lane(w, c.lane);
        races->note_read(who, reinterpret_cast<const std::byte*>(c.from), static_cast<std::uint32_t>(c.bytes));
        races->close(who, to, 16, i.line);
    }
    std::byte line[16] = {};
    if (c.bytes > 0) {
        check_global(w, i, c.from, static_cast<std::uint32_t>(c.bytes));
        std::memcpy(line, reinterpret_cast<const void*>(c.from), static_cast<std::size_t>(c.bytes));
    }
    std::memcpy(to, line, 16);
    w.home->note_write(c.to, 16, by);
}
void copy_line(warp& w, const instruction& i, std::uint32_t lanes)
{
    for (std::uint32_t left = lanes; left; left &= left - 1) {
        const int l = std::countr_zero(left);
        const std::uint32_t to = w.at<std::uint32_t>(i.a)[l] + static_cast<std::uint32_t>(i.offset);
        const std::uint64_t from = w.at<std::uint64_t>(i.b)[l];
        const auto bytes = i.c == no_slot ? 16 : static_cast<int>(w.at<std::uint32_t>(i.c)[l]);
        if (bytes < 0 || bytes > 16) fail(w, i, "a copy of " + std::to_string(bytes) + " of 16 bytes");
        check_align(w, i, to, 16);
        check_align(w, i, from, 16);
        if (bytes > 0) check_global(w, i, from, static_cast<std::uint32_t>(bytes));
        if (race_check* const races = w.home->home->races) {
            races->look(w, i, l, reinterpret_cast<const std::byte*>(from), static_cast<std::uint32_t>(bytes));
            races->open(w, i, l, shared_place(w, i, to, 16), 16);
        }
        w.lines.push_back({to, from, bytes, l, w.groups[l], i.number});
    }
}
void commit_lines(warp& w, const instruction&, std::uint32_t lanes)
{
    for (std::uint32_t left = lanes; left; left &= left - 1) ++w.groups[std::countr_zero(left)];
}
void wait_lines(warp& w, const instruction& i, std::uint32_t lanes) // variant: groups that may stay; -1: what is not committed, too
{
    std::vector<line_copy> rest;
    for (const line_copy& c : w.lines) {
        const bool over = lanes >> c.lane & 1 && (i.variant < 0 || c.group < w.groups[c.lane] - i.variant);
        if (over)
            copy_now(w, c, w.number);
        else
            rest.push_back(c);
    }
    w.lines = std::move(rest);
}
/// The barrier hears of it when all copies of the lane are done.
void arrive_with_lines(warp& w, const instruction& i, std::uint32_t lanes)
{
    for (std::uint32_t left = lanes; left; left &= left - 1) {
        const int l = std::countr_zero(left);
        pending_copy p;
        p.origin = w.home;
        p.line = i.number;
        p.barrier = w.at<std::uint32_t>(i.a)[l] + static_cast<std::uint32_t>(i.offset);
        std::vector<line_copy> rest;
        for (const line_copy& c : w.lines) (c.lane == l ? p.lines : rest).push_back(c);
        w.lines = std::move(rest);
        w.home->home->pending.push_back(std::move(p));
    }
}
std::uint32_t bytes_of(const tensor_map& map) { return map.box[0] * map.element_bytes * map.box[1] * map.box[2]; }
std::uint32_t ranks_of(const pending_copy& p) { return p.ranks ? p.ranks : 1u << p.origin->rank; }
/// What of the box lies inside.
template <class F>
void rows_of_box(const tensor_map& map, const pending_copy& p, F&& f)
{
    const auto inside = [](std::int64_t at, std::uint64_t extent) { return at >= 0 && at < static_cast<std::int64_t>(extent); };
    const std::int64_t from = std::max(p.x, 0),
                       to = std::min<std::int64_t>(p.x + std::int64_t{map.box[0]}, static_cast<std::int64_t>(map.extent[0]));
    for (std::int64_t z = p.z; z < p.z + std::int64_t{map.box[2]}; ++z)
        for (std::int64_t y = p.y; y < p.y + std::int64_t{map.box[1]}; ++y)
            if (from < to && inside(y, map.extent[1]) && inside(z, map.extent[2]))
                f(reinterpret_cast<const std::byte*>(map.base + static_cast<std::uint64_t>(from) * map.element_bytes +
                                                     static_cast<std::uint64_t>(y) * map.stride[0] +
                                                     static_cast<std::uint64_t>(z) * map.stride[1]),
                  static_cast<std::uint32_t>(to - from) * map.element_bytes);
}
void copy_box(warp& w, const instruction& i, std::uint32_t lanes)
{
    for (std::uint32_t left = lanes; left; left &= left - 1) {
        const int l = std::countr_zero(left);
        pending_copy p;
        p.origin = w.home;
        p.line = i.number;
        p.is_box = true;
        p.to = w.at<std::uint32_t>(i.a)[l];
        p.map = reinterpret_cast<const void*>(w.at<std::uint64_t>(i.b)[l]);
        p.x = static_cast<int>(w.at<std::uint32_t>(i.more[0])[l]);
        p.y = static_cast<int>(w.at<std::uint32_t>(i.more[1])[l]);
        p.z = static_cast<int>(w.at<std::uint32_t>(i.more[2])[l]);
        p.barrier = w.at<std::uint32_t>(i.c)[l];
        p.ranks = i.m == no_slot ? 0 : w.at<std::uint32_t>(i.m)[l] & 0xffff;
        if (p.ranks >> w.home->home->blocks.size()) fail(w, i, "blocks that the cluster does not have");
        check_align(w, i, p.to, 128);
        check_align(w, i, reinterpret_cast<std::uintptr_t>(p.map), 64);
        check_global(w, i, reinterpret_cast<std::uintptr_t>(p.map), 128);
        check_waited(w, i);
        if (reinterpret_cast<const tensor_map*>(p.map)->is != tensor_map::magic) fail(w, i, "no tensor map there");
        if (race_check* const races = w.home->home->races) {
            const auto& map = *static_cast<const tensor_map*>(p.map);
            rows_of_box(map, p, [&](const std::byte* from, std::uint32_t bytes) { races->look(w, i, l, from, bytes); });
            for (std::uint32_t to = ranks_of(p); to; to &= to - 1) {
                warp& there = w.home->home->blocks[static_cast<std::size_t>(std::countr_zero(to))].warps[0];
                races->open(w, i, l, shared_place(there, i, p.to, bytes_of(map)), bytes_of(map));
            }
        }
        w.home->home->pending.push_back(std::move(p));
    }
}

} // namespace

void do_pending(cluster& c, std::size_t which)
{
    const pending_copy p = std::move(c.pending[which]);
    c.pending.erase(c.pending.begin() + static_cast<std::ptrdiff_t>(which));
    warp& w = p.origin->warps[0]; // for messages, and whose block it is
    const instruction& i = c.code->code[static_cast<std::size_t>(p.line)];
    if (!p.is_box) {
        const std::byte* const barrier = shared_place(w, i, p.barrier, 8);
        for (const line_copy& line : p.lines) copy_now(w, line, -1, barrier);
        if (c.races) c.races->tell(barrier);
        count(w, i, p.barrier, 1, 0);
        return;
    }
    const auto& map = *static_cast<const tensor_map*>(p.map);
    const std::uint32_t row_bytes = map.box[0] * map.element_bytes, bytes = bytes_of(map);
    for (std::uint32_t left = ranks_of(p); left; left &= left - 1) {
        warp& there = c.blocks[static_cast<std::size_t>(std::countr_zero(left))].warps[0];
        std::byte* to = shared_place(there, i, p.to, bytes);
        for (std::uint32_t z = 0; z < map.box[2]; ++z)
            for (std::uint32_t y = 0; y < map.box[1]; ++y)
                for (std::uint32_t x = 0; x < map.box[0]; ++x) {
                    const std::int64_t at[3] = {std::int64_t{p.x} + x, std::int64_t{p.y} + y, std::int64_t{p.z} + z};
                    bool inside = true;
                    for (int n = 0; n < 3; ++n) inside &= at[n] >= 0 && at[n] < static_cast<std::int64_t>(map.extent[n]);
                    std::uint32_t offset = (z * map.box[1] + y) * row_bytes + x * map.element_bytes;
                    if (map.swizzled) {
                        const std::uint32_t address = p.to + offset;
                        offset += (address ^ (address >> 3 & 0x70)) - address;
                    }
                    if (!inside) {
                        std::memset(to + offset, 0, map.element_bytes);
                        continue;
                    }
                    const std::uintptr_t from = map.base + static_cast<std::uint64_t>(at[0]) * map.element_bytes +
                                                static_cast<std::uint64_t>(at[1]) * map.stride[0] +
                                                static_cast<std::uint64_t>(at[2]) * map.stride[1];
                    check_global(w, i, from, map.element_bytes);
                    std::memcpy(to + offset, reinterpret_cast<const void*>(from), map.element_bytes);
                }
        const std::uint32_t first = (p.to - shared_window) / 16;
        std::fill_n(there.home->written.begin() + first, bytes / 16, 0u);
        if (c.races) {
            const std::byte* const barrier = shared_place(there, i, p.barrier, 8);
            const race_check::agent who = c.races->of_barrier(barrier);
            rows_of_box(map, p, [&](const std::byte* from, std::uint32_t n) { c.races->note_read(who, from, n); });
            c.races->close(who, to, bytes, i.line);
            c.races->tell(barrier);
        }
        count(there, i, p.barrier, 0, -static_cast<int>(bytes));
    }
}

namespace {

void map_address(warp& w, const instruction& i, std::uint32_t lanes) // mapa.shared::cluster
{
    for (std::uint32_t left = lanes; left; left &= left - 1) {
        const int l = std::countr_zero(left);
        const std::uint32_t rank = w.at<std::uint32_t>(i.b)[l];
        if (rank >= w.home->home->blocks.size())
            fail(w, i, "block " + std::to_string(rank) + " of a cluster of " + std::to_string(w.home->home->blocks.size()));
        w.at<std::uint32_t>(i.d)[l] = w.at<std::uint32_t>(i.a)[l] + ((rank + 1) << rank_shift);
    }
}

// -- products of a warp --------------------------------------------------------------------------------------------------

void load_matrices(warp& w, const instruction& i, std::uint32_t) // ldmatrix; variant: transposed
{
    const std::size_t n = i.list.size();
    for (std::size_t m = 0; m < n; ++m) {
        std::uint16_t matrix[8][8];
        for (std::size_t row = 0; row < 8; ++row) {
            const std::uint32_t address = w.at<std::uint32_t>(i.a)[m * 8 + row] + static_cast<std::uint32_t>(i.offset);
            check_align(w, i, address, 16);
            const std::byte* const from = shared_place(w, i, address, 16);
            if (race_check* const races = w.home->home->races)
                races->access(w, i, static_cast<int>(m * 8 + row), from, 16, access_kind::read);
            std::memcpy(matrix[row], from, 16);
        }
        for (int l = 0; l < 32; ++l) {
            const int row = l / 4, col = l % 4 * 2;
            const std::uint32_t low = i.variant ? matrix[col][row] : matrix[row][col],
                                high = i.variant ? matrix[col + 1][row] : matrix[row][col + 1];
            w.at<std::uint32_t>(i.list[m])[l] = high << 16 | low;
        }
    }
}

float element(std::uint16_t bits, int kind) { return kind == 0 ? brain_value(bits) : half_value(bits); }

/// m16n8k16: list is D, more is A, B and C.
void multiply_warp(warp& w, const instruction& i, std::uint32_t)
{
    float a[16][16], b[16][8], c[16][8];
    for (int l = 0; l < 32; ++l)
        for (int half = 0; half < 2; ++half) {
            const int group = l / 4, pair = l % 4 * 2 + half;
            for (int r = 0; r < 4; ++r)
                a[group + r % 2 * 8][pair + r / 2 * 8] = element(
                    static_cast<std::uint16_t>(w.at<std::uint32_t>(i.more[static_cast<std::size_t>(r)])[l] >> (16 * half)), i.variant);
            for (int r = 0; r < 2; ++r)
                b[pair + r * 8][group] = element(
                    static_cast<std::uint16_t>(w.at<std::uint32_t>(i.more[static_cast<std::size_t>(4 + r)])[l] >> (16 * half)), i.variant);
            for (int r = 0; r < 2; ++r)
                c[group + r * 8][pair] = std::bit_cast<float>(w.at<std::uint32_t>(i.more[static_cast<std::size_t>(6 + r * 2 + half)])[l]);
        }
    for (int row = 0; row < 16; ++row)
        for (int col = 0; col < 8; ++col) {
            double sum = c[row][col];
            for (int k = 0; k < 16; ++k) sum += static_cast<double>(a[row][k]) * static_cast<double>(b[k][col]);
            const int l = row % 8 * 4 + col / 2;
            w.at<std::uint32_t>(i.list[static_cast<std::size_t>(row / 8 * 2 + col % 2)])[l] =
                std::bit_cast<std::uint32_t>(static_cast<float>(sum));
        }
}

// -- products of a warpgroup ---------------------------------------------------------------------------------------------

/// wgmma's operand in shared memory, in lines of 128 bytes that are swizzled: where an element lies.
struct operand_place {
    std::uint32_t start, leading, stride;
    int element_bytes;
    bool transposed;

    std::uint32_t address(int row, int k) const
    {
        const int line = 128 / element_bytes;
        std::uint32_t at = start;
        if (!transposed)
            at += static_cast<std::uint32_t>(row / 8) * stride + static_cast<std::uint32_t>(row % 8 * 128 + k * element_bytes);
        else
            at += static_cast<std::uint32_t>(row / line) * leading + static_cast<std::uint32_t>(k / 8) * stride +
                  static_cast<std::uint32_t>(k % 8 * 128 + row % line * element_bytes);
        return at ^ (at >> 3 & 0x70);
    }
};
operand_place operand(warp& w, const instruction& i, std::uint64_t descriptor, int element_bytes, bool transposed)
{
    if (descriptor >> 62 != 1) fail(w, i, "an operand that is not in swizzled lines of 128 bytes");
    if (descriptor >> 49 & 7) fail(w, i, "an operand whose base does not lie on a line of 1024 bytes");
    return {static_cast<std::uint32_t>(descriptor & 0x3fff) << 4, static_cast<std::uint32_t>(descriptor >> 16 & 0x3fff) << 4,
            static_cast<std::uint32_t>(descriptor >> 32 & 0x3fff) << 4, element_bytes, transposed};
}

constexpr int brain = 0, halves = 1, codes = 2;
struct product_kind {
    int n, element;
    bool transposed_a, transposed_b;
};
product_kind kind_of(const instruction& i) { return {i.variant >> 4, i.variant >> 2 & 3, (i.variant & 1) != 0, (i.variant & 2) != 0}; }

/// f(address) for the lines of 16 bytes that hold rows [first, first + rows) of an operand.
template <class F>
void each_line(const operand_place& o, int first, int rows, F&& f)
{
    const int chunk = 16 / o.element_bytes, depth = 2 * chunk;
    for (int row = first; row < first + rows; row += o.transposed ? chunk : 1)
        for (int k = 0; k < depth; k += o.transposed ? 1 : chunk) f(o.address(row, k));
}

void do_product(warp& w, const product& p)
{
    const instruction& i = *p.what;
    const product_kind kind = kind_of(i);
    const int bytes = kind.element == codes ? 1 : 2, depth = 32 / bytes, first_row = w.number % 4 * 16;
    const operand_place from_a = operand(w, i, p.a, bytes, kind.transposed_a), from_b = operand(w, i, p.b, bytes, kind.transposed_b);
    if (race_check* const races = w.home->home->races) {
        const auto note = [&](std::uint32_t address) { races->read_by_products(w, i, shared_place(w, i, address, 16), 16, p.since); };
        each_line(from_a, first_row, 16, note);
        each_line(from_b, 0, kind.n, note);
    }
    const auto read = [&](const operand_place& o, int row, int k) {
        std::uint16_t raw = 0;
        std::memcpy(&raw, shared_place(w, i, o.address(row, k), static_cast<std::uint32_t>(bytes)), static_cast<std::size_t>(bytes));
        return kind.element == codes ? code_value(static_cast<std::uint8_t>(raw)) : element(raw, kind.element);
    };
    float a[16][32], b[32];
    for (int row = 0; row < 16; ++row)
        for (int k = 0; k < depth; ++k) a[row][k] = read(from_a, first_row + row, k);
    for (int col = 0; col < kind.n; ++col) {
        for (int k = 0; k < depth; ++k) b[k] = read(from_b, col, k);
        for (int row = 0; row < 16; ++row) {
            const int l = row % 8 * 4 + col % 8 / 2;
            auto& d = w.at<std::uint32_t>(i.list[static_cast<std::size_t>(col / 8 * 4 + row / 8 * 2 + col % 2)])[l];
            double sum = p.adds ? static_cast<double>(std::bit_cast<float>(d)) : 0;
            for (int k = 0; k < depth; ++k) sum += static_cast<double>(a[row][k]) * static_cast<double>(b[k]);
            d = std::bit_cast<std::uint32_t>(static_cast<float>(sum));
        }
    }
}
void show_writes(warp& w, const instruction&, std::uint32_t) // fence.proxy.async
{
    w.home->shown[static_cast<std::size_t>(w.number)] = w.home->writes;
}
/// Rows [first, first + rows) of an operand were brought by boxes, or are shown to this warp's products.
void check_shown(warp& w, const instruction& i, const operand_place& o, int first, int rows)
{
    const block& b = *w.home;
    each_line(o, first, rows, [&](std::uint32_t address) {
        const std::byte* const at = shared_place(w, i, address, 16);
        if (b.home->races) b.home->races->look(w, i, 0, at, 16);
        const std::size_t line = (address - shared_window) / 16;
        const std::uint32_t when = b.written[line];
        if (when <= b.shown[static_cast<std::size_t>(w.number)]) return;
        if (b.writer[line] >= 0 && when <= b.shown[static_cast<std::size_t>(b.writer[line])]) return;
        fail(w, i, "an operand that threads wrote and no fence.proxy.async shows to products");
    });
}
void multiply_group(warp& w, const instruction& i, std::uint32_t lanes)
{
    const product p{&i, uniform_wide(w, i, i.a, lanes), uniform_wide(w, i, i.b, lanes),
                    i.count != 0 && (i.c == no_slot || w.predicate(i.c) != 0),
                    w.home->home->races ? w.home->home->races->ask_for_product() : 0};
    const product_kind kind = kind_of(i);
    const int bytes = kind.element == codes ? 1 : 2;
    check_shown(w, i, operand(w, i, p.a, bytes, kind.transposed_a), w.number % 4 * 16, 16);
    check_shown(w, i, operand(w, i, p.b, bytes, kind.transposed_b), 0, kind.n);
    if (w.home->home->late_products)
        w.products.push_back(p);
    else
        do_product(w, p);
}
void commit_products(warp& w, const instruction&, std::uint32_t)
{
    w.committed.push_back(std::move(w.products));
    w.products.clear();
}
void wait_products(warp& w, const instruction& i, std::uint32_t) { do_products(w, static_cast<std::size_t>(i.variant)); }
void check_registers(warp& w, const instruction& i, std::uint32_t)
{
    if (i.variant < 24 || i.variant > 256 || i.variant % 8) fail(w, i, "registers: " + std::to_string(i.variant));
}
void no_more(warp&, const instruction&, std::uint32_t) {}

} // namespace

void do_products(warp& w, std::size_t keep)
{
    while (w.committed.size() > keep) {
        const auto first = std::move(w.committed.front());
        w.committed.erase(w.committed.begin());
        for (const product& p : first) do_product(w, p);
        if (w.home->home->races) w.home->home->races->end_products(w);
    }
}

bool decode_asynchronous(const statement& s, operand_source& from, instruction& i)
{
    const std::string_view op = s.parts[0];
    if (op == "fence" && s.has("proxy") && s.has("async")) return i.run = show_writes, true;
    if (op == "cp" && s.has("async") && !s.has("bulk")) {
        if (s.has("commit_group")) return i.run = commit_lines, true;
        if (s.has("wait_group") || s.has("wait_all")) {
            i.variant = s.has("wait_all") ? -1 : std::stoi(s.operands.at(0));
            return i.run = wait_lines, true;
        }
        i.a = from.address(s.operands.at(0), i);
        if (from.is_wide(s.operands[0].substr(1, s.operands[0].find_first_of("+]") - 1))) return false;
        if (s.has("mbarrier")) return i.run = arrive_with_lines, s.has("noinc");
        if (s.operands.at(2) != "16") return false;
        instruction source;
        i.b = from.address(s.operands.at(1), source);
        if (source.offset != 0) return false;
        if (s.operands.size() > 3) i.c = from.read(s.operands[3], false);
        return i.run = copy_line, true;
    }
    if (op == "cp" && s.has("bulk") && s.has("tensor") && s.has("3d") && s.has("tile")) {
        i.a = from.address(s.operands.at(0), i);
        if (i.offset != 0) return false;
        // "[map, {x, y, z}]"
        const std::string& source = s.operands.at(1);
        const std::size_t list = source.find('{');
        std::string map = source.substr(1, source.find(',') - 1);
        instruction ignored;
        i.b = from.address("[" + map + "]", ignored);
        if (ignored.offset != 0) return false;
        for (const std::string& c : from.parts(source.substr(list, source.find('}') - list + 1))) i.more.push_back(from.read(c, false));
        i.c = from.address(s.operands.at(2), ignored);
        if (ignored.offset != 0 || i.more.size() != 3) return false;
        if (s.operands.size() > 3) i.m = from.read(s.operands[3], false);
        return i.run = copy_box, true;
    }
    if (op == "mbarrier") {
        const bool tries = s.has("try_wait") || s.has("test_wait");
        std::size_t n = 0;
        if (tries)
            i.d = from.read(s.operands.at(n++), false);
        else if (s.has("arrive") && s.operands.at(n++) != "_")
            return false; // the state is not kept
        const std::string& address = s.operands.at(n++);
        i.a = from.address(address, i);
        if (from.is_wide(address.substr(1, address.find_first_of("+]") - 1))) return false;
        if (n < s.operands.size()) i.b = from.read(s.operands[n], false);
        if (tries) {
            if (!s.has("parity")) return false;
            i.next = flow::attempt;
            return i.run = no_more, true;
        }
        if (s.has("init")) return i.run = init_barrier, true;
        if (s.has("inval")) return i.run = no_more, true;
        if (!s.has("arrive") || (s.has("expect_tx") != (i.b != no_slot))) return false;
        i.variant = (s.has("expect_tx") ? 1 : 0) | (s.has("cluster") ? 2 : 0);
        return i.run = arrive, true;
    }
    if (op == "mapa") {
        i.d = from.read(s.operands.at(0), false);
        i.a = from.read(s.operands.at(1), false);
        i.b = from.read(s.operands.at(2), false);
        return i.run = map_address, s.parts.back() == "u32";
    }
    if (op == "setmaxnreg") {
        i.variant = std::stoi(s.operands.at(0));
        i.next = flow::meeting;
        return i.run = check_registers, true;
    }
    if (op == "ldmatrix") {
        i.next = flow::meeting;
        for (const std::string& d : from.parts(s.operands.at(0))) i.list.push_back(from.read(d, false));
        i.a = from.address(s.operands.at(1), i);
        i.variant = s.has("trans");
        return i.run = load_matrices, true;
    }
    if (op == "mma" && s.has("m16n8k16") && (s.has("bf16") || s.has("f16"))) {
        i.next = flow::meeting;
        for (const std::string& d : from.parts(s.operands.at(0))) i.list.push_back(from.read(d, false));
        for (std::size_t n = 1; n < 4; ++n)
            for (const std::string& r : from.parts(s.operands.at(n))) i.more.push_back(from.read(r, false));
        i.variant = s.has("bf16") ? brain : halves;
        return i.run = multiply_warp, i.list.size() == 4 && i.more.size() == 10;
    }
    if (op == "wgmma") {
        i.next = flow::meeting;
        if (s.has("fence")) return i.run = no_more, true;
        if (s.has("commit_group")) return i.run = commit_products, true;
        if (s.has("wait_group")) {
            i.variant = std::stoi(s.operands.at(0));
            return i.run = wait_products, true;
        }
        int n = 0;
        for (const auto p : s.parts)
            if (p.starts_with("m64n")) n = std::stoi(std::string(p.substr(4)));
        for (const std::string& d : from.parts(s.operands.at(0))) i.list.push_back(from.read(d, false));
        if (n == 0 || i.list.size() != static_cast<std::size_t>(n / 2) || s.operands.at(1).front() == '{') return false;
        i.a = from.read(s.operands[1], true);
        i.b = from.read(s.operands.at(2), true);
        const std::string& adds = s.operands.at(3);
        if (adds == "0" || adds == "false")
            i.count = 0; // D = A B
        else if (adds != "1" && adds != "true")
            i.c = from.read(adds, false);
        if (s.operands.at(4) != "1" || s.operands.at(5) != "1") return false;
        const int kind = s.has("bf16") ? brain : s.has("f16") ? halves : codes;
        if (kind == codes && !s.has("e4m3")) return false;
        const bool turned_a = s.operands.size() > 6 && s.operands[6] == "1", turned_b = s.operands.size() > 7 && s.operands[7] == "1";
        i.variant = n << 4 | kind << 2 | (turned_b ? 2 : 0) | (turned_a ? 1 : 0);
        return i.run = multiply_group, true;
    }
    return false;
}

} // namespace emulator
