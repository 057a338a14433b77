"""Showing something in a notebook and in plain Python alike.

In a kernel it is one raw display with a text twin; elsewhere the text is printed.
"""

import html
import sys
from typing import Any

MIME = "application/vnd.dsv3.exercise+json"
_EDGE = {"passed": "#2a9d5c", "not_yet": "#d98e04", "raised": "#c8553d", "not_attempted": "#7f8c9b"}


def in_notebook() -> bool:
    """Whether an IPython shell is there to receive a display."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and ipython.get_ipython() is not None


def show(text: str, **rich: Any) -> None:
    """Displays text and its richer forms, named by MIME type with _ for / (text_html=...)."""
    if not in_notebook():
        print(text)
        return
    from IPython.display import display

    bundle = {name.replace("_", "/", 1): value for name, value in rich.items()}
    display({"text/plain": text, **bundle}, raw=True)


def show_verdict(verdict: Any) -> None:
    """A verdict as a line, a box and data for a grader. The words carry all, colours nothing."""
    text = verdict.line
    box = f"<b>{html.escape(text[: text.index(']') + 1])}</b>"
    box += html.escape(text[text.index("]") + 1 :]).replace("\n", "<br>")
    if verdict.printed:
        text += "\nYour code printed:\n" + _indented(verdict.printed)
        box += f"<br>Your code printed:<pre>{html.escape(verdict.printed)}</pre>"
    if not in_notebook():
        print(text)
        return
    from IPython.display import display

    data = {"exercise": verdict.exercise, "status": verdict.status, "message": verdict.message}
    bundle = {"text/plain": text, "text/html": boxed(box, _EDGE[verdict.status]), MIME: data}
    display(bundle, raw=True)


def boxed(content: str, edge: str) -> str:
    """HTML with a coloured left edge; text and background stay the theme's, light or dark."""
    style = f"border-left: 6px solid {edge}; padding: 0.3em 0.8em; margin: 0.2em 0"
    return f'<div style="{style}">{content}</div>'


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
