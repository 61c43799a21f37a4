// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// Copies, barriers and products of sm_80 and sm_90a, against loops over plain arrays.
#include <cmath>
#include <random>

#include "kernel_text.hpp"
#include "support/emulator/numbers.hpp"

namespace {

using emulated::complaint;
using emulated::memory;
using emulated::run;

/// Of small whole numbers, so that every sum is exact.
std::vector<std::uint16_t> brains(std::size_t n, unsigned seed)
{
    std::mt19937 random(seed);
    std::vector<std::uint16_t> out;
    while (out.size() < n) out.push_back(emulator::brain_bits(static_cast<float>(static_cast<int>(random() % 17) - 8)));
    return out;
}
float at(const std::vector<std::uint16_t>& m, std::size_t i) { return emulator::brain_value(m[i]); }

/// Brings `lines` lines of 128 bytes at [from] to the dynamic shared memory + to, swizzled, by 128 threads, and meets.
std::string bring(int lines, const char* from, int to)
{
    std::string out;
    for (int i = 0; i < lines * 8 / 128; ++i)
        out += "mov.u32 %r20, dynamic;\nadd.s32 %r21, %r1, " + std::to_string(i * 128) +
               ";\nshr.u32 %r22, %r21, 3;\nand.b32 %r23, %r22, 7;\nand.b32 %r24, %r21, 7;\n"
               "xor.b32 %r24, %r24, %r23;\nshl.b32 %r24, %r24, 4;\nmad.lo.s32 %r25, %r22, 128, %r24;\nadd.s32 %r25, %r25, %r20;\nadd.s32 "
               "%r25, %r25, " +
               std::to_string(to) + ";\nmul.wide.u32 %rd20, %r21, 16;\nadd.s64 %rd20, " + from +
               ", %rd20;\ncp.async.cg.shared.global [%r25], [%rd20], 16;\n";
    return out + "cp.async.commit_group;\ncp.async.wait_group 0;\nfence.proxy.async.shared::cta;\nbar.sync 0;\n";
}
/// %rd30 = the descriptor of what lies at dynamic + to.
std::string describe(const char* result, int to, int leading, int stride)
{
    return std::string("mov.u32 %r30, dynamic;\nadd.s32 %r30, %r30, ") + std::to_string(to) + ";\nshr.u32 %r30, %r30, 4;\ncvt.u64.u32 " +
           result + ", %r30;\nor.b64 " + result + ", " + result + ", " +
           std::to_string(static_cast<std::uint64_t>(leading >> 4) << 16 | static_cast<std::uint64_t>(stride >> 4) << 32 | 1ull << 62) +
           ";\n";
}
/// A warpgroup's C (64,16), from registers %f0 to %f7 into memory at %rd3.
const std::string store_sums = [] {
    std::string out = "shr.u32 %r40, %r1, 5;\nand.b32 %r41, %r1, 31;\nshr.u32 %r42, %r41, 2;\nmad.lo.s32 %r42, %r40, 16, %r42;\nand.b32 "
                      "%r43, %r41, 3;\nshl.b32 %r43, %r43, 1;\n";
    for (int i = 0; i < 8; ++i)
        out += "mad.lo.s32 %r44, %r42, 16, %r43;\nadd.s32 %r44, %r44, " + std::to_string(i / 4 * 8 + i % 2 + i % 4 / 2 * 8 * 16) +
               ";\nmul.wide.u32 %rd40, %r44, 4;\nadd.s64 %rd40, %rd3, %rd40;\n" + "st.global.u32 [%rd40], %f" + std::to_string(i) + ";\n";
    return out;
}();
constexpr const char* sums = "{%f0, %f1, %f2, %f3, %f4, %f5, %f6, %f7}";
const std::string clear_sums = [] {
    std::string out;
    for (int i = 0; i < 8; ++i) out += "mov.b32 %f" + std::to_string(i) + ", 0f00000000;\n";
    return out;
}();
const emulator::launch_shape warpgroup{{1, 1, 1}, {128, 1, 1}, 1, 32768};

} // namespace

TEST_CASE("a warpgroup multiplies operands that lie deep and wide")
{
    // A (64,64) and B (16,64), 64 columns of the depth, in lines of 128 bytes; or turned, a line a step of the depth, where B has 64 columns.
    for (const bool wide_a : {false, true})
        for (const bool wide_b : {false, true}) {
            CAPTURE(wide_a);
            CAPTURE(wide_b);
            const memory<std::uint16_t> a(brains(64 * 64, 1)), b(brains(64 * 64, 2));
            const memory<float> c(std::vector<float>(64 * 16, 99));
            std::string text = bring(64, "%rd1", 0) + bring(64, "%rd2", 8192) + clear_sums + "wgmma.fence.sync.aligned;\n";
            for (int k = 0; k < 4; ++k)
                text += describe("%rd30", wide_a ? k * 16 * 128 : k * 32, 8192, 1024) +
                        describe("%rd31", 8192 + (wide_b ? k * 16 * 128 : k * 32), 8192, 1024) +
                        "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 " + sums + ", %rd30, %rd31, 1, 1, 1, " +
                        (wide_a ? "1" : "0") + ", " + (wide_b ? "1" : "0") + ";\n";
            text += "wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;\n" + store_sums;
            for (unsigned seed = 1; seed < 6; ++seed) {
                run(text, {a.address(), b.address(), c.address()}, warpgroup, seed);
                int wrong = 0;
                for (std::size_t row = 0; row < 64; ++row)
                    for (std::size_t col = 0; col < 16; ++col) {
                        float sum = 0;
                        for (std::size_t k = 0; k < 64; ++k)
                            sum +=
                                at(a.values(), wide_a ? k * 64 + row : row * 64 + k) * at(b.values(), wide_b ? k * 64 + col : col * 64 + k);
                        wrong += c[row * 16 + col] != sum;
                    }
                CHECK_EQ(wrong, 0);
            }
        }
}

