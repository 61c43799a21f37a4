# SPDX-FileCopyrightText: The FastMoE authors
# SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
"""Shows that check.py finds each fault that it is there to find, and none in a good tree."""
import pathlib
import sys
import tempfile

from check import check_tree

HEAD = """// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// A header.
#pragma once
"""


def include(*names):
    return HEAD + "".join(f"#include <{name}>\n" for name in names)


GOOD = {
    "core/tensor.hpp": HEAD,
    "core/math.hpp": include("fastmoe/core/tensor.hpp"),
    "exec/team.hpp": include("vector", "fastmoe/core/math.hpp"),
    "ops/rows.hpp": include("fastmoe/exec/team.hpp"),
    "comm/self.hpp": include("fastmoe/core/tensor.hpp"),
    "gemm/portable.hpp": include("fastmoe/ops/rows.hpp"),
    "gemm/onednn.hpp": include("fastmoe/ops/rows.hpp"),
    "cuda/cublaslt.cuh": include("fastmoe/gemm/portable.hpp"),
    "io/safetensors.hpp": include("functional", "fastmoe/core/tensor.hpp"),
    "io/sharded_checkpoint.hpp": include("fastmoe/io/safetensors.hpp"),
    "moe.hpp": include("fastmoe/gemm/portable.hpp", "fastmoe/comm/self.hpp"),
    "cuda/rows.cuh": include("fastmoe/exec/team.hpp"),
    "cuda.cuh": include("fastmoe/moe.hpp", "fastmoe/cuda/rows.cuh"),
}

# A change to the good tree, and a word of what must be said about it.
FAULTS = [
    ({"core/tensor.hpp": include("fastmoe/exec/team.hpp")}, "on floor 0 includes exec/team.hpp on floor 1"),
    ({"comm/self.hpp": include("fastmoe/ops/rows.hpp")}, "on floor 2 includes ops/rows.hpp on floor 2"),
    ({"core/tensor.hpp": include("fastmoe/core/math.hpp")}, "circle: "),
    ({"cuda/cublaslt.cuh": include("fastmoe/routing/plan.hpp"), "routing/plan.hpp": HEAD}, "on floor 3 includes routing"),
    ({"gemm/portable.hpp": include("fastmoe/cuda/cublaslt.cuh", "fastmoe/ops/rows.hpp")}, "only cuda.cuh and cuda/ may"),
    ({"moe.hpp": GOOD["moe.hpp"] + "#include <fastmoe/gemm/onednn.hpp>\n"}, "moe.hpp: reaches gemm/onednn.hpp"),
    ({"moe.hpp": GOOD["moe.hpp"] + "#include <fastmoe/io/safetensors.hpp>\n"}, "moe.hpp: reaches io/safetensors.hpp"),
    ({"io/file.hpp": include("fastmoe/io/safetensors.hpp")}, "io/safetensors.hpp, which is for users to include by name"),
    ({"moe.hpp": include("fastmoe/gemm/portable.hpp")}, "moe.hpp: does not reach comm/self.hpp"),
    ({"ops/rows.hpp": include("fastmoe/exec/team.hpp", "iostream")}, "<iostream>, which is slow"),
    ({"ops/rows.hpp": include("fastmoe/exec/gone.hpp")}, "exec/gone.hpp, which does not exist"),
    ({"ops/rows.hpp": HEAD + '#include "team.hpp"\n'}, "write <fastmoe/...>"),
    ({"ops/rows.hpp": include("fastmoe/moe.hpp")}, "the umbrella moe.hpp"),
    ({"ops/rows.hpp": "#pragma once\n"}, "two licence lines"),
    ({"ops/rows.hpp": HEAD.replace("#pragma once\n", "")}, "needs #pragma once"),
    ({"ops/rows.hpp": HEAD + "\n" * 400}, "at most 350"),
    ({"elsewhere/rows.hpp": HEAD}, "on no known floor"),
    ({"ops/rows.hpp": GOOD["ops/rows.hpp"] + "    for_each_row(ex, 1, f, {}); // team.for_each(n, f)\n"}, "without fastmoe::"),
]


def problems_of(files):
    with tempfile.TemporaryDirectory() as directory:
        for name, text in files.items():
            path = pathlib.Path(directory, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return check_tree(directory)


failures = []
if found := problems_of(GOOD):
    failures.append(f"the good tree is refused: {found}")
for change, word in FAULTS:
    found = problems_of(GOOD | change)
    if not any(word in problem for problem in found):
        failures.append(f"not found: '{word}'; found: {found}")
for failure in failures:
    print(failure)
sys.exit(1 if failures else 0)
