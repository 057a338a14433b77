"""What speculation gains on the trained model: by drafts and batch, the law, and by kind of token.

Seconds are process CPU time from the first token on: prompts were read before.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3_tutorial.bench import inference_text, timing
from dsv3_tutorial.bench.attention_steps import BenchError
from dsv3_tutorial.cost import speculation
from dsv3_tutorial.inference.generate import Generation, generate
from dsv3_tutorial.inference.session import Session
from dsv3_tutorial.model import DeepSeekV3

Stats = dict[str, float]
Run = Callable[[int], None]
_QUARTER = 0.6745  # standard deviations from the middle of a normal curve to its quartiles


def decoded(
    model: DeepSeekV3, prompts: list[list[int]], new: int, drafts: int, cache: str | None = None
) -> tuple[float, Generation]:
    """CPU seconds from the first tokens to the last ones, and what came."""
    begun: list[float] = []

    def told(text: int, token: int) -> None:
        if not begun:
            begun.append(time.process_time())

    done = generate(model, prompts, new, speculate=drafts, cache=cache, on_token=told)
    return time.process_time() - begun[0], done


def by_batch(
    model: DeepSeekV3, batch: int, drafts: Sequence[int], new: int, repeats: int, seconds: float
) -> dict[int, tuple[Stats, Generation]]:
    """Tokens a second with each number of drafts, in turn, the same output asserted."""
    prompts = inference_text.prompts(batch)
    order, rates, found = list(drafts), {k: [] for k in drafts}, {}
    deadline = time.perf_counter() + seconds
    for _ in range(repeats):
        for k in order:
            taken, done = decoded(model, prompts, new, k)
            rates[k].append(done.decoded / taken)
            found[k] = done
        order = order[1:] + order[:1]
        if time.perf_counter() > deadline:
            break
    same_output({k: done.sequences for k, done in found.items()})
    return {k: (timing.summary(rates[k]), found[k]) for k in drafts}


def same_output(outputs: Mapping[object, list[list[int]]]) -> None:
    """Raise BenchError unless all wrote the same tokens as the first."""
    (first, wanted), *others = outputs.items()
    wrong = [str(name) for name, tokens in others if tokens != wanted]
    if wrong:
        raise BenchError(
            f"Greedy output of {', '.join(wrong)} is not that of {first}. Their speeds cannot be "
            "compared. Run tests/inference/test_speculate.py, which says where they part."
        )


def facts(done: Generation) -> dict[str, float]:
    """Acceptance of a draft, and tokens that a text got of one pass."""
    turns = max(done.decoded - done.accepted, 1)
    rate = done.accepted / done.drafted if done.drafted else 0.0
    return {"acceptance": rate, "tokens_per_pass": done.decoded / turns, "passes": done.passes}


@torch.inference_mode()
def pass_costs(
    model: DeepSeekV3, batch: int, most: int, repeats: int, seconds: float
) -> dict[str, Stats]:
    """Seconds of a pass over 1 to `most` tokens a text ("1", ...), and of drafts ("draft 1", ...).

    Behind 192 cached tokens, tokens of held-out text. A draft is the module on so many positions,
    the first after each pass on all that the pass kept, and the head on one. Bursts of 4, a pass
    before each untimed.
    """
    session = Session(model, batch, 256 + most, drafts=True)
    rows = inference_text.tensor([(*p.before[-32:], *p.after) for p in _with_text(batch)])
    session.prefill(rows[:, :192].tolist())
    hidden, cache = session.hidden, session.draft_caches[0]
    model.draft(hidden, rows[:, 1:193], cache=cache)
    lengths = [192] * batch

    def verify(count: int) -> Run:
        def run(at: int) -> None:
            session.step(rows[:, 192 + at : 192 + at + count])
            session.trim(lengths)

        return run

    def draft(count: int) -> Run:
        def run(at: int) -> None:
            embedded = model.model.embed_tokens(rows[:, 192 + at : 192 + at + count])
            out = model.mtp[0](hidden[:, -count:], embedded, cache=cache)
            model.lm_head(out[:, -1]).argmax(-1)
            cache.trim(lengths)

        return run

    counts = range(1, most + 1)
    runs = {str(n): _burst(verify(n)) for n in counts}
    runs |= {f"draft {n}": _burst(draft(n)) for n in counts}
    return _bursts(runs, repeats, seconds)


def _with_text(batch: int) -> Sequence[inference_text.Place]:
    return inference_text.places(batch, 256)


def _burst(run: Run) -> Callable[[], float]:
    def timed() -> float:
        run(0)
        begun = time.process_time()
        for at in range(1, 5):
            run(at)
        return (time.process_time() - begun) / 4

    return timed


def _bursts(
    runs: Mapping[str, Callable[[], float]], repeats: int, seconds: float
) -> dict[str, Stats]:
    order, samples = list(runs), {name: [] for name in runs}
    deadline = time.perf_counter() + seconds
    for _ in range(repeats):
        for name in order:
            samples[name].append(runs[name]())
        order = order[1:] + order[:1]
        if time.perf_counter() > deadline:
            break
    return {name: timing.summary(times) for name, times in samples.items()}


def predicted(costs: Mapping[str, Stats], tokens_per_pass: float, drafts: int) -> float:
    """The law: tokens a pass / (c(k + 1) + d(n) + (k - 1) d(1)), in plain steps' time.

    c and d by how many tokens they read. The first draft reads the n that the last pass kept.
    """
    kept = min(round(tokens_per_pass), drafts + 1)
    times = [costs[str(drafts + 1)], costs[f"draft {kept}"], *[costs["draft 1"]] * (drafts - 1)]
    return tokens_per_pass * costs["1"]["median"] / sum(each["median"] for each in times)


def bytes_bound(model: DeepSeekV3, batch: int, drafts: int, acceptance: float) -> float:
    """What the bytes of weights alone would allow, a draft's among them: cost.speculation."""
    if not 0 <= acceptance <= 1:
        return 0.0
    wide = {"weights": "float32", "cache": "float32"}
    return speculation.expert_bytes_bound(
        model.cfg, batch, acceptance, drafts, context=128, drafted=True, **wide
    )


