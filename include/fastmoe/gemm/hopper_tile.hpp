// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The main loop of gemm::hopper: one warpgroup brings stages of operands into a ring in shared memory, two multiply them.
///
/// C (rows,columns) = sum over depth of A (rows,depth) B (columns,depth)^T, in stages of 64 of the depth, or of 128 if elements
/// are bytes.
#pragma once

#include <fastmoe/gemm/hopper_operands.hpp>

namespace fastmoe::inline FASTMOE_ABI::detail::hopper {

/// The stages that are in use, counted from the first on.
template <int stages>
struct ring {
    unsigned count = 0;

    FASTMOE_HOST_DEVICE int stage() const noexcept { return static_cast<int>(count % stages); }
    FASTMOE_HOST_DEVICE unsigned parity() const noexcept { return count / stages & 1; }
};

/// Sums of a thread: blocks of 64 rows, as multiply() has them.
template <hopper_tuning how>
struct sums {
    float of[how.blocks()][how.columns / 2];
};

/// All tiles of a product, by one cluster's blocks at a time.
///
///     Product::tuning, ::element       hopper_tuning; bfloat16, half or float8_e4m3
///     Product::is_scaled               whether the sums of a stage are scaled, see sum_scaled()
///     Product::rows_lie, ::columns_lie of both operands; Product::lines, ::has_map: whether it brings lines, and boxes
///     Product::bring_registers         of the 504 that three warpgroups' threads have together
///     p.start(block, list)             before all else; where the executor was asked for more memory than shared_bytes, it begins at list
///     p.tiles(list)                    of a cluster
///     p.tile(list, t, rank)            what follows is about; t.steps: the stages of its depth; t.has_lines: whether there are lines in them
///     p.bring(block, tile, f)          f(o): of each stage o.box_bytes(block, first), how many of it come in boxes, by all who bring;
///                                      then o.bring_boxes(block, stage, full, first) by the first of them, o.bring_lines(block, stage,
///                                      first) by all. first is where the stage begins in the depth
///     p.before_store(block, tile, first_row)  what store() is handed as `known`: what can be read before the sums are there
///     p.store(block, tile, first_row, known, sums)
template <class Product>
struct multiply_tiles {
    static constexpr hopper_tuning how = Product::tuning;
    static_assert(how.fits(), "a hopper_tuning that registers or shared memory of sm_90 do not hold");
    static constexpr int cluster = how.cluster;
    static constexpr int shared_bytes = how.shared_bytes();
    using position = ring<static_cast<int>(how.stages)>;
    static constexpr bool ping_pong = how.schedule == hopper_schedule::ping_pong;
    static constexpr int warps = warpgroup_threads / warp_threads;

    Product product;

