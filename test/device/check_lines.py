# SPDX-FileCopyrightText: The FastMoE authors
# SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
"""Tests lines.py on texts that are wrong in one way each, and on one that is right."""
import re

from lines import HOT, check

HALF = "    ld.global.nc.u16 %rs1, [%rd1];\n    st.global.u16 [%rd1], %rs1;\n"
LOAD = "    ld.global.nc.v4.u32 {%r1, %r2, %r3, %r4}, [%rd1];\n"
STORE = "    st.global.v4.b32 [%rd1], {%r1, %r2, %r3, %r4};\n"
NAMES = {
    "gather_rows": "run_rowsINS1_11gather_rowsIfNS0_8bfloat16ENS1_12input_weight",
    "sum_row_lists": "run_rowsINS1_13sum_row_listsIfNS0_8bfloat16ES5_",
    "finish_input_gradient": "11finish_rowsIfNS1_21finish_input_gradientINS0_8bfloat16ES6_",
    "activate": "8portable7end_rowINS1_8activateINS0_8gated_byINS0_4siluEEENS0_8bfloat16EEE",
    "activate_backward": "8portable7end_rowINS1_17activate_backwardINS0_8gated_byINS0_4siluEEENS0_8bfloat16EEE",
    "unweigh_input": "8portable7end_rowINS1_13unweigh_inputINS0_8bfloat16EEE",
    "sum_group_columns": "17sum_group_columnsIfNS0_10plain_rowsINS0_8bfloat16EEES6_",
}


def text(without=None, body=LOAD * 4 + STORE + HALF, of=None):
    kernels = [
        f".visible .entry _ZN{symbol}(\n    .param .u64 a\n)\n{{\n{body if of in (None, name) else LOAD * 4 + STORE}    ret;\n\n}}\n"
        for name, symbol in NAMES.items() if name != without
    ]
    return "\n".join(kernels)


def wrong(*arguments, **named):
    return check(text(*arguments, **named))[1]


assert set(NAMES) == {*HOT, "sum_group_columns"}
assert wrong() == [], wrong()
for name in NAMES:
    assert len(wrong(without=name)) == 1 and name in wrong(without=name)[0], name
    assert any("loads" in line for line in wrong(of=name, body=HALF + STORE)), name
    assert any("loads" in line for line in wrong(of=name, body=HALF + STORE + LOAD.replace("global.nc", "local"))), name
    assert any("loads" in line for line in wrong(of=name, body=HALF + STORE + LOAD.replace("v4.u32", "v2.u32"))), name
    if name != "sum_group_columns":
        assert any("stores" in line for line in wrong(of=name, body=HALF + LOAD * 4)), name
assert any("fewer than 4" in line for line in wrong(of="sum_row_lists", body=LOAD * 3 + STORE))
assert not wrong(of="gather_rows", body=re.sub("v4.u32", "v2.b64", LOAD) + STORE)
assert check("")[1]
