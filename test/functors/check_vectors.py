# SPDX-FileCopyrightText: The FastMoE authors
# SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
"""Holds loops of vectorized functors to vectors, at the level of optimization at which objects were compiled:

    check_vectors.py objdump object loop=register...   each loop multiplies in such registers, more than one number at a time
"""
import re
import subprocess
import sys

FUNCTION = re.compile(r"^[0-9a-f]+ <(.*)>:$", re.MULTILINE)


def multiplications(text, loop, register):
    """How often functions of that name multiply vectors of floats in such registers."""
    parts = FUNCTION.split(text)
    packed = re.compile(rf"\sv?(?:mul|fn?m(?:add|sub)\d+)ps\s[^\n]*%{register}\d")
    return sum(len(packed.findall(body)) for name, body in zip(parts[1::2], parts[2::2]) if f"::{loop}<" in name)


def check(text, expected):
    """Returns what is wrong, one line each; nothing if all is well."""
    # A polynomial in the place of an exponential, forward and backward, has more than these.
    return [f"{loop}: {found} products of vectors in %{register}, expected 8 or more"
            for loop, register in expected if (found := multiplications(text, loop, register)) < 8]


def check_the_checker():
    good = "0 <void a::loop_wide<f>()>:\n" + 8 * " 1:\tvmulps %zmm1,%zmm2,%zmm3\n"
    assert not check(good, [("loop_wide", "zmm")])
    for bad in (good.replace("loop_wide", "loop"), good.replace("mulps", "mulss"), good.replace("zmm", "ymm"), good[:-28], ""):
        assert check(bad, [("loop_wide", "zmm")]), bad


if __name__ == "__main__":
    check_the_checker()
    objdump, obj, *loops = sys.argv[1:]
    listing = subprocess.run([objdump, "-dC", "--no-show-raw-insn", obj], check=True, capture_output=True, text=True).stdout
    if wrong := check(listing, [tuple(loop.split("=")) for loop in loops]):
        sys.exit("\n".join(wrong))