    template <class Block>
    FASTMOE_HOST_DEVICE void operator()(Block& block) const
    {
        barrier_word* const full = reinterpret_cast<barrier_word*>(block.shared() + how.stages * how.stage_bytes());
        barrier_word* const empty = full + how.stages;
        barrier_word* const turns = empty + how.stages; // of the two who multiply
        const std::byte* const list = block.shared() + shared_bytes;
        product.start(block, block.shared() + shared_bytes);
        if (block.thread() == 0) {
            for (int g = 0; g < 2; ++g) block.init(turns + g, warps);
            for (int s = 0; s < how.stages; ++s) {
                block.init(full + s, (Product::lines ? warpgroup_threads : 0) + (Product::has_map ? 1 : 0));
                block.init(empty + s, (ping_pong ? 1 : 2) * warps * how.cluster);
            }
        }
        block.sync_cluster();
        if (block.warpgroup() == 0) {
            block.template give_registers<Product::bring_registers>();
            bring(block, list, full, empty);
        } else {
            block.template take_registers<(504 - Product::bring_registers) / 2>();
            multiply(block, list, full, empty, turns);
        }
        block.sync_cluster(); // no block ends while another brings for it, or arrives at its barriers
    }

private:
    template <class Block>
    FASTMOE_HOST_DEVICE void bring(Block& block, const std::byte* list, barrier_word* full, barrier_word* empty) const
    {
        position at;
        for (int64_t t = block.cluster(), end = product.tiles(list); t < end; t += block.clusters()) {
            const auto tile = product.tile(list, t, block.rank());
            if (!Product::lines && block.thread() != 0) {
                at.count += static_cast<unsigned>(tile.steps);
                continue;
            }
            product.bring(block, tile, [&](auto&& operands) {
                FASTMOE_KEEP_LOOP
                for (int s = 0; s < tile.steps; ++s, ++at.count) {
                    std::byte* const to = block.shared() + at.stage() * how.stage_bytes();
                    const int first = s * depth_of<typename Product::element>;
                    [[maybe_unused]] int box_bytes = 0;
                    if constexpr (Product::has_map) box_bytes = operands.box_bytes(block, first);
                    block.wait(empty + at.stage(), at.parity() ^ 1);
                    if constexpr (Product::has_map)
                        if (block.thread() == 0) {
                            block.expect(full + at.stage(), box_bytes);
                            operands.bring_boxes(block, to, full + at.stage(), first);
                        }
                    if constexpr (Product::lines) operands.bring_lines(block, to, first);
                    if constexpr (Product::lines) block.arrive_with_lines(full + at.stage());
                }
            });
        }
    }

    template <class Block>
    FASTMOE_HOST_DEVICE void multiply(Block& block, const std::byte* list, barrier_word* full, barrier_word* empty, barrier_word* turns) const
    {
        const int group = block.warpgroup() - 1;
        const int first_row = ping_pong ? 0 : group * how.blocks() * 64;
        position at;
        bool mine = !ping_pong || group == 0;
        unsigned done = 0; // tiles of this warpgroup
        const int64_t end = product.tiles(list);
        if (block.cluster() >= end) return;
        auto tile = product.tile(list, block.cluster(), block.rank());
        for (int64_t t = block.cluster(); t < end; t += block.clusters()) {
            auto next = tile;
            const auto look = [&] { // for the next one, while the last products of this one are under way
                if (t + block.clusters() < end) next = product.tile(list, t + block.clusters(), block.rank());
            };
            if (mine) {
                const auto known = product.before_store(block, tile, first_row);
                // Products take turns: epilogues lie under the other's, and nobody is so far ahead of a barrier that the parity of
                // its phase comes round.
                if constexpr (ping_pong) block.wait(turns + group, (done++ & 1) ^ (group == 0 ? 1 : 0));
                sums<how> c;
                const auto last = [&] {
                    if (ping_pong && block.thread() % warp_threads == 0) block.arrive(turns + (1 - group), block.rank());
                    look();
                };
                if constexpr (Product::is_scaled) sum_scaled(block, full, empty, first_row, tile, at, c, last);
                else sum(block, full, empty, first_row, tile, at, c, last);
                product.store(block, tile, first_row, known, c);
            } else {
                look();
            }
            at.count += static_cast<unsigned>(tile.steps);
            tile = next;
            if (ping_pong) mine = !mine;
        }
    }

