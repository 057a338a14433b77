"""A full disk: the run says so and goes on, and every earlier checkpoint is still whole."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from dsv3_tutorial.train import sealed

TRAIN_ON_A_FULL_DISK = """
import json, os, sys
from pathlib import Path
from dsv3_tutorial.train import run, sealed, state

filler = Path("disk/filler")
begin = state.Checkpoints.save

def save_and_fill(self, training):
    if self.pending is not None:
        self.pending[1].exception()  # the write before is over: the disk has its whole need
    if training.step == 9:  # nothing is left for the third checkpoint
        spare = os.statvfs("disk").f_bavail * os.statvfs("disk").f_frsize
        filler.write_bytes(bytes(spare - 100_000))
    if training.step == 15:
        filler.unlink()
    begin(self, training)

state.Checkpoints.save = save_and_fill
sys.exit(run.main(json.loads(sys.argv[1])))
"""


def mounting_command():
    """A shell whose mounts go away with it; None where this machine does not give one."""
    for options in (["--mount"], ["--mount", "--user", "--map-root-user"]):
        command = ["unshare", *options, "sh", "-c"]
        probe = "mkdir -p probe && mount -t tmpfs -o size=1m none probe"
        if (
            shutil.which("unshare")
            and not subprocess.run(
                [*command, probe], cwd=os.environ["DSV3_HOME"], capture_output=True
            ).returncode
        ):
            return command
    return None


@pytest.fixture
def small_disk(tmp_path):
    """Run a command line whose checkpoints lie on a disk of 8 MB, which goes away with it."""
    command = mounting_command()
    if command is None:
        pytest.skip("no mount namespace can be made here (unshare)")
    for folder in ("disk", "run"):
        (tmp_path / folder).mkdir()
    (tmp_path / "run/checkpoints").symlink_to(tmp_path / "disk")
    return [*command, 'mount -t tmpfs -o size=8m none disk && "$@" && cp -r disk kept', "sh"]


@pytest.mark.slow
def test_a_disk_that_fills_up_costs_one_checkpoint_and_no_step(small_disk, small_run, tmp_path):
    arguments = json.dumps([str(a) for a in [*small_run, "--out", "run"]])
    ended = subprocess.run(
        [*small_disk, sys.executable, "-c", TRAIN_ON_A_FULL_DISK, arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr
    assert "The checkpoint of step 9 could not be written (No space left on device" in ended.stderr
    assert "step 6 stands" in ended.stderr
    assert len((tmp_path / "run/log.jsonl").read_text().splitlines()) == 24
    folder = tmp_path / "kept"
    assert sorted(p.name for p in folder.iterdir()) == ["step-00000021", "step-00000024"]
    for step in (21, 24):
        assert sealed.verify(sealed.folder_for(folder, step))["step"] == step
