"""What a GPU holds from step to step in a layout."""

from dsv3_tutorial.learn.registry import Case, Exercise, Mutant

_WEIGHTS, _GRADIENTS, _OPTIMIZER = 2, 4, 8


def _numbers(*numbers: float):
    return lambda: numbers


def _open(
    dense=lambda pp, ep: 1 / pp,
    routed=lambda pp, ep: 1 / pp / ep,
    kept=lambda copies: copies,
    optimizer=lambda copies: 1,
    dense_holders=lambda dp, ep: dp,
    routed_holders=lambda dp, ep: dp // ep,
    weights=_WEIGHTS,
    gradients=_GRADIENTS,
    moments=_OPTIMIZER,
):
    """`state_bytes` with shares, holders and bytes open to be got wrong."""

    def state(dense_numbers, routed_numbers, pp, ep, dp, copies=1):
        some, rest = dense_numbers * dense(pp, ep), routed_numbers * routed(pp, ep)
        held = kept(copies) * (weights + gradients) * (some + rest)
        shared = some / dense_holders(dp, ep) + rest / routed_holders(dp, ep)
        return held + optimizer(copies) * moments * shared

    return state


def _same(copies: int) -> int:
    return copies


def _one(*_: int) -> int:
    return 1


STATE_BYTES = Exercise(
    name="codesign.state_bytes",
    reference="dsv3_tutorial.cost.step_memory:state_bytes",
    cases=[
        Case("one GPU", _numbers(3e9, 0.0, 1, 1, 1)),
        Case("experts on 8 of 8", _numbers(1e9, 16e9, 1, 8, 8)),
        Case("8 stages, experts on 8 of 32", _numbers(2e9, 40e9, 8, 8, 32)),
        Case("DeepSeek-V3, one copy", _numbers(17e9, 654e9, 16, 64, 128)),
        Case("DeepSeek-V3, DualPipe", _numbers(17e9, 654e9, 16, 64, 128, 2)),
        Case("dense", _numbers(70e9, 0.0, 4, 1, 16), hidden=True),
        Case("no expert parallelism", _numbers(5e9, 20e9, 2, 1, 6), hidden=True),
        Case("two copies, another split", _numbers(9e9, 220e9, 8, 16, 64, 2), hidden=True),
        Case("experts everywhere", _numbers(1e9, 27e9, 4, 24, 24, 2), hidden=True),
    ],
    hints=[
        "Per stage: dense / pp numbers lie on each GPU, and routed / pp / ep, as ep GPUs share a "
        "layer's experts.",
        "Weights and gradients, 2 + 4 bytes a number, lie on every GPU, for each of its copies "
        "stages.",
        "The optimizer's 8 bytes are dealt out. dp GPUs hold the same dense numbers, dp // ep the "
        "same experts. With two copies a GPU has twice the stages, and each stage twice the "
        "holders: copies cancels.",
    ],
    difficulty=3,
    importance=5,
    minutes=7,
    lines=4,
    tolerance=1e-9,
    mutants=[
        Mutant(
            "no ZeRO",
            _open(dense_holders=_one, routed_holders=_one),
            "The optimizer is not dealt out: ZeRO-1 shares it over all that hold the same numbers.",
        ),
        Mutant(
            "no ZeRO, two copies",
            _open(dense_holders=_one, routed_holders=_one, optimizer=_same),
            "The optimizer is not dealt out, and lies there once for each copy: ZeRO-1 shares it "
            "over all that hold the same numbers.",
        ),
        Mutant(
            "experts over dp",
            _open(routed_holders=lambda dp, ep: dp),
            "An expert's optimizer is dealt out over dp GPUs, but only dp // ep hold that expert.",
        ),
        Mutant(
            "experts over dp x ep",
            _open(routed_holders=lambda dp, ep: dp * ep),
            "More GPUs share an expert's optimizer here than hold the expert: dp // ep do.",
        ),
        Mutant(
            "experts not shared out",
            _open(routed_holders=_one),
            "The experts' optimizer is not dealt out: dp // ep GPUs hold the same experts.",
        ),
        Mutant(
            "dense over dp // ep",
            _open(dense_holders=lambda dp, ep: dp // ep),
            "Every one of the dp GPUs holds the same dense numbers, not dp // ep of them.",
        ),
        Mutant(
            "optimizer for each copy",
            _open(optimizer=_same),
            "A stage with two copies has twice the holders: a GPU's share of the optimizer stays.",
        ),
        Mutant(
            "optimizer halved",
            _open(optimizer=lambda copies: 1 / copies),
            "Twice the holders, but also twice the stages on a GPU: its share of the optimizer "
            "stays.",
        ),
        Mutant(
            "copies not used",
            _open(kept=_one),
            "copies is not used: DualPipe's GPU holds weights and gradients of two stages.",
        ),
        Mutant(
            "everything for each copy",
            _open(kept=_one, optimizer=lambda copies: 1 / copies),
            "copies halves the optimizer here; it doubles weights and gradients.",
        ),
        Mutant(
            "ep not used",
            _open(routed=lambda pp, ep: 1 / pp, routed_holders=lambda dp, ep: dp),
            "ep is not used: each GPU holds only 1 / ep of its stages' experts.",
        ),
        Mutant(
            "experts whole",
            _open(routed=lambda pp, ep: 1 / pp),
            "Each GPU holds all experts of its stage here: ep GPUs share them.",
        ),
        Mutant(
            "dense by ep",
            _open(dense=lambda pp, ep: 1 / pp / ep),
            "ep divides the dense numbers too: it deals out the experts alone.",
        ),
        Mutant(
            "experts not by pp",
            _open(routed=lambda pp, ep: 1 / ep),
            "The experts are not divided by pp: a stage holds its own layers' only.",
        ),
        Mutant(
            "gradients dealt out",
            lambda dense, routed, pp, ep, dp, copies=1: (
                copies * 2 * (dense + routed / ep) / pp + 12 * (dense / dp + routed / dp) / pp
            ),
            "The gradients are dealt out too: that is ZeRO-2. In ZeRO-1 each holder has all.",
        ),
        Mutant(
            "BF16 gradients",
            _open(gradients=2),
            "The gradients are float32: 4 bytes a number.",
        ),
        Mutant("no gradients", _open(gradients=0), "The gradients are missing: 4 bytes a number."),
        Mutant(
            "float32 moments",
            _open(moments=12),
            "The moments are BF16: master copy and moments take 4 + 2 + 2 bytes.",
        ),
        Mutant(
            "no optimizer",
            _open(moments=0),
            "The optimizer is missing: 8 bytes a number, dealt out.",
        ),
    ],
)
