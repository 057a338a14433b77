"""Ranks from cells: a notebook that launches them has the same output every time it is run."""

import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat import v4

ROOT = Path(__file__).parents[2]
CELLS = [
    "import torch\nimport torch.distributed as dist\n"
    "from dsv3_tutorial.parallel.launch import launch",
    "weight = torch.arange(4.0, requires_grad=True)\n"
    "(weight**2).sum().backward()  # threads of the parent must not matter to the ranks\n"
    "gradient = weight.grad\n"
    "def meet(x):\n"
    "    total = gradient * x + dist.get_rank()\n"
    "    dist.all_reduce(total)\n"
    "    print('rank', dist.get_rank(), 'has', total.tolist())\n"
    "    return total.sum().item()\n"
    "launch(meet, 4, 0.5)",
    "launch(meet, 2, 1.0)",
    "def fail():\n"
    "    dist.barrier()\n"
    "    if dist.get_rank() == 1:\n"
    "        raise ValueError('no such expert')\n"
    "    dist.barrier()\n"
    "try:\n"
    "    launch(fail, 4)\n"
    "except RuntimeError as error:\n"
    "    print(error)",
    "import time\n"
    "def hang():\n"
    "    if dist.get_rank() == 1:\n"
    "        time.sleep(60)\n"
    "    dist.barrier()\n"
    "try:\n"
    "    launch(hang, 2, timeout=1)\n"
    "except RuntimeError as error:\n"
    "    print(error)",
]
FAILED = """\
Rank 1 failed, and the others were ended: ValueError: no such expert
Traceback (most recent call last):
  File "notebook cell", line 4, in fail
    raise ValueError('no such expert')
ValueError: no such expert
"""


@pytest.mark.slow
def test_a_notebook_with_ranks_repeats_under_nbval(tmp_path, monkeypatch):
    from nbclient import NotebookClient

    notebook = v4.new_notebook(cells=[v4.new_code_cell(source) for source in CELLS])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "p", "language": "python"}
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    outputs = [cell.outputs for cell in notebook.cells]
    assert [o.output_type for o in outputs[1]] == ["stream", "execute_result"]
    assert outputs[1][0].text.splitlines()[3] == "rank 3 has [6.0, 10.0, 14.0, 18.0]"
    assert outputs[3][0].text == FAILED
    assert "rank 1: cell, line 4, in hang (time.sleep(60))" in outputs[4][0].text
    path = tmp_path / "ranks.ipynb"
    nbformat.write(notebook, path)
    command = [sys.executable, "-m", "pytest", "--nbval", "--nbval-current-env", "-q", str(path)]
    command += ["--disable-plugin-autoload", "-p", "nbval.plugin"]  # the others take seconds
    run = subprocess.run([*command, "-c", "/dev/null"], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0 and f"{len(CELLS)} passed" in run.stdout, run.stdout
