# SPDX-FileCopyrightText: The FastMoE authors
# SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
"""spills.py [--hot=name,name] [--most=bytes] report...: a table of the kernels by registers, from what ptxas -v said; fails if a hot kernel spills (writes and reads more than --most), or if one
of the hot names has no kernel at all, or if the assembler says that warpgroups' products wait for each other. A kernel is hot if its time grows with tokens times width or tokens times choices, unless
it is of double, which nobody trains in."""
import re
import sys

HOT = {
    "multiply_row", "multiply_weight_row", "gather_rows", "sum_row_lists", "sum_group_columns", "finish_rows", "choose_row",
    "weigh_row_backward", "place_choices", "bucket_count", "bucket_rank", "check_few", "count_up", "fill",
    "multiply_row_tiles", "multiply_gradient_tiles",
}  # fmt: skip
ENTRY = re.compile(
    r"Compiling entry function '(\w+)' for '(\w+)'.*?"
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
    re.DOTALL,
)


def is_double(kernel):
    """Whether double is among the template arguments: a lone d between those of classes."""
    return re.search(r"(?:I|E|_)d(?:d|f|E|S|N)", re.sub(r"\d+[a-z_]+", "", kernel)) is not None


def functor_of(kernel):
    """choose_row of ...8run_rowsIN7fastmoe4v0_16detail10choose_rowI...; names have their length before them."""
    found = re.search(r"run_(?:rows|elements|blocks|clusters)IN?(?:S\w*?_)?(.*)", kernel)
    rest, names = found[1] if found else kernel, []
    while length := re.match(r"\d+", rest):
        end = length.end() + int(length[0])
        names.append(rest[length.end() : end])
        rest = rest[end:]
    return names[-1] if names else kernel


def read(text):
    return [(functor_of(k), k, arch, int(stack), int(out) + int(back), int(regs)) for k, arch, stack, out, back, regs in ENTRY.findall(text)]


def main():
    paths = [a for a in sys.argv[1:] if not a.startswith("--")]
    most = max([int(a[7:]) for a in sys.argv[1:] if a.startswith("--most=")], default=0)
    hot = {name for a in sys.argv[1:] if a.startswith("--hot=") for name in a[6:].split(",")} or HOT
    texts = [open(path).read() for path in paths]
    kernels = [k for text in texts for k in read(text)]
    table = {}
    for name, _, arch, stack, spilled, registers in kernels:
        row = table.setdefault((name, arch), [0, 0, 0, 0])
        table[name, arch] = [row[0] + 1, max(row[1], registers), max(row[2], stack), max(row[3], spilled)]
    print(f"{'functor':32} {'for':8} kernels registers stack spilled")
    for (name, arch), row in sorted(table.items(), key=lambda item: -item[1][1]):
        print(f"{name:32} {arch:8} {row[0]:7} {row[1]:9} {row[2]:5} {row[3]:7}{'  hot' if name in hot else ''}")
    wrong = [
        f"{name} spills {spilled} bytes for {arch}: {k}"
        for name, k, arch, _, spilled, _ in kernels if name in hot and not is_double(k) and spilled > most
    ]
    wrong += [line for text in texts for line in text.splitlines() if "wgmma" in line]
    wrong += [f"there is no kernel of {name}" for name in sorted(hot) if not any(k[0] == name for k in kernels)]
    if wrong:
        sys.exit("\n".join(wrong))


main()
