"""A run before its first step: its text, its model in the parts that this rank holds, its state."""

import random

import torch
from torch import nn

from dsv3_tutorial.cost import params
from dsv3_tutorial.files import write_whole
from dsv3_tutorial.model import DeepSeekV3
from dsv3_tutorial.moe.experts import Experts
from dsv3_tutorial.parallel.data import Ranks, shard
from dsv3_tutorial.parallel.mesh import Layout
from dsv3_tutorial.parallel.replicas import Replicas
from dsv3_tutorial.train import corpus
from dsv3_tutorial.train.options import Plan
from dsv3_tutorial.train.precision import recompute_blocks, share_masters, worker_for
from dsv3_tutorial.train.recipe import Recipe
from dsv3_tutorial.train.step import Pipe, TrainingState, optimizer_for


def read_text(planned: Plan, ranks: Ranks) -> corpus.Corpus:
    """The text as bytes, or in the run's own vocabulary, which the first rank learns for all."""
    if planned.recipe.tokenizer == "bytes":
        return corpus.load(planned.folder)
    from dsv3_tutorial.train import bpe  # tokenizers, which a run on bytes does without

    path, size = planned.out / "tokenizer.json", planned.recipe.vocab_size
    if ranks.first and not (planned.resume and path.exists()):
        write_whole(path, bpe.vocabulary(planned.folder, size))
    ranks.sum(torch.zeros(1, device=ranks.device))
    return bpe.load(planned.folder, size, path.read_text(encoding="utf-8"))


def fresh_state(planned: Plan, text: corpus.Corpus, ranks: Ranks) -> TrainingState:
    """The run before its first step; the seed decides weights and order, whatever the layout."""
    recipe = planned.recipe
    torch.manual_seed(recipe.seed)
    random.seed(recipe.seed)
    model = DeepSeekV3(planned.config).to(ranks.device)
    worker = worker_for(model, recipe.precision, share=False)
    if recipe.recompute:
        recompute_blocks(worker)
    same = worker is model
    worker = own_part(worker, ranks)
    model = worker if same else own_part(model, ranks)
    if planned.layout.zero != 3:  # FSDP2 has made parameters of its own in each of the two
        share_masters(worker, model)
    sampler = corpus.Sampler(text.train, recipe.batch, recipe.seq_len, recipe.seed, text.place)
    corpus.check_window(text.held_out, recipe.seq_len)
    replicas = Replicas(model, ranks)
    optimizer = optimizer_for(model, recipe.peak_lr, recipe.moments_in, replicas.owned())
    pipe = _pipe(worker, model, recipe, ranks) if planned.layout.pp > 1 else None
    return TrainingState(model, optimizer, sampler, recipe, 0, worker, replicas, pipe)


def _pipe(worker: nn.Module, model: nn.Module, recipe: Recipe, ranks: Ranks) -> Pipe:
    from dsv3_tutorial.train.pipelined import Pipeline  # torch.distributed.pipelining with it

    grid = ranks.grid
    how = grid.group("pp"), ranks.device, grid.layout.schedule, grid.layout.dp
    return Pipeline(worker, model, recipe, *how)


def own_part(model: nn.Module, ranks: Ranks) -> nn.Module:
    """What this rank holds and computes of a whole model, by its place on the grid.

    First the stage, then heads and widths, then experts, then FSDP2's share of what is left. The
    names of the parameters stay. Every rank must hold the same weights before.
    """
    if ranks.grid is None:
        return model
    layout, mesh = ranks.grid.layout, ranks.grid.mesh
    if layout.pp > 1:
        from dsv3_tutorial.parallel.stage import split

        model = split(model, layout.pp, ranks.grid.index("pp"))
    if layout.tp > 1:
        from dsv3_tutorial.parallel.tensor import tensor_parallel

        model = tensor_parallel(model, mesh["tp"])
    if layout.ep > 1 and any(isinstance(part, Experts) for part in model.modules()):
        from dsv3_tutorial.parallel.expert import expert_parallel

        model = expert_parallel(model, ranks.grid.experts)
    return shard(model, ranks) if layout.zero == 3 else model


def introduction(planned: Plan, text: corpus.Corpus) -> str:
    """What is about to be trained, on what, and on which ranks."""
    counted, recipe = params.count(planned.config), planned.recipe
    seen = recipe.steps * recipe.batch * recipe.seq_len
    return (
        f"{planned.config_name}: {planned.config.num_hidden_layers} layers, "
        f"{counted.total / 1e6:.2f} M parameters, {counted.activated / 1e6:.2f} M activated a "
        f"token, {counted.mtp / 1e6:.2f} M more for multi-token prediction\n"
        f"text: {text.train_files} files to train on, {text.held_out_files} held out; "
        f"{len(text.train) / 1e6:.2f} M and {len(text.held_out) / 1e6:.2f} M symbols\n"
        f"{recipe.steps} steps of {recipe.batch} x {recipe.seq_len} symbols: {seen / 1e6:.2f} M"
        f"{_spread(planned.layout)}"
    )


def _spread(layout: Layout) -> str:
    ways = [f"{name} = {getattr(layout, name)}" for name in ("dp", "ep", "tp", "pp", "zero")]
    return f"\n{layout.world} ranks: {', '.join(ways)}" if layout.world > 1 else ""
