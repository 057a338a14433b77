"""Tensor parallel: one layer's heads and features over several ranks, and a sum behind each layer.

Each rank computes some heads of attention and some features of an MLP from the same input, and an
all-reduce adds what they contribute. Per block and token that is 2 D numbers reduced forward, and
backward 2 D with plain attention, D + Q + C + R with MLA. Under sequence parallelism the ranks
hold S / p tokens each between the layers, and an all-gather and a reduce-scatter, as many bytes
together, stand where the all-reduce was.

Memory: 1 / p of those weights. Whole on every rank stay MLA's two latent projections, norms,
embedding, head, gates and routed experts (`parallel.expert` splits those), and the latent cache: a
latent is read by every head, so no rank can do without. Megatron-LM, arXiv 1909.08053, section 3.
"""

from collections.abc import Iterator
from dataclasses import replace

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from dsv3_tutorial.attention.mha import Attention
from dsv3_tutorial.attention.mla import MLA
from dsv3_tutorial.block import Block
from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.mlp import MLP
from dsv3_tutorial.model import DeepSeekV3
from dsv3_tutorial.moe.layer import MoE
from dsv3_tutorial.parallel import tensor_layers as layers
from dsv3_tutorial.parallel.same_weights import check_same
from dsv3_tutorial.parallel.tensor_exchange import ShareError
from dsv3_tutorial.parallel.tensor_layers import Between, wrap

OUT, IN = 0, 1  # the sides of a linear layer's weight


def tensor_parallel(
    module: nn.Module, mesh: DeviceMesh, sequence: bool = False, check: bool = True
) -> nn.Module:
    """Share a model's, a stage's or a layer's heads and features over a mesh; in place, returned.

    mesh: one dimension, say root["tp"]. Every rank must hold the same weights and gets the same
    input; results and gradients are those of one process. The keys of the state dict stay, and
    become DTensors where they are shared. Put weights in FP8 before, experts on ranks and FSDP2
    over a sibling dimension of the mesh after.
    sequence: between layers a rank holds its own S / p tokens: of a whole model the blocks, not
    its input, its logits and its MTP modules; of a single layer input and output (B, S / p, D).
    check: compare the ranks' weights first, which reads them once.
    Raises ShareError with every size that the ranks do not divide, and WeightsDiffer, before
    anything is changed.
    """
    if mesh.ndim != 1:
        raise ShareError(
            f"The mesh has {mesh.ndim} dimensions {mesh.mesh_dim_names}, and a layer is shared "
            'over one. Give one of them, as mesh["tp"].'
        )
    _check_not_shared(module)
    problems = list(dict.fromkeys(_problems(module, mesh.size())))
    if problems:
        raise ShareError(
            f"{mesh.size()} ranks cannot share this: {'; '.join(problems)}. Each must have as many "
            "heads and features as the others. Take a number of ranks that divides them."
        )
    if check:
        check_same({"": module}, mesh.get_group())
    whole = Between(mesh.get_group())
    if isinstance(module, DeepSeekV3):
        _model(module, mesh, Between(mesh.get_group(), sequence))
    else:
        _parts(module, mesh, Between(mesh.get_group(), sequence), whole)
    return module


def local_config(cfg: ModelConfig, ranks: int) -> ModelConfig:
    """The config of the attention that one of `ranks` ranks runs: its heads, each as wide as ever.

    Where there are fewer key-value heads than ranks, ranks share one, and each has a copy of it.
    """
    heads, kv_heads = cfg.num_attention_heads // ranks, max(1, cfg.kv_heads // ranks)
    width = None if cfg.is_mla else cfg.head_size
    return replace(cfg, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=width)


def _check_not_shared(module: nn.Module) -> None:
    kinds = layers.Features | layers.Heads | layers.LatentHeads
    shared = [name for name, part in module.named_modules() if isinstance(part, kinds)]
    if shared:
        raise ShareError(
            f"{shared[0] or 'The layer'} is shared over ranks already. Its parts would be cut "
            "again, and their sum made twice. Call tensor_parallel once on a module, and build a "
            "new one for another mesh."
        )


def _problems(module: nn.Module, ranks: int) -> Iterator[str]:
    for name, part in module.named_modules():
        if isinstance(part, MLA | Attention):
            heads, kv_heads = part.cfg.num_attention_heads, part.cfg.kv_heads
            if heads % ranks:
                yield f"{heads} heads"
            elif kv_heads % ranks and ranks % kv_heads:
                yield f"{kv_heads} key-value heads"
        if isinstance(part, MLP) and part.gate_proj.weight.shape[0] % ranks:
            yield f"{part.gate_proj.weight.shape[0]} features of {name or 'the MLP'}"


