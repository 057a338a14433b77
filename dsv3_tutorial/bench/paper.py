"""`python -m dsv3_tutorial paper`: every printed number beside ours, and what does not fit.

A number is computed again by our code, within a stated tolerance, or quoted with the reason why
nothing here can compute it. docs/paper.md is what `--markdown` prints.
"""

import argparse
from functools import cache

from dsv3_tutorial import paper
from dsv3_tutorial.bench import (
    paper_fp8,
    paper_model,
    paper_network,
    paper_planner,
    paper_serving,
    paper_text,
    paper_training,
)
from dsv3_tutorial.bench.paper_verdict import Reproduced

ONLY = {
    "wrong": "what differs",
    "reproduced": "what is computed",
    "quoted": "what is not",
}


def main(argv: list[str] | None = None) -> int:
    """Print the table; exit status 0."""
    parser = argparse.ArgumentParser(prog="python -m dsv3_tutorial paper", description=__doc__)
    parser.add_argument("--markdown", action="store_true", help="as the page docs/paper.md")
    choices = "; ".join(f"{name}: {about}" for name, about in ONLY.items())
    parser.add_argument("--only", choices=tuple(ONLY), help=choices)
    options = parser.parse_args(argv)
    print_page = paper_text.markdown if options.markdown else paper_text.text
    print(print_page(reproduced(), quoted(), predicted(), options.only), end="")
    return 0


@cache
def _reproduced() -> tuple[Reproduced, ...]:
    modules = (paper_model, paper_training, paper_network, paper_serving, paper_fp8)
    modules = (paper_planner, *modules)  # whose rows give way to a shorter calculation
    found = {check.row.id: check for module in modules for check in module.checks()}
    return tuple(found[row.id] for row in paper.all_rows() if row.id in found)


def reproduced() -> list[Reproduced]:
    """Every number that our code computes, in the order of the files of data/paper."""
    return list(_reproduced())


def predicted() -> list[Reproduced]:
    """What the planner says of published runs; some of it is in `reproduced` by another way."""
    return paper_planner.checks()


def quoted() -> list[paper.Row]:
    """Every number that nothing here can compute; each says why."""
    return [row for row in paper.all_rows() if row.quoted]
