"""Weights in eight and four bits on disk: known names, exact numbers, clear refusals."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from dsv3_tutorial import checkpoint
from dsv3_tutorial.checkpoint_codes import CODED, decode, encode, outlines, pieces
from dsv3_tutorial.checkpoint_files import CheckpointError
from dsv3_tutorial.checkpoint_layout import is_fp8
from dsv3_tutorial.config import ConfigError, ModelConfig, QuantizationConfig
from dsv3_tutorial.model import DeepSeekV3
from dsv3_tutorial.weights.formats import dequantize, quantize

UP = "model.layers.1.mlp.experts.2.up_proj.weight"


def sparse():
    """Two layers, the second of experts, and an MTP module; sides that transformers' FP8 takes."""
    sizes = {"num_hidden_layers": 2, "first_k_dense_replace": 1, "num_nextn_predict_layers": 1}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    return replace(ModelConfig.named("tiny"), **sizes, **experts, n_shared_experts=1)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return DeepSeekV3(sparse())


@pytest.fixture
def folder(model, tmp_path, request):
    fmt = getattr(request, "param", "int4")
    checkpoint.save(tmp_path / "model", model.cfg, model.state_dict(), quantize=fmt)
    return tmp_path / "model"


def change(folder, edit):
    path = folder / "model.safetensors"
    state = load_file(path)
    edit(state)
    save_file(state, path, metadata={"format": "pt"})


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (16, 128), (130, 259)])
@pytest.mark.parametrize("fmt", CODED)
def test_a_weight_comes_back_as_its_codes_exactly(fmt, shape):
    weight = torch.randn(shape)
    stored = encode(fmt, "w", weight)
    expected = outlines(fmt, "w", shape)
    assert {k: (t.shape, t.dtype) for k, t in stored.items()} == {
        k: (t.shape, t.dtype) for k, t in expected.items()
    }
    assert stored.keys() == pieces(fmt, "w", shape).keys()
    back = decode(fmt, "w", stored, shape)
    assert torch.equal(dequantize(back), dequantize(quantize(weight, fmt)))


def test_int4_lies_as_compressed_tensors_packs_it():
    """Written out: value + 8 in four bits, eight to an int32, the first column lowest."""
    weight = torch.randn(3, 19)
    stored = encode("int4", "w", weight)
    scale = weight.abs().amax(dim=-1) / 7
    codes = (weight / scale[:, None]).round().clamp(-7, 7).long() + 8
    assert stored["w_packed"].shape == (3, 3) and stored["w_shape"].tolist() == [3, 19]
    for row in range(3):
        words = [int(word) & 0xFFFFFFFF for word in stored["w_packed"][row]]
        nibbles = [(words[j // 8] >> (4 * (j % 8))) & 15 for j in range(19)]
        assert nibbles == codes[row].tolist()


@pytest.mark.parametrize("folder", CODED, indirect=True)
def test_a_folder_reads_as_what_its_codes_stand_for(folder, model):
    fmt = checkpoint.read_config(folder).quantization_config.fmt
    fmt = "fp8" if fmt == "e4m3" else fmt
    back = DeepSeekV3.from_pretrained(folder, torch.float32).state_dict()
    for name, tensor in model.state_dict().items():
        if ".experts." in name:
            gate_up = tensor.chunk(2, dim=1) if "gate_up" in name else (tensor,)
            wanted = torch.cat([dequantize(quantize(part, fmt)) for part in gate_up], dim=1)
        else:
            wanted = dequantize(quantize(tensor, fmt)) if is_fp8(name) else tensor
        assert torch.equal(back[name], wanted), name


def test_the_config_says_it_as_compressed_tensors_does_and_is_read_back(folder):
    raw = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert raw["quant_method"] == "compressed-tensors" and raw["format"] == "pack-quantized"
    weights = raw["config_groups"]["group_0"]["weights"]
    assert (weights["num_bits"], weights["strategy"], weights["group_size"]) == (4, "group", 128)
    assert "lm_head" in raw["ignore"]
    assert checkpoint.read_config(folder).quantization_config == QuantizationConfig.of("int4")


@pytest.mark.parametrize(
    "edit",
    [
        lambda q: q.update(format="float-quantized"),
        lambda q: q["config_groups"]["group_0"]["weights"].update(group_size=64),
        lambda q: q["config_groups"]["group_0"]["weights"].update(symmetric=False),
        lambda q: q["config_groups"]["group_0"].update(input_activations={"dynamic": False}),
        lambda q: q["config_groups"].update(group_1=q["config_groups"]["group_0"]),
        lambda q: q.update(config_groups=None),
    ],
)
def test_other_kinds_of_compressed_tensors_are_refused(model, edit):
    raw = {**model.cfg.to_dict(), "quantization_config": None}
    own = QuantizationConfig.of("int4")
    quantized = ModelConfig(**{**vars(model.cfg), "quantization_config": own}).to_dict()
    raw["quantization_config"] = quantized["quantization_config"]
    assert ModelConfig.from_dict(raw).quantization_config == own
    edit(raw["quantization_config"])
    with pytest.raises(ConfigError, match="this kind of 'compressed-tensors' cannot be honoured"):
        ModelConfig.from_dict(raw)


REFUSED = {
    "without its scale or its shape: .*up_proj": lambda s: s.pop(UP + "_scale"),
    "without its scale or its shape: model": lambda s: s.pop(UP + "_shape"),
    "not positive and finite: .*up_proj": lambda s: s[UP + "_scale"].zero_(),
    "unexpected: .*up_proj.weight_zero_point": lambda s: s.update(
        {f"{UP}_zero_point": s[UP + "_scale"].clone()}
    ),
    r"I32 \(\d+, 1\), not I32": lambda s: s.update(
        {f"{UP}_packed": s[UP + "_packed"][:, :1].clone()}
    ),
    "not positive and finite": lambda s: s[UP + "_shape"].add_(1),
}


@pytest.mark.parametrize("told", REFUSED)
def test_a_damaged_folder_is_refused_and_named(folder, told):
    change(folder, REFUSED[told])
    with pytest.raises(CheckpointError, match=told):
        DeepSeekV3.from_pretrained(folder)


def test_the_lowest_code_that_other_writers_use_is_read_as_the_weight_it_says():
    """compressed-tensors lets symmetric codes go down to -8 and -128; ours end one above."""
    stored = encode("int4", "w", torch.randn(2, 5))
    stored["w_packed"].view(torch.uint8)[0, 0] &= 0xF0  # column 0's four bits: -8
    q = decode("int4", "w", stored, (2, 5))
    assert dequantize(q)[0, 0] == -8 * q.scale[0, 0]


def test_codes_without_a_config_that_announces_them_are_refused(folder):
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    del raw["quantization_config"]
    path.write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=r"INT4, and config.json has no quantization_config"):
        DeepSeekV3.from_pretrained(folder)


def test_kept_codes_are_given_under_their_names_on_disk(folder, model):
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    state = checkpoint.load(folder, checkpoint.read_config(folder), shapes, keep_codes=True)
    assert UP in state and "model.layers.1.mlp.experts.gate_up_proj" not in state
    expert = model.state_dict()["model.layers.1.mlp.experts.gate_up_proj"][2].chunk(2)[1]
    assert torch.equal(state[UP].codes, quantize(expert, "int4").codes)