def _model(model: DeepSeekV3, mesh: DeviceMesh, between: Between) -> None:
    """The blocks as asked for; the MTP modules, which see S - 1 tokens, never by tokens."""
    decoder, whole = model.model, Between(between.group)
    for i, block in enumerate(decoder.layers):
        _parts(block, mesh, between if i < decoder.depth else whole, whole)
    if between.sequence:
        decoder.layers[0].register_forward_pre_hook(between.before_blocks)
        _hold(wrap(layers.Local, decoder.norm, between), mesh, apart=True)
        decoder.norm.register_forward_hook(between.behind_blocks)
    wrap(layers.Model, model, between)


def _parts(module: nn.Module, mesh: DeviceMesh, between: Between, whole: Between) -> None:
    """Every layer inside `module`, itself too; those inside a mixture of experts with `whole`."""
    inside = {
        id(part) for moe in module.modules() if isinstance(moe, MoE) for part in moe.modules()
    }
    for part in list(module.modules()):
        if isinstance(part, MLA):
            _mla(part, mesh, between)
        elif isinstance(part, Attention):
            _attention(part, mesh, between)
        elif isinstance(part, MLP):
            _mlp(part, mesh, whole if id(part) in inside else between)
        elif isinstance(part, MoE) and between.sequence:
            wrap(layers.Whole, part, between)
        elif isinstance(part, Block) and between.sequence:
            for norm in (part.input_layernorm, part.post_attention_layernorm):
                _hold(wrap(layers.Local, norm, between), mesh, apart=True)


def _mlp(mlp: MLP, mesh: DeviceMesh, between: Between) -> None:
    for linear, side in ((mlp.gate_proj, OUT), (mlp.up_proj, OUT), (mlp.down_proj, IN)):
        _hold(wrap(layers.Local, linear, between), mesh, side)
    wrap(layers.Features, mlp, between)


def _mla(mla: MLA, mesh: DeviceMesh, between: Between) -> None:
    behind = Between(between.group)  # between the projections every rank has all tokens
    queries = mla.q_proj if mla.cfg.q_lora_rank is None else mla.q_b_proj
    _hold(wrap(layers.Column, queries, behind), mesh, OUT)
    _hold(wrap(layers.Local, mla.kv_b_proj, behind), mesh, OUT)
    _hold(wrap(layers.Row, mla.o_proj, between), mesh, IN, apart=between.sequence)
    wrap(layers.LatentHeads, mla, between).cfg = local_config(mla.cfg, mesh.size())


def _attention(attention: Attention, mesh: DeviceMesh, between: Between) -> None:
    cfg, ranks = attention.cfg, mesh.size()
    _hold(wrap(layers.Local, attention.q_proj, between), mesh, OUT)
    for linear in (attention.k_proj, attention.v_proj):
        wrap(layers.Local, linear, between)
        if cfg.kv_heads % ranks == 0:
            _hold(linear, mesh, OUT)
        else:  # fewer heads than ranks: all hold all, and each uses one
            head = mesh.get_local_rank() * cfg.kv_heads // ranks
            _hold(linear, mesh, apart=True)
            linear.rows = slice(head * cfg.head_size, (head + 1) * cfg.head_size)
    _hold(wrap(layers.Row, attention.o_proj, between), mesh, IN, apart=between.sequence)
    wrap(layers.Heads, attention, between).cfg = local_config(cfg, ranks)


def _hold(layer: nn.Module, mesh: DeviceMesh, side: int | None = None, apart: bool = False) -> None:
    """Keep this rank's part of a layer's parameters, or all of them, as DTensors on the mesh."""
    for name, whole in list(layer._parameters.items()):
        if whole is None:
            continue
        cut = side if whole.ndim == 2 or side == OUT else None  # an input side cuts no bias
        own = whole.detach()
        if cut is not None:
            own = own.chunk(mesh.size(), cut)[mesh.get_local_rank()].clone()
        placement = Replicate() if cut is None else Shard(cut)
        spread = DTensor.from_local(own, mesh, [placement], run_check=False)
        layer.register_parameter(name, nn.Parameter(spread, requires_grad=whole.requires_grad))
    layer.apart = apart
