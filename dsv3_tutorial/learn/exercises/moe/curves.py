"""Reading a run by its curves: the clinic's one exercise."""

import torch

from dsv3_tutorial.bench import clinic
from dsv3_tutorial.learn.registry import Case, Exercise, Mutant


def _run(case: str, seed: int):
    def make() -> tuple[torch.Tensor, torch.Tensor]:
        (run,) = clinic.load(case, (seed,))
        return torch.tensor(run.loss), torch.tensor(run.held_out)

    return make


def _low_loss(loss, held_out):
    return bool(loss[-20:].mean() < 2.5)


def _bad_held_out(loss, held_out):
    return bool(held_out[-1] > 3.6)


def _ticking_up() -> tuple[torch.Tensor, torch.Tensor]:  # healthy, and its last measurement noisy
    loss, held_out = _run("healthy", 1)()
    held_out = held_out.clone()
    held_out[-1] = held_out[-2] + 0.05
    return loss, held_out


def _diverging() -> tuple[torch.Tensor, torch.Tensor]:  # both losses rise, side by side
    loss, held_out = _run("healthy", 0)()
    return loss + torch.linspace(0, 6, len(loss)), held_out + torch.linspace(0.6, 6, len(held_out))


def _held_out_rose(loss, held_out):
    return bool(held_out[-1] > held_out[0])


def _last_rose(loss, held_out):
    return bool(held_out[-1] > held_out[-2])


def _above_best(loss, held_out):
    return bool(held_out[-1] > held_out.min())


def _any_gap(loss, held_out):
    return bool(held_out[-1] > loss[-20:].mean())


def _rising(loss, held_out):
    return bool(loss[-20:].mean() > loss[-40:-20].mean())


def _wrong_way(loss, held_out):
    return bool(loss[-20:].mean() - held_out[-1] > 0.5)


MEMORISES = Exercise(
    name="moe.memorises",
    reference="dsv3_tutorial.bench.clinic:memorises",
    cases=[
        Case("a run on four kilobytes", _run("little_text", 0)),
        Case("a healthy run", _run("healthy", 0)),
        Case("a run that sees the future", _run("future_visible", 0)),
        Case("a run that learns badly", _run("target_one_too_far", 0)),
        Case("another on four kilobytes", _run("little_text", 1), hidden=True),
        Case("one on four kilobytes, held back", _run("little_text", 2), hidden=True),
        Case("healthy, held back", _run("healthy", 2), hidden=True),
        Case("slow and healthy", _run("healthy_half_rate", 2), hidden=True),
        Case("a noisy last measurement", _ticking_up, hidden=True),
        Case("diverging", _diverging, hidden=True),
        Case("unclipped", _run("no_clipping", 1), hidden=True),
    ],
    hints=[
        "Compare what it reaches on the text it reads with what it reaches on other text.",
        "held_out[-1] against the mean of the last losses: a batch alone is noisy.",
        "Healthy runs end 0 to 0.2 bits apart. Return bool(... > a border well above that).",
    ],
    difficulty=2,
    importance=4,
    minutes=6,
    lines=1,
    mutants=[
        Mutant("low loss", _low_loss, "A low loss alone: a model that sees the future has it too."),
        Mutant(
            "bad on other text",
            _bad_held_out,
            "held_out alone: a model that learns badly has it too.",
        ),
        Mutant("any gap", _any_gap, "Healthy runs have a small gap too: 0 to 0.2 bits is noise."),
        Mutant(
            "the last rose",
            _last_rose,
            "A single measurement that rises is noise: compare with the text it reads.",
        ),
        Mutant(
            "above its best",
            _above_best,
            "A single measurement that rises is noise: compare with the text it reads.",
        ),
        Mutant(
            "held_out rose",
            _held_out_rose,
            "held_out rises in a run that diverges too: compare with the text it reads.",
        ),
        Mutant(
            "rising", _rising, "This asks whether the loss rises: by heart, it falls and falls."
        ),
        Mutant(
            "wrong way", _wrong_way, "The sign: held-out loss lies *above* the loss of the batches."
        ),
    ],
)

EXERCISES = [MEMORISES]
