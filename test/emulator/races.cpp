// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// Pairs of kernels that differ in what orders two accesses: one is said to race, the other not, whatever comes first.
#include "kernel_text.hpp"

namespace {

using emulated::memory;

emulator::launch_shape shape_of(unsigned grid, unsigned threads, unsigned cluster = 1)
{
    return {{grid, 1, 1}, {threads, 1, 1}, cluster, 16384, true};
}
/// What is said of it with each of some orders of the warps; all have to agree whether it races.
std::string found(const std::string& body, const emulated::arguments& with, const emulator::launch_shape& shape)
{
    std::string out;
    for (unsigned seed = 1; seed < 9; ++seed) {
        const std::string said = emulated::complaint(body, with, shape, seed);
        if (seed > 1) CHECK_EQ(said.empty(), out.empty());
        out = said;
    }
    return out;
}
bool races(const std::string& body, const emulated::arguments& with, const emulator::launch_shape& shape)
{
    const std::string said = found(body, with, shape);
    if (said.empty()) return false;
    CHECK_MESSAGE(emulated::says(said, "a race at"), said);
    return true;
}
std::string without(std::string text, const std::string& what)
{
    const std::size_t at = text.find(what);
    REQUIRE(at != std::string::npos);
    return text.erase(at, what.size());
}

/// %r2 is the thread's own word of shared memory, %r3 that of the thread `by` further, modulo the threads.
std::string words(unsigned threads, unsigned by)
{
    return "mov.u32 %r10, dynamic;\nshl.b32 %r2, %r1, 2;\nadd.s32 %r2, %r2, %r10;\nadd.s32 %r3, %r1, " + std::to_string(by) +
           ";\nand.b32 %r3, %r3, " + std::to_string(threads - 1) + ";\nshl.b32 %r3, %r3, 2;\nadd.s32 %r3, %r3, %r10;\n";
}
const std::string write_own = "st.shared.u32 [%r2], %r1;\n", read_other = "ld.shared.u32 %r4, [%r3];\n";
const std::string barrier = "bar.sync 0;\n", warp_barrier = "bar.warp.sync -1;\n";

} // namespace

TEST_CASE("warps of a block")
{
    const auto shape = shape_of(1, 64);
    CHECK_FALSE(races(words(64, 32) + write_own + barrier + read_other, {}, shape));
    CHECK(races(words(64, 32) + write_own + read_other, {}, shape));
    CHECK(races(words(64, 32) + write_own + warp_barrier + read_other, {}, shape));
    // Read, then written by another.
    CHECK_FALSE(races(words(64, 32) + write_own + barrier + read_other + barrier + write_own, {}, shape));
    CHECK(races(words(64, 32) + write_own + barrier + read_other + write_own, {}, shape));
    // One word that all read and one writes: all readers count, whoever was the last.
    const std::string all_read =
        "mov.u32 %r10, dynamic;\nsetp.eq.s32 %p1, %r1, 0;\n@%p1 st.shared.u32 [%r10], %r1;\nbar.sync 0;\nld.shared.u32 %r4, [%r10];\n";
    const std::string write_again = "@%p1 st.shared.u32 [%r10], %r1;\n";
    CHECK_FALSE(races(all_read, {}, shape));
    CHECK_FALSE(races(all_read + barrier + write_again, {}, shape));
    CHECK(races(all_read + write_again, {}, shape));
    // Bytes of one word are not each other.
    const std::string byte = "mov.u32 %r10, dynamic;\nadd.s32 %r2, %r10, %r1;\n";
    CHECK_FALSE(races(byte + "st.shared.u8 [%r2], %r1;\n", {}, shape));
    CHECK(races(byte + "st.shared.u8 [%r2], %r1;\n" +
                    "shr.u32 %r3, %r1, 2;\nshl.b32 %r3, %r3, 2;\nadd.s32 %r3, %r3, %r10;\nld.shared.u32 %r4, [%r3];\n",
                {}, shape));
}

