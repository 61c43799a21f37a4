// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Time of forward + backward against the number of experts, at a constant number of rows: the layer stays flat, the
/// naive way grows. The experiment of figure 5 of the FastMoE paper (He et al. 2021) at a size for two processors:
/// T 2048, D 512, H 2048, K 2, fp32. Option --svg=FILE draws it.

#include <cstdio>
#include <cstring>
#include <fstream>
#include <memory>

#include <fastmoe/gemm/onednn.hpp>

#include "baselines/naive.hpp"
#include "moe_setup.hpp"
#include "race.hpp"

namespace {

using namespace bench;
using Gemm = fm::gemm::onednn;

constexpr int64_t experts[] = {2, 4, 8, 16, 32, 64};
constexpr int points = 6;
std::string svg_file;

/// The naive way with the routing of a layer of the same size, given to it: it runs no gate, forward or backward.
struct naive_setup {
    fm::host_executor& ex;
    moe_setup<float, Gemm>& moe;
    baselines::naive_moe<float, Gemm> naive;
    memory<int32_t> chosen;
    memory<float> weights, dweights, y, dx;
    fm::owned_weights<float, fm::mlp<fm::gelu, Gemm>, fm::host_executor> gradients;

    naive_setup(fm::host_executor& on, moe_setup<float, Gemm>& of)
        : ex(on), moe(of), naive(on, of.sizes.tokens, of.sizes.k, of.sizes.experts, of.sizes.width, of.sizes.hidden),
          chosen(on, of.sizes.choices()), weights(on, of.sizes.choices()), dweights(on, of.sizes.choices()),
          y(on, of.sizes.tokens * of.sizes.width), dx(on, of.sizes.tokens * of.sizes.width),
          gradients(fm::zero_weights<float>(on, of.layer))
    {
        moe.forward([&](const auto& saved) {
            for (int64_t c = 0; c < moe.sizes.choices(); ++c) {
                chosen.data()[c] = saved.routing().experts(c);
                weights.data()[c] = saved.routing().weights(c);
            }
        });
        train();
        same("the naive way's y", difference(y.data(), moe.y().data_handle(), y.size()), bound<float>);
    }
    void train()
    {
        const auto& w = moe.weights.view().expert;
        const auto& g = gradients.view().expert;
        naive.forward(ex, moe.x(), chosen.data(), weights.data(), w.up, w.down, y.matrix(moe.sizes.tokens, moe.sizes.width));
        naive.backward(ex, moe.dy(), weights.data(), w.up, w.down, dx.matrix(moe.sizes.tokens, moe.sizes.width),
                              dweights.data(), g.up, g.down);
    }
};

/// Two curves over the number of experts, with axes, units and a legend.
class plot {
public:
    struct curve {
        std::string name, color;
        spread time[points]; // seconds
    };

    void write(const std::string& file, const std::vector<curve>& curves)
    {
        for (const auto& c : curves)
            for (const spread& s : c.time) top_ = std::max(top_, 1.1e3 * s.high);
        std::ofstream out(file);
        out << "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 640 400\" font-family=\"sans-serif\" font-size=\"13\">\n"
               "<rect width=\"640\" height=\"400\" fill=\"white\"/>\n";
        text(out, 320, 24, "middle", "One MoE layer, forward + backward: T 2048, D 512, H 2048, K 2, fp32");
        text(out, 340, 390, "middle", "experts");
        out << "<text transform=\"translate(18 200) rotate(-90)\" text-anchor=\"middle\">"
            << (processor_clock() ? "processor time, ms" : "time, ms") << "</text>\n";
        const double step = round_step(top_ / 5);
        for (double v = 0; v <= top_; v += step) {
            line(out, left, y_of(v), right, y_of(v), "#ddd", 1);
            char label[32];
            std::snprintf(label, sizeof label, "%g", v);
            text(out, left - 8, y_of(v) + 4, "end", label);
        }
        for (int i = 0; i < points; ++i) text(out, x_of(i), bottom + 20, "middle", std::to_string(experts[i]));
        line(out, left, bottom, right, bottom, "black", 1);
        line(out, left, top, left, bottom, "black", 1);
        double legend = 56;
        for (const auto& c : curves) {
            draw(out, c);
            line(out, left + 20, legend, left + 50, legend, c.color.c_str(), 2.5);
            text(out, left + 58, legend + 4, "start", c.name);
            legend += 20;
        }
        text(out, left + 20, legend + 4, "start", "bars: quartiles");
        out << "</svg>\n";
    }

private:
    static constexpr double left = 70, right = 610, top = 40, bottom = 350;

