"""What a learner has passed and predicted, in one small JSON file under DSV3_HOME.

Two kernels may write at once: each change is made to the file as it is then, under a lock, and the
file is replaced whole. Where it cannot be written, the course works and says so once.
"""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import platformdirs

from dsv3_tutorial.files import write_whole

_PARTS = ("exercises", "predictions")
_LOCK_SECONDS = 2.0
_session: dict[str, dict[str, Any]] = {part: {} for part in _PARTS}
_said: set[str] = set()


def home() -> Path:
    """The folder for what the course keeps: DSV3_HOME, or the user's data folder."""
    return Path(os.environ.get("DSV3_HOME") or platformdirs.user_data_dir("dsv3_tutorial"))


def read() -> dict[str, dict[str, Any]]:
    """The whole record: {"exercises": {name: status}, "predictions": {name: value}}."""
    stored = _stored()
    return {part: {**stored[part], **_session[part]} for part in _PARTS}


def note_exercise(name: str, status: str) -> None:
    """Keeps a status. An exercise once passed stays passed, whatever is tried afterwards."""

    def change(kept: dict[str, dict[str, Any]]) -> None:
        if kept["exercises"].get(name) != "passed":
            kept["exercises"][name] = status

    _update(change)


def note_prediction(name: str, value: Any) -> None:
    """Keeps the learner's latest prediction."""
    _update(lambda kept: kept["predictions"].__setitem__(name, value))


def _update(change: Callable[[dict[str, dict[str, Any]]], None]) -> None:
    change(_session)
    try:
        with _locked():
            kept = _stored()
            before = json.dumps(kept)
            change(kept)
            if json.dumps(kept) != before:
                write_whole(_file(), json.dumps(kept, indent=1, sort_keys=True) + "\n")
    except OSError:
        _say("Your progress cannot be kept: the folder for it is not writable (see DSV3_HOME).")


def _file() -> Path:
    return home() / "progress.json"


def _stored() -> dict[str, dict[str, Any]]:
    """What the file holds. A damaged one is moved aside and counts as empty."""
    empty: dict[str, dict[str, Any]] = {part: {} for part in _PARTS}
    try:
        found = json.loads(_file().read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("not an object")
        kept = {part: found.get(part, {}) for part in _PARTS}
        if not all(isinstance(part, dict) for part in kept.values()):
            raise ValueError("a part is not an object")
        return kept
    except OSError:  # none yet, or not readable
        return empty
    except (ValueError, RecursionError):
        with contextlib.suppress(OSError):
            os.replace(_file(), _file().with_name("progress.damaged.json"))
        _say("The record of your progress was damaged; it is now progress.damaged.json.")
        return empty


def _say(sentence: str) -> None:
    if sentence not in _said:
        _said.add(sentence)
        print(sentence)


@contextlib.contextmanager
def _locked() -> Iterator[None]:
    """One writer at a time, where the system can lock; after two seconds it goes on regardless."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    home().mkdir(parents=True, exist_ok=True)
    with open(home() / "progress.lock", "w", encoding="utf-8") as lock:
        deadline = time.monotonic() + _LOCK_SECONDS
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() > deadline:
                    break
                time.sleep(0.01)
        yield  # closing the file unlocks it
