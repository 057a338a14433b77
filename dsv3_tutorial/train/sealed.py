"""Folders that are whole or not there: written aside, checked, and moved into place in one rename.

A checkpoint under its final name `step-00000120` has every byte its manifest lists. Whatever is
interrupted leaves only a name that starts with a dot, and the next start removes it.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
SEAL = "manifest.sha256"  # as sha256sum writes it: `sha256sum -c manifest.sha256` reads it
DAMAGED = "damaged-"
_WRITING, _REMOVING = ".writing-", ".removing-"
_STEP = re.compile(r"step-(\d{8,})")


class StateError(ValueError):
    """A training state that cannot be kept or taken up: what, why it matters, what to do."""


class Damaged(StateError):
    """A checkpoint that is not what was written: names the folder, the file and what is wrong."""


def folder_for(root: Path, step: int) -> Path:
    """Where the whole checkpoint of `step` stands."""
    return root / f"step-{step:08d}"


def whole_steps(root: Path) -> list[int]:
    """The steps with a checkpoint under its final name, oldest first."""
    names = (_STEP.fullmatch(p.name) for p in root.iterdir()) if root.is_dir() else ()
    return sorted(int(found[1]) for found in names if found)


def writing_folder(root: Path, step: int) -> Path:
    """Where the checkpoint of `step` is written: beside the final one, for one rename."""
    return root / f"{_WRITING}{folder_for(root, step).name}"


def seal(temporary: Path, final: Path, facts: dict[str, Any]) -> None:
    """List every file with its size and SHA-256, then give the folder its final name.

    Every file must already be synced; the manifest, the folder and its parent are synced here, so
    that the name cannot survive a power cut that the bytes did not. Cost: one read of all files.
    """
    files = {p.name: _fingerprint(p) for p in sorted(temporary.iterdir())}
    body = json.dumps({**facts, "files": files}, sort_keys=True).encode()
    _write_synced(temporary / MANIFEST, body)
    _write_synced(temporary / SEAL, _seal_of(body))
    _sync_folder(temporary)
    os.rename(temporary, final)
    _sync_folder(final.parent)


def read_facts(folder: Path) -> dict[str, Any]:
    """What `seal` was told about a checkpoint. Raises Damaged for a manifest not as written."""
    try:
        body = (folder / MANIFEST).read_bytes()
        if (folder / SEAL).read_bytes() == _seal_of(body):
            return json.loads(body)
    except OSError as error:
        raise _damaged(folder, MANIFEST, f"or its seal cannot be read ({error.strerror})") from None
    raise _damaged(folder, MANIFEST, "is not what was written")


def verify(folder: Path) -> dict[str, Any]:
    """The facts of a checkpoint whose every file has the size and SHA-256 of its manifest.

    Raises Damaged with the first file that has not. Cost: one read of the whole checkpoint.
    """
    facts = read_facts(folder)
    if folder_for(folder.parent, facts["step"]) != folder:
        raise _damaged(folder, MANIFEST, f"is that of step {facts['step']}")
    for name, (size, digest) in facts["files"].items():
        path = folder / name
        try:
            found = path.stat().st_size
            if found != size:
                raise _damaged(folder, name, f"has {found} bytes where {size} were written")
            if _fingerprint(path)[1] != digest:
                raise _damaged(folder, name, "has its size, but not the bytes that were written")
        except OSError as error:
            raise _damaged(folder, name, f"cannot be read ({error.strerror})") from None
    return facts


def set_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint: its step can be written again, and it can be looked at."""
    aside = folder.with_name(f"{DAMAGED}{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(folder, aside)
    return aside


def prune(root: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints: first the name goes, then the bytes."""
    for step in whole_steps(root)[: -max(1, keep)]:
        folder = folder_for(root, step)
        removing = folder.with_name(f"{_REMOVING}{folder.name}")
        os.rename(folder, removing)
        shutil.rmtree(removing)


def clean(root: Path) -> list[str]:
    """Remove what an interrupted run left half written or half removed. Returns the names."""
    root.mkdir(parents=True, exist_ok=True)
    left = sorted(p for p in root.iterdir() if p.name.startswith((_WRITING, _REMOVING)))
    for folder in left:
        shutil.rmtree(folder)
    return [folder.name for folder in left]


class RunLock(contextlib.AbstractContextManager):
    """One process at a time on a run's folder. Freed by the system however the holder dies.

    Raises StateError that names the holder. A forked child keeps it too; exec lets it go.
    """

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.file = (folder / ".lock").open("a+", encoding="utf-8")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.file.seek(0)
            holder = self.file.read().strip() or "unknown"
            self.file.close()
            raise StateError(
                f"Another process (pid {holder}) is training in {folder.name!r}. Two would write "
                "one log and remove each other's checkpoints. Wait for it, end it, or give another "
                "--out."
            ) from None
        self.file.truncate(0)
        self.file.write(str(os.getpid()))
        self.file.flush()

    def __exit__(self, *_: object) -> None:
        self.file.close()


def _damaged(folder: Path, name: str, problem: str) -> Damaged:
    return Damaged(
        f"Checkpoint {folder.name} is damaged: {name} {problem}. Training from it would go on from "
        "weights that nobody trained. The one before it is the one to use."
    )


def _fingerprint(path: Path) -> list:
    with open(path, "rb") as file:
        return [os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def _seal_of(body: bytes) -> bytes:
    return f"{hashlib.sha256(body).hexdigest()}  {MANIFEST}\n".encode()


def _write_synced(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