TEST_CASE("lanes of a warp")
{
    const auto shape = shape_of(1, 32);
    CHECK_FALSE(races(words(32, 1) + write_own + warp_barrier + read_other, {}, shape));
    CHECK(races(words(32, 1) + write_own + read_other, {}, shape));
    // A shuffle meets all lanes and orders no memory.
    CHECK(races(words(32, 1) + write_own + "shfl.sync.bfly.b32 %r5, %r1, 1, 31, -1;\n" + read_other, {}, shape));
    // Halves that meet among themselves.
    const std::string half =
        "setp.lt.u32 %p1, %r1, 16;\n@%p1 bra LOW;\nbar.warp.sync -65536;\nbra BOTH;\nLOW:\nbar.warp.sync 65535;\nBOTH:\n";
    const std::string xor_word = "xor.b32 %r3, %r1, 8;\nshl.b32 %r3, %r3, 2;\nadd.s32 %r3, %r3, %r10;\n";
    CHECK_FALSE(races(words(32, 1) + xor_word + write_own + half + read_other, {}, shape));
    CHECK(races(words(32, 16) + write_own + half + read_other, {}, shape));
}

TEST_CASE("atomics are no race with each other, and one with all else")
{
    const auto shape = shape_of(1, 64);
    const std::string add = "mov.u32 %r10, dynamic;\nsetp.eq.s32 %p1, %r1, 0;\n@%p1 st.shared.u32 [%r10], %r1;\nbar.sync "
                            "0;\natom.shared.add.u32 %r4, [%r10], 1;\n";
    CHECK_FALSE(races(add, {}, shape));
    CHECK_FALSE(races(add + barrier + "ld.shared.u32 %r5, [%r10];\n", {}, shape));
    CHECK(races(add + "ld.shared.u32 %r5, [%r10];\n", {}, shape));
    CHECK(races(without(add, "bar.sync 0;\n"), {}, shape));
    const memory<std::uint32_t> count(std::vector<std::uint32_t>(4, 0));
    CHECK_FALSE(races("atom.global.add.u32 %r4, [%rd1], 1;\n", {count.address()}, shape_of(4, 32)));
    CHECK(races("atom.global.add.u32 %r4, [%rd1], 1;\nld.global.u32 %r5, [%rd1];\n", {count.address()}, shape_of(4, 32)));
}

TEST_CASE("blocks know nothing of each other")
{
    const memory<std::uint32_t> m(std::vector<std::uint32_t>(256, 0));
    const std::string own =
        "mov.u32 %r2, %ctaid.x;\nmad.lo.s32 %r2, %r2, 32, %r1;\nmul.wide.u32 %rd5, %r2, 4;\nadd.s64 %rd5, %rd1, %rd5;\n";
    const std::string same = "mul.wide.u32 %rd5, %r1, 4;\nadd.s64 %rd5, %rd1, %rd5;\n";
    CHECK_FALSE(races(own + "ld.global.u32 %r3, [%rd5];\nst.global.u32 [%rd5], %r1;\n", {m.address()}, shape_of(4, 32)));
    CHECK_FALSE(races(same + "ld.global.u32 %r3, [%rd5];\n", {m.address()}, shape_of(4, 32)));
    CHECK(races(same + "st.global.u32 [%rd5], %r1;\n", {m.address()}, shape_of(4, 32)));
    CHECK(races(same + "ld.global.u32 %r3, [%rd5];\nbar.sync 0;\nst.global.u32 [%rd5], %r1;\n", {m.address()}, shape_of(4, 32)));
    // In a cluster a barrier orders them.
    const std::string meet = "barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;\n";
    const std::string other = "mov.u32 %r2, %ctaid.x;\nxor.b32 %r2, %r2, 1;\nmad.lo.s32 %r2, %r2, 32, %r1;\nmul.wide.u32 %rd6, %r2, "
                              "4;\nadd.s64 %rd6, %rd1, %rd6;\n";
    const std::string write = own + "st.global.u32 [%rd5], %r1;\n", read = other + "ld.global.u32 %r3, [%rd6];\n";
    CHECK_FALSE(races(write + meet + read, {m.address()}, shape_of(2, 32, 2)));
    CHECK(races(write + read, {m.address()}, shape_of(2, 32, 2)));
    std::string relaxed = write + meet + read;
    relaxed.replace(relaxed.find("release"), 7, "relaxed");
    CHECK(races(relaxed, {m.address()}, shape_of(2, 32, 2)));
}

