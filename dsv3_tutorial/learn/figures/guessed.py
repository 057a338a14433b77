"""Who made each token of a text: the model itself, or a draft that it kept; and what it refused.

The same pieces as coloured text, as plain text with marks under its lines, and as a picture of the
passes. Drafts are underlined and refused ones struck, so that nothing hangs on colour alone.
"""

import html
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from threading import get_ident
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dsv3_tutorial.inference.generate import generate
from dsv3_tutorial.inference.sample import GREEDY, Sampling
from dsv3_tutorial.inference.text import Vocabulary
from dsv3_tutorial.learn.figures.style import COMPUTE, IDLE, INK, MEMORY, figure, note
from dsv3_tutorial.learn.show import show
from dsv3_tutorial.model import DeepSeekV3

BLUE, ORANGE = "rgba(0, 114, 178, 0.25)", "rgba(213, 94, 0, 0.25)"  # over light and dark themes
TAGS = {
    "prompt": '<span style="opacity: 0.6">{}</span>',
    "model": "{}",
    "draft": f'<u style="background-color: {BLUE}">{{}}</u>',
    "refused": f'<s style="background-color: {ORANGE}">{{}}</s>',
}
KEPT, CORRECTED = "~", "x"  # under the letters of a kept draft, and of what stands for a refused
BOX = 'style="white-space: pre-wrap; line-height: 1.5"'
VISIBLE = str.maketrans({" ": "\u00b7", "\n": "\u21b5", "\t": "\u2192"})


@dataclass(frozen=True)
class Made:
    """One token of the output, whether it was drafted, and the drafts it stands in place of."""

    token: int
    drafted: bool = False
    refused: tuple[int, ...] = ()


class Watch:
    """Says of each token that `generate` hands over who made it: its on_token, for one text.

    It looks at what the model reads: in each pass the last token and the drafts behind it. A token
    equal to its draft was kept, since the draw that follows a refusal excludes the refused one.
    tell(made) is called for each, and ends the text if it gives True. Use it as a context, once;
    what other threads do with the same model meanwhile is not its business.
    """

    def __init__(self, model: DeepSeekV3, tell: Callable[[Made], bool | None] | None = None):
        self.model, self.tell = model, tell
        self.made: list[Made] = []
        self._drafts: list[int] = []
        self._read = 0

    def __enter__(self) -> "Watch":
        self._thread = get_ident()
        self._hook = self.model.model.register_forward_pre_hook(self._reads)
        return self

    def __exit__(self, *_: Any) -> None:
        self._hook.remove()

    def _reads(self, _module: Any, inputs: tuple) -> None:
        if get_ident() == self._thread:
            self._drafts = inputs[0][0, 1:].tolist() if self._read else []  # the first: the prompt
            self._read += 1

    def __call__(self, _text: int, token: int) -> bool | None:
        drafted = bool(self._drafts) and self._drafts[0] == token
        self.made.append(Made(token, drafted, () if drafted else tuple(self._drafts)))
        self._drafts = self._drafts[1:] if drafted else []
        return self.tell(self.made[-1]) if self.tell else None


def run(
    model: DeepSeekV3,
    prompt: Sequence[int],
    max_new_tokens: int,
    drafts: int = 1,
    sampling: Sampling = GREEDY,
) -> list[Made]:
    """Continue one prompt, with who made each token: what `generate` gives, and the drafts."""
    with Watch(model) as watch:
        generate(model, [prompt], max_new_tokens, sampling, speculate=drafts, on_token=watch)
    return watch.made


class Pieces:
    """A text as it grows, in pieces (text, who): letters are whole, as `Vocabulary.stream` has it.

    who is "prompt", "model", "draft" or "refused".
    """

    def __init__(self, vocabulary: Vocabulary, prompt: str, made: Iterable[Made] = ()):
        self.vocabulary, self.letters = vocabulary, vocabulary.stream()
        self.parts: list[tuple[str, str]] = [(prompt, "prompt")] if prompt else []
        self.made: list[Made] = []
        for one in made:
            self.add(one)

    def add(self, made: Made) -> None:
        """One token more, behind the drafts that were refused in its place."""
        self.made.append(made)
        for token in made.refused:
            self.parts.append((alone(self.vocabulary, token), "refused"))
        self.parts.append((self.letters.add(made.token), "draft" if made.drafted else "model"))

    def in_words(self) -> str:
        """How many tokens came, and who made them."""
        kept, refused = sum(m.drafted for m in self.made), sum(len(m.refused) for m in self.made)
        said = f"{_counted(len(self.made), 'token')}: {len(self.made) - kept} by the model itself"
        return f"{said}, {_counted(kept, 'draft')} kept, {_counted(refused, 'draft')} refused"

    def as_html(self) -> str:
        """Drafts underlined on blue, refused ones struck on orange, the prompt paler."""
        body = "".join(TAGS[who].format(html.escape(text)) for text, who in self.parts)
        legend = f"{TAGS['draft'].format('drafted and kept')}, "
        legend += TAGS["refused"].format("drafted and refused")
        return f"<pre {BOX}>{body}</pre><p>{html.escape(self.in_words())} ({legend})</p>"

    def as_text(self) -> str:
        """The text with marks under it: ~ a kept draft, x the model's word for a refused one."""
        lines = []
        for line, marks in self.marked():
            lines += [line.rstrip(), marks.rstrip()] if marks.strip() else [line.rstrip()]
        legend = f"({KEPT} drafted and kept, {CORRECTED} in place of a refused draft)"
        return "\n".join([*lines, f"{self.in_words()} {legend}"])

    def marked(self) -> list[tuple[str, str]]:
        """Each line, and as many marks: tabs stay tabs, so that they lie under their letters."""
        letters, marks, sign = "", "", " "
        for text, who in self.parts:
            if who == "refused":
                sign = CORRECTED
                continue
            sign = KEPT if who == "draft" else sign
            letters += text
            marks += "".join(letter if letter in "\n\t" else sign for letter in text)
            sign = " " if text else sign  # half a letter hands its mark on
        return list(zip(letters.split("\n"), marks.split("\n"), strict=True))


