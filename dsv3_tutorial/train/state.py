"""A run's state on disk: written in the background, and taken up again bit for bit.

torch.distributed.checkpoint moves the tensors, so ranks write their own shards and another number
of ranks can read them; `sealed` makes a checkpoint whole or absent. Nothing is unpickled on load
but DCP's own table of contents, and of that only the classes it is made of.
"""

import contextlib
import json
import shutil
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from tqdm import tqdm

from dsv3_tutorial.parallel.data import from_a_peer
from dsv3_tutorial.parallel.mesh import TIMEOUT
from dsv3_tutorial.train import sealed
from dsv3_tutorial.train.contents import (
    Resumable,
    model_kinds,
    plain_state,
    put_back,
    targets,
    tensor_state,
)
from dsv3_tutorial.train.sealed import Damaged, StateError
from dsv3_tutorial.train.storage import Reader, Writer

WRITING = 6 * TIMEOUT  # ranks wait here for each other's disks


class Checkpoints:
    """The checkpoints of one run, `keep` of them, in `folder`. Every rank calls every method.

    `save` copies the state (one more copy of it in CPU memory) and returns; the bytes are written
    behind the next steps. A write that fails, on a full disk for one, costs no earlier checkpoint:
    the half is removed, one line is reported, training goes on and the next save tries again.
    A resume must match in the recipe, save for its `free` fields, and in `identity`.
    """

    def __init__(
        self,
        folder: Path,
        keep: int = 2,
        free: Iterable[str] = (),
        identity: Mapping[str, Any] | None = None,
        report: Callable[[str], None] | None = None,
        writer: type[Writer] = Writer,
    ):
        self.folder, self.keep, self.free = folder, keep, frozenset(free)
        self.identity, self.writer = dict(identity or {}), writer
        self.report = report or (lambda line: tqdm.write(line, file=sys.stderr))
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        # a group of its own: the writer's messages must not meet the training's
        self.group = None
        if dist.is_initialized():
            self.group = dist.new_group(backend="gloo", timeout=WRITING)
        self.pending: tuple[int, Future] | None = None
        self.failure: str | None = None
        left = sealed.clean(folder) if self.rank == 0 else ()
        for name in left:
            self._say(f"Removed {name}: a write that was interrupted.")

    def steps(self) -> list[int]:
        """The steps of the whole checkpoints, oldest first."""
        return sealed.whole_steps(self.folder)

    def save(self, state: Resumable) -> None:
        """Begin to write the state as it is now; waits only for a write still going on."""
        self._harvest()
        final = sealed.folder_for(self.folder, state.step)
        if final.exists():
            return
        facts = {
            "step": state.step,
            "asked": self._asked(state),
            "plain": plain_state(state),
            "made_with": {
                "torch": torch.__version__,
                "ranks": dist.get_world_size() if self.group else 1,
            },
        }
        temporary = sealed.writing_folder(self.folder, state.step)
        writer = self.writer(temporary, final, facts, self.keep)
        _silence_single_process()
        tensors = tensor_state(state, self.rank)
        future = dcp.async_save(tensors, storage_writer=writer, process_group=self.group)
        self.pending = (state.step, future)

    def poll(self) -> None:
        """Take note of a write that has ended. Costs nothing while it goes on."""
        if self.pending is not None and self.pending[1].done():
            self._harvest()

    def wait(self) -> None:
        """Until the last save is on the disk. Raises StateError, once, where it could not be."""
        self._harvest()
        failure, self.failure = self.failure, None
        if failure is not None:
            raise StateError(failure)

    def restore_latest(self, state: Resumable) -> int:
        """Fill `state` in place from the newest whole checkpoint; returns its step, 0 without one.

        A damaged checkpoint is reported by name, set aside, and the one before it is used. Raises
        StateError when none of them is left, or when the recipe of the run was another.
        """
        facts = self._agree(lambda: self._newest(self._fixed(self._asked(state))))
        if facts is None:
            return 0
        folder = sealed.folder_for(self.folder, facts["step"])
        tensors = targets(state, facts["tensors"], self.rank, self._kinds(state))
        _silence_single_process()
        dcp.load(tensors, storage_reader=Reader(folder), process_group=self.group)
        put_back(state, tensors, facts["plain"], self.rank)
        state.step = facts["step"]
        return state.step

    def _kinds(self, state: Resumable) -> dict[str, list]:
        """What all ranks hold of the model between them: a stage of a pipeline holds its layers."""
        found = [model_kinds(state)]
        if self.group is not None:
            found *= dist.get_world_size(self.group)
            dist.all_gather_object(found, found[0], group=self.group)
        return {name: kind for one in found for name, kind in one.items()}

    def _asked(self, state: Resumable) -> dict[str, Any]:
        return json.loads(json.dumps({**state.recipe.to_dict(), **self.identity}))

    def _fixed(self, asked: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in asked.items() if name not in self.free}

    def _newest(self, asked: dict[str, Any]) -> dict[str, Any] | None:
        for step in reversed(self.steps()):
            folder = sealed.folder_for(self.folder, step)
            try:
                facts = sealed.verify(folder)
            except Damaged as error:
                self._say(f"{error} Set aside as {sealed.set_aside(folder).name}.")
                continue
            _refuse_other_recipe(self._fixed(facts["asked"]), asked, folder.name)
            return facts
        if damaged := sorted(p.name for p in self.folder.glob(f"{sealed.DAMAGED}*")):
            raise StateError(
                f"No whole checkpoint is left in {self.folder.name!r}: {', '.join(damaged)}. "
                "Starting again from step 0 in silence would hide the loss of the run. Check the "
                "disk, then move this folder away to train from the start."
            )
        return None

    def _agree(self, choose: Callable[[], Any]) -> Any:
        """What rank 0 chose, on every rank; its refusal too."""
        answer: list[Any] = [None, None]
        if self.rank == 0:
            try:
                answer[0] = choose()
            except StateError as error:
                answer[1] = error
        if self.group is not None:
            dist.broadcast_object_list(answer, src=0, group=self.group)
        if answer[1] is not None:
            raise answer[1]
        return answer[0]

    def _harvest(self) -> None:
        if self.pending is None:
            return
        (step, future), self.pending = self.pending, None
        error = future.exception()
        if error is None:
            self.failure = None
        else:
            self._failed(step, error)

    def _failed(self, step: int, error: BaseException) -> None:
        if self.rank == 0:
            shutil.rmtree(sealed.writing_folder(self.folder, step), ignore_errors=True)
        why = reason(error, self.folder)
        then = "Free some space; the next checkpoint is tried all the same."
        if from_a_peer(error):
            why, then = "another rank has ended or hangs", "Start all of them again, with --resume."
        self.failure = (
            f"The checkpoint of step {step} could not be written ({why}). Its half is removed, and "
            f"{_standing(self.steps())}: a run that ended now would go on from there. {then}"
        )
        self._say(self.failure)

    def _say(self, line: str) -> None:
        if self.rank == 0:
            self.report(line)


