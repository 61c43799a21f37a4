# SPDX-FileCopyrightText: The FastMoE authors
# SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
"""Holds the tests to the filter by which ctest finds those of the GPU: check_columns.py test

Reads the sources as nvcc would, with FASTMOE_TEST_CUDA, so that neither it nor a GPU is needed. Each program that is registered with
a column of CUDA has a case that the filter finds. A case that uses the GPU is found, and none that does not.
"""
import fnmatch
import pathlib
import re
import sys

COMMENT = re.compile(r"""//[^\n]*|/\*.*?\*/|'(?:[^'\\\n]|\\.)'|("(?:[^"\\\n]|\\.)*")""", re.DOTALL)
DIRECTIVE = re.compile(r"\s*#\s*(if|ifdef|ifndef|elif|else|endif|define)\b(.*)", re.DOTALL)
CONDITION = re.compile(r"^\s*(!?)\s*defined\s*\(?\s*FASTMOE_TEST_CUDA\s*\)?\s*$")
ALIAS = re.compile(r"\busing\s+(\w+)\s*=\s*([^;]+);")
CASE = re.compile(r"\b(TEST_CASE(?:_TEMPLATE)?)\s*\(")
WORD = re.compile(r"[A-Za-z_]\w*")
EXECUTOR = "cuda_executor"


class wrong_source(Exception):
    pass


def lines_of(text):
    """Without comments and characters, continued lines as one."""
    text = COMMENT.sub(lambda m: m[1] or " ", text)
    return text.replace("\\\n", " ").split("\n")


def read(text, cuda):
    """The lines that remain, each with whether it stands in a part that only FASTMOE_TEST_CUDA has, and the macros."""
    kept, macros, open_now = [], {}, []  # of each #if: whether it holds (None: either), and whether it is about CUDA
    for line in lines_of(text):
        found = DIRECTIVE.match(line)
        if not found:
            if all(holds is not False for holds, _ in open_now):
                kept.append((line, any(special for _, special in open_now)))
            continue
        word, rest = found.groups()
        if word == "define":
            name = re.match(r"\s*(\w+)(\(([^)]*)\))?\s*(.*)", rest, re.DOTALL)
            if all(holds is not False for holds, _ in open_now):
                parameters = None if name[2] is None else [p.strip() for p in name[3].split(",")]
                macros[name[1]] = (parameters, name[4])
        elif word in ("if", "ifdef", "ifndef"):
            said = CONDITION.match(rest) if word == "if" else None
            if said is None and word == "if" and re.search(r"(?<!!)defined\s*\(?\s*FASTMOE_TEST_CUDA", rest) and "||" in rest:
                open_now.append((True if cuda else None, False))
            elif said is None:
                plain = rest.strip() == "FASTMOE_TEST_CUDA"
                holds = None if not plain else cuda == (word == "ifdef")
                open_now.append((holds, plain and word == "ifdef"))
            else:
                open_now.append((cuda != bool(said[1]), said[1] == ""))
        elif word in ("elif", "else"):
            holds, special = open_now.pop()
            about_cuda = holds is not None
            open_now.append((not holds if about_cuda else None, about_cuda and not special and holds is False))
        elif open_now:
            open_now.pop()
    return kept, macros


def closing(text, at):
    """The place of the bracket that closes the one at a place."""
    depth, quoted = 0, False
    while at < len(text):
        c = text[at]
        if quoted and c == "\\":
            at += 1
        elif c == '"':
            quoted = not quoted
        elif not quoted and c in "([{":
            depth += 1
        elif not quoted and c in ")]}":
            depth -= 1
            if depth == 0:
                return at
        at += 1
    raise wrong_source("a bracket is not closed")


def arguments(text):
    """Parts between commas that no bracket and no string holds; < and > hold as brackets do."""
    parts, depth, quoted, now = [], 0, False, ""
    for c in text:
        quoted ^= c == '"'
        if not quoted:
            depth += (c in "([{<") - (c in ")]}>")
        if c == "," and depth == 0 and not quoted:
            parts.append(now.strip())
            now = ""
        else:
            now += c
    return parts + [now.strip()]


def calls_of_cases(text, macros):
    """The text, with macros that hold test cases written out."""
    holders = {name for name, (_, body) in macros.items() if CASE.search(body)}
    grown = True
    while grown:
        more = {name for name, (_, body) in macros.items() if set(WORD.findall(body)) & holders} - holders
        holders |= more
        grown = bool(more)
    for _ in range(8):
        found = next((m for m in re.finditer(r"\b(\w+)\s*\(", text) if m[1] in holders and macros[m[1]][0] is not None), None)
        if found is None:
            return text
        end = closing(text, found.end() - 1)
        parameters, body = macros[found[1]]
        given = dict(zip(parameters, arguments(text[found.end():end])))
        written = WORD.sub(lambda m: given.get(m[0], m[0]), body)
        text = text[:found.start()] + written + text[end + 1:]
    return text


