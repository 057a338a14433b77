"""The trained model at work: greedy texts beside transformers' `generate`, batching, and phases."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from dsv3_tutorial.bench import inference_text, machine, timing
from dsv3_tutorial.bench.inference_model import CACHED, PEERS, PLAIN, Engines
from dsv3_tutorial.bench.inference_spec import Stats, same_output
from dsv3_tutorial.cost import bill, flops
from dsv3_tutorial.inference.batch import Request, Server
from dsv3_tutorial.inference.generate import generate
from dsv3_tutorial.model import DeepSeekV3

Run = Callable[[], list[list[int]]]
EXACT = (PLAIN, "speculation", *PEERS)  # these write the same tokens, or nothing is timed
SLOTS = 8  # texts at a time


def generation(
    engines: Engines,
    with_mtp: DeepSeekV3,
    batch: int,
    new: int,
    narrow: Sequence[str],
    repeats: int,
    seconds: float,
) -> dict[str, tuple[Stats, float]]:
    """Tokens a second of whole calls, prompts read, and the share of tokens that are float32's.

    "speculation": one draft. transformers is asked for exactly as many tokens; its time is that of
    its own `generate`, with its dynamic cache and with its static one.
    """
    prompts = inference_text.prompts(batch)
    runs: dict[str, Run] = {
        form: lambda form=form: (
            generate(engines.model(form), prompts, new, cache=CACHED.get(form)).sequences
        )
        for form in (PLAIN, *narrow)
    }
    runs["speculation"] = lambda: generate(with_mtp, prompts, new, speculate=1).sequences
    if engines.theirs is not None:
        for form in PEERS:
            runs[form] = lambda form=form: _theirs(engines, form, prompts, new)
    outputs = {form: run() for form, run in runs.items()}  # also the warm-up
    same_output({form: out for form, out in outputs.items() if form in EXACT})
    times = timing.compare(runs, repeats=repeats, warmup=0, seconds=seconds)
    wanted = torch.tensor(outputs[PLAIN])
    return {
        form: (rate(times[form], batch * new), float((torch.tensor(out) == wanted).double().mean()))
        for form, out in outputs.items()
    }


def _theirs(engines: Engines, form: str, prompts: list[list[int]], new: int) -> list[list[int]]:
    from transformers import GenerationConfig

    model, ids = engines.peer(form), torch.tensor(prompts)
    static = {"cache_implementation": "static"} if PEERS[form][2] else {}
    config = GenerationConfig(max_new_tokens=new, do_sample=False, pad_token_id=0, **static)
    model.generation_config = config  # its own would end a text at symbol 1, a letter of ours
    mask = torch.ones_like(ids)
    with torch.no_grad():
        out = model.generate(ids, generation_config=config, attention_mask=mask)
    return out[:, ids.shape[1] :].tolist()


def rate(stats: Mapping[str, float], work: float) -> Stats:
    """Seconds of a run to work a second."""
    found = {"median": work / stats["median"], "q1": work / stats["q3"], "q3": work / stats["q1"]}
    return found | {"repeats": stats["repeats"]}


def batching(model: DeepSeekV3, count: int, longest: int, seconds: float) -> dict[str, Stats]:
    """Tokens a second of `count` requests of uneven length, `SLOTS` at a time, three ways.

    "one by one", in "static" batches that wait for their longest text, and "continuous". Only
    tokens that were asked for count; equal tokens asserted.
    """
    prompts = inference_text.prompts(count)
    numbers = torch.Generator().manual_seed(0)
    wanted = torch.randint(longest // 8, longest + 1, (count,), generator=numbers).tolist()

    def one_by_one() -> list[list[int]]:
        return [generate(model, [p], n).sequences[0] for p, n in zip(prompts, wanted)]

    def static() -> list[list[int]]:
        out = []
        for at in range(0, count, SLOTS):
            some, counts = prompts[at : at + SLOTS], wanted[at : at + SLOTS]
            texts = generate(model, some, max(counts)).sequences
            out += [text[:n] for text, n in zip(texts, counts)]
        return out

    def continuous() -> list[list[int]]:
        room = inference_text.PROMPT + longest
        server = Server(model, pages=SLOTS * -(-room // 64), max_batch=SLOTS)
        for prompt, n in zip(prompts, wanted):
            server.submit(Request(prompt, n))
        results = server.run()
        return [results[i].tokens for i in range(count)]

    runs: dict[str, Run] = {"one by one": one_by_one, "static": static, "continuous": continuous}
    outputs: dict[str, list[list[int]]] = {}
    kept = {name: lambda name=name: outputs.update({name: runs[name]()}) for name in runs}
    times = timing.compare(kept, repeats=5, warmup=0, seconds=seconds)
    same_output(outputs)
    return {name: rate(stats, sum(wanted)) for name, stats in times.items()}


def phases(
    model: DeepSeekV3, tokens: int, batch: int, ceilings: machine.Ceilings, seconds: float
) -> Iterator[tuple[str, str, Stats, str | None, float | None]]:
    """Prefill of `batch` prompts and decoding behind them: (phase, unit, stats, ceiling, share).

    FLOP are those of the formula, bytes those of the bill: weights and cache once a step.
    """
    ids = torch.arange(batch * tokens).view(batch, tokens) * 7 % model.cfg.vocab_size
    caches = model.caches(batch, tokens + 1)

    def prefill() -> None:
        for cache in caches:
            cache.reset()
        model.lm_head(model.model(ids, caches)[:, -1])

    def decode() -> None:
        for cache in caches:
            cache.trim([tokens] * batch)
        model(ids[:, :1], caches)

    with torch.inference_mode():
        prefill()
        times = timing.compare({"prefill": prefill, "decode": decode}, repeats=15, seconds=seconds)
    wide = {"weights": "float32", "cache": "float32"}
    step = bill.total(bill.decode_bill(model.cfg, tokens + 1, batch, **wide))
    read = bill.total(bill.decode_bill(model.cfg, tokens, batch, tokens, **wide)).bytes
    work = {
        "prefill": (batch * tokens * flops.forward_flops_per_token(model.cfg, tokens), read),
        "decode": (step.flops, step.bytes),
    }
    for phase, stats in times.items():
        made = batch * (tokens if phase == "prefill" else 1)
        yield phase, "tokens/s", rate(stats, made), None, None
        flop, held = (rate(stats, amount) for amount in work[phase])
        yield phase, "FLOP/s", flop, "matmul fp32", flop["median"] / ceilings.matrix["fp32"].value
        yield phase, "bytes/s", held, "copy", held["median"] / ceilings.copy.value