TEST_CASE("copies of lines")
{
    const memory<std::uint32_t> m(std::vector<std::uint32_t>(256, 7));
    const auto shape = shape_of(1, 64);
    const std::string copy =
        "mov.u32 %r10, dynamic;\nmad.lo.s32 %r2, %r1, 16, %r10;\nxor.b32 %r3, %r1, 32;\nmad.lo.s32 %r3, %r3, 16, %r10;\nmul.wide.u32 %rd5, "
        "%r1, 16;\nadd.s64 %rd5, %rd1, %rd5;\ncp.async.cg.shared.global [%r2], [%rd5], 16;\ncp.async.commit_group;\n";
    const std::string wait = "cp.async.wait_group 0;\n", read_own = "ld.shared.u32 %r4, [%r2];\n";
    CHECK_FALSE(races(copy + wait + read_own, {m.address()}, shape));
    CHECK_FALSE(races(copy + wait + barrier + read_other, {m.address()}, shape));
    CHECK(races(copy + read_own + wait, {m.address()}, shape));
    CHECK(races(copy + wait + read_other, {m.address()}, shape)); // one's own copies are there, not the other's
    CHECK(races(copy + barrier + wait + read_other, {m.address()}, shape));
    // What another still reads.
    const std::string early = "mov.u32 %r10, dynamic;\nxor.b32 %r3, %r1, 32;\nmad.lo.s32 %r3, %r3, 16, %r10;\n" + read_other;
    CHECK_FALSE(races(early + barrier + copy + wait, {m.address()}, shape));
    CHECK(races(early + copy + wait, {m.address()}, shape));
}

TEST_CASE("who waits at a barrier in memory knows what those knew who arrived")
{
    // Warp 0 fills 32 words, its lane 0 arrives; warp 1 waits, and reads.
    const std::string text =
        "mov.u32 %r10, dynamic;\nadd.s32 %r11, %r10, 1024;\nand.b32 %r5, %r1, 31;\nshl.b32 %r2, %r5, 2;\nadd.s32 %r2, %r2, %r10;\n"
        "setp.eq.s32 %p1, %r1, 0;\nsetp.lt.u32 %p2, %r1, 32;\n@%p1 mbarrier.init.shared::cta.b64 [%r11], 1;\nbar.sync 0;\n"
        "@!%p2 bra READ;\nst.shared.u32 [%r2], %r1;\nbar.warp.sync -1;\n@%p1 mbarrier.arrive.shared::cta.b64 _, [%r11];\nbra DONE;\n"
        "READ:\nmbarrier.try_wait.parity.shared::cta.b64 %p3, [%r11], 0;\n@!%p3 bra READ;\nld.shared.u32 %r4, [%r2];\nDONE:\n";
    const auto shape = shape_of(1, 64);
    CHECK_FALSE(races(text, {}, shape));
    CHECK(races(without(text, "bar.warp.sync -1;\n"), {}, shape));         // others than lane 0 have told nobody
    CHECK_FALSE(found(without(text, "bar.sync 0;\n"), {}, shape).empty()); // the barrier itself may not be there yet
    // A warp of which one lane alone has waited.
    std::string one = text;
    one.replace(one.find("READ:\n"), 6, "READ:\nsetp.ne.s32 %p4, %r5, 0;\n@%p4 bra SEEN;\nLOOK:\n");
    one.replace(one.find("@!%p3 bra READ;\n"), 16, "@!%p3 bra LOOK;\nSEEN:\nbar.warp.sync -1;\n");
    CHECK_FALSE(races(one, {}, shape));
    const std::size_t last = one.rfind("bar.warp.sync -1;\n");
    CHECK(races(one.erase(last, 18), {}, shape));
}

TEST_CASE("another block of the cluster is told of writes by a release of its scope, and not by one of the block's")
{
    const memory<std::uint32_t> m(std::vector<std::uint32_t>(4, 0));
    const auto text = [](const std::string& scope) {
        return "mov.u32 %r10, dynamic;\nmov.u32 %r2, %ctaid.x;\nsetp.eq.s32 %p1, %r1, 0;\nsetp.eq.s32 %p2, %r2, 0;\n@%p1 "
               "mbarrier.init.shared::cta.b64 [%r10], 1;\n"
               "barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;\n@!%p1 bra DONE;\n@!%p2 bra READ;\n"
               "st.global.u32 [%rd1], %r1;\nmov.u32 %r4, 1;\nmapa.shared::cluster.u32 %r5, %r10, %r4;\nmbarrier.arrive" +
               scope +
               ".shared::cluster.b64 _, [%r5];\nbra DONE;\nREAD:\nmbarrier.try_wait.parity.shared::cta.b64 %p3, [%r10], 0;\n@!%p3 bra "
               "READ;\n"
               "ld.global.u32 %r6, [%rd1];\nDONE:\n";
    };
    CHECK_FALSE(races(text(".release.cluster"), {m.address()}, shape_of(2, 32, 2)));
    CHECK(races(text(""), {m.address()}, shape_of(2, 32, 2)));
}

