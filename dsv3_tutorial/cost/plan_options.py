"""The planner's options, read strictly: what cannot be read is said with what to write instead."""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

from dsv3_tutorial.config import ModelConfig, preset_names
from dsv3_tutorial.cost import cluster_file
from dsv3_tutorial.cost.assumptions import Assumptions
from dsv3_tutorial.cost.layout import Job, Layout, PlanError
from dsv3_tutorial.cost.serving_target import Target
from dsv3_tutorial.hardware import Cluster

_UNITS = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


@dataclass(frozen=True)
class Task:
    """All that was asked for. layout None: the best one; removed: decisions taken back."""

    name: str
    cfg: ModelConfig
    cluster: Cluster
    job: Job
    layout: Layout | None
    assume: Assumptions
    removed: tuple[str, ...]
    target: Target


def task(options: argparse.Namespace) -> Task:
    """The options as numbers. Raises what says which of them to change."""
    name, cfg = model(options.model)
    rent = [] if options.rent is None else [f"rent={options.rent}"]
    sizes = ("seq_len", "sequences")
    numbers = {n: number(getattr(options, n), n.replace("_", "-"), True) for n in sizes}
    return Task(
        name,
        cfg,
        cluster_file.read(options.cluster),
        Job(number(options.tokens, "tokens"), **numbers),
        None if options.layout == "auto" else Layout.read(options.layout),
        Assumptions.parse([*options.assume, *rent]),
        tuple(name for given in options.without for name in given.split(",") if name),
        Target(
            context=number(options.context, "context", True),
            tokens_per_second=number(options.user_rate, "user-rate"),
        ),
    )


def parser(decisions: tuple[str, ...]) -> argparse.ArgumentParser:
    """Of `python -m dsv3_tutorial plan`; values are text, and `number` reads them."""
    made = argparse.ArgumentParser(
        prog="python -m dsv3_tutorial plan",
        description="What training a model costs on a cluster, and what it then serves.",
    )
    add = made.add_argument
    add("model", metavar="MODEL", help=f"{', '.join(preset_names())}, or a config.json")
    add("--cluster", required=True, metavar="CHIP:COUNT", help="h800:2048, or a JSON file")
    add("--tokens", required=True, metavar="T", help="to train on: 14.8T, 500B")
    add("--layout", default="auto", metavar="L", help="auto (default), a name, or a JSON file")
    add(
        "--without",
        action="append",
        default=[],
        metavar="D[,D]",
        help=f"take decisions back: {', '.join(decisions)}",
    )
    add("--seq-len", default="4096", metavar="N", help="tokens of a sequence (4096)")
    add("--sequences", default="15360", metavar="N", help="sequences of a step (15360)")
    add("--rent", metavar="X", help="dollars a GPU and hour (2.0)")
    add("--assume", action="append", default=[], metavar="NAME=VALUE", help="see --assumptions")
    add("--assumptions", action="store_true", help="say of each assumption where it is from")
    add("--serve", action="store_true", help="what the model serves from these chips as well")
    add("--context", default="4989", metavar="N", help="tokens in a served cache (4989)")
    add("--user-rate", default="20", metavar="R", help="tokens a second that a user sees (20)")
    add("--tornado", action="store_true", help="remove and add each decision by itself")
    add("--short", action="store_true", help="the plan in a few lines")
    add("--json", action="store_true", help="JSON on standard output")
    return made


def number(text: str, name: str, whole: bool = False) -> float:
    """A number above 0 with a unit of K, M, B or T, as 14.8T. Raises PlanError."""
    unit = text[-1:].upper()
    body = text[:-1] if unit in _UNITS else text
    try:
        value = float(body) * _UNITS.get(unit, 1)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0) or (whole and value != round(value)):
        kind = "whole number" if whole else "number"
        raise PlanError(
            f"--{name} {text!r} is no {kind} above 0: nothing can be counted from it. Write for "
            f"example {'--tokens 14.8T' if name == 'tokens' else f'--{name} 4096'}."
        )
    return round(value) if whole else value


def joined(argv: list[str]) -> list[str]:
    """The arguments with "--tokens -5T" as "--tokens=-5T": a wrong number is no unknown option."""
    found: list[str] = []
    for word in argv:
        negative = word[:1] == "-" and word[1:2] in set(".0123456789")
        if negative and found and found[-1].startswith("--") and "=" not in found[-1]:
            found[-1] += f"={word}"
        else:
            found.append(word)
    return found


def model(name: str) -> tuple[str, ModelConfig]:
    """A preset, a config.json or its folder, and what to call it. Raises ConfigError."""
    if name in preset_names() or not (name.endswith(".json") or Path(name).exists()):
        return name, ModelConfig.named(name)
    path = Path(name)
    folder = path if path.is_dir() else path.parent
    called = folder.resolve().name if path.is_dir() or path.name == "config.json" else path.stem
    return called, ModelConfig.from_json(path)
