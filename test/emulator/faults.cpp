// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// Kernels that are wrong, each in one way: what the emulator says of them.
#include "kernel_text.hpp"

namespace {

using emulated::complaint;
using emulated::memory;
using emulated::says;

const emulator::launch_shape two_warps{{1, 1, 1}, {64, 1, 1}, 1, 1024};
const std::string own_word = "mul.wide.u32 %rd5, %r1, 4;\nadd.s64 %rd5, %rd1, %rd5;\n";

std::string complaint_of(const std::string& text, const std::byte* map, const emulator::launch_shape& shape)
{
    const emulator::module module(text);
    const emulator::kernel* k = module.find("k");
    REQUIRE(k != nullptr);
    CHECK(k->unknown.empty());
    std::vector<std::byte> parameters(k->parameter_bytes);
    std::memcpy(parameters.data(), map, 128);
    try {
        emulator::run(module, *k, shape, parameters.data(), 1);
    } catch (const emulator::kernel_error& e) {
        return e.what();
    }
    return {};
}

} // namespace

TEST_CASE("memory that is not the kernel's")
{
    const memory<std::uint32_t> m(std::vector<std::uint32_t>(32, 7));
    CHECK(complaint(own_word + "ld.global.u32 %r2, [%rd5];", {m.address()}) == "");
    CHECK(says(complaint(own_word + "ld.global.u32 %r2, [%rd5+4];", {m.address()}),
               "is no memory of the device: 0 bytes behind a piece of 128"));
    CHECK(says(complaint(own_word + "st.global.u32 [%rd5+-4], %r1;", {m.address()}), "is no memory of the device"));
    CHECK(says(complaint(own_word + "ld.global.u64 %rd6, [%rd5];", {m.address()}), "misaligned address"));
    CHECK(says(complaint("ld.global.v4.u32 {%r2, %r3, %r4, %r5}, [%rd1+120];", {m.address()}), "misaligned address"));
    CHECK(says(complaint("atom.global.min.u32 %r2, [%rd1+128], %r1;", {m.address()}), "is no memory of the device"));
    int here = 0; // of the host
    CHECK(says(complaint("ld.u32 %r2, [%rd1];", {reinterpret_cast<std::uintptr_t>(&here)}), "is no memory of the device"));
    std::uint64_t gone = 0;
    {
        const memory<std::uint32_t> short_lived(std::vector<std::uint32_t>(100000));
        gone = short_lived.address();
    }
    CHECK(says(complaint("st.global.u32 [%rd1], %r1;", {gone}), "is no memory of the device"));
    const std::string said = complaint("mov.u32 %r2, dynamic;\nld.shared.u32 %r3, [%r2+1024];", {}, two_warps);
    CHECK(says(said, "shared address 2048, 4 bytes; the block has 1024 to 2048"));
    CHECK(says(said, "ld.shared.u32 %r3, [%r2+1024];"));
    CHECK(says(complaint("cp.async.cg.shared.global [%r1], [%rd1], 16;", {m.address()}, two_warps), "misaligned address"));
}

TEST_CASE("a kernel that begins early waits for those before, each warp of it, before it looks at memory of the device")
{
    const memory<std::uint32_t> m(std::vector<std::uint32_t>(64, 7));
    const emulator::launch_shape early{{1, 1, 1}, {64, 1, 1}, 1, 1024, false, true};
    const std::string wait = "griddepcontrol.wait;\n", load = own_word + "ld.global.u32 %r2, [%rd5];\n";
    const char* const too_early = "has not met griddepcontrol.wait";
    CHECK(complaint(load, {m.address()}, two_warps) == "");
    CHECK(complaint(wait + load, {m.address()}, early) == "");
    for (const std::string& look :
         {load, own_word + "st.global.u32 [%rd5], %r1;\n", own_word + "ld.u32 %r2, [%rd5];\n",
          own_word + "atom.global.min.u32 %r2, [%rd5], %r1;\n",
          std::string("mov.u32 %r2, dynamic;\ncp.async.ca.shared.global [%r2], [%rd1], 16;\ncp.async.wait_all;\n")}) {
        CHECK(says(complaint(look, {m.address()}, early), too_early));
        CHECK(says(complaint("griddepcontrol.launch_dependents;\n" + look, {m.address()}, early), too_early));
        CHECK(complaint(wait + look, {m.address()}, early) == "");
    }
    CHECK(says(complaint("setp.lt.u32 %p1, %r1, 32;\n@%p1 bra FIRST;\n" + load + "ret;\nFIRST:\n" + wait + load, {m.address()}, early),
               "block 0, warp 1"));
    // A box whose map is a parameter: where it is asked for, and not where the map is read.
    const memory<std::uint16_t> values(std::vector<std::uint16_t>(64 * 8));
    const emulated::box_map map(values.address(), 64, 8, 1, 8);
    const auto bring = [&](const std::string& first, const std::string& then) {
        std::string text = emulated::text_of(
            first +
                "cvta.param.u64 %rd6, %rd5;\nmov.u32 %r10, dynamic;\nadd.s32 %r11, %r10, 1024;\nmov.u32 %r3, 0;\nsetp.ne.s32 %p1, %r1, "
                "0;\n@%p1 bra DONE;\nmbarrier.init.shared::cta.b64 [%r11], 1;\n"
                "mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%r11], 1024;\n"
                "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%r10], [%rd6, {%r3, %r3, %r3}], "
                "[%r11];\n" +
                then + "LOOP:\nmbarrier.try_wait.parity.shared::cta.b64 %p2, [%r11], 0;\n@!%p2 bra LOOP;\nDONE:\n",
            "mov.b64 %rd5, k_param_0;");
        const auto replace = [&](const std::string& from, const std::string& to) { text.replace(text.find(from), from.size(), to); };
        replace(".param .u64 k_param_0", ".param .align 64 .b8 k_param_0[128]");
        replace("ld.param.u64 %rd1, [k_param_0];", "");
        return complaint_of(text, reinterpret_cast<const std::byte*>(map.address()), {{1, 1, 1}, {32, 1, 1}, 1, 4096, false, true});
    };
    CHECK(says(bring("", ""), too_early));
    CHECK(says(bring("", wait), too_early)); // though the copy itself comes later
    CHECK(bring(wait, "") == "");
    // What is the block's own may be touched before.
    CHECK(complaint("mov.u32 %r2, dynamic;\nst.shared.u32 [%r2], %r1;\nbar.sync 0;\n" + wait + load, {m.address()}, early) == "");
}