TEST_CASE("of more than 1024 threads warps are looked at, and not what lanes of one do to each other")
{
    const auto shape = shape_of(2, 1024, 2);
    CHECK_FALSE(races(words(1024, 32) + write_own + barrier + read_other, {}, shape));
    CHECK(races(words(1024, 32) + write_own + read_other, {}, shape));
    CHECK_FALSE(races(words(1024, 1) + write_own + "xor.b32 %r3, %r1, 1;\nshl.b32 %r3, %r3, 2;\nadd.s32 %r3, %r3, %r10;\n" + read_other, {},
                      shape));
}

TEST_CASE("boxes, the products that read them, and the next box")
{
    // Warps 0 to 3 multiply what thread 128 brings, twice into the same place: A at dynamic, B behind it, in one box of 8 KiB each.
    const memory<std::uint16_t> m(std::vector<std::uint16_t>(64 * 64, 0));
    const memory<std::uint32_t> out(std::vector<std::uint32_t>(4, 0));
    const emulated::box_map map(m.address(), 64, 64, 1, 64);
    const std::string bring =
        "mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%r11], 8192;\n"
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%r10], [%rd1, {%r3, %r3, %r3}], [%r11];\n";
    const std::string look = "mbarrier.try_wait.parity.shared::cta.b64 %p3, ";
    const std::string multiply = "shr.u32 %r30, %r10, 4;\ncvt.u64.u32 %rd30, %r30;\nor.b64 %rd30, %rd30, " +
                                 std::to_string(std::uint64_t{64} << 32 | 1ull << 62) +
                                 ";\nwgmma.fence.sync.aligned;\nwgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {%f0, %f1, %f2, %f3, "
                                 "%f4, %f5, %f6, %f7}, %rd30, %rd30, 0, 1, 1, 0, 0;\n"
                                 "wgmma.commit_group.sync.aligned;\n";
    const std::string wait = "wgmma.wait_group.sync.aligned 0;\n", free_it = "@%p4 mbarrier.arrive.shared::cta.b64 _, [%r12];\n";
    const auto text = [&](const std::string& consume, const std::string& wait_for_free) {
        return "mov.u32 %r10, dynamic;\nadd.s32 %r11, %r10, 8192;\nadd.s32 %r12, %r11, 8;\nmov.u32 %r3, 0;\nsetp.eq.s32 %p1, %r1, "
               "128;\nsetp.lt.u32 %p2, %r1, 128;\nand.b32 "
               "%r5, %r1, 31;\nsetp.eq.s32 %p4, %r5, 0;\n"
               "@%p1 mbarrier.init.shared::cta.b64 [%r11], 1;\n@%p1 mbarrier.init.shared::cta.b64 [%r12], 4;\nbar.sync 0;\n@%p2 bra "
               "USE;\n@!%p1 bra DONE;\n" +
               bring + wait_for_free + bring + "bra DONE;\nUSE:\nFIRST:\n" + look + "[%r11], 0;\n@!%p3 bra FIRST;\n" + consume +
               "SECOND:\n" + look + "[%r11], 1;\n@!%p3 bra SECOND;\n" + multiply + wait + "DONE:\n";
    };
    const std::string free_seen = "FREE:\n" + look + "[%r12], 0;\n@!%p3 bra FREE;\n",
                      full_seen = "FULL:\n" + look + "[%r11], 0;\n@!%p3 bra FULL;\n";
    const auto shape = shape_of(1, 160);
    const emulated::arguments with{map.address(), out.address()};
    CHECK_FALSE(races(text(multiply + wait + free_it, free_seen), with, shape));
    CHECK(races(text(multiply + free_it + wait, free_seen), with, shape)); // told before the products are done
    CHECK(races(text(multiply + wait + free_it, full_seen), with, shape)); // the box is there: nothing says that it was used
    // A thread's own look at the box needs to have waited, as products do.
    const std::string peek = "ld.shared.u32 %r6, [%r10];\n";
    CHECK_FALSE(races(text(peek + multiply + wait + "bar.warp.sync -1;\n" + free_it, free_seen), with, shape));
    CHECK(races(text(peek + multiply + wait + free_it, free_seen), with, shape)); // other lanes' look was not told of
}
