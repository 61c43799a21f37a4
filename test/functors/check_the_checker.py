# SPDX-FileCopyrightText: The FastMoE authors
# SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
"""Shows that check.py finds what it is there to find, and nothing in a good tree."""
import pathlib
import sys
import tempfile

from check import COMMENT, check_ran, check_verbs, functors_of

VERBS = """
namespace verbs {
struct move;
struct count;
} // namespace verbs

template <class Executor>
struct implementation<verbs::move, Executor> {};
template <class Executor>
struct implementation<verbs::count, Executor> {};
template <>
struct implementation<verbs::count, host_executor> {};
"""
TUNED, GENERIC = {"count": {"host_executor"}}, {"move"}
VERB_FAULTS = [
    (VERBS.replace("count, host_executor", "move, host_executor"), "the verb move is tuned for ['host_executor']; the list says []"),
    (VERBS.replace("count, host_executor", "move, host_executor"), "the verb count is tuned for []; the list says ['host_executor']"),
    (VERBS.replace("host_executor", "cuda_executor"), "the verb count is tuned for ['cuda_executor']"),
    (VERBS.replace("<verbs::move, Executor>", "<verbs::sort, Executor>"), "the verb move has no generic source"),
    (VERBS.replace("class Executor", "runs_blocks Executor"), "the verb move has no generic source"),
    (VERBS.replace("class Executor", "runs_blocks Executor"), "the verb move is tuned for ['runs_blocks']"),
    (VERBS.replace("<verbs::move, Executor>", "<verbs::sort, Executor>"), "sort is implemented but not declared"),
    (VERBS.replace("struct move;", "struct move;\nstruct weigh;"), "the verb weigh is not in the list"),
    (VERBS.replace("struct move;", ""), "the list names move, which is no verb"),
]

FUNCTORS = """
template <class Real, class Scale = unit<Real>>
struct outer {
    struct inner {
        void no_functor(int) const {}
    };
    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t row) const
    {
        if (row) { team.sync(); }
    }
};
struct elements {
    FASTMOE_HOST_DEVICE void operator()(int64_t i) const {}
};
// struct commented { FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t) const {} };
struct host_only {
    template <class Team>
    void operator()(Team& team, int64_t) const {}
};
struct no_epilogue {
    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team&, int64_t) const noexcept {}
};
struct second : elements {
    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team,
                                        int64_t) const {}
};
"""

failures = []


def expect(condition, what):
    if not condition:
        failures.append(what)


def in_folder(files, run):
    with tempfile.TemporaryDirectory() as directory:
        for name, text in files.items():
            path = pathlib.Path(directory, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return run(pathlib.Path(directory))


def verb_problems(text):
    return in_folder({"verbs.hpp": text}, lambda root: check_verbs(root, TUNED, GENERIC))


def ran_problems(log):
    files = {"include/rows.hpp": FUNCTORS} | ({"logs/a": log, "logs/b": ""} if log is not None else {"logs/c/d": ""})
    return in_folder(files, lambda root: check_ran(root / "include", root / "logs"))


expect(verb_problems(VERBS) == [], f"the good tree is refused: {verb_problems(VERBS)}")
for text, word in VERB_FAULTS:
    expect(any(word in p for p in verb_problems(text)), f"not found: '{word}'; found: {verb_problems(text)}")

found = functors_of(COMMENT.sub("", FUNCTORS))
expect(found == ["outer", "second"], f"other functors are found: {found}")
both = "fastmoe::v0_1::detail::outer<float, fastmoe::v0_1::unit<float>>\n"
expect(ran_problems(both + "fastmoe::v0_1::detail::row<double, fastmoe::v0_1::detail::second>") == [], "a name within a name does not count")
expect(ran_problems(both) == ["rows.hpp: second has not run on lanes"], f"a functor that did not run: {ran_problems(both)}")
expect(len(ran_problems("fastmoe::outermost\nfastmoe::second_best")) == 2, "a longer name counts")
expect(any("no logs" in p for p in ran_problems(None)), "no logs at all are no problem")
for failure in failures:
    print(failure)
sys.exit(1 if failures else 0)
