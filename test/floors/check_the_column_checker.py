# SPDX-FileCopyrightText: The FastMoE authors
# SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
"""Shows that check_columns.py finds each fault that it is there to find, and none in good tests."""
import pathlib
import sys
import tempfile

from check_columns import check

CMAKE = r"""
set(floors exec gemm examples)
  set(devices cuda "*cuda_executor*,*on the GPU*")
    file(STRINGS "${source}" typed REGEX "FASTMOE_[A-Z_]*(CELLS|EXECUTORS)|FASTMOE_MLP_TEST|FASTMOE_TEST_CUDA")
    file(STRINGS "${source}" own_heap REGEX "allocations\\.hpp")
"""
LISTS = """
#if defined(FASTMOE_TEST_CUDA)
#define FASTMOE_CUDA_COLUMN , FASTMOE_COLUMN(::fastmoe::cuda_executor)
#else
#define FASTMOE_CUDA_COLUMN
#endif
#define FASTMOE_COLUMN(...) ::support::cell<__VA_ARGS__, float>
#define FASTMOE_CELLS FASTMOE_COLUMN(::fastmoe::host_executor) FASTMOE_CUDA_COLUMN
"""
MACROS = """
#if defined(FASTMOE_TEST_CUDA)
#define FASTMOE_MLP_TEST_ON_CUDA(label, policy) \\
    TEST_CASE_TEMPLATE("an mlp with " label " on the GPU", T, FASTMOE_DTYPES) \\
    { \\
        using Cell = ::support::cell<::fastmoe::cuda_executor, T>; \\
    }
#else
#define FASTMOE_MLP_TEST_ON_CUDA(label, policy)
#endif
#define FASTMOE_MLP_TEST(name, policy) \\
    FASTMOE_MLP_TEST_ON_CUDA(name, policy) \\
    TEST_CASE("an mlp with " name " on lanes") {}
"""
TYPED = """
TEST_CASE_TEMPLATE("a sum, of (", Cell, FASTMOE_CELLS) // TEST_CASE("
{
    CHECK(c == '{');
}
TEST_CASE("of the host") {}
"""
BLOCKS = """
#if defined(FASTMOE_TEST_CUDA)
using clusters = fm::cuda_executor;
#define ON_CLUSTERS ", on the GPU"
#else
using clusters = support::lanes;
#define ON_CLUSTERS ""
#endif
#if defined(FASTMOE_TEST_CUDA)
TEST_CASE("products on the GPU") { run<fm::cuda_executor>(); }
#else
TEST_CASE("products") {}
#endif
TEST_CASE("either" ON_CLUSTERS)
{
    clusters ex;
}
#if !defined(FASTMOE_TEST_CUDA)
TEST_CASE("of fibers") { clusters ex; }
#endif
"""
GOOD = {
    "CMakeLists.txt": CMAKE,
    "support/executors.hpp": LISTS,
    "support/compare_mlp.hpp": MACROS,
    "exec/team.cpp": TYPED,
    "exec/heap.cpp": '#include "allocations.hpp"\nTEST_CASE_TEMPLATE("own", T, FASTMOE_DTYPES) { FASTMOE_CELLS }\n',
    "exec/plain.cpp": 'TEST_CASE("plain") {}\n',
    "gemm/blocks.cpp": BLOCKS,
    "gemm/mlp.cpp": 'FASTMOE_MLP_TEST("SiLU", silu)\n',
    "examples/compose.cpp": "// FASTMOE_CELLS\n",
}

# A change to the good tests, and a word of what must be said about it.
OF_CUDA = "exec/team.cpp: has a column of CUDA of which the filter finds no case"
UNNAMED = MACROS.replace(" on the GPU", "")
ASKS = 'of the host")\n{\n#if defined(FASTMOE_TEST_CUDA)\n    if (x) y();\n#endif\n}'
FAULTS = [
    ({"support/compare_mlp.hpp": UNNAMED}, "gemm/mlp.cpp: has a column of CUDA of which the filter finds no case"),
    ({"support/compare_mlp.hpp": UNNAMED}, "'an mlp with SiLU' uses the GPU, and the filter does not find it"),
    ({"gemm/blocks.cpp": BLOCKS.replace("products on the GPU", "products")}, "'products' uses the GPU"),
    ({"gemm/blocks.cpp": BLOCKS.replace("products on the GPU", "p").replace("run<fm::cuda_executor>();", "")}, "'p' uses the GPU"),
    ({"gemm/blocks.cpp": BLOCKS.replace(', on the GPU"', '"')}, "'either' uses the GPU"),
    ({"gemm/blocks.cpp": BLOCKS.replace('ON_CLUSTERS ""', 'ON_CLUSTERS " on the GPU"')}, "'either on the GPU' says that it is the GPU's"),
    ({"exec/team.cpp": TYPED.replace("of the host", "on the GPU too")}, "'on the GPU too' is found by the filter, and does not use"),
    ({"exec/team.cpp": TYPED.replace("FASTMOE_CELLS", "FASTMOE_DTYPES") + "// FASTMOE_CELLS\n"}, OF_CUDA),
    ({"support/executors.hpp": LISTS.replace("_executor)\n#else", "_stream)\n#else")}, OF_CUDA),
    ({"exec/team.cpp": TYPED.replace('of the host") {}', ASKS)}, "'of the host' uses the GPU"),
    ({"exec/team.cpp": TYPED.replace("FASTMOE_CELLS)", "FASTMOE_CELLS")}, "exec/team.cpp: cannot be read"),
    ({"CMakeLists.txt": CMAKE.replace("*cuda_executor*,", "")}, OF_CUDA),
    ({"CMakeLists.txt": CMAKE.replace("set(devices", "set(columns")}, "is not where it was"),
]


def problems_of(files):
    with tempfile.TemporaryDirectory() as directory:
        for name, text in files.items():
            path = pathlib.Path(directory, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return check(directory)


failures = []
if found := problems_of(GOOD):
    failures.append(f"good tests are refused: {found}")
for change, word in FAULTS:
    found = problems_of(GOOD | change)
    if not any(word in problem for problem in found):
        failures.append(f"not found: '{word}'; found: {found}")
for failure in failures:
    print(failure)
sys.exit(1 if failures else 0)
