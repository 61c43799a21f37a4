# SPDX-FileCopyrightText: The FastMoE authors
# SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
"""lines.py ptx...: a table of how the kernels of rows reach global memory, from the PTX that the compiler made of them; fails if one of
them for bfloat16 does not both read and write it in whole lines of 16 bytes, or if there is no kernel of one of the functors."""
import re
import sys

# What stands in a kernel's name; and the least of its loads that are lines, of which four are the rows under way at one time.
HOT = {
    "gather_rows": (r"gather_rows\w*bfloat16", 1),
    "sum_row_lists": (r"sum_row_lists\w*bfloat16", 4),
    "finish_input_gradient": (r"finish_input_gradient\w*bfloat16", 4),
    "activate": (r"\d\d?end_row\w*?8activateI\w*bfloat16", 2),
    "activate_backward": (r"\d\d?end_row\w*?17activate_backwardI\w*bfloat16", 3),
    "unweigh_input": (r"unweigh_input\w*bfloat16", 2),
}  # fmt: skip
SUMS = r"sum_group_columns\w*rowsINS0_8bfloat16"  # read in lines; what they write are columns

ENTRY = re.compile(r"\.entry\s+(\w+)\s*\((.*?)^\}", re.DOTALL | re.MULTILINE)
# Without a space the compiler did not work it out, as it may with kernels that are inlined far.
ACCESS = re.compile(r"\b(ld|st)(?:\.(?:global|nc|volatile|relaxed|weak|c[agsv]|lu|w[bt]|L[12]::\w+))*\.(v2|v4)\.[bufs](32|64)\b")


def lines_of(body):
    """How many loads and stores of global memory are of 16 bytes."""
    found = {"ld": 0, "st": 0}
    for kind, vector, bits in ACCESS.findall(body):
        found[kind] += int(vector[1]) * int(bits) == 128
    return found["ld"], found["st"]


def check(text, hot=None, sums=SUMS):
    """Returns the table and what is wrong, one line each; nothing is wrong if all is well."""
    hot = HOT if hot is None else hot
    kernels = {name: lines_of(body) for name, body in ENTRY.findall(text)}
    table, wrong = [], []
    for name, (pattern, least, writes) in [(n, (*p, 1)) for n, p in hot.items()] + [("sum_group_columns", (sums, 1, 0))]:
        matching = {k: v for k, v in kernels.items() if re.search(pattern, k)}
        if not matching:
            wrong.append(f"there is no kernel of {name} for bfloat16")
        for kernel, (loads, stores) in matching.items():
            table.append(f"{name:24} {loads:5} {stores:6}  {kernel}")
            if loads < least:
                wrong.append(f"{name} has {loads} loads of 16 bytes, fewer than {least}: {kernel}")
            if stores < writes:
                wrong.append(f"{name} has {stores} stores of 16 bytes: {kernel}")
    return table, wrong


def main():
    table, wrong = [], []
    for path in sys.argv[1:]:
        for text in re.split(r"^\.version", open(path).read(), flags=re.MULTILINE)[1:]:  # one for each architecture
            found, faults = check(text)
            table += found
            wrong += faults
    if not table:
        wrong.append("there is no PTX")
    print(f"{'functor':24} loads stores  of 16 bytes")
    print("\n".join(table))
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
