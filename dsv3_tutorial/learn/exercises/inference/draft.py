"""What the MTP module reads: each position's hidden state, and the token after it."""

import torch
from torch import Tensor

from dsv3_tutorial.learn.attempt import first_line
from dsv3_tutorial.learn.draw import randn
from dsv3_tutorial.learn.registry import Case, Exercise, Mutant

LEAVE = "Leave input_ids as they are, and put the shifted tokens into a new tensor."


def _texts(seed: int, batch: int, length: int, width: int, dtype: torch.dtype = torch.float32):
    def make() -> tuple[Tensor, Tensor, Tensor]:
        draw = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, 512, (batch, length), generator=draw)
        chosen = torch.randint(0, 512, (batch,), generator=draw)
        return randn(seed, (batch, length, width), dtype=dtype)[0], ids, chosen

    return make


def _ids(next_ids):
    """`mtp_inputs` with the tokens open to be got wrong."""
    return lambda hidden, input_ids, chosen: (hidden, next_ids(input_ids, chosen[:, None]))


def _shifted(ids: Tensor, chosen: Tensor) -> Tensor:
    return torch.cat([ids[:, 1:], chosen], dim=1)


def _last_dropped(hidden, input_ids, chosen):
    return hidden[:, :-1], input_ids[:, 1:]


def _hidden_shifted(hidden, input_ids, chosen):
    before = torch.cat([torch.zeros_like(hidden[:, :1]), hidden[:, :-1]], dim=1)
    return before, _shifted(input_ids, chosen[:, None])


def _both_shifted(hidden, input_ids, chosen):
    after = torch.cat([hidden[:, 1:], hidden[:, -1:]], dim=1)
    return after, _shifted(input_ids, chosen[:, None])


def _longer(hidden, input_ids, chosen):
    return hidden, torch.cat([input_ids, chosen[:, None]], dim=1)


def _last_only(hidden, input_ids, chosen):
    return hidden[:, -1:], chosen[:, None]


def _in_place(next_ids):
    """As `_ids`, but the tokens are written over the input."""
    return lambda hidden, input_ids, chosen: (
        hidden,
        input_ids.copy_(next_ids(input_ids.clone(), chosen[:, None])),
    )


def _hidden_in_place(hidden, input_ids, chosen):
    hidden[:, :-1] = hidden[:, 1:].clone()
    return hidden, _shifted(input_ids, chosen[:, None])


_OVERWRITTEN = {
    "shifted": _shifted,
    "shifted, chosen not used": lambda ids, chosen: torch.cat([ids[:, 1:], ids[:, -1:]], dim=1),
    "rolled": lambda ids, chosen: ids.roll(-1, dims=1),
    "the last replaced": lambda ids, chosen: torch.cat([ids[:, :-1], chosen], dim=1),
    "the wrong way": lambda ids, chosen: torch.cat([chosen, ids[:, :-1]], dim=1),
}


def _swapped(hidden, input_ids, chosen):
    return _shifted(input_ids, chosen[:, None]), hidden


def _no_column(error: BaseException, arguments: tuple) -> str | None:
    """After axes that do not fit: what chosen is; after a copy onto itself: to leave it."""
    if "memory location" in first_line(error):
        return LEAVE
    if "dimension" in first_line(error) or "size" in first_line(error):
        return "chosen is (B,), one token a text: chosen[:, None] makes it a column (B, 1)."
    return None


MTP_INPUTS = Exercise(
    name="inference.mtp_inputs",
    reference="dsv3_tutorial.inference.speculate:mtp_inputs",
    cases=[
        Case("one text", _texts(0, 1, 5, 4)),
        Case("three texts", _texts(1, 3, 6, 8)),
        Case("a single position", _texts(2, 2, 1, 4)),
        Case("as many texts as positions", _texts(3, 4, 4, 3), hidden=True),
        Case("BF16", _texts(4, 2, 7, 5, torch.bfloat16), hidden=True),
        Case("one text, one position", _texts(5, 1, 1, 2), hidden=True),
    ],
    hints=[
        "Write a text's tokens in a row, and under each the token after it. Under the last one "
        "stands chosen.",
        "The hidden states stay as they are; the tokens lose the first and gain one at the end.",
        "torch.cat([input_ids[:, 1:], chosen[:, None]], dim=1).",
    ],
    difficulty=2,
    importance=5,
    minutes=6,
    lines=2,
    mutants=[
        Mutant(
            "not shifted",
            _ids(lambda ids, chosen: ids),
            "Each hidden state stands beside its own token, which it has read already: the module "
            "gets the one after.",
        ),
        Mutant(
            "the wrong way",
            _ids(lambda ids, chosen: torch.cat([chosen, ids[:, :-1]], dim=1)),
            "The tokens are shifted the wrong way: beside position i stands token i + 1.",
        ),
        Mutant(
            "the token before",
            _ids(lambda ids, chosen: torch.cat([ids[:, :1], ids[:, :-1]], dim=1)),
            "Beside position i stands token i - 1: it is token i + 1.",
        ),
        Mutant(
            "rolled",
            _ids(lambda ids, chosen: ids.roll(-1, dims=1)),
            "The first token comes round to the end: what follows the last position is chosen.",
        ),
        Mutant(
            "rolled over the texts",
            _ids(lambda ids, chosen: _shifted(ids.roll(-1, dims=0), chosen)),
            "Another text's tokens: shift along the positions, dim 1.",
        ),
        Mutant(
            "the last repeated",
            _ids(lambda ids, chosen: torch.cat([ids[:, 1:], ids[:, -1:]], dim=1)),
            "The last token is there twice, and chosen is not used.",
        ),
        Mutant(
            "chosen in place of the last",
            _ids(lambda ids, chosen: torch.cat([ids[:, :-1], chosen], dim=1)),
            "chosen replaces the last token, and the others are not shifted.",
        ),
        Mutant(
            "chosen everywhere",
            _ids(lambda ids, chosen: chosen.expand_as(ids).clone()),
            "chosen follows the last position only.",
        ),
        Mutant(
            "two further",
            _ids(
                lambda ids, chosen: torch.cat([ids[:, 2:], chosen, chosen], dim=1)[
                    :, -ids.shape[1] :
                ]
            ),
            "This is the token after the next, which the module is to guess.",
        ),
        Mutant(
            "last dropped",
            _last_dropped,
            "The last position is dropped: it is the one that drafts, beside chosen.",
        ),
        Mutant(
            "hidden shifted",
            _hidden_shifted,
            "The hidden states are shifted too, so that each stands two tokens before its partner.",
        ),
        Mutant(
            "both shifted",
            _both_shifted,
            "Hidden states and tokens are both shifted, and match as before: leave hidden alone.",
        ),
        Mutant("longer", _longer, "The first token has nobody before it: it goes."),
        Mutant(
            "last only", _last_only, "Only the last position: the module's cache needs them all."
        ),
        *(
            Mutant(f"in place, {name}", _in_place(next_ids), LEAVE)
            for name, next_ids in _OVERWRITTEN.items()
        ),
        Mutant(
            "hidden in place",
            _hidden_in_place,
            "Leave hidden as it is: only the tokens are shifted.",
        ),
        Mutant("swapped", _swapped, "Return the hidden states first, then the tokens."),
    ],
    raised=_no_column,
)
