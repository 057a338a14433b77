"""How much past fits: into a device's memory, in four forms of the cache, and into an L2."""

from dataclasses import replace

from matplotlib.figure import Figure

from dsv3_tutorial import hardware
from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost import bill, deployment, storage
from dsv3_tutorial.learn.figures.style import IDLE, INK, MEMORY, figure, finish, note, plain_log

DEVICES = ("rtx-4090", "rtx-5090", "h800", "h20", "h200", "b200")
FORMS = {
    "full": "keys and values of all 128 heads",
    "gqa": "of 8 heads, which all share (GQA)",
    "latent": "BF16 latent",
    "fp8": "FP8 latent",
}
LOOKS = {  # the latent is orange wherever it is drawn
    "full": {"color": IDLE},
    "gqa": {"color": "#777777"},
    "latent": {"color": MEMORY},
    "fp8": {"facecolor": "white", "edgecolor": MEMORY, "hatch": "////"},
}
L2 = ("rtx-4090", "rtx-5090")  # the claim is of a consumer GPU
MODEL = "deepseek-v3"


def tokens_that_fit() -> dict[str, dict[str, int]]:
    """Tokens of V3's cache that a device holds if all its memory is for them, by form."""
    kinds = {form: (ModelConfig.named(MODEL), form) for form in FORMS}
    kinds["gqa"] = _grouped(), "full"
    return {
        device: {
            form: deployment.context_that_fits(cfg, hardware.chip(device), weights=None, cache=kind)
            for form, (cfg, kind) in kinds.items()
        }
        for device in DEVICES
    }


def context_that_fits() -> Figure:
    """Bars: tokens of V3's cache on six devices, the weights being elsewhere."""
    fits = tokens_that_fit()
    fig, ax = figure(10.5, 4.6)
    for index, (form, label) in enumerate(FORMS.items()):
        places = [place + (index - 1.5) * 0.22 for place in range(len(DEVICES))]
        values = [fits[device][form] for device in DEVICES]
        ax.bar(places, values, 0.2, label=label, **LOOKS[form])
        for place, value in zip(places, values):
            ax.text(place, value * 1.1, _short(value), ha="center", fontsize=8)
    ax.set_xticks(range(len(DEVICES)), [_name(device) for device in DEVICES])
    plain_log(ax.yaxis)
    ax.set_ylim(1e3, 6e7)
    ax.axhline(131072, color=INK, linewidth=1.2, linestyle=":", label="V3's longest, 131,072")
    full, shared, latent, fp8 = (fits["h800"][form] for form in FORMS)
    held = f"V3's latent holds {latent / full:.0f} times as many tokens as keys and values of all "
    title = f"{held}heads,\n{latent / shared:.1f} times as many as GQA with 8 heads; in FP8 "
    title += f"{fp8 / latent:.2f} times that"
    finish(fig, ax, title, "", "tokens of V3's cache", legend=False)
    ax.legend(loc="upper left", ncols=2, fontsize=10, frameon=False)
    share = f"{deployment.USABLE:.0%} of the device's memory"
    note(fig, f"derived: {share} for the cache, V3's weights elsewhere; GQA in V3's 61 layers")
    return fig


def _grouped() -> ModelConfig:
    """What others would cache in V3's depth: Llama 3.1 405B's 8 heads of 128, in 61 layers."""
    layers = ModelConfig.named(MODEL).num_hidden_layers
    return replace(ModelConfig.named("llama-3.1-405b"), num_hidden_layers=layers)


def l2_table() -> None:
    """Print how many of V3's cached tokens an L2 holds, and what a step sends through it."""
    cfg = ModelConfig.named(MODEL)
    print(f"{'':16}{'L2':>8}{'tokens, all 61 layers':>24}{'tokens, one layer':>20}")
    for name in L2:
        chip = hardware.chip(name)
        held = [deployment.tokens_in(chip.l2_bytes, cfg, "latent", layers) for layers in (None, 1)]
        size = f"{chip.l2_bytes / 2**20:.0f} MiB"
        print(f"{name:16}{size:>8}{held[0]:>24,}{held[1]:>20,}")
    read = bill.total(bill.decode_bill(cfg, 4096, weights="fp8")).bytes
    print(f"and each step sends {read / 1e9:.0f} GB of weights and cache through that L2")


def short_table() -> None:
    """Print a checklist's size of the cache beside the true one."""
    cfg = ModelConfig.named(MODEL)
    formula, true = cfg.kv_lora_rank, storage.cache_bytes(cfg, "bf16", 1)
    print(f'"batch x sequence x latent": {formula} a token')
    parts = f"({cfg.kv_lora_rank} + {cfg.qk_rope_head_dim}) x 2 bytes x {cfg.num_hidden_layers}"
    print(f"{parts} layers: {true:,} bytes a token, {true / formula:.0f} times that")


def _name(device: str) -> str:
    title = hardware.chip(device).title.removeprefix("NVIDIA ").removeprefix("GeForce ")
    return title.partition(" (")[0].replace(" SXM5", "").replace(" SXM", "").replace(" ", "\n")


def _short(tokens: float) -> str:
    if tokens >= 1e6:
        return f"{tokens / 1e6:.1f}M"
    return f"{tokens / 1e3:.0f}k" if tokens >= 1e4 else f"{tokens / 1e3:.1f}k"
