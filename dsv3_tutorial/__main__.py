"""`python -m dsv3_tutorial`: what this machine is, what it measures, and what an answer is worth.

Each command loads only what it needs; `--help` does not load torch.
"""

import argparse
import importlib
import sys
from collections.abc import Callable
from importlib.util import find_spec

# Each has main(argv) and takes --out FOLDER. Listed once its module is there.
BENCHES = {
    "machine": "dsv3_tutorial.bench.machine",
    "attention": "dsv3_tutorial.bench.attention",
    "moe": "dsv3_tutorial.bench.moe",
    "learning": "dsv3_tutorial.bench.learning",
    "baselines": "dsv3_tutorial.bench.baselines",
    "clinic": "dsv3_tutorial.bench.clinic",
    "balance": "dsv3_tutorial.bench.balance",
    "fp8": "dsv3_tutorial.bench.fp8",
    "precision": "dsv3_tutorial.bench.precision",
    "gradients": "dsv3_tutorial.bench.gradients",
    "network": "dsv3_tutorial.bench.network",
    "inference": "dsv3_tutorial.bench.inference",
    "quality": "dsv3_tutorial.bench.quality",
    "codesign": "dsv3_tutorial.bench.codesign",
    "stalls": "dsv3_tutorial.bench.stalls",
}


def main(argv: list[str] | None = None) -> int:
    """Run one command and give its exit status.

    1 with the message, without a traceback, for an error of this package's own; 2 for wrong usage
    (argparse exits); 130 for an interrupt. Anything else is a bug, and keeps its traceback.
    """
    parser = _parser()
    options, options.rest = parser.parse_known_args(argv)
    own = options.run in (_train, _generate, _quantize, _plan, _paper)  # have their own options
    takes_more = own or (options.run is _bench and len(options.names) == 1)
    if options.rest and not takes_more:
        parser.error(f"unrecognized arguments: {' '.join(options.rest)}")
    try:
        return options.run(options) or 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if not _is_ours(error):
            raise
        print(error, file=sys.stderr)
        return 1


def benches() -> dict[str, str]:
    """The benchmarks that are here: {name: module}."""
    return {name: module for name, module in BENCHES.items() if find_spec(module)}


def _is_ours(error: Exception) -> bool:
    """Whether this package raised it on purpose: our error class, or a ValueError in our code."""
    if type(error).__module__.partition(".")[0] == "dsv3_tutorial":
        return True
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    raised_in = "" if place is None else place.tb_frame.f_globals.get("__name__", "")
    return type(error) is ValueError and raised_in.partition(".")[0] == "dsv3_tutorial"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m dsv3_tutorial", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    doctor = _command(commands, "doctor", _doctor, "what this machine is, and what runs on it")
    doctor.add_argument("--json", action="store_true", help="JSON on standard output")
    doctor.add_argument("--quick", action="store_true", help="measure nothing")

    bench = _command(
        commands, "bench", _bench, "measure, and keep receipts; one NAME takes its own options"
    )
    bench.add_argument("names", nargs="*", metavar="NAME", help="which (default: all)")
    bench.add_argument("--list", action="store_true", help="say which there are, and run none")
    bench.add_argument("--out", metavar="FOLDER", help="receipts go here (default: data/measured)")

    for name, run, about in (
        ("train", _train, "train a model on real text"),
        ("generate", _generate, "continue a text with a trained model"),
        ("quantize", _quantize, "write a checkpoint in FP8, INT8 or INT4, and say what it costs"),
        ("plan", _plan, "what a model costs to train on a cluster, and what it then serves"),
        ("paper", _paper, "every number that the papers print, beside ours"),
    ):
        commands.add_parser(name, add_help=False, help=about).set_defaults(run=run)

    probe = _command(commands, "probe", _probe, "find out how this machine's FP8 matmul sums")
    probe.add_argument("--out", metavar="FOLDER", help="receipts go here (default: data/measured)")
    probe.add_argument("--json", action="store_true", help="JSON on standard output")

    grade = _command(commands, "grade", _grade, "run submitted notebooks again and judge them")
    grade.add_argument("files", nargs="+", metavar="FILE")
    grade.add_argument("--csv", action="store_true", help="one row an exercise, as CSV")
    return parser


def _command(commands, name: str, run: Callable, about: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=about, description=about)
    parser.set_defaults(run=run, parser=parser)
    return parser


def _doctor(options: argparse.Namespace) -> int:
    from dsv3_tutorial.bench import doctor

    flags = {"--json": options.json, "--quick": options.quick}
    return doctor.main([flag for flag, given in flags.items() if given])


def _bench(options: argparse.Namespace) -> int:
    known = benches()
    unknown = [name for name in options.names if name not in known]
    if unknown:
        options.parser.error(f"no benchmark {', '.join(unknown)}; there is {', '.join(known)}")
    if options.list:
        print("\n".join(known))
        return 0
    out = ["--out", options.out] if options.out else []
    for name in options.names or known:
        importlib.import_module(known[name]).main([*options.rest, *out])  # its own options
    return 0


def _train(options: argparse.Namespace) -> int:
    from dsv3_tutorial.train import run

    return run.main(options.rest)  # its own options


def _generate(options: argparse.Namespace) -> int:
    from dsv3_tutorial.inference import command

    return command.main(options.rest)  # its own options


def _quantize(options: argparse.Namespace) -> int:
    from dsv3_tutorial.bench import quantize_report

    return quantize_report.main(options.rest)  # its own options


def _paper(options: argparse.Namespace) -> int:
    from dsv3_tutorial.bench import paper

    return paper.main(options.rest)  # its own options


def _plan(options: argparse.Namespace) -> int:
    from dsv3_tutorial.cost import plan_command

    return plan_command.main(options.rest)  # its own options


def _probe(options: argparse.Namespace) -> int:
    from dsv3_tutorial.bench import probe

    out = ["--out", options.out] if options.out else []
    return probe.main([*out, *(["--json"] if options.json else [])])


def _grade(options: argparse.Namespace) -> int:
    from dsv3_tutorial.learn import grade

    return grade.main([*options.files, *(["--csv"] if options.csv else [])])


if __name__ == "__main__":
    sys.exit(main())
