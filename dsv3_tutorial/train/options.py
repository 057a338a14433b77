"""What `train` was asked for, checked as a whole before anything is loaded or written."""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from dsv3_tutorial.config import ConfigError, ModelConfig, preset_names
from dsv3_tutorial.parallel.mesh import Layout
from dsv3_tutorial.train import layout as layouts
from dsv3_tutorial.train import recipe as recipes
from dsv3_tutorial.train.recipe import Recipe, RecipeError

STEPS = 1000
STDLIB = "stdlib"
ALONE = Layout()
NAMES = tuple(field.name for field in fields(Recipe))


@dataclass(frozen=True)
class Plan:
    """A run that is possible: what trains, on what, how, where it is written, on which ranks.

    `laid_out`: whether the layout was asked for, and so is the run's own from now on.
    """

    config: ModelConfig
    config_name: str
    text: str
    recipe: Recipe
    out: Path
    resume: bool
    layout: Layout = ALONE
    laid_out: bool = False

    @property
    def folder(self) -> Path | None:
        """The folder of the text; None for the standard library."""
        return None if self.text == STDLIB else Path(self.text)

    def to_dict(self) -> dict[str, Any]:
        values = {"config_name": self.config_name, "config": self.config.to_dict()}
        values |= {"text": self.text, "recipe": self.recipe.to_dict()}
        return values | ({"layout": layouts.to_dict(self.layout)} if self.laid_out else {})


def parser() -> argparse.ArgumentParser:
    """The options of `train`. One that is not given is None: the recipe or the run knows it."""
    made = argparse.ArgumentParser(prog="python -m dsv3_tutorial train", description=ABOUT)
    made.add_argument("--out", type=Path, required=True, help="the run's folder")
    made.add_argument("--resume", action="store_true", help="go on with the run in --out")
    made.add_argument("--config", help=f"{', '.join(preset_names())} or a config.json (small)")
    made.add_argument("--text", help="a folder of text files, or stdlib (the default)")
    for flag, kind, about in (*OPTIONS, *layouts.OPTIONS):
        made.add_argument(f"--{flag.replace('_', '-')}", type=_lenient(kind), help=about)
    made.add_argument("--recompute", action="store_true", default=None, help=RECOMPUTE)
    made.add_argument("--prefetch", type=int, default=0, metavar="N", help=PREFETCH)
    made.add_argument("--threads", type=int, help="of PyTorch (default: its own choice)")
    made.add_argument("--device", help="cpu, cuda, ... (default: cuda where there is one)")
    made.add_argument("--csv", action="store_true", help="log.csv beside log.jsonl")
    made.add_argument("--profile", action="store_true", help="a trace for Perfetto, and a table")
    made.add_argument("--save-dtype", choices=SAVE_DTYPES, default="float32", help="of DIR/model")
    return made


ABOUT = (
    "Train a model on real text: DIR/log.jsonl has a row a step, DIR/checkpoints/ what --resume "
    "goes on from, and DIR/model/ the result in Hugging Face's layout."
)
RECOMPUTE = "keep a block's input only and run it again in backward: less memory, more work"
PRECISION = (
    "float32; bf16 (computed in a BF16 copy of float32 weights); fp8 (that, and the linear layers' "
    "and experts' products in FP8, a scale for 1x128 values and 128x128 weights); fp8-tensor (the "
    "same, one scale a tensor)"
)
PREFETCH = "batches drawn ahead by a thread while a step computes (0); the same run, to the bit"
SAVE_DTYPES = ("float32", "bf16")
OPTIONS: tuple[tuple[str, type, str], ...] = (
    ("steps", int, f"optimizer steps ({STEPS})"),
    ("seed", int, "of the weights and of the order of the text (0)"),
    ("batch", int, f"sequences a step ({Recipe.batch})"),
    ("micro_batches", int, "parts a step's batch is computed in, gradients added up (1)"),
    ("seq_len", int, f"symbols a sequence ({Recipe.seq_len})"),
    ("peak_lr", float, f"the highest learning rate ({Recipe.peak_lr:g})"),
    ("warmup", int, f"steps in which the rate rises to it ({Recipe.warmup})"),
    ("schedule", str, "after that: report (held, then a cosine to a tenth) or cosine"),
    ("mtp_weight", float, f"of the MTP loss, a third of it late ({recipes.MTP_WEIGHT})"),
    ("balance", str, "bias (with the sequence-wise loss), sequence, batch or none"),
    ("gamma", float, f"how far the balance bias moves a step ({recipes.GAMMA})"),
    ("alpha", float, f"of the balance loss ({recipes.ALPHA})"),
    ("freeze_bias", float, f"last part of the run it rests in ({Recipe.freeze_bias:.3f})"),
    ("precision", str, PRECISION),
    ("moments", str, "of the optimizer: float32, or bf16 (so with fp8 and fp8-tensor)"),
    ("tokenizer", str, "bytes, or bpe (learned from the training files)"),
    ("vocab_size", int, "symbols of the bpe"),
    ("evaluate_every", int, f"steps between held-out losses ({Recipe.evaluate_every})"),
    ("evaluate_windows", int, f"held-out sequences each is over ({Recipe.evaluate_windows})"),
    ("save_every", int, f"steps between checkpoints ({Recipe.save_every})"),
)


def _lenient(kind: type) -> Callable[[str], Any]:
    """Read a value as `kind`, or leave it: the recipe then says all that is wrong at once."""

    def read(text: str) -> Any:
        try:
            return kind(text)
        except ValueError:
            return text

    return read


