// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// gemm::portable against gemm::onednn, verb by verb: 16 experts, N 1408, K 2048, from one row an expert to 256.

#include <fastmoe/gemm/onednn.hpp>
#include <fastmoe/gemm/portable.hpp>

#include "inputs.hpp"
#include "race.hpp"

namespace {

using namespace bench;

constexpr int64_t experts = 16, out = 1408, in = 2048;
const char* const verbs[] = {"forward", "dgrad", "wgrad"};

/// The operands of all three verbs; results of each policy apart, so that they can be compared.
template <class T>
struct operands {
    even_groups groups;
    int64_t slots;
    memory<T> x, dy, w, y[2], dx[2], dw[2];

    operands(fm::host_executor& ex, int64_t rows)
        : groups(experts, rows), slots(experts * rows), x(random_buffer<T>(ex, slots * in, 1)),
          dy(random_buffer<T>(ex, slots * out, 2)), w(random_buffer<T>(ex, experts * out * in, 3, 0.05f)),
          y{{ex, slots * out}, {ex, slots * out}}, dx{{ex, slots * in}, {ex, slots * in}},
          dw{{ex, experts * out * in}, {ex, experts * out * in}}
    {
    }
};

template <class T, class Gemm>
void call(fm::host_executor& ex, operands<T>& o, int which, int verb, fm::arena& memory)
{
    Gemm gemm;
    if constexpr (std::is_same_v<Gemm, fm::gemm::onednn>) gemm.limits = {0, 0, 0}; // oneDNN itself, at every size
    const fm::plain_rows<T> x{fm::matrix_view<const T>(o.x.data(), o.slots, in)};
    const fm::plain_rows<T> dy{fm::matrix_view<const T>(o.dy.data(), o.slots, out)};
    const fm::weight_view<const T> w{o.w.data(), nullptr, experts, out, in, out * in, in, 1};
    const fm::weight_view<T> dw{o.dw[which].data(), nullptr, experts, out, in, out * in, in, 1};
    const auto g = o.groups.view();
    if (verb == 0)
        gemm.forward(ex, g, x, w, fm::matrix_view<const T>{}, o.y[which].matrix(o.slots, out), fm::no_epilogue{}, memory);
    else if (verb == 1) gemm.dgrad(ex, g, dy, w, o.dx[which].matrix(o.slots, in), fm::no_epilogue{}, memory);
    else gemm.wgrad(ex, g, dy, x, dw, fm::write_mode::overwrite, memory);
}

template <class T, class Gemm>
std::function<void()> contender(fm::host_executor& ex, operands<T>& o, int which, int verb, memory<std::byte>& workspace)
{
    workspace = workspace_for(ex, [&](fm::arena& a) { call<T, Gemm>(ex, o, which, verb, a); });
    return [&ex, &o, &workspace, which, verb] {
        fm::arena a(workspace.view());
        call<T, Gemm>(ex, o, which, verb, a);
    };
}

template <class T>
standing hold(int64_t rows, int verb)
{
    fm::host_executor ex;
    operands<T> o(ex, rows);
    memory<std::byte> space[2];
    race r;
    const int onednn = r.add(contender<T, fm::gemm::onednn>(ex, o, 0, verb, space[0]));
    const int portable = r.add(contender<T, fm::gemm::portable>(ex, o, 1, verb, space[1]));
    r.run(budget(1.5));
    auto& result = verb == 0 ? o.y : verb == 1 ? o.dx : o.dw;
    same(verbs[verb], difference(result[1].data(), result[0].data(), result[0].size()), bound<T>);

    const double flops = 2.0 * static_cast<double>(o.slots) * out * in;
    const std::string name = sizeof(T) == 2 ? "bf16" : "fp32";
    return {{{.text = "gemm " + name + ", " + verbs[verb] + ", " + std::to_string(rows) +
                      " rows an expert: speed of portable / onednn",
              .ratio = r.ratio(onednn, portable),
              .kind = rows >= 16 ? target::at_least : target::none,
              .value = 0.80,
              .seconds_a_call = r.time(portable).middle,
              .also = {{"portable_gflops", flops / r.time(portable).middle * 1e-9},
                       {"onednn_gflops", flops / r.time(onednn).middle * 1e-9}}}},
            r.rounds()};
}

template <class T>
void add(const char* type)
{
    for (int verb = 0; verb < 3; ++verb)
        for (int64_t rows : {1, 4, 16, 64, 256})
            register_lines({std::string("gemm/") + type + "/" + verbs[verb] + "/rows:" + std::to_string(rows)},
                           [=] { return hold<T>(rows, verb); });
}

} // namespace

int main(int argc, char** argv)
{
    add<float>("fp32");
    add<fm::bfloat16>("bf16");
    return run_all(argc, argv);
}
