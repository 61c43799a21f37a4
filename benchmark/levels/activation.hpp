// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// One source at two levels of the compiler's optimization.
#pragma once

#include <functional>
#include <vector>

namespace bench {

struct activation_turn {
    std::function<void()> run; ///< empty where the machine lacks the instructions
    std::function<std::vector<float>()> result;
};

activation_turn activation_at_o2(bool avx512);
activation_turn activation_at_o3(bool avx512);

} // namespace bench
