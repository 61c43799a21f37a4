# SPDX-FileCopyrightText: The FastMoE authors
# SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
"""The picture in docs/architecture.md names every header, in its folder and on its floor, and none that does not exist."""
import pathlib
import re
import sys

root = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(root / "test/floors"))
import check  # the floors as the headers are held to them


def named(text):
    """The headers of the first indented block, as paths below include/fastmoe, and the floor that each folder is given."""
    block = re.search(r"^    include/fastmoe\n((?:(?:    .*)?\n)+)", text, re.M)
    if not block:
        sys.exit("docs/architecture.md has no block that begins with '    include/fastmoe'")
    headers, floors, folder = set(), {}, ""
    for line in block[1].splitlines():
        begin = re.match(r"      (\w+)/ +(\d|-)  ", line)
        if begin:
            folder = begin[1]
            if begin[2] != "-":
                floors[folder] = int(begin[2])
        for name in re.findall(r"\w+\.(?:hpp|cuh)\b", line):
            path = f"{folder}/{name}" if folder else name
            if path in headers:
                sys.exit(f"docs/architecture.md names {path} twice")
            headers.add(path)
    return headers, floors


def main():
    headers, floors = named((root / "docs/architecture.md").read_text())
    include = root / "include/fastmoe"
    there = {f.relative_to(include).as_posix() for f in include.rglob("*") if f.suffix in (".hpp", ".cuh")}
    wrong = [f"does not name {path}" for path in sorted(there - headers)]
    wrong += [f"names {path}, which does not exist" for path in sorted(headers - there)]
    wrong += [
        f"puts {folder}/ on floor {floor}; it is on floor {check.FLOORS.get(folder)}"
        for folder, floor in floors.items()
        if check.FLOORS.get(folder) != floor
    ]
    if wrong:
        sys.exit("docs/architecture.md\n  " + "\n  ".join(wrong))
    print(f"{len(there)} headers are named in docs/architecture.md")


main()
