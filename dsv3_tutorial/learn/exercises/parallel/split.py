"""A feed-forward network split over ranks, with one all-reduce."""

import torch
import torch.nn.functional as F

from dsv3_tutorial.learn.draw import randn
from dsv3_tutorial.learn.exercises.parallel.lockstep import compared
from dsv3_tutorial.learn.exercises.parallel.split_ranks import (
    DETACHED,
    on_ranks,
    over,
    stored_turned,
)
from dsv3_tutorial.learn.registry import Case, Exercise, Mutant


def _case(seed: int, world: int, width: int, *shape: int, dtype: torch.dtype = torch.float64):
    """x (*shape), the three weights of a network of this width, and how many ranks share it."""
    d = shape[-1]
    return lambda: (*randn(seed, shape, (width, d), (width, d), (d, width), dtype=dtype), world)


def _mine(x, width, rank, world):
    return slice(rank * width // world, (rank + 1) * width // world)


def _open(hidden=None, after=lambda y, all_reduce, world: all_reduce(y)):
    """`column_row` with its parts open to be got wrong."""
    hidden = hidden or (lambda gate, up, all_reduce: F.silu(gate) * up)

    def split(x, w_gate, w_up, w_down, rank, world, all_reduce):
        mine = _mine(x, len(w_gate), rank, world)
        gate, up = x @ w_gate[mine].T, x @ w_up[mine].T
        return after(hidden(gate, up, all_reduce) @ w_down[:, mine].T, all_reduce, world)

    return split


def _reduced_before(gate, up, all_reduce):
    return F.silu(all_reduce(gate)) * all_reduce(up)


def _rows_thrice(x, w_gate, w_up, w_down, rank, world, all_reduce):
    mine = _mine(x, x.shape[-1], rank, world)
    gate = all_reduce(x[..., mine] @ w_gate[:, mine].T)
    up = all_reduce(x[..., mine] @ w_up[:, mine].T)
    mine = _mine(x, len(w_gate), rank, world)
    return all_reduce((F.silu(gate) * up)[..., mine] @ w_down[:, mine].T)


def _rows_first(x, w_gate, w_up, w_down, rank, world, all_reduce):
    mine = _mine(x, x.shape[-1], rank, world)
    gate, up = x[..., mine] @ w_gate[:, mine].T, x[..., mine] @ w_up[:, mine].T
    return all_reduce((F.silu(gate) * up) @ w_down.T)


def _hidden_gathered(x, w_gate, w_up, w_down, rank, world, all_reduce):
    mine = _mine(x, len(w_gate), rank, world)
    hidden = torch.zeros(*x.shape[:-1], len(w_gate), dtype=x.dtype)
    hidden[..., mine] = F.silu(x @ w_gate[mine].T) * (x @ w_up[mine].T)
    hidden = all_reduce(hidden)
    out = torch.zeros_like(x)
    mine = _mine(x, x.shape[-1], rank, world)
    out[..., mine] = hidden @ w_down[mine].T
    return all_reduce(out)


def _read_literally(x, w_gate, w_up, w_down, rank, world, all_reduce):
    gate, up = (w.chunk(world, dim=1)[rank] for w in (w_gate, w_up))
    return all_reduce((F.silu(x @ gate.T) * (x @ up.T)) @ w_down.chunk(world, dim=0)[rank].T)


def _down_by_rows(x, w_gate, w_up, w_down, rank, world, all_reduce):
    gate, up = (w.chunk(world)[rank] for w in (w_gate, w_up))
    return all_reduce((F.silu(x @ gate.T) * (x @ up.T)) @ w_down.chunk(world)[rank].T)


def _detached(x, w_gate, w_up, w_down, rank, world, all_reduce):
    with torch.no_grad():
        return _open()(x, w_gate, w_up, w_down, rank, world, all_reduce)


def _everything(x, w_gate, w_up, w_down, rank, world, all_reduce):
    return (F.silu(x @ w_gate.T) * (x @ w_up.T)) @ w_down.T


def _everything_summed(x, w_gate, w_up, w_down, rank, world, all_reduce):
    return all_reduce(_everything(x, w_gate, w_up, w_down, rank, world, all_reduce))


def _first_part(x, w_gate, w_up, w_down, rank, world, all_reduce):
    return _open()(x, w_gate, w_up, w_down, 0, world, all_reduce)


def _residual(x, w_gate, w_up, w_down, rank, world, all_reduce):
    mine = _mine(x, len(w_gate), rank, world)
    hidden = F.silu(x @ w_gate[mine].T) * (x @ w_up[mine].T)
    return all_reduce(x + hidden @ w_down[:, mine].T)


COLUMN_ROW = Exercise(
    name="parallel.column_row",
    reference="dsv3_tutorial.parallel.split:column_row",
    cases=[
        Case("2 ranks", _case(0, 2, 8, 3, 6)),
        Case("4 ranks, one feature each", _case(1, 4, 4, 5, 8)),
        Case("3 ranks, float32", _case(2, 3, 12, 2, 6, dtype=torch.float32)),
        Case("a batch of sequences", _case(3, 4, 20, 2, 3, 4), hidden=True),
        Case("as wide as x", _case(4, 2, 4, 3, 4), hidden=True),
        Case("one rank", _case(5, 1, 5, 2, 3), hidden=True),
        Case("BF16", _case(6, 2, 16, 4, 8, dtype=torch.bfloat16), hidden=True),
    ],
    hints=[
        "silu needs finished sums, so cut w_gate and w_up along F: a rank then has whole hidden "
        "features, F / world of them. Weights are stored (out, in): these are rows of w_gate.",
        "part = w_gate.shape[0] // world; w_gate[rank * part : (rank + 1) * part], the same of "
        "w_up; hidden = F.silu(x @ gate.T) * (x @ up.T).",
        "The hidden features of a rank meet the same columns of w_down. Each rank then has a part "
        "of the sum for all of D: one all_reduce.",
    ],
    difficulty=3,
    importance=5,
    minutes=6,
    lines=3,
    mutants=[
        Mutant(
            "no sum",
            _open(after=lambda y, all_reduce, world: y),
            "Each rank has a part of the sum only: all_reduce it.",
        ),
        Mutant(
            "columns, then rows, read literally",
            _read_literally,
            "w_gate and w_up are cut along D, their inputs. Weights are stored (out, in): a column "
            "of the formula is a row here, so cut these two by rows, and w_down by columns.",
        ),
        Mutant(
            "down by rows",
            _down_by_rows,
            "w_down is cut along D, its outputs: cut it along F, by columns w_down[:, mine], as a "
            "rank has only its own features. Weights are stored (out, in).",
        ),
        Mutant(
            "detached",
            _detached,
            f"{DETACHED}.",
        ),
        Mutant(
            "before silu",
            _open(_reduced_before),
            "all_reduce comes before silu: it adds up different features of different ranks.",
        ),
        Mutant(
            "rows first",
            _rows_first,
            "silu acts on unfinished sums: cut w_gate and w_up along F, not along D.",
        ),
        Mutant(
            "three sums",
            _rows_thrice,
            "With w_gate and w_up cut along D their outputs need sums of their own: cut along F.",
        ),
        Mutant(
            "hidden gathered",
            _hidden_gathered,
            "The hidden features are brought together: a rank's own meet its columns of w_down.",
        ),
        Mutant(
            "summed twice",
            _open(after=lambda y, all_reduce, world: all_reduce(all_reduce(y))),
            "After one all_reduce every rank has the sum: the second multiplies it by world.",
        ),
        Mutant(
            "mean",
            _open(after=lambda y, all_reduce, world: all_reduce(y) / world),
            "Parts of a sum are added, not averaged: do not divide by world.",
        ),
        Mutant(
            "everything",
            _everything,
            "Every rank computes everything: nothing is split. Take 1 / world of the features.",
        ),
        Mutant(
            "everything summed",
            _everything_summed,
            "Every rank computes everything, and the sum is world times too large.",
        ),
        Mutant("first part", _first_part, "Every rank takes the first part: rank is not used."),
        Mutant(
            "no silu",
            _open(lambda gate, up, all_reduce: gate * up),
            "gate times up without silu: gate goes through silu first.",
        ),
        Mutant(
            "silu of up",
            _open(lambda gate, up, all_reduce: gate * F.silu(up)),
            "silu goes over the gate, not over up.",
        ),
        Mutant("residual", _residual, "x is added on every rank: the block adds it, once."),
    ],
    compare=compared(over),
    run=on_ranks,
    raised=stored_turned,
)
