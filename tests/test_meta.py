"""The published models, built whole where a tensor has a shape and no bytes, and counted."""

import time

import pytest
import torch

from dsv3_tutorial.config import ModelConfig, preset_names
from dsv3_tutorial.cost import params
from dsv3_tutorial.model import DeepSeekV3
from dsv3_tutorial.moe.gate import Gate


def built(name):
    with torch.device("meta"):
        return DeepSeekV3(ModelConfig.named(name))


def learned(model):
    """Names and sizes of what a checkpoint ships and training moves: parameters, balance biases."""
    return {name: tensor.numel() for name, tensor in model.state_dict().items()}


def test_deepseek_v3_has_671_026_419_200_parameters():
    began = time.process_time()
    model = built("deepseek-v3")
    assert time.process_time() - began < 10
    sizes = learned(model)
    module = {name: size for name, size in sizes.items() if name.startswith("model.layers.61.")}
    assert sum(sizes.values()) - sum(module.values()) == 671_026_419_200
    assert sum(module.values()) == params.count(model.cfg).mtp
    assert len(model.mtp) == 1


def test_of_them_the_balance_biases_are_no_parameters_of_the_optimizer():
    model = built("deepseek-v3")
    optimized = sum(p.numel() for p in model.parameters())
    assert sum(learned(model).values()) - optimized == 59 * 256  # 58 layers and the MTP module
    assert sum(isinstance(part, Gate) for part in model.modules()) == 59


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_has_what_the_cost_model_counts(name):
    model, counted = built(name), params.count(ModelConfig.named(name))
    sizes = learned(model)
    if model.cfg.tie_word_embeddings:
        del sizes["lm_head.weight"]
    assert sum(sizes.values()) == counted.total + counted.mtp
    assert all(tensor.is_meta for tensor in model.state_dict().values())


def test_the_experts_of_deepseek_v3_are_stacked_as_transformers_stacks_them():
    experts = built("deepseek-v3").model.layers[3].mlp.experts
    assert experts.gate_up_proj.shape == (256, 2 * 2048, 7168)
    assert experts.down_proj.shape == (256, 7168, 2048)


@pytest.mark.parametrize("name", ["deepseek-v2-lite", "moonlight-16b-a3b", "deepseek-v3"])
def test_the_names_and_shapes_are_those_of_transformers_model(name):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    cfg = ModelConfig.named(name)
    kind = {"deepseek_v2": "DeepseekV2", "deepseek_v3": "DeepseekV3"}[cfg.model_type]
    config = getattr(transformers, f"{kind}Config")(**cfg.to_dict())
    with torch.device("meta"):
        theirs = getattr(transformers, f"{kind}ForCausalLM")(config)
    expected = {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in built(name).state_dict().items()}
    module = f"model.layers.{cfg.num_hidden_layers}."
    assert {n: shape for n, shape in found.items() if not n.startswith(module)} == expected
