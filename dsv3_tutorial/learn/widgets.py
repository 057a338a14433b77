"""An explorer: controls over a function that draws a figure, and nothing else.

The figure function holds all logic and is tested without a widget. The box updates an Image through
`observe`: `interact` and `Output` would not repeat when a notebook is compared with its stored
outputs.
"""

import html
import io
import sys
from collections.abc import Callable
from typing import Any

import ipywidgets as w

DPI = 100


class Explorer(w.VBox):
    """Controls, a picture and a caption. Its stored output is one sentence that never changes."""

    def __init__(
        self,
        draw: Callable[..., Any],
        say: Callable[..., str] | None,
        controls: dict[str, w.Widget],
    ):
        self._draw, self._say, self._controls = draw, say, controls
        self._image, self._caption = w.Image(format="png"), w.HTML()
        self._image.layout.max_width = "100%"
        self._image.layout.align_self = "flex-start"  # a box stretches what it holds
        for control in controls.values():
            control.observe(self.update, names="value")
        super().__init__([*controls.values(), self._image, self._caption])
        self.update()

    @property
    def values(self) -> dict[str, Any]:
        """What the controls say now."""
        return {name: control.value for name, control in self._controls.items()}

    @property
    def picture(self) -> bytes:
        """The PNG on show; empty when the last setting could not be drawn."""
        return bytes(self._image.value)

    @property
    def caption(self) -> str:
        return self._caption.value

    def update(self, _change: Any = None) -> None:
        """Draws the figure for the controls' values, or says why it cannot be drawn."""
        try:
            picture = _png(self._draw(**self.values))
            text = self._say(**self.values) if self._say else ""
        except Exception as error:
            picture, text = b"", f"This setting cannot be drawn: {type(error).__name__}: {error}"
        self._image.value = picture
        self._image.layout.display = "" if picture else "none"
        self._caption.value = html.escape(text)

    def twin(self) -> str:
        """The sentence that stands for the explorer where no widget can be shown."""
        names = ", ".join(name.replace("_", " ") for name in self._controls)
        return f"Explorer: run this cell and move the controls ({names})."

    def __repr__(self) -> str:
        return self.twin()

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        bundle = super()._repr_mimebundle_(**kwargs)
        data, *metadata = bundle if isinstance(bundle, tuple) else (bundle,)
        data = {**(data or {}), "text/plain": self.twin(), "text/html": html.escape(self.twin())}
        return (data, *metadata) if metadata else data


def explore(
    draw: Callable[..., Any],
    *,
    say: Callable[..., str] | None = None,
    start: dict[str, Any] | None = None,
    **controls: Any,
) -> Explorer:
    """Controls over draw(**values) -> Figure; say(**values) puts in words what the figure shows.

    A control is a list of choices, a dictionary of labels to values, a range, (low, high, step), or
    a bool. Each begins at its first value, or where `start` says.
    """
    start = start or {}
    unknown = sorted(set(start) - set(controls))
    if unknown:
        raise ValueError(
            f"start names {', '.join(unknown)}, which is no control, so it would move nothing; "
            f"the controls are {', '.join(controls)}"
        )
    made = {name: _control(name, kind, start.get(name)) for name, kind in controls.items()}
    return Explorer(draw, say, made)


def _control(name: str, kind: Any, start: Any) -> w.Widget:
    look = {"description": name.replace("_", " "), "style": {"description_width": "10em"}}
    slide = {**look, "continuous_update": False, "layout": {"width": "32em"}}
    if isinstance(kind, bool):
        return w.Checkbox(value=kind if start is None else start, indent=False, **look)
    if isinstance(kind, dict):
        return _choice(w.Dropdown, list(kind.items()), start, list(kind.values()), look)
    if isinstance(kind, range):
        kind = (kind[0], kind[-1], kind.step)
    if isinstance(kind, tuple) and len(kind) == 3:
        low, high, step = kind
        slider = w.IntSlider if all(isinstance(v, int) for v in kind) else w.FloatSlider
        return slider(value=low if start is None else start, min=low, max=high, step=step, **slide)
    if isinstance(kind, list) and kind:
        if any(isinstance(value, str) for value in kind):
            return _choice(w.Dropdown, kind, start, kind, look)
        labels = [(f"{value:,}" if isinstance(value, int) else str(value), value) for value in kind]
        return _choice(w.SelectionSlider, labels, start, kind, slide)
    raise TypeError(
        f"the control {name} is a {type(kind).__name__}, so there is nothing to move; "
        "give a list, a dictionary, a range, (low, high, step) or a bool"
    )


def _choice(kind: type, options: list, start: Any, values: list, look: dict) -> w.Widget:
    return kind(options=options, value=values[0] if start is None else start, **look)


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})
    _close(figure)
    return buffer.getvalue()


def _close(figure: Any) -> None:
    """Takes the figure from pyplot's list, if it is there: nothing else would ever free it."""
    pyplot = sys.modules.get("matplotlib.pyplot")
    if pyplot is not None:
        pyplot.close(figure)
    figure.clear()
