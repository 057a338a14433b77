"""Checkpoints in the public layout: what is saved comes back, and public names are expected."""

import json
import math
import os
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dsv3_tutorial import checkpoint
from dsv3_tutorial import checkpoint_layout as layout
from dsv3_tutorial.checkpoint import CheckpointError
from dsv3_tutorial.checkpoint_files import stored_tensors
from dsv3_tutorial.checkpoint_folder import replaced
from dsv3_tutorial.config import ModelConfig, QuantizationConfig
from dsv3_tutorial.cost import params
from dsv3_tutorial.fp8.quant import dequantize_blocks, quantize_blocks
from dsv3_tutorial.model import DeepSeekV3

BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


def config(**changes):
    """Two layers, the second of experts, and an MTP module; no size a multiple of another."""
    sizes = {
        **{"vocab_size": 33, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2},
        **{"num_attention_heads": 2, "q_lora_rank": 20, "kv_lora_rank": 12, "v_head_dim": 6},
        **{"qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "n_routed_experts": 4},
        **{"num_experts_per_tok": 2, "moe_intermediate_size": 10, "n_shared_experts": 1},
        **{"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
        "num_nextn_predict_layers": 1,
    }
    return ModelConfig(**{**sizes, **changes})


def model_of(cfg):
    """A model in which no number is what it starts as: norms and biases included."""
    model = DeepSeekV3(cfg)
    for tensor in model.state_dict().values():
        tensor.normal_()
    return model


def equal(one, other):
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


LLAMA = {
    **{"model_type": "llama", "vocab_size": 33, "hidden_size": 24, "intermediate_size": 40},
    **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
}


@st.composite
def configs(draw):
    """Small models of every kind: plain attention, dense, tied, with MTP or query latent or not."""
    if draw(st.booleans()):
        kind = draw(st.sampled_from(["llama", "qwen2"]))
        tied = draw(st.booleans())
        return ModelConfig(**{**LLAMA, "model_type": kind, "tie_word_embeddings": tied})
    return config(
        hidden_size=draw(st.sampled_from([8, 24, 136])),
        n_routed_experts=draw(st.sampled_from([2, 4, 11])),
        moe_intermediate_size=draw(st.sampled_from([1, 10, 130])),
        n_shared_experts=draw(st.integers(0, 2)),
        q_lora_rank=draw(st.sampled_from([None, 20])),
        attention_bias=draw(st.booleans()),
        tie_word_embeddings=draw(st.booleans()),
        num_nextn_predict_layers=draw(st.integers(0, 2)),
        first_k_dense_replace=draw(st.integers(0, 2)),
        topk_method=draw(st.sampled_from(["noaux_tc", "greedy"])),
    )


dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
shard_sizes = st.sampled_from(["5GB", "20KB", "4KB"])


@settings(max_examples=15, deadline=None)
@given(cfg=configs(), dtype=dtypes, size=shard_sizes)
def test_what_is_saved_comes_back_bit_for_bit_in_one_file_or_many(
    tmp_path_factory, cfg, dtype, size
):
    folder = tmp_path_factory.mktemp("saved") / "model"
    model = model_of(cfg).to(dtype)
    checkpoint.save(folder, cfg, model.state_dict(), max_shard_size=size)
    assert checkpoint.read_config(folder) == cfg
    back = DeepSeekV3.from_pretrained(folder)
    assert equal(back.state_dict(), model.state_dict())
    tied = back.lm_head.weight is back.model.embed_tokens.weight
    assert tied == cfg.tie_word_embeddings


def test_no_file_is_larger_than_asked_for_and_the_index_names_every_tensor_once(tmp_path):
    folder, cfg = tmp_path / "model", config()
    checkpoint.save(folder, cfg, model_of(cfg).state_dict(), max_shard_size=8000)
    files = {path.name: load_file(path) for path in sorted(folder.glob("*.safetensors"))}
    count = len(files)
    assert list(files) == [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    sizes = [sum(tensor.nbytes for tensor in state.values()) for state in files.values()]
    assert max(sizes) <= 8000 and count > 2
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes)
    named = [(key, name) for name, state in files.items() for key in state]
    assert sorted(index["weight_map"].items()) == sorted(named)


def by_disk_name(cfg, state):
    """What a state_dict says to each name on disk, written out by hand."""
    made = {}
    for name, tensor in state.items():
        if name.endswith("experts.gate_up_proj"):
            half = tensor.shape[1] // 2
            for e, both in enumerate(tensor):
                prefix = name.replace("gate_up_proj", str(e))
                made[f"{prefix}.gate_proj.weight"] = both[:half]
                made[f"{prefix}.up_proj.weight"] = both[half:]
        elif name.endswith("experts.down_proj"):
            for e, down in enumerate(tensor):
                made[f"{name.replace('down_proj', str(e))}.down_proj.weight"] = down
        else:
            made[name] = tensor
    for i in range(cfg.num_nextn_predict_layers):
        prefix = f"model.layers.{cfg.num_hidden_layers + i}"
        made[f"{prefix}.embed_tokens.weight"] = state["model.embed_tokens.weight"]
        made[f"{prefix}.shared_head.head.weight"] = state["lm_head.weight"]
    return made


def test_on_disk_each_expert_has_its_three_matrices_and_mtp_its_copies(tmp_path):
    cfg = config()
    model = model_of(cfg)
    model.save_pretrained(tmp_path / "model")
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert equal(stored, by_disk_name(cfg, model.state_dict()))
    with safe_open(tmp_path / "model" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}  # transformers asks for it


@settings(max_examples=10, deadline=None)
@given(cfg=configs(), size=shard_sizes, dtype=st.sampled_from([None, torch.float32]))
def test_fp8_comes_back_as_its_blocks_say_exactly(tmp_path_factory, cfg, size, dtype):
    folder = tmp_path_factory.mktemp("fp8") / "model"
    model = model_of(cfg)
    state = model.state_dict()
    checkpoint.save(folder, cfg, state, torch.bfloat16, quantize="fp8", max_shard_size=size)
    loaded = DeepSeekV3.from_pretrained(folder, dtype=dtype)
    assert loaded.cfg.quantization_config == QuantizationConfig()
    on_disk = by_disk_name(loaded.cfg, loaded.state_dict())
    for name, tensor in by_disk_name(cfg, state).items():
        if name.endswith(layout.BIAS):
            wanted = tensor
        elif tensor.ndim == 2 and "_proj" in name and not name.endswith("eh_proj.weight"):
            wanted = dequantize_blocks(*quantize_blocks(tensor), dtype or torch.bfloat16)
        else:
            wanted = tensor.bfloat16().to(dtype or torch.bfloat16)
        assert on_disk[name].dtype == wanted.dtype and torch.equal(on_disk[name], wanted), name


def test_fp8_files_hold_a_quarter_of_the_bytes_and_a_scale_for_each_matrix(tmp_path):
    cfg = config(hidden_size=384, moe_intermediate_size=256, intermediate_size=512, v_head_dim=64)
    model = model_of(cfg)
    model.save_pretrained(tmp_path / "model", quantize="fp8")
    stored = stored_tensors(tmp_path / "model")
    expert = "model.layers.1.mlp.experts.3.up_proj.weight"
    assert stored[expert].dtype == "F8_E4M3" and stored[expert].shape == (256, 384)
    scale = stored[expert + "_scale_inv"]
    assert scale.dtype == "F32" and scale.shape == (2, 3)
    kept = {name for name, found in stored.items() if found.dtype != "F8_E4M3"}
    kept = {name for name in kept if not name.endswith("_scale_inv")}
    left = ("norm.weight", "embed_tokens.weight", "head.weight", "gate.weight", "eh_proj.weight")
    assert all(name.endswith((*left, layout.BIAS)) for name in kept)
    raw = json.loads((tmp_path / "model" / "config.json").read_text())
    assert raw["quantization_config"]["weight_block_size"] == [128, 128]


def test_the_balance_bias_stays_float32_whatever_the_rest_becomes(tmp_path):
    model = model_of(config())
    model.save_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    stored = stored_tensors(tmp_path / "model")
    assert stored[BIAS].dtype == "F32" and stored["lm_head.weight"].dtype == "BF16"
    loaded = DeepSeekV3.from_pretrained(tmp_path / "model", dtype=torch.float16).state_dict()
    assert torch.equal(loaded[BIAS], model.state_dict()[BIAS])
    assert loaded[BIAS].dtype == torch.float32 and loaded["lm_head.weight"].dtype == torch.float16


def test_experts_fused_as_transformers_has_them_in_memory_are_read_too(tmp_path):
    cfg = config(num_nextn_predict_layers=0)
    model = model_of(cfg)
    model.save_pretrained(tmp_path / "model")
    save_file(model.state_dict(), tmp_path / "model" / "model.safetensors")
    assert equal(DeepSeekV3.from_pretrained(tmp_path / "model").state_dict(), model.state_dict())


def test_fused_experts_in_fp8_are_read_too(tmp_path):
    cfg = config(num_nextn_predict_layers=0, quantization_config=QuantizationConfig())
    model = model_of(cfg)
    model.save_pretrained(tmp_path / "model", quantize="fp8")
    state = dict(model.state_dict())
    name = "model.layers.1.mlp.experts.gate_up_proj"
    wanted = dequantize_blocks(*quantize_blocks(state[name]), torch.bfloat16)
    state[name], state[f"{name}_scale_inv"] = quantize_blocks(state[name])
    save_file(state, tmp_path / "model" / "model.safetensors")
    assert torch.equal(DeepSeekV3.from_pretrained(tmp_path / "model").state_dict()[name], wanted)


def test_experts_stored_in_different_dtypes_become_the_wider_one(tmp_path):
    model = model_of(config())
    model.save_pretrained(tmp_path / "model")
    state = load_file(tmp_path / "model" / "model.safetensors")
    name = "model.layers.1.mlp.experts.2.down_proj.weight"
    state[name] = state[name].bfloat16()
    save_file(state, tmp_path / "model" / "model.safetensors")
    loaded = DeepSeekV3.from_pretrained(tmp_path / "model").state_dict()
    experts = loaded["model.layers.1.mlp.experts.down_proj"]
    assert experts.dtype == torch.float32 and torch.equal(experts[2], state[name].float())


def test_without_mtp_the_same_folder_gives_the_main_model_alone(tmp_path):
    model = model_of(config())
    model.save_pretrained(tmp_path / "model")
    alone = DeepSeekV3.from_pretrained(tmp_path / "model", mtp=False)
    assert alone.cfg == config(num_nextn_predict_layers=0)
    assert alone.mtp == [] and len(model.mtp) == 1
    ids = torch.randint(0, 33, (1, 7))
    assert torch.equal(alone(ids), model(ids))


def test_copies_of_embedding_and_head_may_be_left_out_on_disk(tmp_path):
    model = model_of(config())
    model.save_pretrained(tmp_path / "model")
    state = load_file(tmp_path / "model" / "model.safetensors")
    for name in ("embed_tokens", "shared_head.head"):
        del state[f"model.layers.2.{name}.weight"]
    save_file(state, tmp_path / "model" / "model.safetensors")
    assert equal(DeepSeekV3.from_pretrained(tmp_path / "model").state_dict(), model.state_dict())


def test_rotary_frequencies_of_old_files_are_ignored_and_nothing_else(tmp_path):
    model = model_of(config())
    model.save_pretrained(tmp_path / "model")
    state = load_file(tmp_path / "model" / "model.safetensors")
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    save_file(state, tmp_path / "model" / "model.safetensors")
    assert equal(DeepSeekV3.from_pretrained(tmp_path / "model").state_dict(), model.state_dict())


def test_a_loaded_model_is_no_window_on_its_file_and_trains(tmp_path):
    saved = model_of(config())
    saved.save_pretrained(tmp_path / "model")
    model = DeepSeekV3.from_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    with open(path, "r+b") as file:  # safetensors maps the file into memory
        file.write(bytes(path.stat().st_size))
    assert equal(model.state_dict(), saved.state_dict())
    model(torch.randint(0, 33, (1, 5))).sum().backward()
    assert model.model.layers[1].mlp.experts.down_proj.grad.abs().sum() > 0


# Public checkpoints, from their configs alone


def published(name):
    """What the files of a public model must hold, from its config and no weights."""
    with torch.device("meta"):
        model = DeepSeekV3(ModelConfig.named(name))
    return checkpoint._Written(model.cfg, model.state_dict(), torch.bfloat16, "fp8")


@pytest.mark.parametrize(
    ("name", "keys"), [("moonlight-16b-a3b", 5317), ("deepseek-v2-lite", 5291)]
)
def test_the_files_of_a_public_model_are_expected_name_by_name(name, keys):
    files = published(name)
    cfg, parts = files.cfg, files.parts
    # a dense layer, 26 layers of experts, three tensors beside the layers
    attention, norms, bias = 5, 2, int(cfg.topk_method == "noaux_tc")
    by_hand = 27 * (attention + norms) + 3 + 26 * (1 + bias + 3 + 64 * 3) + 3
    assert len(parts) == by_hand == keys
    total = sum(math.prod(part.shape) for part in parts.values())
    assert total == params.count(cfg).total
    assert parts["model.layers.26.mlp.experts.63.gate_proj.weight"].shape == (1408, 2048)
    assert parts["model.layers.1.mlp.shared_experts.down_proj.weight"].shape == (2048, 2816)
    assert parts["model.layers.0.self_attn.q_proj.weight"].shape == (16 * 192, 2048)
    gates = [name for name in parts if name.endswith(layout.BIAS)]
    assert len(gates) == (26 if cfg.topk_method == "noaux_tc" else 0)


def test_deepseek_v3_in_fp8_has_the_tensors_and_the_bytes_of_its_published_files():
    files = published("deepseek-v3")
    cfg = files.cfg
    total = sum(math.prod(part.shape) for part in files.parts.values())
    count = params.count(cfg)
    assert total == count.total + count.mtp + 2 * cfg.vocab_size * cfg.hidden_size
    outlines = files.outlines()
    # an inspection of the headers of deepseek-ai/DeepSeek-V3 lists 91,991 tensors and these bytes
    assert len(outlines) == 91_991
    assert sum(t.nbytes for t in outlines.values()) == 688_574_839_360
    latent = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    assert outlines[latent].dtype == torch.float8_e4m3fn and outlines[latent].shape == (576, 7168)
    assert outlines[f"{latent}_scale_inv"].shape == (5, 56)
    assert outlines["model.layers.61.eh_proj.weight"].dtype == torch.bfloat16
    assert outlines["model.layers.61.eh_proj.weight"].shape == (7168, 14336)


# How a folder appears


def listing(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_save_takes_the_place_of_the_old_one_and_keeps_a_tokenizer(tmp_path):
    folder = tmp_path / "model"
    cfg = config()
    checkpoint.save(folder, cfg, model_of(cfg).state_dict(), max_shard_size=1000)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer.json").chmod(0o444)
    model = model_of(cfg)
    model.save_pretrained(folder)
    assert set(listing(folder)) == {"config.json", "model.safetensors", "tokenizer.json"}
    assert equal(DeepSeekV3.from_pretrained(folder).state_dict(), model.state_dict())
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("fails", ["save_file", "_write_json"])
@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()], ids=repr)
def test_an_interrupted_save_leaves_the_old_folder_as_it_was(tmp_path, monkeypatch, fails, error):
    folder = tmp_path / "model"
    cfg = config()
    model_of(cfg).save_pretrained(folder)
    before = listing(folder)
    real, calls = getattr(checkpoint, fails), []

    def interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise error
        return real(*arguments, **options)

    monkeypatch.setattr(checkpoint, fails, interrupted)
    shown = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else CheckpointError
    with pytest.raises(shown):
        checkpoint.save(folder, cfg, model_of(cfg).state_dict(), max_shard_size=2000)
    assert len(calls) == 2 and listing(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("at", [1, 2])
def test_a_folder_that_cannot_be_moved_into_place_leaves_the_old_one(tmp_path, monkeypatch, at):
    folder, real, calls = tmp_path / "model", os.rename, []
    folder.mkdir()
    (folder / "config.json").write_text("old")

    def rename(*arguments):
        calls.append(arguments)
        if len(calls) == at:
            raise OSError("refused")
        real(*arguments)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(OSError, match="refused"), replaced(folder, lambda name: True) as new:
        (new / "config.json").write_text("new")
    assert (folder / "config.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "model").symlink_to(tmp_path / "disk")
    model_of(config()).save_pretrained(tmp_path / "model")
    assert (tmp_path / "model").is_symlink() and (tmp_path / "disk" / "config.json").is_file()


def test_a_shard_may_be_a_link_as_in_the_hugging_face_cache(tmp_path):
    model = model_of(config())
    model.save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    file.rename(tmp_path / "blob")
    file.symlink_to(tmp_path / "blob")
    assert equal(DeepSeekV3.from_pretrained(tmp_path / "model").state_dict(), model.state_dict())


# Names that differ in numbers only

key_sets = st.sets(st.tuples(st.integers(0, 3), st.integers(0, 12)), min_size=1, max_size=30)


def spelled_out(group):
    """The names that a group stands for."""
    text = re.sub(r" \(\d+ keys\)$", "", group)
    found = re.search(r"\{([^}]*)\}", text)
    if not found:
        return [text]
    numbers = []
    for run in found[1].split(", "):
        first, _, last = run.partition("..")
        numbers += range(int(first), int(last or first) + 1)
    return [
        name
        for number in numbers
        for name in spelled_out(text[: found.start()] + str(number) + text[found.end() :])
    ]


@given(key_sets)
def test_a_group_of_names_stands_for_those_names_and_no_others(keys):
    names = [f"layers.{i}.experts.{j}.weight" for i, j in keys]
    found = [name for group in layout.grouped(names) for name in spelled_out(group)]
    assert sorted(found) == sorted(names)


def test_a_whole_block_of_names_is_one_line():
    names = [f"a.{i}.b.{j}.up_proj.weight" for i in range(3, 8) for j in range(16)]
    assert layout.grouped([*names, "lm_head.weight"]) == [
        "a.{3..7}.b.{0..15}.up_proj.weight (80 keys)",
        "lm_head.weight",
    ]


def test_replace_keeps_the_config_of_a_quantized_model_readable(tmp_path):
    cfg = replace(config(), quantization_config=QuantizationConfig())
    model_of(cfg).save_pretrained(tmp_path / "model")
    assert checkpoint.read_config(tmp_path / "model").quantization_config is None