    static double round_step(double v)
    {
        double unit = std::pow(10.0, std::floor(std::log10(v)));
        for (double m : {1.0, 2.0, 5.0, 10.0})
            if (m * unit >= v) return m * unit;
        return v;
    }
    static double x_of(int i) { return left + 40 + (right - left - 80) * i / (points - 1); }
    double y_of(double ms) const { return bottom - (bottom - top) * ms / top_; }
    static void text(std::ofstream& out, double x, double y, const char* anchor, const std::string& what)
    {
        out << "<text x=\"" << x << "\" y=\"" << y << "\" text-anchor=\"" << anchor << "\">" << what << "</text>\n";
    }
    static void line(std::ofstream& out, double x1, double y1, double x2, double y2, const char* color, double width)
    {
        out << "<line x1=\"" << x1 << "\" y1=\"" << y1 << "\" x2=\"" << x2 << "\" y2=\"" << y2 << "\" stroke=\"" << color
            << "\" stroke-width=\"" << width << "\"/>\n";
    }
    void draw(std::ofstream& out, const curve& c) const
    {
        for (int i = 0; i < points; ++i) {
            const double y = y_of(1e3 * c.time[i].middle);
            line(out, x_of(i), y_of(1e3 * c.time[i].low), x_of(i), y_of(1e3 * c.time[i].high), c.color.c_str(), 1.5);
            out << "<circle cx=\"" << x_of(i) << "\" cy=\"" << y << "\" r=\"3.5\" fill=\"" << c.color << "\"/>\n";
            if (i > 0) line(out, x_of(i - 1), y_of(1e3 * c.time[i - 1].middle), x_of(i), y, c.color.c_str(), 2.5);
        }
    }

    double top_ = 0; // ms
};

standing hold()
{
    fm::host_executor ex;
    std::unique_ptr<moe_setup<float, Gemm>> layers[points];
    std::unique_ptr<naive_setup> naives[points];
    race r;
    int ours[points], theirs[points];
    for (int i = 0; i < points; ++i) {
        layers[i] = std::make_unique<moe_setup<float, Gemm>>(ex, shape{2048, 512, 2048, experts[i], 2});
        naives[i] = std::make_unique<naive_setup>(ex, *layers[i]);
        ours[i] = r.add([l = layers[i].get()] { l->train(); });
        theirs[i] = r.add([n = naives[i].get()] { n->train(); });
    }
    r.run(budget(30));

    plot::curve layer{"this library", "#1f6fb4", {}}, naive{"naive: mask, gather, product, scatter", "#d1495b", {}};
    for (int i = 0; i < points; ++i) {
        layer.time[i] = r.time(ours[i]);
        naive.time[i] = r.time(theirs[i]);
    }
    if (!svg_file.empty()) plot().write(svg_file, {layer, naive});

    standing out{{}, r.rounds()};
    const std::string prefix = "experts sweep, T 2048, fp32: ";
    out.claims.push_back({.text = prefix + "the layer's time at E 64 / at E 2",
                          .ratio = r.ratio(ours[points - 1], ours[0]),
                          .seconds_a_call = layer.time[points - 1].middle});
    out.claims.push_back({.text = prefix + "the naive way's time at E 64 / at E 2",
                          .ratio = r.ratio(theirs[points - 1], theirs[0]),
                          .seconds_a_call = naive.time[points - 1].middle});
    for (int i = 0; i < points; ++i)
        out.claims.push_back({.text = prefix + "naive / layer at E " + std::to_string(experts[i]),
                              .ratio = r.ratio(theirs[i], ours[i]),
                              .seconds_a_call = layer.time[i].middle,
                              .also = {{"naive_ms", 1e3 * naive.time[i].middle}}});
    return out;
}

} // namespace

int main(int argc, char** argv)
{
    int kept = 1;
    for (int i = 1; i < argc; ++i)
        if (std::strncmp(argv[i], "--svg=", 6) == 0) svg_file = argv[i] + 6;
        else argv[kept++] = argv[i];
    std::vector<std::string> names{"experts/growth/layer", "experts/growth/naive"};
    for (int64_t e : experts) names.push_back("experts/naive_over_layer/experts:" + std::to_string(e));
    register_lines(names, hold);
    return run_all(kept, argv);
}
