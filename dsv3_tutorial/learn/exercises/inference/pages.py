"""Where a token lies when the cache is cut into pages."""

import torch
from torch import Tensor

from dsv3_tutorial.learn.registry import Case, Exercise, Mutant


def _tables(
    seed: int,
    batch: int,
    length: int,
    page_size: int,
    pages: int = 40,
    dtype: torch.dtype = torch.int64,
    first: int = 0,
):
    """Texts with pages of their own from a pool, asked for any positions of theirs."""

    def make() -> tuple[Tensor, Tensor, int]:
        draw = torch.Generator().manual_seed(seed)
        each = 4
        tables = torch.randperm(pages, generator=draw)[: batch * each].view(batch, each) + first
        positions = torch.randint(0, each * page_size, (batch, length), generator=draw)
        return tables.to(dtype), positions, page_size

    return make


def _next_tokens() -> tuple[Tensor, Tensor, int]:
    """A decode step: one new token for each text, each of another length."""
    tables = torch.tensor([[7, 2, 9], [0, 5, 1], [4, 8, 3]])
    return tables, torch.tensor([[64], [63], [130]]), 64


def _page(tables: Tensor, positions: Tensor, page_size: int) -> Tensor:
    return tables.long().gather(1, positions // page_size)


def _contiguous(tables, positions, page_size):
    return positions + 0


def _page_only(tables, positions, page_size):
    return _page(tables, positions, page_size)


def _first_slot(tables, positions, page_size):
    return _page(tables, positions, page_size) * page_size


def _not_multiplied(tables, positions, page_size):
    return _page(tables, positions, page_size) + positions % page_size


def _position_whole(tables, positions, page_size):
    return _page(tables, positions, page_size) * page_size + positions


def _swapped(tables, positions, page_size):
    index = (positions % page_size).clamp(max=tables.shape[1] - 1)
    return tables.long().gather(1, index) * page_size + positions // page_size


def _first_text(tables, positions, page_size):
    page = tables[0].long()[positions // page_size]
    return page * page_size + positions % page_size


def _by_step(tables, positions, page_size):
    """Indexed by rows: texts and positions mixed up."""
    page = tables.long()[:, positions // page_size][:, 0]
    return page * page_size + positions % page_size


def _narrow(tables, positions, page_size):
    page = tables.gather(1, positions // page_size)
    return (page * page_size + (positions % page_size).to(tables.dtype)).long()


def _by_pages(tables, positions, page_size):
    return _page(tables, positions, page_size) * tables.shape[1] + positions % page_size


def _rounded_up(tables, positions, page_size):
    index = (-(-positions // page_size)).clamp(max=tables.shape[1] - 1)
    return tables.long().gather(1, index) * page_size + positions % page_size


SLOTS = Exercise(
    name="inference.slots",
    reference="dsv3_tutorial.attention.paged:slots",
    cases=[
        Case("one text, pages of 4", _tables(0, 1, 6, 4)),
        Case("three texts, pages of 16", _tables(1, 3, 5, 16)),
        Case("a decode step", _next_tokens),
        Case("int32 tables", _tables(2, 2, 4, 8, dtype=torch.int32)),
        Case("as many texts as positions", _tables(3, 4, 4, 64), hidden=True),
        Case("pages of one token", _tables(4, 3, 4, 1), hidden=True),
        Case(
            "a large pool, int32 tables",
            _tables(5, 2, 3, 64, dtype=torch.int32, first=40_000_000),
            hidden=True,
        ),
        Case("pages that are no power of two", _tables(6, 5, 9, 7), hidden=True),
    ],
    hints=[
        "A position is in the text's page number positions // page_size, at place positions % "
        "page_size of it.",
        "tables says which page of the pool that is; page j holds slots j * page_size and on. Each "
        "text has its own row: tables.gather(1, positions // page_size).",
        "tables.long().gather(1, positions // page_size) * page_size + positions % page_size.",
    ],
    difficulty=2,
    importance=4,
    minutes=5,
    lines=2,
    mutants=[
        Mutant("not looked up", _contiguous, "tables is not used: these are the text's positions."),
        Mutant("page only", _page_only, "These are pages: return slots, page * page_size + place."),
        Mutant("first slot", _first_slot, "This is where the page begins: add the place in it."),
        Mutant(
            "not multiplied",
            _not_multiplied,
            "Page j begins at slot j * page_size, not at slot j.",
        ),
        Mutant(
            "whole position",
            _position_whole,
            "The whole position is added to the page's first slot: add the place in the page.",
        ),
        Mutant("swapped", _swapped, "// gives the page, % the place in it: here they are swapped."),
        Mutant("first text", _first_text, "Every text reads the first one's row of tables."),
        Mutant(
            "all texts at once",
            _by_step,
            "tables[:, index] takes these columns of every text: gather takes each text's own.",
        ),
        Mutant(
            "narrow",
            _narrow,
            "int32 runs over in a large pool: make the pages int64 before you multiply.",
        ),
        Mutant(
            "pages in place of size",
            _by_pages,
            "The page is multiplied by the number of pages, not by the page's size.",
        ),
        Mutant("rounded up", _rounded_up, "The page is rounded up: positions // page_size."),
    ],
)