def changed_fields(saved: Mapping[str, Any], asked: Mapping[str, Any], at: str = "") -> list[str]:
    """The fields in which two recipes differ, nested ones by their path, with both values."""
    found: list[str] = []
    for name in sorted(saved.keys() | asked.keys()):
        was, now = saved.get(name, "absent"), asked.get(name, "absent")
        if isinstance(was, Mapping) and isinstance(now, Mapping):
            found += changed_fields(was, now, f"{at}{name}.")
        elif was != now:
            found.append(f"{at}{name} ({was!r} in the checkpoint, {now!r} now)")
    return found


def reason(error: BaseException, folder: Path) -> str:
    """Why a write failed, in one line: the system's own word if it has one, and the space left."""
    failures = getattr(error, "failures", None)
    cause: BaseException | None = next(iter(failures.values()))[0] if failures else error
    said = str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    if isinstance(cause, OSError) and cause.strerror:
        said = cause.strerror
    free = 0
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(folder).free
    return f"{said}; {free / 1e6:,.1f} MB are free there"


def _refuse_other_recipe(saved: dict[str, Any], asked: dict[str, Any], name: str) -> None:
    changed = changed_fields(saved, asked)
    if changed:
        raise StateError(
            f"{name} was trained with another recipe: {'; '.join(changed)}. Going on would give a "
            "run that neither recipe describes. Give the old values, or start afresh in another "
            "--out."
        )


def _standing(steps: list[int]) -> str:
    return f"step {steps[-1]} stands" if steps else "no checkpoint stands yet"


def _silence_single_process() -> None:
    """DCP warns that there is one process. That is meant here, and the filter names its words.

    The warning comes from the writer's thread, where catch_warnings would race with the caller's.
    """
    warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable", UserWarning)
