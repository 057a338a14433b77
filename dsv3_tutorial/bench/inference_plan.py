"""What `bench inference` measures on a CPU: forms, batches, contexts, and for how long."""

from dataclasses import dataclass

from dsv3_tutorial.bench import inference_model
from dsv3_tutorial.bench.inference_model import CACHED, FORMS, PEERS, PLAIN
from dsv3_tutorial.config import ModelConfig

SOME = (PLAIN, *CACHED, "int8", "int4", *PEERS)
OURS = (PLAIN, *CACHED, "int8")
FEWER = (*OURS, "transformers eager", "transformers static")  # many tokens: the default is slower
Cell = tuple[int, int, tuple[str, ...]]  # batch, context, forms


@dataclass(frozen=True)
class Plan:
    """What the CPU part measures; `seconds` of wall clock for a cell, one round at least."""

    trained: tuple[Cell, ...] = (
        (1, 256, FORMS),
        *((1, context, SOME) for context in (512, 2048, 8192)),
        *((8, context, FEWER) for context in (512, 2048, 8192)),
        *((32, context, FEWER) for context in (512, 2048)),
        (32, 8192, OURS),  # transformers would take five seconds a step: left out
    )
    wide: tuple[Cell, ...] = (
        (1, 256, FORMS),
        *((1, context, SOME) for context in (512, 2048, 4096, 8192)),
        *((8, context, FEWER) for context in (512, 2048)),
        (8, 8192, OURS),
        *((32, context, OURS) for context in (512, 2048)),
    )
    wide_config: ModelConfig = inference_model.WIDE
    repeats: int = 15
    burst: int = 15  # steps timed in turn, behind one that is not
    seconds: float = 6.0
    generated: tuple[tuple[int, int], ...] = ((1, 128), (8, 64))  # batch, new tokens
    narrow: tuple[str, ...] = (*CACHED, "bf16", "int8", "int4")  # that write beside the exact ones
    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    drafts: tuple[int, ...] = (0, 1, 2)
    more_drafts: tuple[int, ...] = (0, 1, 2, 3, 4)  # at batch 1
    new: int = 128
    kinds: tuple[int, int] = (32, 192)  # texts and their tokens
    sides: tuple[int, ...] = (256, 1024, 2048)
    rows: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    streamed: int = 2**27  # bytes of float32 weights that are met in turn
    requests: tuple[int, int] = (24, 96)  # and their longest
    prefilled: tuple[tuple[int, int], ...] = ((1, 256), (8, 256))  # batch, tokens


QUICK = Plan(
    trained=((1, 8, (PLAIN, *PEERS)), (2, 16, (PLAIN, *CACHED, "int8", *PEERS))),
    wide=((1, 8, SOME), (1, 16, SOME)),
    wide_config=ModelConfig.named("tiny"),
    repeats=1,
    burst=1,
    seconds=0.1,
    generated=((2, 4),),
    narrow=("fp8 cache",),
    batches=(1, 2),
    more_drafts=(0, 1, 2),
    new=8,
    kinds=(2, 16),
    sides=(64,),
    rows=(1, 2),
    streamed=2**16,
    requests=(3, 8),
    prefilled=((1, 8),),
)