def coloured(vocabulary: Vocabulary, prompt: str, made: Iterable[Made]) -> None:
    """Show a prompt and what came of it, each token by who made it."""
    pieces = Pieces(vocabulary, prompt, made)
    show(pieces.as_text(), text_html=pieces.as_html())


def alone(vocabulary: Vocabulary, token: int) -> str:
    """A token that is no part of the text, with its spaces and line ends to be seen."""
    return (vocabulary.stream().add(token) or "\ufffd").translate(VISIBLE)


def passes(made: Sequence[Made]) -> list[tuple[int, list[int], int, int]]:
    """(last token, drafts, how many were kept, the model's own) of each pass behind the prompt's.

    A pass that the end of the text cut short is left out.
    """
    found, kept, last = [], [], made[0].token
    for one in made[1:]:
        if one.drafted:
            kept.append(one.token)
            continue
        found.append((last, [*kept, *one.refused], len(kept), one.token))
        kept, last = [], one.token
    return found


def steps(vocabulary: Vocabulary, made: Sequence[Made], most: int = 10) -> Figure:
    """The first passes of a run, a row each: what was read, what was drafted, what came of it."""
    rows = passes(made)[:most]
    drafts = max((len(drafted) for _, drafted, *_ in rows), default=0)
    fig, ax = figure(2.6 + 2.0 * (drafts + 1), 1.3 + 0.36 * len(rows))
    names = ["last token, read", *[f"draft {i + 1}" for i in range(drafts)], "the model's own"]
    for row, (last, drafted, kept, own) in enumerate(rows):
        looks = ["read", *["kept"] * kept, *["refused"] * (len(drafted) - kept)]
        for column, (token, look) in enumerate(zip([last, *drafted], looks, strict=True)):
            _cell(ax, column, row, alone(vocabulary, token), look)
        _cell(ax, len(names) - 1, row, alone(vocabulary, own), "model")
    ax.set(xlim=(-0.55, len(names) - 0.45), ylim=(len(rows) - 0.4, -0.6))
    ax.set_xticks(range(len(names)), names)
    ax.xaxis.tick_top()
    ax.set_yticks(range(len(rows)), [f"pass {row + 1}" for row in range(len(rows))])
    ax.tick_params(length=0)
    ax.grid(False)
    ax.spines[:].set_visible(False)
    won = sum(kept for *_, kept, _ in rows)
    fig.suptitle(
        f"{_counted(len(rows), 'pass', 'es')} gave {_counted(len(rows) + won, 'token')}, "
        f"{won} of them drafted",
        x=0.02, ha="left", fontsize=13, color=INK, fontweight="bold",
    )  # fmt: skip
    note(fig, "blue: kept; hatched and crossed: refused; \u00b7 a space, \u21b5 a line's end")
    return fig


LOOKS = {
    "read": {"facecolor": "white", "edgecolor": IDLE},
    "kept": {"facecolor": "#BFDCEB", "edgecolor": COMPUTE},
    "refused": {"facecolor": "#F7DCC9", "edgecolor": MEMORY, "hatch": "//"},
    "model": {"facecolor": "white", "edgecolor": INK},
}


def _cell(ax: Axes, column: int, row: int, text: str, look: str) -> None:
    ax.bar(column, 0.8, 0.9, bottom=row - 0.4, **LOOKS[look])
    said = f"\u2717 {text}" if look == "refused" else text
    box = {"facecolor": LOOKS[look]["facecolor"], "edgecolor": "none", "pad": 1}
    ax.text(column, row, said, ha="center", va="center", fontsize=11, color=INK, bbox=box)


def _counted(number: int, thing: str, plural: str = "s") -> str:
    return f"{number} {thing}{'' if number == 1 else plural}"