TEST_CASE("a warp multiplies what ldmatrix has read")
{
    // A (16,16) row by row, B (16,16) by columns of eight: rows of 32 bytes.
    const memory<std::uint16_t> a(brains(256, 3)), b(brains(256, 4));
    const memory<float> c(std::vector<float>(16 * 8, 99));
    for (const bool transposed : {false, true}) {
        CAPTURE(transposed);
        run(std::string("mov.u32 %r20, dynamic;\nmul.wide.u32 %rd20, %r1, 16;\nadd.s64 %rd21, %rd1, %rd20;\nadd.s64 %rd22, %rd2, "
                        "%rd20;\nshl.b32 %r21, %r1, 4;\nadd.s32 %r21, %r20, %r21;\n"
                        "ld.global.v4.u32 {%r2, %r3, %r4, %r5}, [%rd21];\nst.shared.v4.u32 [%r21], {%r2, %r3, %r4, %r5};\nld.global.v4.u32 "
                        "{%r2, %r3, %r4, %r5}, [%rd22];\n"
                        "st.shared.v4.u32 [%r21+512], {%r2, %r3, %r4, %r5};\nbar.warp.sync -1;\n"
                        // Lane l has row l % 16 of chunk l / 16.
                        "and.b32 %r22, %r1, 15;\nshr.u32 %r23, %r1, 4;\nshl.b32 %r22, %r22, 5;\nmad.lo.s32 %r22, %r23, 16, %r22;\nadd.s32 "
                        "%r22, %r20, %r22;\n"
                        "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r10, %r11, %r12, %r13}, [%r22];\n") +
                (transposed ? "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%r14, %r15, %r16, %r17}, [%r22+512];\n"
                            : "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r14, %r16, %r15, %r17}, [%r22+512];\n") +
                "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f0, %f1, %f2, %f3}, {%r10, %r11, %r12, %r13}, {%r14, %r15}, "
                "{0f3F800000, 0f3F800000, 0f3F800000, 0f3F800000};\n"
                "shr.u32 %r30, %r1, 2;\nand.b32 %r31, %r1, 3;\nshl.b32 %r31, %r31, 1;\nmad.lo.s32 %r32, %r30, 8, %r31;\nmul.wide.u32 "
                "%rd30, %r32, 4;\nadd.s64 %rd30, %rd3, %rd30;\n"
                "st.global.u32 [%rd30], %f0;\nst.global.u32 [%rd30+4], %f1;\nst.global.u32 [%rd30+256], %f2;\nst.global.u32 [%rd30+260], "
                "%f3;",
            {a.address(), b.address(), c.address()}, {{1, 1, 1}, {32, 1, 1}, 1, 2048});
        int wrong = 0;
        for (std::size_t row = 0; row < 16; ++row)
            for (std::size_t col = 0; col < 8; ++col) {
                float sum = 1;
                for (std::size_t k = 0; k < 16; ++k)
                    sum += at(a.values(), row * 16 + k) * (transposed ? at(b.values(), k * 16 + col) : at(b.values(), col * 16 + k));
                wrong += c[row * 8 + col] != sum;
            }
        CHECK_EQ(wrong, 0);
    }
}

