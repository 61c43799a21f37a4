# SPDX-FileCopyrightText: The FastMoE authors
# SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
"""Code in the documents is cut from files that are compiled. A block

    <!-- examples/file.cpp [tag] -->
    ```cpp

must equal what stands in that file between two lines `// [tag]`, but for its indentation. A block of cmake lies between two
lines `# [tag]`. With --write the blocks are filled in.
"""
import pathlib
import re
import sys
import textwrap

root = pathlib.Path(__file__).resolve().parents[2]
block = re.compile(r"<!-- (\S+) \[(\w+)\] -->\n```(cpp|cmake)\n(.*?)```\n", re.S)


def cut(name, tag):
    parts = re.split(rf"^ *(?://|#) \[{tag}\]\n", (root / name).read_text(), flags=re.M)
    if len(parts) != 3:
        sys.exit(f"{name}: expected two lines `[{tag}]`, found {len(parts) - 1}")
    return textwrap.dedent(parts[1]).strip("\n") + "\n"


def main():
    write, checked, wrong = "--write" in sys.argv, 0, []
    for document in [root / "README.md", *sorted((root / "docs").glob("*.md"))]:
        text = document.read_text()

        def fill(found):
            nonlocal checked
            checked += 1
            code = cut(found[1], found[2])
            if code != found[4]:
                wrong.append(f"{document.name}: {found[1]} [{found[2]}]")
            return f"<!-- {found[1]} [{found[2]}] -->\n```{found[3]}\n{code}```\n"

        filled = block.sub(fill, text)
        if len(re.findall(r"```(?:cpp|cmake)", text)) != len(block.findall(text)):
            wrong.append(f"{document.name}: a block of code that names no file")
        if write:
            document.write_text(filled)
    if wrong and not write:
        sys.exit("These differ from the code; run test/docs/snippets.py --write:\n" + "\n".join(wrong))
    if checked < 4:
        sys.exit(f"only {checked} blocks of code found; the pattern no longer matches the documents")
    print(f"{checked} blocks of code are as in the files they come from")


main()
