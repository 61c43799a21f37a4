# SPDX-FileCopyrightText: The FastMoE authors
# SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
"""check_main_loop.py: that main_loop.py can fail, on machine code that is made up."""
import os
import subprocess
import sys
import tempfile

GOOD = ["STL [R1], R2", "IADD3 R2, R2, 0x1, RZ", "@P0 BRA 0x80", "HGMMA.64x256x16.F32.BF16 R24, gdesc[UR12], R24", "MOV R1, R2",
        "QGMMA.64x128x32.F32.E4M3.E4M3 R24, R24", "@P2 BRA 0x80", "@P1 BRA 0x10", "LDL R2, [R1]", "EXIT"]  # fmt: skip
CASES = [
    ("local memory outside of the loop", GOOD, True),
    ("a load between products", GOOD[:4] + ["LDL.LU R4, [R1+0x8]"] + GOOD[4:], False),
    ("a load before them, in the loop", GOOD[:2] + ["LDL R4, [R1+0x8]"] + GOOD[2:], False),
    ("a store behind them, in the loop", GOOD[:7] + ["@!P0 STL.64 [R1], R4"] + GOOD[7:], False),
    ("no loop", GOOD[:7] + GOOD[8:], False),
    ("no product at all", [each for each in GOOD if "GMMA" not in each], False),
    ("nothing", [], False),
]


def main():
    program = os.path.join(os.path.dirname(os.path.abspath(__file__)), "main_loop.py")
    wrong = []
    for name, code, passes in CASES:
        with tempfile.NamedTemporaryFile("w", suffix=".sass") as file:
            file.write("\t\tFunction : kernel\n" + "".join(f"        /*{16 * i:04x}*/  {each} ;\n" for i, each in enumerate(code)))
            file.flush()
            ended = subprocess.run([sys.executable, program, file.name], capture_output=True, check=False)
        if (ended.returncode == 0) != passes:
            wrong.append(f"{name}: ended with {ended.returncode}, {ended.stderr.decode()}")
    if wrong:
        sys.exit("\n".join(wrong))


main()
