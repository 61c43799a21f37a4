# SPDX-FileCopyrightText: The FastMoE authors
# SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
"""Every benchmark is run by scripts/bench and explained in docs/performance.md."""
import pathlib
import re
import sys

root = pathlib.Path(__file__).resolve().parents[2]
programs = {f.stem for f in (root / "benchmark").glob("*.cpp")} - {"table"}
listed = re.search(r"names=\(([a-z_ ]+)\)$", (root / "scripts/bench").read_text(), re.M)
run = set(listed[1].split()) if listed else set()
document = (root / "docs/performance.md").read_text()

wrong = [f"scripts/bench does not run benchmark/{name}.cpp" for name in sorted(programs - run)]
wrong += [f"scripts/bench runs {name}, which does not exist" for name in sorted(run - programs)]
wrong += [f"docs/performance.md does not name {name}.cpp" for name in sorted(programs) if f"`{name}.cpp`" not in document]
if wrong:
    sys.exit("\n".join(wrong))
print(f"{len(programs)} benchmarks are run and explained")
