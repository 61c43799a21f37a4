# SPDX-FileCopyrightText: The FastMoE authors
# SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
"""main_loop.py [--cuobjdump=program] object...: from the machine code of the kernels that multiply by warpgroups, that none reads or writes
local memory where it does so. Fails if one does, or if there is no such kernel. What an assembler spills elsewhere, once a tile, is
spills.py's."""
import os
import re
import subprocess
import sys

PRODUCT = re.compile(r"\b[HQ]GMMA\b")
LOCAL = re.compile(r"\b(?:LDL|STL)\b")


def kernels(lines):
    """Names, with the addresses and instructions of each in order."""
    name, code = None, []
    for line in lines:
        if found := re.match(r"\s*Function : (\S+)", line):
            if name:
                yield name, code
            name, code = found[1], []
        elif found := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(.*?);", line):
            code.append((int(found[1], 16), found[2]))
    if name:
        yield name, code


def complaint(code):
    """The first instruction of local memory in the loop around the products, from where its branch leads to it; or nothing."""
    places = [i for i, (_, each) in enumerate(code) if PRODUCT.search(each)]
    if not places:
        return None
    first, end = places[0], places[-1] + 1
    for i in range(places[-1], len(code)):
        target = re.search(r"\bBRA\b.* 0x([0-9a-f]+)", code[i][1])
        back = target and int(target[1], 16) <= code[places[0]][0]
        if back:
            first, end = next(j for j, (at, _) in enumerate(code) if at >= int(target[1], 16)), i
            break
    else:
        return "no loop"
    return next((each for _, each in code[first:end] if LOCAL.search(each)), "")


def main():
    program, paths = "cuobjdump", []
    for argument in sys.argv[1:]:
        if argument.startswith("--cuobjdump="):
            program = argument[12:]
        else:
            paths.append(argument)
    multiplying, wrong = 0, []
    for path in paths:
        if path.endswith(".sass"):
            lines = open(path)
        else:
            # It calls nvdisasm, which lies beside it.
            there = os.path.dirname(program)
            environment = dict(os.environ, **({"NVDISASM_PATH": there} if os.path.exists(os.path.join(there, "nvdisasm")) else {}))
            lines = subprocess.Popen([program, "-sass", path], stdout=subprocess.PIPE, text=True, env=environment).stdout
        for name, code in kernels(lines):
            found = complaint(code)
            multiplying += found is not None
            if found:
                wrong.append(f"{found.strip()} beside products: {name}")
    print(f"{multiplying} kernels multiply by warpgroups")
    if multiplying == 0:
        wrong.append("there is no kernel that multiplies by warpgroups")
    if wrong:
        sys.exit("\n".join(wrong))


main()
