"""A folder that is replaced whole, or not at all."""

import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replaced(folder: Path, is_ours: Callable[[str], bool]) -> Iterator[Path]:
    """A new, empty folder beside `folder`, which takes its place when the block ends well.

    Files of the old one that are not ours (`is_ours(name)` is False: a tokenizer, a note) come
    along. Where anything fails, the old folder stands as it was and the new one is gone. Killed
    between the two renames at the very end, the old one is found beside, as `.NAME.SUFFIX.old`.
    Raises OSError for whatever the disk refuses, and for a folder that holds folders.
    """
    folder = folder.resolve()  # through a link: the link stays
    folder.parent.mkdir(parents=True, exist_ok=True)
    kept = _other_files(folder, is_ours)
    mark = secrets.token_hex(8)
    new = folder.with_name(f".{folder.name}.{mark}.new")
    old = folder.with_name(f".{folder.name}.{mark}.old")
    new.mkdir()
    try:
        yield new
        for path in kept:
            shutil.copy2(path, new / path.name)
        _flush(new)
        if folder.exists():
            os.rename(folder, old)
        os.rename(new, folder)
    except BaseException:
        if old.exists() and not folder.exists():
            os.rename(old, folder)
        shutil.rmtree(new, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _other_files(folder: Path, is_ours: Callable[[str], bool]) -> list[Path]:
    if not folder.exists():
        return []
    if not folder.is_dir():
        raise FileExistsError(f"{folder.name} is a file: name a folder")
    others = [p for p in folder.iterdir() if not (p.is_file() and is_ours(p.name))]
    folders = sorted(path.name for path in others if not path.is_file())
    if folders:
        # somebody's home or project, perhaps: nothing that holds more than files is replaced
        raise FileExistsError(
            f"{folder.name} holds more than files ({', '.join(folders[:5])}): "
            "name a folder that is the checkpoint's own"
        )
    return others


def _flush(folder: Path) -> None:
    """Bring every file's bytes to the disk before the folder is known by its name."""
    for path in folder.iterdir():
        file = os.open(path, os.O_RDONLY)  # a file that came along may be read-only
        try:
            os.fsync(file)
        finally:
            os.close(file)
