// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// A layer behind a C interface, as engines with plugins or another language have it: no exception passes the border, and what
/// went wrong comes back as a code and a text in the caller's memory.
#include <fastmoe/moe.hpp>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

namespace fm = fastmoe;

// [interface]
extern "C" {
enum moe_status { moe_ok, moe_wrong_argument, moe_no_memory, moe_failed };
struct moe_error { // the caller's; says why a call did not return moe_ok
    char text[256];
};
struct moe_block; // no more than a pointer to C

moe_status moe_create(int64_t experts, int64_t k, int64_t width, int64_t hidden, moe_block** block, moe_error* error);
void moe_destroy(moe_block* block);
moe_status moe_workspace(moe_block* block, int64_t tokens, int64_t* bytes, moe_error* error);
/// x, y (T,D); gate (E,D); up (E,2H,D), gates first; down (E,D,H). The workspace is aligned to 256 bytes.
moe_status moe_infer(moe_block* block, int64_t tokens, const float* x, const float* gate, const float* up, const float* down,
                     float* y, void* workspace, int64_t bytes, moe_error* error);
}
// [interface]

// [guard]
/// f(), with what it throws as a status.
template <class F>
moe_status guarded(moe_error* error, const F& f) noexcept
{
    const auto say = [error](moe_status status, const char* text) {
        if (error) std::snprintf(error->text, sizeof error->text, "%s", text);
        return status;
    };
    try {
        f();
        return moe_ok;
    } catch (const fm::invalid_argument& e) {
        return say(moe_wrong_argument, e.what());
    } catch (const fm::out_of_memory& e) {
        return say(moe_no_memory, e.what());
    } catch (const std::bad_alloc&) {
        return say(moe_no_memory, "no memory");
    } catch (const std::exception& e) { // fm::error has more children
        return say(moe_failed, e.what());
    } catch (...) {
        return say(moe_failed, "unknown");
    }
}

// [guard]

using layer_type = fm::moe_layer<fm::top_k_gate<fm::softmax_score>, fm::mlp<fm::swiglu>>;

struct moe_block {
    fm::host_executor ex; // in a .cu: fm::cuda_executor ex{stream}, from a cudaStream_t that moe_create is given
    layer_type layer;
    int64_t width, hidden;

    moe_block(int64_t experts, int64_t k, int64_t d, int64_t h)
        : layer{{.experts = experts, .k = k}, {.width = d, .hidden = h}}, width(d), hidden(h)
    {
    }
};

moe_status moe_create(int64_t experts, int64_t k, int64_t width, int64_t hidden, moe_block** block, moe_error* error)
{
    return guarded(error, [&] { *block = new moe_block(experts, k, width, hidden); });
}
void moe_destroy(moe_block* block) { delete block; }

moe_status moe_workspace(moe_block* block, int64_t tokens, int64_t* bytes, moe_error* error)
{
    return guarded(error, [&] { *bytes = block->layer.infer_bytes<float>(block->ex, tokens, block->width); });
}

moe_status moe_infer(moe_block* block, int64_t tokens, const float* x, const float* gate, const float* up, const float* down,
                     float* y, void* workspace, int64_t bytes, moe_error* error)
{
    return guarded(error, [&] {
        const int64_t d = block->width, h = block->hidden, e = block->layer.gate.experts;
        using tensor = fm::tensor_view<const float, 3>;
        const layer_type::weights<const float> w{
            .gate = fm::matrix_view<const float>(gate, e, d),
            .gate_bias = {},
            .expert = {fm::stacked(tensor(up, e, 2 * h, d)), fm::stacked(tensor(down, e, d, h)), {}, {}}};
        fm::arena scratch(fm::vector_view<std::byte>(static_cast<std::byte*>(workspace), bytes));
        block->layer.infer(block->ex, fm::matrix_view<const float>(x, tokens, d), w, fm::matrix_view<float>(y, tokens, d), scratch);
        block->ex.synchronize(); // on a stream: throws faults of the work, and waits; leave it out where the caller does so
    });
}
int main()
{
    constexpr int64_t tokens = 20, experts = 4, width = 16, hidden = 24;
    moe_error error{};
    moe_block* block = nullptr;
    int64_t bytes = 0;
    if (moe_create(experts, 2, width, hidden, &block, &error) != moe_ok) return 1;
    const std::unique_ptr<moe_block, void (*)(moe_block*)> owner(block, moe_destroy);
    if (moe_workspace(block, tokens, &bytes, &error) != moe_ok) return 1;

    const auto waves = [](int64_t n) {
        std::vector<float> v(static_cast<std::size_t>(n));
        for (std::size_t i = 0; i < v.size(); ++i) v[i] = std::sin(static_cast<float>(i));
        return v;
    };
    const auto x = waves(tokens * width), gate = waves(experts * width), up = waves(experts * 2 * hidden * width),
               down = waves(experts * width * hidden);
    std::vector<float> y(x.size(), NAN), untouched(x.size(), -7.0f);
    const std::unique_ptr<std::byte[], void (*)(std::byte*)> workspace(
        static_cast<std::byte*>(::operator new(static_cast<std::size_t>(bytes), std::align_val_t{256})),
        [](std::byte* p) { ::operator delete(p, std::align_val_t{256}); });
    if (moe_infer(block, tokens, x.data(), gate.data(), up.data(), down.data(), y.data(), workspace.get(), bytes, &error) != moe_ok) {
        std::fprintf(stderr, "%s\n", error.text);
        return 1;
    }
    bool right = true;
    for (const float v : y) right = right && std::isfinite(v);

    // What is wrong is said, and nothing is written.
    const auto refused = [&](moe_status status, const float* from, int64_t room) {
        const auto found = moe_infer(block, tokens, from, gate.data(), up.data(), down.data(), untouched.data(), workspace.get(), room, &error);
        std::printf("%d: %s\n", found, error.text);
        for (const float v : untouched) right = right && v == -7.0f;
        return found == status && std::strncmp(error.text, "fastmoe: ", 9) == 0;
    };
    right = refused(moe_wrong_argument, nullptr, bytes) && refused(moe_no_memory, x.data(), bytes - 1) && right;
    return right ? 0 : 1;
}