def mentions(text, names, deep=0):
    """Whether the executor is in the text, or in what its macros and aliases stand for."""
    return EXECUTOR in text or deep < 8 and any(
        names[word] != text and mentions(names[word], names, deep + 1) for word in set(WORD.findall(text)) if word in names)


def string_of(text, macros):
    """Literals side by side, macros among them."""
    out = ""
    for literal, word in re.findall(r'"((?:[^"\\]|\\.)*)"|([A-Za-z_]\w*)', text):
        out += literal if not word else string_of(macros[word][1], macros) if word in macros else ""
    return out


def cases_of(text, shared, cuda):
    """(name with its types as doctest has it, whether the case uses the GPU) for each case of a program."""
    kept, own = read(text, cuda)
    macros = shared | own
    aliases = {}
    for name, of in ALIAS.findall("\n".join(line for line, _ in kept)):
        aliases[name] = of
    marked = "\n".join(("\x01" if special and line.strip() else "") + line for line, special in kept)
    marked = calls_of_cases(marked, macros)
    names = {name: body for name, (_, body) in macros.items()} | aliases
    out = []
    for found in CASE.finditer(marked):
        end = closing(marked, found.end() - 1)
        parts = arguments(marked[found.end():end].replace("\x01", ""))
        begin = marked.index("{", end)
        body = marked[begin:closing(marked, begin) + 1]
        types = ", ".join(parts[2:])
        has_executor = mentions(types, names)
        special = marked[marked.rfind("\n", 0, found.start()) + 1:found.start() + 1].startswith("\x01")
        uses = cuda and (has_executor or special or "\x01" in body or mentions(body, aliases))
        out.append((string_of(parts[0], macros) + (f"<{EXECUTOR}>" if has_executor else ""), uses))
    return out


def check(root):
    """Returns what is wrong, one line each; nothing if all is well."""
    root = pathlib.Path(root)
    cmake = (root / "CMakeLists.txt").read_text()
    filters = re.search(r'set\(devices cuda "([^"]+)"\)', cmake)
    typed = re.search(r'file\(STRINGS "\$\{source\}" typed REGEX "([^"]+)"\)', cmake)
    own_heap = re.search(r'file\(STRINGS "\$\{source\}" own_heap REGEX "([^"]+)"\)', cmake)
    floors = re.search(r"^set\(floors ([^)]*)\)", cmake, re.MULTILINE)
    if not (filters and typed and own_heap and floors):
        return ["CMakeLists.txt: the filter, or what it is for, is not where it was"]
    patterns = [p.lower() for p in filters[1].split(",")]
    typed, own_heap = (re.compile(m[1].replace("\\\\", "\\")) for m in (typed, own_heap))

    def is_found(name):
        return any(fnmatch.fnmatchcase(name.lower(), p) for p in patterns)

    wrong, headers = [], {}
    files = [file for floor in floors[1].split() if floor != "examples" for file in sorted((root / floor).glob("*.cpp"))]
    for cuda in (True, False):
        headers[cuda] = {}
        for header in sorted(root.glob("*/*.hpp")):
            headers[cuda] |= read(header.read_text(), cuda)[1]
    for file in files:
        text = file.read_text()
        path = file.relative_to(root).as_posix()
        try:
            if not typed.search(text) or own_heap.search(text):
                continue
            cases = cases_of(text, headers[True], True)
            if not any(is_found(name) for name, _ in cases):
                wrong.append(f"{path}: has a column of CUDA of which the filter finds no case")
            for name, uses in cases:
                if uses and not is_found(name):
                    wrong.append(f"{path}: '{name}' uses the GPU, and the filter does not find it")
                if is_found(name) and not uses:
                    wrong.append(f"{path}: '{name}' is found by the filter, and does not use the GPU")
            for name, _ in cases_of(text, headers[False], False):
                if is_found(name):
                    wrong.append(f"{path}: '{name}' says that it is the GPU's, also without one")
        except (wrong_source, ValueError) as error:
            wrong.append(f"{path}: cannot be read: {error}")
    return wrong


if __name__ == "__main__":
    problems = check(sys.argv[1])
    for problem in problems:
        print(problem)
    sys.exit(1 if problems else 0)