    /// @param last  called when the last products are under way
    template <class Block, class Tile, class Last>
    FASTMOE_HOST_DEVICE void sum(Block& block, barrier_word* full, barrier_word* empty, int first_row, const Tile& tile, position at,
                                 sums<how>& c, const Last& last) const
    {
        using T = typename Product::element;
        block.sync_warp(); // whose lanes may have parted where the last tile was stored
        clear(c);
        FASTMOE_UNROLL
        for (int b = 0; b < how.blocks(); ++b) block.hold(c.of[b]);
        position before = at;
        FASTMOE_KEEP_LOOP
        for (int s = 0; s < tile.steps; ++s, ++at.count) {
            const std::uint32_t rows = block.address(block.shared() + at.stage() * how.stage_bytes());
            block.wait(full + at.stage(), at.parity());
            if (how.fences_lines && tile.has_lines) block.show_lines();
            block.begin_products();
            FASTMOE_UNROLL
            for (int k = 0; k < steps_of_stage; ++k)
                FASTMOE_UNROLL
                for (int b = 0; b < how.blocks(); ++b)
                    block.template multiply<T, how.columns, Product::rows_lie, Product::columns_lie>(
                        c.of[b], operand_at<Product::rows_lie>(rows, first_row + 64 * b, k),
                        operand_at<Product::columns_lie>(rows + how.row_bytes(), 0, k));
            block.commit_products();
            block.template wait_products<1>();
            if (s > 0) release(block, empty, before);
            before = at;
        }
        if (tile.steps == 0) block.sync_warp(); // all of a warp have had their turn before it passes it on
        last();
        block.template wait_products<0>();
        FASTMOE_UNROLL
        for (int b = 0; b < how.blocks(); ++b) block.hold(c.of[b]);
        if (tile.steps > 0) release(block, empty, before);
    }

    /// Sums of each stage on their own, added with its scales: tensor cores keep some 14 bits of a sum of eight-bit floats, so no sum
    /// is left to them for long. One warpgroup adds while the other multiplies.
    template <class Block, class Tile, class Last>
    FASTMOE_HOST_DEVICE void sum_scaled(Block& block, barrier_word* full, barrier_word* empty, int first_row, const Tile& tile, position at,
                                        sums<how>& c, const Last& last) const
    {
        using T = typename Product::element;
        const auto scales = product.scales(block, tile, first_row);
        using factors = decltype(scales.at(0));
        factors next = tile.steps > 0 ? scales.at(0) : factors{};
        block.sync_warp();
        clear(c);
        float part[how.columns / 2] = {};
        FASTMOE_KEEP_LOOP
        for (int s = 0; s < tile.steps; ++s, ++at.count) {
            const factors now = next;
            const std::uint32_t rows = block.address(block.shared() + at.stage() * how.stage_bytes());
            block.wait(full + at.stage(), at.parity());
            if (how.fences_lines && tile.has_lines) block.show_lines();
            FASTMOE_UNROLL
            for (int b = 0; b < how.blocks(); ++b) {
                block.hold(part);
                block.begin_products();
                FASTMOE_UNROLL
                for (int k = 0; k < steps_of_stage; ++k) {
                    const std::uint64_t from_a = operand_at<lie::deep>(rows, first_row + 64 * b, k),
                                        from_b = operand_at<lie::deep>(rows + how.row_bytes(), 0, k);
                    if (k == 0) block.template multiply<T, how.columns, lie::deep, lie::deep, false>(part, from_a, from_b);
                    else block.template multiply<T, how.columns, lie::deep, lie::deep>(part, from_a, from_b);
                }
                block.commit_products();
                if (b == how.blocks() - 1 && s + 1 < tile.steps) next = scales.at(s + 1); // under way while this stage is multiplied
                block.template wait_products<0>();
                block.hold(part);
                if (b == how.blocks() - 1) release(block, empty, at);
                scales.add(c.of[b], part, now, b);
            }
        }
        block.sync_warp(); // all of a warp have had their turn before it passes it on
        last();
    }

    /// A stage, to all who bring into it.
    template <class Block>
    FASTMOE_HOST_DEVICE static void release(Block& block, barrier_word* empty, const position& p)
    {
        if (block.thread() % warp_threads < how.cluster) block.arrive(empty + p.stage(), block.thread() % warp_threads);
    }
    FASTMOE_HOST_DEVICE static void clear(sums<how>& c)
    {
        FASTMOE_UNROLL
        for (int b = 0; b < how.blocks(); ++b)
            FASTMOE_UNROLL
            for (int i = 0; i < how.columns / 2; ++i) c.of[b][i] = 0.0f;
    }
};

} // namespace fastmoe::inline FASTMOE_ABI::detail::hopper
