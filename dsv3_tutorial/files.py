"""Where the course's data lies, and how a file is written so that it is never half there."""

import os
import secrets
from pathlib import Path

_PACKAGE = Path(__file__).parent
_INSTALLED = _PACKAGE / "_data"  # inside a wheel; in a checkout data/ stands beside the package


def data_path(*parts: str) -> Path:
    """The path of a file under data/, in a checkout and in an installed wheel alike."""
    root = _INSTALLED if _INSTALLED.is_dir() else _PACKAGE.parent / "data"
    return root.joinpath(*parts)


def write_whole(path: Path, text: str) -> None:
    """Write text to path so that a reader sees the old file or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with open(temporary, "x", encoding="utf-8") as file:  # mode as any new file's, not 0600
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
