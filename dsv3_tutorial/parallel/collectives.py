"""Reads torch.distributed's operators: what each communicates, between whom, of what size.

c10d:: is what dist.all_reduce and its kin call; _c10d_functional:: is what DTensor and compiled
code call. Both reach the dispatcher with their tensors, the backward's too.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dsv3_tutorial.parallel.calls import Call

NAMESPACES = ("c10d", "_c10d_functional", "_dtensor")
_GROUPED = {  # operator: the kind, and the argument whose bytes count
    "c10d::allreduce_": ("all_reduce", "tensors"),
    "c10d::allreduce_coalesced_": ("all_reduce", "tensors"),
    "c10d::allgather_": ("all_gather", "output_tensors"),
    "c10d::_allgather_base_": ("all_gather", "output_tensor"),
    "c10d::allgather_coalesced_": ("all_gather", "output_lists"),
    "c10d::allgather_into_tensor_coalesced_": ("all_gather", "outputs"),
    "c10d::reduce_scatter_": ("reduce_scatter", "input_tensors"),
    "c10d::_reduce_scatter_base_": ("reduce_scatter", "input_tensor"),
    "c10d::reduce_scatter_tensor_coalesced_": ("reduce_scatter", "inputs"),
    "c10d::broadcast_": ("broadcast", "tensors"),
    "c10d::reduce_": ("reduce", "tensors"),
    "c10d::gather_": ("gather", "input_tensors"),
    "c10d::scatter_": ("scatter", "output_tensors"),
    "c10d::barrier": ("barrier", None),
    "c10d::monitored_barrier_": ("barrier", None),
    "_c10d_functional::all_reduce": ("all_reduce", "input"),
    "_c10d_functional::all_reduce_": ("all_reduce", "input"),
    "_c10d_functional::all_reduce_coalesced": ("all_reduce", "inputs"),
    "_c10d_functional::all_reduce_coalesced_": ("all_reduce", "inputs"),
    "_c10d_functional::all_gather_into_tensor": ("all_gather", "input"),
    "_c10d_functional::all_gather_into_tensor_out": ("all_gather", "input"),
    "_c10d_functional::all_gather_into_tensor_coalesced": ("all_gather", "inputs"),
    "_c10d_functional::reduce_scatter_tensor": ("reduce_scatter", "input"),
    "_c10d_functional::reduce_scatter_tensor_out": ("reduce_scatter", "input"),
    "_c10d_functional::reduce_scatter_tensor_coalesced": ("reduce_scatter", "inputs"),
    "_c10d_functional::broadcast": ("broadcast", "input"),
    "_c10d_functional::broadcast_": ("broadcast", "input"),
}
_MESSAGES = {  # operator: the kind, the argument with the tensors, the argument with the peer
    "c10d::send": ("send", "tensors", "dst"),
    "c10d::recv_": ("recv", "tensors", "src"),
    "c10d::recv_any_source_": ("recv_any", "tensors", None),
    "_c10d_functional::isend": ("send", "tensor", "dst"),
    "_c10d_functional::irecv": ("recv", "tensor", "src"),
}
Given = dict[str, Any]


def read(func: torch._ops.OpOverload, args: tuple, kwargs: Given) -> list[Call]:
    """The communications of one operator: none, one, or those of a batch of messages."""
    name = func.name().partition(".")[0]
    given = dict(zip((argument.name for argument in func._schema.arguments), args)) | kwargs
    if name in _GROUPED:
        return [_grouped(name, given)]
    if name in _ROWS:
        ranks = _ranks(given)
        row = tuple(_ROWS[name](given, len(ranks)))
        n = sum(row) - row[ranks.index(dist.get_rank())]
        dtype = _dtype(given.get("input", given.get("input_tensors")))
        return [Call("all_to_all", n, ranks, row, dtype=dtype)]
    if name in _MESSAGES:
        kind, tensors, peer = _MESSAGES[name]
        return [_message(kind, given[tensors], given.get(peer), given["tag"], _ranks(given))]
    if name == "_c10d_functional::batch_p2p_ops":
        each = zip(*(given[part] for part in ("op_list", "tensors", "peer_list", "tag_list")))
        ranks = _ranks(given)
        return [_message(op.removeprefix("i"), t, peer, tag, ranks) for op, t, peer, tag in each]
    return []


def _grouped(name: str, given: Given) -> Call:
    kind, part = _GROUPED[name]
    ranks = _ranks(given)
    n = 0 if part is None else _bytes(given[part])
    if kind == "all_gather" and name.startswith("_c10d_functional"):
        n *= len(ranks)  # what is given is one rank's share
    root = given.get("root_rank", given.get("src"))
    dtype = "" if part is None else _dtype(given[part])
    return Call(kind, n, ranks, root=None if root is None else ranks[root], dtype=dtype)


def _message(kind: str, tensors: Any, peer: int | None, tag: int, ranks: tuple[int, ...]) -> Call:
    here = dist.get_rank()
    there = -1 if peer is None else ranks[peer]
    between = (here, there) if kind == "send" else (there, here)
    return Call(kind, _bytes(tensors), between, tag=tag, dtype=_dtype(tensors))


def _bytes(tensors: Any) -> int:
    if isinstance(tensors, Tensor):
        return tensors.nbytes
    return sum(_bytes(tensor) for tensor in tensors)


def _dtype(tensors: Any) -> str:
    """The type of the numbers; of several tensors each type once, in order."""
    if isinstance(tensors, Tensor):
        return str(tensors.dtype).removeprefix("torch.")
    return " and ".join(dict.fromkeys(_dtype(tensor) for tensor in tensors))


def _ranks(given: Given) -> tuple[int, ...]:
    """The global ranks of an operator's group, in its order."""
    group = given.get("process_group", given.get("group_name"))
    if isinstance(group, str):
        group = dist.distributed_c10d._resolve_process_group(group)
    elif isinstance(group, torch.ScriptObject):
        group = dist.ProcessGroup.unbox(group)
    return tuple(dist.get_process_group_ranks(group))


def _even(tensor: Tensor, p: int) -> list[int]:
    return [tensor.nbytes // p] * p


def _split(tensor: Tensor, splits: Sequence[int], p: int) -> list[int]:
    """Bytes to each rank of a tensor that is cut along its first dimension."""
    if not splits:
        return _even(tensor, p)
    return [rows * (tensor.nbytes // max(1, len(tensor))) for rows in splits]


_ROWS: dict[str, Callable[[Given, int], list[int]]] = {  # what an all-to-all sends each rank
    "c10d::alltoall_base_": lambda g, p: _split(g["input"], g["input_split_sizes"], p),
    "c10d::alltoall_": lambda g, p: [_bytes(tensor) for tensor in g["input_tensors"]],
    "_c10d_functional::all_to_all_single": lambda g, p: _split(
        g["input"], g["input_split_sizes"], p
    ),
    "_dtensor::shard_dim_alltoall": lambda g, p: _even(g["input"], p),
}
