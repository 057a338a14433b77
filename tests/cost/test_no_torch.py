"""Predicting what a model costs needs no torch: it opens in a blink, on any machine."""

import json
import subprocess
import sys
from pathlib import Path

from dsv3_tutorial import cost

MODULES = sorted(path.stem for path in Path(cost.__file__).parent.glob("*.py"))
HEAVY = ("torch", "numpy", "matplotlib", "transformers", "triton")


def test_no_cost_module_imports_torch_or_anything_as_heavy():
    names = [f"dsv3_tutorial.cost.{name}" for name in MODULES if name != "__init__"]
    assert len(names) >= 5
    code = f"""
import sys, time, json, importlib
start = time.process_time()
import dsv3_tutorial.cost
for name in {names}: importlib.import_module(name)
from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost.params import count
total = count(ModelConfig.named("deepseek-v3")).total
loaded = sorted({{name.split(".")[0] for name in sys.modules}})
print(json.dumps([time.process_time() - start, total, loaded]))
"""
    ran = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(cost.__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    seconds, total, loaded = json.loads(ran.stdout)
    assert total == 671_026_419_200
    assert not set(HEAVY) & set(loaded)
    assert seconds < 1.0  # processor time, so a busy machine does not count; torch alone takes more
