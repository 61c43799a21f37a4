// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include <doctest/doctest.h>

#include <sstream>
#include <string>

#include "scaling/plan_text.hpp"
#include "scaling/tables.hpp"
#include "support/temporary_folder.hpp"

namespace {

const std::string root = std::string(__FILE__).substr(0, std::string(__FILE__).rfind("/test/scaling/"));

/// Every line of `text` stands in the document, as a line of a block of four columns' indentation.
void stands_in(const std::string& text, const std::string& document)
{
    std::istringstream lines(text);
    for (std::string line; std::getline(lines, line);) {
        while (!line.empty() && line.back() == ' ') line.pop_back();
        if (line.empty()) continue;
        INFO(line);
        CHECK(document.find("\n    " + line + "\n") != std::string::npos);
    }
}

} // namespace

TEST_CASE("docs/scaling.md and its picture are what the measurements in the repository give, number by number")
{
    scaling::measurements m;
    scaling::read(root + "/benchmark/scaling/measured/threads.json", m);
    const auto document = support::read_file(root + "/docs/scaling.md");
    const auto all = scaling::predict_all(m);
    stands_in(all.text, document);
    CHECK_EQ(all.svg, support::read_file(root + "/docs/scaling.svg"));
    CHECK(scaling::predictor(m).half(false).size() >= 30);
}

TEST_CASE("docs/scaling.md has the plan of a trillion parameters as the program prints it")
{
    stands_in(scaling::plan_text(scaling::trillion()), support::read_file(root + "/docs/scaling.md"));
}
