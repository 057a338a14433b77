"""Ranks that begin with different weights are told so, which and whose, before anything changes."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from dsv3_tutorial.cost.schedule import dual_pipe, one_f_one_b
from dsv3_tutorial.mlp import MLP
from dsv3_tutorial.moe.experts import Experts
from dsv3_tutorial.parallel import traffic
from dsv3_tutorial.parallel.expert import expert_parallel
from dsv3_tutorial.parallel.launch import launch
from dsv3_tutorial.parallel.pipeline import Pipeline
from dsv3_tutorial.parallel.same_weights import WeightsDiffer, check_same
from dsv3_tutorial.parallel.tensor import tensor_parallel

KINDS = [torch.float64, torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.complex128]


def said_of(call):
    try:
        call()
    except WeightsDiffer as error:
        return str(error)
    return None


def mlp(seed):
    torch.manual_seed(seed)
    return MLP(8, 16)


def one_bit_off(seed):
    """An MLP that differs from that of other ranks in the last bit of one number, on rank 2."""
    made = mlp(seed)
    if dist.get_rank() == 2:
        with torch.no_grad():
            made.up_proj.weight.view(torch.int32)[3, 1] ^= 1
    return made


class Spread(nn.Module):
    """Experts beside a weight and a buffer that are on every rank."""

    def __init__(self, seed, bias=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.experts = Experts(n_experts=4, hidden_size=4, width=4)
        for p in self.experts.parameters():
            nn.init.normal_(p)
        torch.manual_seed(seed)
        self.gate = nn.Linear(4, 4)
        self.register_buffer("bias", torch.full((4,), bias))


def of_kind(dtype, odd):
    """A module with one weight, scalar and none, of a dtype; rank 3's differs where `odd`."""
    holder = nn.Module()
    numbers = torch.arange(6.0).view(2, 3).T + (odd and dist.get_rank() == 3)  # not contiguous
    for name, tensor in (("matrix", numbers), ("scalar", numbers[0, 0]), ("none", numbers[:0])):
        holder.register_buffer(name, tensor.to(dtype))
    return holder


def tensor_cases(mesh, root):
    rank, unseeded = dist.get_rank(), MLP(8, 16)
    found = {"unseeded": said_of(lambda: tensor_parallel(unseeded, mesh))}
    odd = one_bit_off(0)
    found["bit"] = said_of(lambda: tensor_parallel(odd, mesh))
    found["unchanged"] = not any(isinstance(p, DTensor) for p in odd.parameters())
    shared = tensor_parallel(one_bit_off(0), mesh, check=False)
    found["let"] = isinstance(shared.up_proj.weight, DTensor)
    with traffic.record() as seen:
        tensor_parallel(mlp(0), mesh)
    found["seen"] = len(seen.calls)
    tensor_parallel(mlp(rank // 2), root["tp"])  # replicas of their own: equal where it counts
    found["group"] = said_of(lambda: tensor_parallel(mlp(rank % 2), root["tp"]))
    return found


def expert_cases():
    rank = dist.get_rank()
    expert_parallel(Spread(0))
    expert_parallel(Spread(rank), check=False)
    return {
        "gate": said_of(lambda: expert_parallel(Spread(rank))),
        "bias": said_of(lambda: expert_parallel(Spread(0, bias=float(rank == 1)))),
        "whole": said_of(lambda: expert_parallel(MLPs(rank))),
    }


class MLPs(nn.Module):
    """Experts of which the ranks have different numbers of weights beside."""

    def __init__(self, count):
        super().__init__()
        self.spread, self.rest = Spread(0), nn.ModuleList(mlp(i) for i in range(count))


def pipeline_cases():
    """DualPipe's rank d holds stages d and 3 - d: stage 1 lies on ranks 1 and 2."""
    schedule, rank = dual_pipe(4, 8), dist.get_rank()
    held = schedule.placement[rank]
    same = [mlp(stage) for stage in held]
    odd = [mlp(stage + 10 * (stage == 1 and rank == 2)) for stage in held]
    Pipeline(schedule, same, nn.functional.mse_loss)
    Pipeline(schedule, odd, nn.functional.mse_loss, check=False)
    with traffic.record() as seen:  # no copies: nothing to compare, and nobody to wait for
        Pipeline(one_f_one_b(4, 2), [MLP(8, 16)], nn.functional.mse_loss)
    return {
        "odd": said_of(lambda: Pipeline(schedule, odd, nn.functional.mse_loss)),
        "seen": len(seen.calls),
    }


def plain_cases(mesh):
    """What is compared, and what is not: dtypes, no memory, parts of a distributed tensor."""
    group, found = dist.group.WORLD, {}
    for dtype in KINDS:
        check_same({"": of_kind(dtype, odd=False)}, group)
        found[str(dtype)] = said_of(lambda d=dtype: check_same({"": of_kind(d, odd=True)}, group))
    with torch.device("meta"):
        check_same({"": MLP(8, 16)}, group)
        narrow = MLP(8, 16 + dist.get_rank())
    found["shape"] = said_of(lambda: check_same({"": narrow}, group))
    spread = nn.Module()
    spread.weight = nn.Parameter(distribute_tensor(torch.arange(8.0), mesh, [Shard(0)]))
    check_same({"": spread}, group)
    return found


def everything():
    mesh = init_device_mesh("cpu", (4,))
    root = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    cases = tensor_cases(mesh, root), expert_cases(), pipeline_cases(), plain_cases(mesh)
    return dict(zip(("tensor", "expert", "pipeline", "plain"), cases, strict=True))


@pytest.fixture(scope="module")
def found():
    return launch(everything, 4)


def test_a_single_bit_is_found_on_every_rank_before_anything_is_changed(found):
    for each in (rank["tensor"] for rank in found):
        assert each["bit"].startswith(
            "Ranks 0 and 2 must hold the same weights, and 1 of 3 differ, up_proj.weight first."
        )
        assert "Seed all ranks alike" in each["bit"] and each["unchanged"]


def test_weights_that_nobody_seeded_are_found(found):
    assert all("3 of 3 differ" in each["tensor"]["unseeded"] for each in found)


def test_the_check_can_be_left_out_and_is_no_traffic(found):
    assert all(each["tensor"]["let"] and each["tensor"]["seen"] == 0 for each in found)


def test_only_ranks_of_one_group_are_compared_and_named_as_in_the_world(found):
    said = [each["tensor"]["group"] for each in found]
    assert ["Ranks 0 and 1" in s for s in said] == [True, True, False, False]
    assert ["Ranks 2 and 3" in s for s in said] == [False, False, True, True]


def test_what_lies_beside_the_experts_is_compared_too(found):
    for each in (rank["expert"] for rank in found):
        assert "2 of 5 differ, gate.weight first" in each["gate"]
        assert "Ranks 0 and 1" in each["bias"] and "1 of 5 differ, bias first" in each["bias"]
        assert "3 of 8 differ, rest.0.gate_proj.weight first" in each["whole"]


def test_copies_of_a_stage_are_compared_by_stage_and_a_pipeline_without_copies_is_not(found):
    for each in (rank["pipeline"] for rank in found):
        assert "Ranks 1 and 2 must hold the same weights of stage 1" in each["odd"]
        assert each["seen"] == 0


@pytest.mark.parametrize("dtype", KINDS)
def test_every_dtype_is_compared_and_without_memory_the_shape_alone(found, dtype):
    for each in (rank["plain"] for rank in found):
        assert "Ranks 0 and 3" in each[str(dtype)] and "2 of 3 differ" in each[str(dtype)]
        assert "3 of 3 differ" in each["shape"]
