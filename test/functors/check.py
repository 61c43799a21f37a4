# SPDX-FileCopyrightText: The FastMoE authors
# SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
"""Holds the library's verbs and row functors to what is said of them:

    check.py verbs include/fastmoe           which verbs have a tuned twin, and that each has a generic source
    check.py ran include/fastmoe folder      every row functor ran on lanes, by the logs that the tests left in a folder
"""
import pathlib
import re
import sys

# A verb whose body is replaced for an executor, and that executor, or what it has to be. Whoever tunes a verb, or takes a twin
# away, says so here.
TUNED = {
    "multiply_rows": {"derives_from_host", "runs_blocks"},
    "multiply_weight_gradients": {"derives_from_host", "runs_blocks"},
}
GENERIC = {
    "apply_capacity",
    "balance_quantiles",
    "bucket",
    "choose",
    "combine",
    "combine_weights_backward",
    "count_choices",
    "dispatch",
    "importance_loss",
    "jitter",
    "make_plan",
    "measure_load",
    "router_losses",
    "router_losses_backward",
    "sum_groups",
    "update_bias",
    "weigh",
    "weigh_backward",
}
# Functors that stand for others in a concept, or do nothing.
STAND_INS = {"row_archetype", "no_epilogue"}

COMMENT = re.compile(r"//[^\n]*")
TEMPLATE = re.compile(r"template\s*<[^<>]*(?:<[^<>]*>[^<>]*)*>")
TOKEN = re.compile(
    r"\b(?:struct|class)\s+(?P<name>\w+)[^;{}()]*\{"
    r"|(?P<call>FASTMOE_HOST_DEVICE\s+\w+\s+operator\(\)\s*\(\s*Team\s*&)"
    r"|[{}]"
)
VERBS = re.compile(r"namespace verbs\s*\{([^}]*)\}")
IMPLEMENTATION = re.compile(r"template <(\w*)[^>]*>\s*struct implementation<\s*verbs::(\w+)\s*,\s*(\w+)\s*>")


def headers(root):
    for file in sorted(pathlib.Path(root).rglob("*")):
        if file.suffix in (".hpp", ".cuh"):
            yield file.relative_to(root).as_posix(), COMMENT.sub("", file.read_text())


def functors_of(text):
    """Names of the structs that a team of any executor can call."""
    found, open_now, depth = [], [], 0
    for token in TOKEN.finditer(TEMPLATE.sub("", text)):
        if token["call"]:
            if open_now:
                found.append(open_now[-1][0])
        elif token.group() == "}":
            depth -= 1
            while open_now and open_now[-1][1] > depth:
                open_now.pop()
        else:
            depth += 1
            if token["name"]:
                open_now.append((token["name"], depth))
    return [name for name in found if name not in STAND_INS]


def check_verbs(root, tuned=TUNED, generic=GENERIC):
    """Returns what is wrong, one line each; nothing if all is well."""
    wrong, declared, sources, twins = [], {}, set(), {}
    for path, text in headers(root):
        for block in VERBS.findall(text):
            for name in re.findall(r"struct (\w+);", block):
                declared[name] = path
        for kind, name, executor in IMPLEMENTATION.findall(text):
            if executor == "Executor" and kind == "class":
                sources.add(name)
            else:
                twins.setdefault(name, set()).add(kind if executor == "Executor" else executor)
    for name, path in sorted(declared.items()):
        if name not in sources:
            wrong.append(f"{path}: the verb {name} has no generic source")
        if twins.get(name, set()) != tuned.get(name, set()):
            wrong.append(f"{path}: the verb {name} is tuned for {sorted(twins.get(name, []))}; the list says {sorted(tuned.get(name, []))}")
        if name not in tuned and name not in generic:
            wrong.append(f"{path}: the verb {name} is not in the list")
    for name in sorted((sources | set(twins)) - set(declared)):
        wrong.append(f"{name} is implemented but not declared in namespace verbs")
    for name in sorted((set(tuned) | generic) - set(declared)):
        wrong.append(f"the list names {name}, which is no verb")
    return wrong


def check_ran(root, logs):
    """The same for functors: what no log names has not run on lanes."""
    files = [file for file in pathlib.Path(logs).glob("*") if file.is_file()]
    if not files:
        return [f"no logs in {logs}"]
    ran = "\n".join(file.read_text() for file in files)
    return [
        f"{path}: {name} has not run on lanes"
        for path, text in headers(root)
        for name in functors_of(text)
        if not re.search(rf"::{name}\b", ran)
    ]


if __name__ == "__main__":
    what, *arguments = sys.argv[1:]
    problems = {"verbs": check_verbs, "ran": check_ran}[what](*arguments)
    for problem in problems:
        print(problem)
    sys.exit(1 if problems else 0)