def plan(options: argparse.Namespace) -> Plan:
    """The run that the options ask for. Raises RecipeError with every problem at once."""
    given = {name: getattr(options, name, None) for name in (*NAMES, "config", "text")}
    given = {name: value for name, value in given.items() if value is not None}
    if given.get("text", STDLIB) != STDLIB:
        given["text"] = str(Path(given["text"]).resolve())  # --resume may come from elsewhere
    problems: list[str] = []
    before = _before(options, problems)
    if before is not None:
        return _resumed(before, given, options, problems)
    recipe = _recipe({"steps": STEPS, **given}, problems)
    text = given.get("text", STDLIB)
    if text != STDLIB and not Path(text).is_dir():
        problems.append(f"text = {text!r}: there is no such folder; {STDLIB} is always there")
    name = given.get("config", "small")
    config = _config(name, problems)
    problems += _machine_problems(options)
    if config is not None and recipe is not None:
        config = _fit(config, recipe, problems)
    if config is None or recipe is None:
        raise RecipeError(problems)
    made = Plan(config, name, text, recipe, options.out, options.resume)
    return _spread(made, options, None, problems)


def _spread(
    made: Plan, options: argparse.Namespace, before: Layout | None, problems: list[str]
) -> Plan:
    """The plan on the ranks that there are. Raises RecipeError with every problem so far."""
    asked = {name: getattr(options, name, None) for name in layouts.NAMES}
    asked = {name: value for name, value in asked.items() if value is not None}
    layout, wrong = layouts.chosen(asked, before, made.config, made.recipe)
    if problems := problems + wrong:
        raise RecipeError(problems)
    return replace(made, layout=layout, laid_out=bool(asked) or layout is before)


def _before(options: argparse.Namespace, problems: list[str]) -> dict[str, Any] | None:
    """The run that is in the folder already, when it is to be taken up."""
    path = options.out / "run.json"
    if not path.exists():
        return None
    if options.resume or layouts.restarted(path):
        return _begun(path)
    problems.append(
        f"out = {options.out.name!r}: a run is there already, and would be lost; "
        "--resume goes on with it, another --out leaves it alone"
    )
    return None


def _begun(path: Path) -> dict[str, Any]:
    """What run.json says. It is written whole, so only another hand can have damaged it."""
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        Recipe.from_dict(before["recipe"])
        ModelConfig.from_dict(before["config"])
        layout = layouts.written(before["layout"]) if "layout" in before else None
        kept = {name: before[name] for name in ("config_name", "config", "text", "recipe")}
        return {**kept, "layout": layout}
    except (ValueError, KeyError, TypeError) as error:
        problem = f"{path.name} is not as a run wrote it ({type(error).__name__})"
        raise RecipeError([f"out = {path.parent.name!r}: {problem}"]) from None


def _resumed(
    before: dict[str, Any], given: dict[str, Any], options: argparse.Namespace, problems: list[str]
) -> Plan:
    """The run as it was begun; what is given again must agree, save for how long it lasts."""
    was = {**before["recipe"], "config": before["config_name"], "text": before["text"]}
    was["moments"] = Recipe.from_dict(before["recipe"]).moments_in
    problems += [
        f"{name} = {value!r}: the run was begun with {was[name]!r}, and goes on with it"
        for name, value in given.items()
        if value != was[name] and name not in CHANGEABLE
    ]
    changed = {name: value for name, value in given.items() if name in CHANGEABLE}
    recipe = _recipe({**before["recipe"], **changed}, problems)
    if recipe is None:
        raise RecipeError(problems)
    config = ModelConfig.from_dict(before["config"])
    made = Plan(config, before["config_name"], before["text"], recipe, options.out, resume=True)
    return _spread(made, options, before["layout"], problems)


CHANGEABLE = ("steps", "evaluate_every", "evaluate_windows", "save_every")


def _recipe(values: dict[str, Any], problems: list[str]) -> Recipe | None:
    try:
        return Recipe(**{name: value for name, value in values.items() if name in NAMES})
    except RecipeError as error:
        problems += error.problems
        return None


def _config(name: str, problems: list[str]) -> ModelConfig | None:
    try:
        return ModelConfig.named(name) if name in preset_names() else ModelConfig.from_json(name)
    except ConfigError as error:
        known = ", ".join(preset_names())
        problems += [f"config = {name!r}: {p} (presets: {known})" for p in error.problems]
        return None


def _machine_problems(options: argparse.Namespace) -> Iterator[str]:
    if options.threads is not None and options.threads < 1:
        yield f"threads = {options.threads}: it must be 1 or more"
    if options.prefetch < 0:
        yield f"prefetch = {options.prefetch}: it must be 0 or more"
    try:
        kind = torch.device(options.device or "cpu").type
    except RuntimeError:
        kind = None
    if kind is None or (kind != "cpu" and not getattr(torch, kind).is_available()):
        yield f"device = {options.device!r}: this machine has none, or torch cannot use it"


def _fit(config: ModelConfig, recipe: Recipe, problems: list[str]) -> ModelConfig:
    """The config with the tokenizer's vocabulary; adds what the two cannot do together."""
    problems += _unfit(config, recipe)
    return replace(config, vocab_size=recipe.vocab_size) if recipe.vocab_size else config


def _unfit(config: ModelConfig, recipe: Recipe) -> Iterator[str]:
    if recipe.tokenizer == "bytes" and config.vocab_size < 256:
        yield f"vocab_size of the config = {config.vocab_size}: bytes need 256"
    if recipe.seq_len > config.max_position_embeddings:
        most = config.max_position_embeddings
        yield f"seq_len = {recipe.seq_len}: the config's positions end at {most}"
    if recipe.seq_len < 2 + config.num_nextn_predict_layers:
        yield f"seq_len = {recipe.seq_len}: the MTP modules would have nothing to predict"