TEST_CASE("what never ends")
{
    // A barrier at which one warp is missing since it waits at another.
    CHECK(says(complaint("setp.lt.u32 %p1, %r1, 32;\n@%p1 bra FIRST;\nbar.sync 1, 64;\nbra DONE;\nFIRST:\nbar.sync 2, 64;\nDONE:\n", {},
                         two_warps),
               "does not go on"));
    CHECK(says(complaint("mov.u32 %r2, dynamic;\nsetp.eq.s32 %p1, %r1, 0;\n@%p1 mbarrier.init.shared::cta.b64 [%r2], 2;\nbar.sync 0;\n@%p1 "
                         "mbarrier.arrive.shared::cta.b64 _, [%r2];\n"
                         "LOOP:\nmbarrier.try_wait.parity.shared::cta.b64 %p2, [%r2], 0;\n@!%p2 bra LOOP;",
                         {}, two_warps),
               "does not go on"));
    // Bytes that are expected and do not come.
    CHECK(says(complaint("mov.u32 %r2, dynamic;\nsetp.eq.s32 %p1, %r1, 0;\n@%p1 mbarrier.init.shared::cta.b64 [%r2], 1;\nbar.sync 0;\n"
                         "@%p1 mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%r2], "
                         "16;\nLOOP:\nmbarrier.try_wait.parity.shared::cta.b64 %p2, [%r2], 0;\n@!%p2 bra LOOP;",
                         {}, two_warps),
               "does not go on"));
}

TEST_CASE("lanes and barriers that do not fit")
{
    CHECK(says(complaint("setp.lt.u32 %p1, %r1, 16;\n@%p1 bra HALF;\nbra DONE;\nHALF:\nshfl.sync.bfly.b32 %r2, %r1, 1, 31, -1;\nbra "
                         "DONE2;\nDONE:\nbar.warp.sync 65535;\nDONE2:\n",
                         {}),
               "lane"));
    CHECK(says(complaint("setp.lt.u32 %p1, %r1, 16;\n@%p1 bra HALF;\nret;\nHALF:\nshfl.sync.bfly.b32 %r2, %r1, 16, 31, -1;", {}),
               "which is not there"));
    CHECK(says(complaint("setp.lt.u32 %p1, %r1, 16;\n@%p1 bar.sync 0;", {}), "a barrier under a guard"));
    CHECK(says(complaint("mov.u32 %r2, dynamic;\nmbarrier.arrive.shared::cta.b64 _, [%r2];", {}, two_warps), "there is no barrier"));
    CHECK(says(complaint("mov.u32 %r2, dynamic;\nsetp.eq.s32 %p1, %r1, 0;\n@%p1 mbarrier.init.shared::cta.b64 [%r2], 3;\nbar.sync 0;\n@%p1 "
                         "mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%r2], 16;\n"
                         "@!%p1 mbarrier.arrive.shared::cta.b64 _, [%r2];",
                         {}, two_warps),
               "more arrivals than the barrier expects"));
    CHECK(says(complaint("trap;", {}), "trap"));
}

TEST_CASE("what it does not know is refused where it would run, and only there")
{
    const emulator::module text(emulated::text_of("setp.gt.u32 %p1, %r1, 100;\n@%p1 tex.made.up %r2, %r3;"));
    const emulator::kernel* k = text.find("k");
    REQUIRE(k != nullptr);
    REQUIRE(k->unknown.size() == 1);
    CHECK(k->unknown[0] == "tex.made.up");
    std::byte parameters[32] = {};
    emulator::run(text, *k, {{1, 1, 1}, {32, 1, 1}, 1, 0}, parameters, 1);
    CHECK_THROWS_AS(emulator::run(text, *k, {{1, 1, 1}, {128, 1, 1}, 1, 0}, parameters, 1), emulator::kernel_error);
    CHECK(text.find("other") == nullptr);
    const emulator::module broken(emulated::text_of("add.s32 %r2, %r3, %unknown;"));
    CHECK_THROWS_AS(emulator::run(broken, *broken.find("k"), {{1, 1, 1}, {32, 1, 1}, 1, 0}, parameters, 1), emulator::kernel_error);
    const emulator::module narrow(emulated::text_of("add.s32 %r2, %r3, %rd3;"));
    CHECK_THROWS_AS((void)narrow.find("k"), emulator::syntax_error);
}