@torch.inference_mode()
def by_kind(
    model: DeepSeekV3, count: int, length: int
) -> Iterator[tuple[str, str, str, float, int]]:
    """Acceptance of the first draft: (text, rule, kind of token, share, tokens).

    "generated": the model's own greedy text, where a draft is right or not. "held-out": files as
    they are; "sampled" is the chance that a draw is accepted, the sum over min(p, q), and "greedy"
    whether module and model have the same best guess, by the kind of the token that stands there.
    """
    found = inference_text.places(count, length)
    made = generate(model, [place.prompt for place in found], length).sequences
    for text, tails in (("generated", made), ("held-out", [place.after for place in found])):
        ids = inference_text.tensor([(*place.prompt, *tail) for place, tail in zip(found, tails)])
        greedy, sampled = _agreement(model, ids, length)
        kinds = [
            kind
            for place, tail in zip(found, tails)
            for kind in inference_text.kinds(place.before, tail)
        ]
        yield from _shares(text, "greedy", kinds, greedy.flatten())
        if text == "held-out":
            yield from _shares(text, "sampled", kinds, sampled.flatten())


def _agreement(model: DeepSeekV3, ids: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """For the last `length` tokens of ids (B, S): same best guess, and sum of min(p, q)."""
    logits, (drafts, *_) = model(ids, drafts=True)
    target, draft = logits[:, 1:-1][:, -length:], drafts[:, :-1][:, -length:]  # of the same token
    least = torch.minimum(F.softmax(target, -1), F.softmax(draft, -1)).sum(-1)
    return (target.argmax(-1) == draft.argmax(-1)).double(), least.double()


def _shares(
    text: str, rule: str, kinds: Sequence[str], kept: Tensor
) -> Iterator[tuple[str, str, str, float, int]]:
    yield text, rule, "all", float(kept.mean()), len(kept)
    for kind in inference_text.KINDS:
        own = kept[torch.tensor([k == kind for k in kinds])]
        if len(own):
            yield text, rule, kind, float(own.mean()), len(own)


def quartiles(share: float, count: int) -> Stats:
    """Where a share of so many tokens lies as often as not, if tokens were independent."""
    off = _QUARTER * (share * (1 - share) / count) ** 0.5
    return {"median": share, "q1": share - off, "q3": share + off, "repeats": 1}
