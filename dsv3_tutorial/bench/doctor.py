"""What this machine is, what on it is usable and why not, and how the course's parts run on it.

`report` is a plain dictionary, for tools; `render` is the same in words. Nothing that is missing is
an error: the course runs on a laptop without a GPU. Only a torch that does not load stops it.
"""

import argparse
import contextlib
import json
import platform
import sys
from collections.abc import Mapping
from typing import Any

from dsv3_tutorial import receipts
from dsv3_tutorial.bench import host, parts

_GIB = 2**30


def report(quick: bool = False, seconds: float = 3.0) -> dict[str, Any]:
    """Everything the doctor finds, as JSON holds it; quick leaves the measuring out.

    Keys: machine, parts ({name: version, detail, usable, reason, do}), measured, receipts, course.
    """
    found, kept = parts.probe(), _receipts()
    if quick:
        measured = {"reason": "not measured: --quick was given"}
    elif found["torch"]["usable"]:
        measured = _measure(seconds)
    else:
        measured = {"reason": "torch does not load"}
    return {
        "machine": _machine(),
        "parts": found,
        "measured": measured,
        "receipts": kept,
        "course": course(found, kept),
    }


def course(found: Mapping[str, Any], kept: Mapping[str, Any]) -> list[dict[str, str]]:
    """How each part of the course that depends on the machine runs here, one row each.

    how is "measured" (here, live), "emulated", "receipts" (recorded elsewhere), "derived" (from the
    cost model, since nobody has measured it) or "not here".
    """
    live = ("measured", "live, on this machine")
    if not found["torch"]["usable"]:
        live = ("not here", "torch does not load")
    learning = live
    if found["torch"]["usable"] and "learning" in kept:
        learning = ("receipts", "recorded curves, and one short run live over them")
    rows = [
        ("00_start_here", "this machine's roofline", live),
        ("01_latent_attention", "decode time against context, in PyTorch", live),
        ("01_latent_attention", "decode kernel's speed", _kernel_speed(found, kept)),
        ("01_latent_attention", "decode kernel's correctness", _kernel_proof(found)),
        ("01_latent_attention", "training curves", learning),
    ]
    names = ("lesson", "part", "how", "why")
    return [dict(zip(names, (lesson, part, *how), strict=True)) for lesson, part, how in rows]


def _kernel_speed(found: Mapping[str, Any], kept: Mapping[str, Any]) -> tuple[str, str]:
    if found["GPU"]["usable"] and found["Triton"]["usable"]:
        return "measured", "Triton, live, on this GPU"
    here = "PyTorch's reference runs here" if found["torch"]["usable"] else "nothing runs here"
    if kept.get("attention", {}).get("gpu"):
        return "receipts", f"{here}; Triton's numbers come from data/measured"
    return "derived", f"{here}; no GPU receipt yet, the cost model stands for it"


def _kernel_proof(found: Mapping[str, Any]) -> tuple[str, str]:
    if found["GPU"]["usable"] and found["Triton"]["usable"]:
        return "measured", "Triton against the reference, on this GPU"
    if found["Triton"]["emulates"]:
        return "emulated", "Triton's interpreter; compiled for Hopper, not run"
    return "not here", "Triton does not load"


def render(found: Mapping[str, Any]) -> str:
    """The report in words, for a terminal."""
    text = ["This machine"]
    text += [f"  {name:<20}{value}" for name, value in _machine_words(found["machine"])]
    text += ["", "What is usable"]
    for name, part in found["parts"].items():
        text.append(f"  {name:<20}{'yes' if part['usable'] else 'no '}  {_part_words(part)}")
    text += ["", "Measured ceilings", *(f"  {line}" for line in _measured_words(found["measured"]))]
    text += ["", "Receipts (data/measured)"]
    text += [f"  {name:<20}{known['caption']}" for name, known in found["receipts"].items()]
    text += [] if found["receipts"] else ["  none yet; python -m dsv3_tutorial bench writes them"]
    text += ["", "How the course runs here"]
    for row in found["course"]:
        text.append(f"  {row['lesson']:<20}{row['part']:<42}{row['how']:<10}{row['why']}")
    return "\n".join(text)


def main(argv: list[str] | None = None) -> int:
    """`doctor`: print the report. 0 where the course can run, 1 where torch does not load."""
    parser = argparse.ArgumentParser(prog="dsv3_tutorial doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="the report as JSON, and nothing else")
    parser.add_argument("--quick", action="store_true", help="measure nothing")
    options = parser.parse_args(argv)
    with contextlib.redirect_stdout(sys.stderr):  # what a library prints while it loads
        found = report(options.quick)
    print(json.dumps(found, indent=2, allow_nan=False) if options.json else render(found))
    return 0 if found["parts"]["torch"]["usable"] else 1


def _measure(seconds: float) -> dict[str, Any]:
    try:
        from dsv3_tutorial.bench import machine

        found = machine.measure(seconds)
    except Exception as error:  # the doctor reports on a sick machine; it does not fall ill
        return {"reason": f"measuring failed: {type(error).__name__}: {error}"}
    return {
        "device": found.device,
        "threads": found.threads,
        "copy_bytes_per_second": found.copy.value,
        "flops_per_second": {name: rate.value for name, rate in found.matrix.items()},
        "missing": found.missing,
        "words": machine.lines(found),
    }


def _receipts() -> dict[str, dict[str, Any]]:
    found = {}
    for name in receipts.names():
        try:
            rows = receipts.read(name)
        except receipts.ReceiptError as error:
            found[name] = {"count": 0, "gpu": False, "caption": str(error).replace("\n", " ")}
            continue
        gpu = any(row.device_kind == "gpu" for row in rows)
        found[name] = {"count": len(rows), "gpu": gpu, "caption": receipts.caption(rows)}
    return found


def _machine() -> dict[str, Any]:
    return {
        "system": platform.platform(),
        "python": platform.python_version(),
        "processor": host.cpu_name(),
        "logical_cores": host.logical_cores(),
        "physical_cores": host.physical_cores(),
        "allowed_cores": host.allowed_cores(),
        "core_limit": host.core_limit(),
        "memory_bytes": host.memory_bytes(),
        "memory_limit_bytes": host.memory_limit_bytes(),
    }


def _machine_words(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    physical = facts["physical_cores"] or "an unknown number of"
    cores = f"{physical} physical, {facts['logical_cores']} logical"
    if facts["allowed_cores"] != facts["logical_cores"]:
        cores += f", {facts['allowed_cores']} open to this process"
    if facts["core_limit"] is not None:
        cores += f", limited to the time of {facts['core_limit']:g}"
    total, limit = facts["memory_bytes"], facts["memory_limit_bytes"]
    memory = f"{total / _GIB:.1f} GiB" if total else "unknown"
    memory += (
        f", limited to {limit / _GIB:.1f} GiB" if limit and limit < (total or limit + 1) else ""
    )
    return [
        ("system", facts["system"]),
        ("processor", facts["processor"]),
        ("cores", cores),
        ("memory", memory),
        ("Python", facts["python"]),
    ]


def _part_words(part: Mapping[str, Any]) -> str:
    if part["usable"]:
        return ", ".join(filter(None, (part["version"], part["detail"])))
    version = f"{part['version']}, but " if part["version"] else ""
    return f"{version}{part['reason']}. {part['do']}"


def _measured_words(measured: Mapping[str, Any]) -> list[str]:
    return measured.get("words") or [measured["reason"]]
