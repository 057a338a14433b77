"""Compile Triton kernels for a GPU that is not here, and say what came out: JSON in, JSON out.

    python tests/hopper_compile.py < specs.json

A spec names a kernel (`module`, `kernel`), its arguments' types (`signature`), its `constexprs`,
which arguments are multiples of 16 (`divisible`), `num_warps` and `num_stages`, and optionally the
compute `capability` (90, Hopper). The answer gives, in the same order, registers a thread, bytes of
stack, bytes of shared memory, instructions that spill, and tensor-core instructions in the PTX and
in the machine code. Only Triton is needed: ptxas and the disassembler lie in its wheel.

It runs in a process of its own because a process that interprets kernels cannot compile them.
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SPILLS = ("STL", "LDL")
TENSOR = ("HGMMA", "HMMA", "QGMMA", "IGMMA")
COPIES = ("LDGSTS", "UTMALDG")


def compile_elsewhere(specs: list[dict], timeout: float = 300) -> list[dict]:
    """The answers to specs, from a fresh process without the interpreter; raises what it said."""
    with tempfile.TemporaryDirectory(prefix="dsv3_tutorial_triton_") as cache:
        environment = {**os.environ, "TRITON_CACHE_DIR": cache}
        environment.pop("TRITON_INTERPRET", None)
        run = subprocess.run(
            [sys.executable, __file__],
            input=json.dumps(specs),
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    if run.returncode != 0:
        raise RuntimeError(f"compiling for Hopper failed:\n{run.stderr[-4000:]}")
    return json.loads(run.stdout)


def compile_one(spec: dict) -> dict:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(spec["module"]), spec["kernel"])
    constexprs = spec["constexprs"]
    signature = {**spec["signature"], **dict.fromkeys(constexprs, "constexpr")}
    place = {name: (i,) for i, name in enumerate(kernel.arg_names)}
    source = ASTSource(
        fn=kernel,
        signature={name: signature[name] for name in kernel.arg_names},
        constexprs={place[name]: value for name, value in constexprs.items()},
        attrs={place[name]: [["tt.divisibility", 16]] for name in spec["divisible"]},
    )
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", spec.get("capability", 90), 32),
        options={"num_warps": spec["num_warps"], "num_stages": spec["num_stages"]},
    )
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    return {"shared": compiled.metadata.shared, **inspect(compiled.asm, tools)}


def inspect(assembly: dict, tools: Path) -> dict:
    """What ptxas made of a kernel, read from its resource table and its machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(assembly["cubin"])
        file.flush()
        usage = _output(tools / "cuobjdump", "-res-usage", file.name)
        code = _output(tools / "nvdisasm", "-c", file.name)
    ptx = assembly["ptx"]
    counted = {name: len(re.findall(rf"\b{name}\b", code)) for name in SPILLS + TENSOR + COPIES}
    return {
        "target": re.search(r"\.target (\w+)", ptx)[1],
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "local": int(re.search(r"LOCAL:(\d+)", usage)[1]),
        "spills": sum(counted.pop(name) for name in SPILLS),
        "wgmma": len(re.findall(r"wgmma\.mma_async", ptx)),
        "mma_sync": len(re.findall(r"mma\.sync", ptx)),
        **counted,
    }


def _output(*command) -> str:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    json.dump([compile_one(spec) for spec in json.load(sys.stdin)], sys.stdout, indent=1)