TEST_CASE("a box comes to all blocks of a cluster, swizzled, with zeros for what is outside")
{
    // A matrix (2,10,72); the box (1,8,64) at (48, 5, 1): columns from 72 on and rows from 10 on are outside.
    const memory<std::uint16_t> m(brains(2 * 10 * 72, 5));
    memory<std::uint32_t> out(std::vector<std::uint32_t>(2 * 8 * 32, 99));
    const emulated::box_map map(m.address(), 72, 10, 2, 8);
    const std::string text = "mov.u32 %r20, dynamic;\nadd.s32 %r21, %r20, 1024;\nmov.u32 %r22, %ctaid.x;\nsetp.eq.s32 %p1, %r1, 0;\n@%p1 "
                             "mbarrier.init.shared::cta.b64 [%r21], 1;\n"
                             "barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;\n"
                             "@%p1 mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%r21], 1024;\nsetp.eq.s32 %p2, %r22, "
                             "0;\nand.pred %p3, %p1, %p2;\nmov.b16 %rs1, 3;\nmov.u32 %r2, 48;\n"
                             "mov.u32 %r3, 5;\nmov.u32 %r4, 1;\n@%p3 "
                             "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%r20], "
                             "[%rd1, {%r2, %r3, %r4}], [%r21], %rs1;\n"
                             "LOOP:\nmbarrier.try_wait.parity.shared::cta.b64 %p4, [%r21], 0;\n@!%p4 bra LOOP;\n"
                             // 32 threads, a word of each line at a time.
                             "mov.u32 %r5, 0;\nNEXT:\nshr.u32 %r6, %r1, 2;\nxor.b32 %r6, %r6, %r5;\nshl.b32 %r6, %r6, 4;\nand.b32 %r7, "
                             "%r1, 3;\nmad.lo.s32 %r6, %r7, 4, %r6;\nmad.lo.s32 %r6, %r5, 128, %r6;\n"
                             "add.s32 %r6, %r6, %r20;\nld.shared.u32 %r8, [%r6];\nmad.lo.s32 %r9, %r22, 8, %r5;\nmad.lo.s32 %r9, %r9, 32, "
                             "%r1;\nmul.wide.u32 %rd5, %r9, 4;\nadd.s64 %rd5, %rd2, %rd5;\n"
                             "st.global.u32 [%rd5], %r8;\nadd.s32 %r5, %r5, 1;\nsetp.lt.s32 %p5, %r5, 8;\n@%p5 bra "
                             "NEXT;\nbarrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;";
    for (unsigned seed = 1; seed < 10; ++seed) {
        run(text, {map.address(), out.address()}, {{2, 1, 1}, {32, 1, 1}, 2, 2048}, seed);
        int wrong = 0;
        for (std::size_t block = 0; block < 2; ++block)
            for (std::size_t y = 0; y < 8; ++y)
                for (std::size_t x = 0; x < 64; ++x) {
                    const std::uint32_t word = out[(block * 8 + y) * 32 + x / 2];
                    const std::uint16_t is = static_cast<std::uint16_t>(x % 2 ? word >> 16 : word);
                    wrong += is != (48 + x < 72 && 5 + y < 10 ? m[720 + (5 + y) * 72 + 48 + x] : 0);
                }
        CHECK_EQ(wrong, 0);
    }
}

TEST_CASE("who does not wait finds what was there before")
{
    const memory<std::uint16_t> a(brains(64 * 64, 6)), b(brains(64 * 64, 7));
    const memory<float> c(std::vector<float>(64 * 16, 99));
    // Copies of a group that nobody waits for.
    std::string text = bring(64, "%rd1", 0);
    text.replace(text.find("cp.async.wait_group 0;"), 22, "cp.async.wait_group 1;");
    text += "mov.u32 %r2, dynamic;\nshl.b32 %r3, %r1, 2;\nadd.s32 %r2, %r2, %r3;\nld.shared.u32 %r4, [%r2];\nmul.wide.u32 %rd5, %r1, "
            "4;\nadd.s64 %rd5, %rd3, %rd5;\nst.global.u32 [%rd5], %r4;";
    run(text, {a.address(), b.address(), c.address()}, warpgroup);
    for (std::size_t i = 0; i < 128; ++i) CHECK(std::isnan(c[i]));
    // Products that still read what is overwritten.
    const std::string product = describe("%rd30", 0, 8192, 1024) + describe("%rd31", 8192, 8192, 1024) +
                                "wgmma.fence.sync.aligned;\nwgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 " + sums +
                                ", %rd30, %rd31, 1, 1, 1, 0, 0;\nwgmma.commit_group.sync.aligned;\n";
    const std::string overwrite = bring(64, "%rd2", 0), wait = "wgmma.wait_group.sync.aligned 0;\n";
    const auto product_of = [&](const std::string& order, unsigned seed) {
        run(bring(64, "%rd1", 0) + bring(64, "%rd2", 8192) + clear_sums + order + store_sums, {a.address(), b.address(), c.address()},
            warpgroup, seed);
        return c.values();
    };
    const auto right = product_of(product + wait + "bar.sync 0;\n" + overwrite, 1);
    int different = 0;
    for (unsigned seed = 1; seed < 10; ++seed) {
        CHECK(product_of(product + wait + "bar.sync 0;\n" + overwrite, seed) == right);
        different += product_of(product + overwrite + wait, seed) != right;
    }
    CHECK(different > 0);
    CHECK(emulated::says(complaint(bring(64, "%rd1", 0) + clear_sums + describe("%rd31", 8192, 8192, 1024) + product,
                                   {a.address(), b.address(), c.address()}, warpgroup, different > 0 ? 1 : 2),
                         "nobody waited"));
    // Lines that no fence shows to the products.
    std::string unshown = bring(64, "%rd1", 0) + bring(64, "%rd2", 8192) + clear_sums + product + wait + store_sums;
    CHECK(complaint(unshown, {a.address(), b.address(), c.address()}, warpgroup) == "");
    for (std::size_t fence; (fence = unshown.find("fence.proxy.async.shared::cta;")) != std::string::npos;) unshown.erase(fence, 30);
    CHECK(emulated::says(complaint(unshown, {a.address(), b.address(), c.address()}, warpgroup), "no fence.proxy.async shows"));
}
