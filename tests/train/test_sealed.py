"""A folder under its final name is whole; whatever is interrupted or damaged is told apart."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_tutorial.train import sealed

FILES = {"a.distcp": b"weights" * 40, ".metadata": b"a table of contents", "empty": b""}


def written(root, step=3):
    """A sealed checkpoint of three small files."""
    folder = sealed.writing_folder(root, step)
    folder.mkdir(parents=True)
    for name, data in FILES.items():
        (folder / name).write_bytes(data)
    final = sealed.folder_for(root, step)
    sealed.seal(folder, final, {"step": step})
    return final


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return written(tmp_path_factory.mktemp("whole"))


def test_a_sealed_folder_is_whole_and_its_temporary_is_gone(whole):
    facts = sealed.verify(whole)
    assert facts["step"] == 3
    assert facts["files"] == {
        name: [len(data), hashlib.sha256(data).hexdigest()] for name, data in FILES.items()
    }
    assert [p.name for p in whole.parent.iterdir()] == ["step-00000003"]


def test_the_seal_is_one_that_sha256sum_reads(whole):
    digest, name = (whole / sealed.SEAL).read_text().split()
    assert name == sealed.MANIFEST
    assert digest == hashlib.sha256((whole / name).read_bytes()).hexdigest()


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_flipped_bit_any_cut_and_any_missing_file_is_found_and_named(whole, data):
    name = data.draw(st.sampled_from(sorted(p.name for p in whole.iterdir())))
    with tempfile.TemporaryDirectory() as root:
        folder = shutil.copytree(whole, Path(root) / whole.name)
        path = folder / name
        content = bytearray(path.read_bytes())
        kinds = ["missing", "longer"] + ["bit", "cut"] * bool(content)
        kind = data.draw(st.sampled_from(kinds))
        if kind == "missing":
            path.unlink()
        elif kind == "longer":
            path.write_bytes(bytes(content) + b"\n")
        elif kind == "cut":
            path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
        else:
            bit = data.draw(st.integers(0, 8 * len(content) - 1))
            content[bit // 8] ^= 1 << bit % 8
            path.write_bytes(content)
        with pytest.raises(sealed.Damaged, match="step-00000003 is damaged") as found:
            sealed.verify(folder)
        named = sealed.MANIFEST if name == sealed.SEAL else name
        assert f"{named} " in str(found.value)


def test_a_folder_that_was_being_written_or_removed_is_no_checkpoint_and_is_cleaned(tmp_path):
    written(tmp_path, 3)
    sealed.writing_folder(tmp_path, 6).mkdir()
    (sealed.writing_folder(tmp_path, 6) / "half").write_bytes(b"ha")
    (tmp_path / ".removing-step-00000001").mkdir()
    (tmp_path / "step-9.txt").touch()
    assert sealed.whole_steps(tmp_path) == [3]
    assert sealed.clean(tmp_path) == [".removing-step-00000001", ".writing-step-00000006"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000003", "step-9.txt"]


@pytest.mark.parametrize(
    ("keep", "left"), [(2, [7, 100000000]), (1, [100000000]), (0, [100000000]), (9, None)]
)
def test_pruning_keeps_the_newest_and_never_removes_the_last(tmp_path, keep, left):
    steps = [3, 5, 7, 100000000]
    for step in steps:
        written(tmp_path, step)
    sealed.prune(tmp_path, keep)
    assert sealed.whole_steps(tmp_path) == (steps if left is None else left)


def test_a_checkpoint_set_aside_frees_its_name_and_replaces_an_older_one(tmp_path):
    for content in (b"first", b"second"):
        written(tmp_path, 3)
        (sealed.folder_for(tmp_path, 3) / "a.distcp").write_bytes(content)
        aside = sealed.set_aside(sealed.folder_for(tmp_path, 3))
    assert aside.name == "damaged-step-00000003"
    assert (aside / "a.distcp").read_bytes() == b"second"
    assert sealed.whole_steps(tmp_path) == []


def test_a_failure_before_the_rename_leaves_no_final_name(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OSError, match="No space left"):
        written(tmp_path)
    assert sealed.whole_steps(tmp_path) == []


HOLD = """
import sys, time
from pathlib import Path
from dsv3_tutorial.train.sealed import RunLock
with RunLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_run_is_locked_against_a_second_process_until_its_holder_dies(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(sealed.StateError, match=rf"pid {holder.pid}\) is training"):
            sealed.RunLock(tmp_path)
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        holder.stdout.close()
    with sealed.RunLock(tmp_path), pytest.raises(sealed.StateError, match=str(os.getpid())):
        sealed.RunLock(tmp_path)
    sealed.RunLock(tmp_path).__exit__()


def test_what_a_checkpoint_says_of_itself_is_plain_json(whole):
    assert json.loads((whole / sealed.MANIFEST).read_text())["step"] == 3
