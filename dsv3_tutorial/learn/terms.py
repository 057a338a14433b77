"""`term("HBM")` shows the entry of GLOSSARY.md, without leaving the notebook."""

import difflib
import re
from functools import cache
from pathlib import Path

from dsv3_tutorial.files import data_path
from dsv3_tutorial.learn.show import show

_ENTRY = re.compile(r"^### (?P<title>.+)\n+(?P<text>(?:(?!#).*\n?)+)", re.MULTILINE)


def glossary_path() -> Path:
    """GLOSSARY.md at the top of a checkout, or the copy in an installed wheel."""
    installed = data_path("GLOSSARY.md")
    return installed if installed.is_file() else data_path().parent / "GLOSSARY.md"


@cache
def entries() -> dict[str, str]:
    """Title -> paragraph, in the glossary's order."""
    text = glossary_path().read_text(encoding="utf-8")
    return {match["title"].strip(): match["text"].strip() for match in _ENTRY.finditer(text)}


def term(name: str) -> None:
    """Shows what a term means; for one that is not in the glossary, the closest that are."""
    aliases = {key: title for title in entries() for key in _keys(title)}
    wanted = _normal(str(name))
    forms = (wanted, wanted.removesuffix("s"), wanted.removesuffix("es"))
    title = next((aliases[form] for form in forms if form in aliases), None)
    if title:
        text = entries()[title]
        show(f"{title}: {text}", text_markdown=f"**{title}**: {text}")
        return
    close = difflib.get_close_matches(wanted, aliases, n=4, cutoff=0.4)
    titles = list(dict.fromkeys(aliases[key] for key in close)) or list(entries())[:4]
    show(f"The glossary has no entry {name!r}. The closest: {', '.join(titles)}.")


def _keys(title: str) -> list[str]:
    """All that a title answers to: 'FLOP and FLOP/s', 'Expert parallelism (EP), dispatch'."""
    inside = re.findall(r"\(([^)]*)\)", title)
    outside = re.sub(r" *\([^)]*\)", "", title)
    parts = [title, outside, *inside, *re.split(r" and |, ", outside)]
    return [key for key in map(_normal, parts) if key]


def _normal(text: str) -> str:
    return re.sub(r"[^a-z0-9/]", "", text.casefold())
