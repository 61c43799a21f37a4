# SPDX-FileCopyrightText: The FastMoE authors
# SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
"""Holds the headers to the floors: check.py include/fastmoe

Includes point down. A file never includes one of its own floor in another folder, no includes form a circle, the
umbrellas stay free of headers that need a further library, and no header drags in a slow or forbidden one. Loops are called
by their full name.
"""
import pathlib
import re
import sys

FLOORS = {
    "core": 0,
    "exec": 1,
    "ops": 2,
    "comm": 2,
    "gemm": 3,
    "routing": 4,
    "transfer": 5,
    "expert": 5,
    "parallel": 6,
    "layer": 7,
    "io": 8,
    "models": 8,
    "": 9,  # the umbrellas
}
# A tuned twin in cuda/ stands where the header does whose verbs it specializes.
TWINS = {
    "cuda_check": "exec",
    "kernel_order": "exec",
    "cuda_memory": "exec",
    "cuda_block": "exec",
    "cuda_cluster": "exec",
    "warpgroup_product": "exec",
    "pinned_memory": "exec",
    "cuda_team": "exec",
    "cuda_executor": "exec",
    "bucket": "ops",
    "rows": "ops",
    "top_k": "routing",
    "cublaslt": "gemm",
    "cublaslt_context": "gemm",
    "cublaslt_product": "gemm",
    "cublaslt_rows": "gemm",
    "cublaslt_groups": "gemm",
    "cublaslt_grouped": "gemm",
    "hopper_gemm": "gemm",
    "nccl": "comm",
}
# These need a library beyond the CUDA Toolkit's headers: included by name, or by another of them.
BY_NAME = {"gemm/onednn.hpp", "comm/mpi.hpp", "cuda/nccl.cuh", "cuda/cublaslt.cuh",
           "cuda/cublaslt_grouped.cuh", "io/safetensors.hpp",
           "io/sharded_checkpoint.hpp", "io/sharded_save.hpp", "io/checkpoint_manifest.hpp"}
UMBRELLAS = {"moe.hpp", "cuda.cuh"}
# Headers that cost every consumer compile time.
SLOW = {"algorithm", "functional", "immintrin.h", "iostream", "random", "ranges", "regex", "sstream"}
LONGEST = 350

INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', re.MULTILINE)
# A loop that is called by its bare name is looked for in the namespaces of users' executors and policies, too.
UNQUALIFIED = re.compile(r"(?<![\w:.>])(?<!void )for_each(_row)?\(")


def folder_of(path):
    """The folder whose rules hold for a header, e.g. "gemm" for cuda/cublaslt.cuh."""
    parts = path.split("/")
    if len(parts) == 1:
        return ""
    if parts[0] == "cuda":
        return TWINS.get(parts[-1].split(".")[0])
    return parts[0]


def check_tree(root):
    """Returns what is wrong, one line each; nothing if all is well."""
    root = pathlib.Path(root)
    wrong = []
    includes = {}
    for file in sorted(root.rglob("*")):
        if file.suffix not in (".hpp", ".cuh"):
            continue
        path = file.relative_to(root).as_posix()
        text = file.read_text()
        say = lambda what: wrong.append(f"{path}: {what}")

        lines = text.splitlines()
        if lines[:2] != [
            "// SPDX-FileCopyrightText: The FastMoE authors",
            "// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception",
        ]:
            say("does not start with the two licence lines")
        if len(lines) < 3 or not lines[2].startswith("/// "):
            say("does not say in its third line what the reader finds")
        if text.count("#pragma once") != 1:
            say("needs #pragma once, once")
        if len(lines) > LONGEST:
            say(f"has {len(lines)} lines; at most {LONGEST}")

        for number, line in enumerate(lines, 1):
            if UNQUALIFIED.search(line.split("//")[0]):
                say(f"line {number} calls for_each without fastmoe::, which may find a user's")

        folder = folder_of(path)
        if folder not in FLOORS:
            say(f"is on no known floor (folder {folder})")
            continue
        includes[path] = []
        for quote, name in INCLUDE.findall(text):
            if quote == '"':
                say(f'includes "{name}"; write <fastmoe/...>')
                continue
            if name in SLOW and folder != "io":
                say(f"includes <{name}>, which is slow to compile")
            if not name.startswith("fastmoe/"):
                continue
            target = name.removeprefix("fastmoe/")
            includes[path].append(target)
            if not (root / target).is_file():
                say(f"includes {target}, which does not exist")
                continue
            below = folder_of(target)
            if target in UMBRELLAS and path not in UMBRELLAS:
                say(f"includes the umbrella {target}")
            elif target.startswith("cuda/") and not path.startswith("cuda/") and path != "cuda.cuh":
                say(f"includes {target}; only cuda.cuh and cuda/ may")
            elif below in FLOORS and below != folder and FLOORS[below] >= FLOORS[folder]:
                say(f"on floor {FLOORS[folder]} includes {target} on floor {FLOORS[below]}")
            if target in BY_NAME and path not in BY_NAME:
                say(f"includes {target}, which is for users to include by name")

    # Circles: a depth-first walk that meets a file it has not left yet.
    done, open_now = set(), []

    def walk(path):
        if path in done:
            return
        if path in open_now:
            wrong.append("circle: " + " -> ".join(open_now[open_now.index(path):] + [path]))
            return
        open_now.append(path)
        for target in includes.get(path, []):
            walk(target)
        open_now.pop()
        done.add(path)

    for path in includes:
        walk(path)

    # The umbrella covers all that needs no further library and no nvcc.
    if "moe.hpp" in includes:
        reached, todo = set(), ["moe.hpp"]
        while todo:
            for target in includes.get(todo.pop(), []):
                if target not in reached:
                    reached.add(target)
                    todo.append(target)
        # What a header that is included by name, or one of cuda/, is made of need not be in the umbrella.
        parts, todo = set(), [path for path in includes if path in BY_NAME or path.endswith(".cuh")]
        while todo:
            fresh = set(includes.get(todo.pop(), [])) - parts
            parts |= fresh
            todo += fresh
        for target in sorted(reached & (BY_NAME | {p for p in includes if p.endswith(".cuh")})):
            wrong.append(f"moe.hpp: reaches {target}")
        for path in sorted(includes):
            if path.endswith(".hpp") and path not in reached | BY_NAME | UMBRELLAS | parts and not path.startswith("io/"):
                wrong.append(f"moe.hpp: does not reach {path}")
    else:
        wrong.append("moe.hpp: is missing")
    return wrong


if __name__ == "__main__":
    problems = check_tree(sys.argv[1])
    for problem in problems:
        print(problem)
    sys.exit(1 if problems else 0)
