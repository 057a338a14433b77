"""What a folder of weights may be instead of a checkpoint: each refused by name, nothing loaded."""

import json
import pickle
import re
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dsv3_tutorial import checkpoint
from dsv3_tutorial.checkpoint import CheckpointError
from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.model import DeepSeekV3

INDEX = "model.safetensors.index.json"
UP = "model.layers.1.mlp.experts.2.up_proj.weight"


@pytest.fixture(scope="module")
def model():
    """One dense layer, one of experts, an MTP module."""
    torch.manual_seed(0)
    cfg = ModelConfig(
        **{"vocab_size": 16, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2},
        **{"num_attention_heads": 2, "kv_lora_rank": 4, "qk_nope_head_dim": 4, "v_head_dim": 4},
        **{"qk_rope_head_dim": 2, "n_routed_experts": 4, "num_experts_per_tok": 2},
        **{"moe_intermediate_size": 6, "n_shared_experts": 1, "first_k_dense_replace": 1},
        num_nextn_predict_layers=1,
    )
    return DeepSeekV3(cfg)


@pytest.fixture
def one_file(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def sharded(model, tmp_path):
    checkpoint.save(tmp_path / "model", model.cfg, model.state_dict(), max_shard_size=2500)
    return tmp_path / "model"


@pytest.fixture
def fp8(model, tmp_path):
    model.save_pretrained(tmp_path / "model", quantize="fp8")
    return tmp_path / "model"


def shards(folder):
    return sorted(folder.glob("*.safetensors"))


def change(folder, edit):
    """Let `edit` change the dictionary of stored tensors of a folder with one file."""
    path = folder / "model.safetensors"
    state = load_file(path)
    edit(state)
    save_file(state, path, metadata={"format": "pt"})


def change_index(folder, edit):
    index = json.loads((folder / INDEX).read_text())
    edit(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def refused(folder, *patterns, **options):
    """The error says what, why and what to do, and loading into a model left the model alone."""
    with pytest.raises(CheckpointError) as caught:
        DeepSeekV3.from_pretrained(folder, **options)
    text = str(caught.value)
    assert text.startswith("The checkpoint in 'model' cannot be loaded:\n  - ")
    assert "Nothing of it was loaded: " in text and "then load the folder again." in text
    for pattern in patterns:
        assert re.search(pattern, text), text
    return caught.value


def test_the_folders_that_the_faults_are_planted_in_are_sound(model, one_file):
    loaded = DeepSeekV3.from_pretrained(one_file)
    pairs = zip(loaded.state_dict().values(), model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


# Files that are not what their name says

WEB_PAGE = b"\n<!DOCTYPE html><html><body>Please log in</body></html>"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0a\nsize 4300\n"


@pytest.mark.parametrize("content", [WEB_PAGE, b"<html><p>404", b'<?xml version="1.0"?><Error/>'])
def test_a_web_page_saved_as_weights(one_file, content):
    (one_file / "model.safetensors").write_bytes(content)
    refused(one_file, r"model\.safetensors is a web page.*fetch the file again")


def test_a_git_lfs_pointer(sharded):
    shards(sharded)[1].write_bytes(POINTER)
    refused(sharded, rf"{shards(sharded)[1].name} is a Git LFS pointer.*git lfs pull")


def test_an_empty_file(sharded):
    shards(sharded)[0].write_bytes(b"")
    refused(sharded, rf"{shards(sharded)[0].name} is empty")


@pytest.mark.parametrize("keep", [1, 7, 8, 9, 100, 0.5, -1])
def test_a_truncated_file(one_file, keep):
    path = one_file / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep) if keep == 0.5 else keep])
    refused(one_file, r"model\.safetensors is truncated or damaged")


def test_every_damaged_file_is_named_at_once(sharded):
    first, second, third = shards(sharded)[:3]
    first.write_bytes(POINTER)
    second.write_bytes(second.read_bytes() + b"more")
    third.unlink()
    refused(sharded, f"{first.name} is a Git", f"{second.name} is trunc", f"missing.*{third.name}")


def crafted(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    "content",
    [
        crafted(b"[1, 2]"),
        crafted(b"{not json"),
        crafted(b"\xff\xfe"),
        crafted(b"[" * 50_000),
        crafted({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 80]}}, b"\0" * 8),
        crafted({"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, b"\0" * 8),
        crafted({"x": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}}, b"\0" * 8),
        crafted({"x": {"shape": [2], "data_offsets": [0, 8]}}, b"\0" * 8),
        crafted({"x": 7}),
        struct.pack("<Q", 2**62) + b"{}",
    ],
    ids=range(10),
)
def test_a_header_that_does_not_describe_its_file(one_file, content):
    (one_file / "model.safetensors").write_bytes(content)
    refused(one_file, r"model\.safetensors is truncated or damaged")


def test_a_header_that_names_a_tensor_twice(one_file):
    entry = b'{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
    twice = b'{"lm_head.weight":' + entry + b',"lm_head.weight":' + entry + b"}"
    (one_file / "model.safetensors").write_bytes(crafted(twice, b"\0" * 8))
    refused(one_file, r"names lm_head\.weight twice")


class Payload:
    """A pickle that makes a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("protocol", [0, 1, 2, 4, 5, "torch"])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_a_pickle_is_never_executed_whatever_its_name(one_file, tmp_path, name, protocol):
    (one_file / "model.safetensors").unlink()
    proof = tmp_path / "executed"
    content = {"lm_head.weight": Payload(proof)}
    if protocol == "torch":
        torch.save(content, one_file / name)
    else:
        (one_file / name).write_bytes(pickle.dumps(content, protocol=protocol))
    refused(one_file, r"pickle" if name.endswith("bin") or protocol not in (0, 1) else "damaged")
    assert not proof.exists()
    with open(one_file / name, "rb") as file:  # and the payload would have worked
        torch.load(file, weights_only=False) if protocol == "torch" else pickle.load(file)
    assert proof.exists()


def test_a_sound_file_whose_first_bytes_look_like_a_pickles_is_read(one_file, model):
    path = one_file / "model.safetensors"
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    longer = length // 65536 * 65536 + 65536 + 0x0280  # in bytes: 80 02, pickle's protocol 2
    header = content[8 : 8 + length].ljust(longer)
    path.write_bytes(struct.pack("<Q", longer) + header + content[8 + length :])
    loaded = DeepSeekV3.from_pretrained(one_file)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


# Folders


def test_no_such_folder_a_file_instead_of_one_and_no_config(one_file):
    (one_file / "config.json").unlink()
    refused(one_file, "holds no config.json")
    with pytest.raises(CheckpointError, match="is no folder"):
        DeepSeekV3.from_pretrained(one_file / "nowhere")
    with pytest.raises(CheckpointError, match="is no folder"):
        DeepSeekV3.from_pretrained(one_file / "model.safetensors")


def test_a_folder_without_weights(one_file):
    (one_file / "model.safetensors").unlink()
    refused(one_file, f"neither model.safetensors nor {INDEX}")


def test_an_index_beside_a_single_file_that_it_does_not_name(sharded):
    save_file({"x": torch.ones(1)}, sharded / "model.safetensors")
    refused(sharded, "both stand here: two models")


def test_missing_shards_are_all_named_at_once(sharded):
    gone = [shards(sharded)[0], shards(sharded)[2]]
    for path in gone:
        path.unlink()
    refused(sharded, f"missing files.*{gone[0].name}, {gone[1].name}")


def test_a_folder_where_a_shard_should_be(sharded):
    path = shards(sharded)[0]
    path.unlink()
    path.mkdir()
    refused(sharded, f"missing files.*{path.name}")


# The index


def test_a_tensor_in_two_shards(sharded):
    first, second = shards(sharded)[:2]
    state = load_file(first)
    name = next(iter(state))
    save_file({**load_file(second), name: state[name]}, second)
    refused(sharded, f"in two shards, {second.name} and an earlier one: {re.escape(name)}")


def test_an_index_that_names_a_tensor_twice(sharded):
    text = (sharded / INDEX).read_text()
    extra = '"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors", '
    (sharded / INDEX).write_text(re.sub(r'"weight_map": \{', extra, text))
    refused(sharded, r"names lm_head\.weight twice")


def test_an_index_and_shards_that_disagree(sharded):
    path = shards(sharded)[0]
    state = load_file(path)
    name, other = list(state)[:2]
    state["stranger"] = state.pop(name)
    save_file(state, path)
    change_index(sharded, lambda weight_map: weight_map.pop(other))
    first, second = (re.escape(name), re.escape(other))
    refused(sharded, f"not in the file that .* names for it: {first}", f"not in .*: {second}")


UNSAFE = ["../model.safetensors", "/etc/passwd", "/model.safetensors", "a/b.safetensors"]
UNSAFE += ["..\\model.safetensors", "C:\\model.safetensors", "C:model.safetensors", "..", ".", ""]
UNSAFE += ["~/model.safetensors", ".hidden.safetensors", "model\0.safetensors", "config.json"]
UNSAFE += ["model.safetensors\n", "pytorch_model.bin", "-o.safetensors", None, 7, ["a.safetensors"]]


@pytest.mark.parametrize("name", UNSAFE, ids=repr)
def test_an_index_that_leads_out_of_the_folder(sharded, name):
    (sharded.parent / "model.safetensors").write_bytes(b"a file that must not be opened")
    change_index(sharded, lambda weight_map: weight_map.update({"lm_head.weight": name}))
    refused(sharded, "names the file .*in this very folder, and no other file is opened")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is not JSON: is empty"),
        (b"{", "is not JSON"),
        (b"\xff", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (WEB_PAGE, "is not JSON: is a web page"),
        (POINTER, "is not JSON: is a Git LFS pointer"),
        (b"[]", "is not an object with a weight_map"),
        (b"7", "is not an object with a weight_map"),
        (b'{"metadata": {}}', "is not an object with a weight_map"),
        (b'{"weight_map": ["a"]}', "is not an object with a weight_map"),
        (b'{"weight_map": {}}', "is not an object with a weight_map"),
    ],
    ids=range(11),
)
def test_an_index_that_is_no_index(sharded, content, says):
    (sharded / INDEX).write_bytes(content)
    refused(sharded, says)


# Names, shapes and dtypes


def test_missing_and_unexpected_tensors_are_grouped(one_file):
    def edit(state):
        for name in list(state):
            if ".mlp.experts." in name and "up_proj" in name:
                state[name.replace("up_proj", "upward")] = state.pop(name)
        del state["model.norm.weight"]

    change(one_file, edit)
    refused(
        one_file,
        r"missing: model\.layers\.\{1\.\.2\}\.mlp\.experts\.\{0\.\.3\}\.up_proj\.weight \(8 keys\)",
        r"missing: model\.norm\.weight",
        r"unexpected: .*\.upward\.weight \(8 keys\)",
    )


def test_both_layouts_of_the_experts_at_once(one_file, model):
    name = "model.layers.1.mlp.experts.gate_up_proj"
    change(one_file, lambda state: state.update({name: model.state_dict()[name].clone()}))
    refused(one_file, r"unexpected: .*experts\.\{0\.\.3\}\.gate_proj\.weight \(4 keys\)")


def test_wrong_shapes_are_all_listed(one_file):
    def edit(state):
        state["model.norm.weight"] = torch.ones(9)
        state["lm_head.weight"] = state["lm_head.weight"].T.contiguous()
        state["model.layers.2.embed_tokens.weight"] = torch.ones(1, 8)
        for e in range(3):
            name = f"model.layers.1.mlp.experts.{e}.down_proj.weight"
            state[name] = torch.ones(8, 7)

    change(one_file, edit)
    refused(
        one_file,
        r"shape \(9,\), not \(8,\): model\.norm\.weight",
        r"shape \(8, 16\), not \(16, 8\): lm_head\.weight",
        r"shape \(1, 8\), not \(16, 8\): model\.layers\.2\.embed_tokens\.weight",
        r"shape \(8, 7\), not \(8, 6\): .*experts\.\{0\.\.2\}\.down_proj\.weight \(3 keys\)",
    )


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float64, torch.float8_e5m2])
def test_weights_of_another_kind_of_number(one_file, dtype):
    change(one_file, lambda state: state.update({UP: state[UP].to(dtype)}))
    refused(one_file, rf"stored as \w+, and a weight is F32.*: {UP}")


def test_mtp_modules_announced_and_not_there(one_file, model):
    def edit(state):
        for name in [name for name in state if name.startswith("model.layers.2.")]:
            del state[name]

    change(one_file, edit)
    problems = refused(one_file, "announces 1 module.*load with mtp=False").problems
    assert len(problems) == 1
    loaded = DeepSeekV3.from_pretrained(one_file, mtp=False)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_mtp_modules_there_and_not_announced(one_file, model):
    raw = json.loads((one_file / "config.json").read_text())
    raw["num_nextn_predict_layers"] = 0
    (one_file / "config.json").write_text(json.dumps(raw))
    refused(one_file, r"unexpected: model\.layers\.2\.")


@pytest.mark.parametrize("name", ["embed_tokens", "shared_head.head"])
def test_a_copy_for_the_mtp_module_that_is_no_copy(one_file, name):
    key = f"model.layers.2.{name}.weight"
    change(one_file, lambda state: state[key][0, 0].add_(1))
    refused(one_file, rf"{re.escape(key)} differs from .*, which it is a copy of")


# Values


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_all_named(one_file, value):
    def edit(state):
        state[UP][0, 0] = value
        state["model.norm.weight"][1] = value

    change(one_file, edit)
    refused(one_file, rf"NaN or infinite values in: {UP}", r"infinite .*: model\.norm\.weight")


def test_a_value_too_large_for_the_dtype_asked_for(one_file):
    change(one_file, lambda state: state[UP][0].fill_(1e30))
    assert DeepSeekV3.from_pretrained(one_file)
    refused(one_file, rf"NaN or infinite values in: {UP}", dtype=torch.float16)


def test_fp8_without_its_scale(fp8):
    def edit(state):
        for e in range(4):
            del state[f"model.layers.1.mlp.experts.{e}.up_proj.weight_scale_inv"]

    change(fp8, edit)
    refused(fp8, r"FP8 without its scale: .*experts\.\{0\.\.3\}\.up_proj\.weight \(4 keys\)")


def test_a_scale_without_fp8(fp8):
    change(fp8, lambda state: state.update({UP: state[UP].float()}))
    refused(fp8, rf"unexpected: {UP}_scale_inv")


def test_fp8_without_its_block_size_in_the_config(fp8):
    raw = json.loads((fp8 / "config.json").read_text())
    del raw["quantization_config"]
    (fp8 / "config.json").write_text(json.dumps(raw))
    refused(fp8, "config.json has no quantization_config to give the block size")


@pytest.mark.parametrize("scale", [torch.ones(2, 1), torch.ones(1), torch.tensor(1.0)])
def test_a_scale_of_the_wrong_shape(fp8, scale):
    change(fp8, lambda state: state.update({f"{UP}_scale_inv": scale}))
    refused(fp8, rf"F32 \(.*\), not F32 \(1, 1\): {UP}_scale_inv")


def test_a_scale_of_the_wrong_dtype(fp8):
    change(fp8, lambda state: state.update({f"{UP}_scale_inv": torch.ones(1, 1).bfloat16()}))
    refused(fp8, rf"BF16 \(1, 1\), not F32 \(1, 1\): {UP}_scale_inv")


@pytest.mark.parametrize("value", [0.0, -0.0, -1.0, float("nan"), float("inf"), -float("inf")])
def test_a_scale_that_is_no_positive_number(fp8, value):
    change(fp8, lambda state: state[f"{UP}_scale_inv"].fill_(value))
    refused(fp8, rf"not positive and finite: {UP}_scale_inv")


def test_nan_among_fp8_values(fp8):
    def edit(state):
        values = state[UP].float()
        values[0, 0] = float("nan")
        state[UP] = values.to(torch.float8_e4m3fn)

    change(fp8, edit)
    refused(fp8, rf"NaN or infinite values in: {UP}")


def test_a_vector_in_fp8(fp8):
    name = "model.norm.weight"
    change(fp8, lambda state: state.update({name: state[name].to(torch.float8_e4m3fn)}))
    refused(fp8, r"FP8, and no matrix: model\.norm\.weight")


def test_a_thousand_problems_are_counted_and_not_printed(one_file):
    strangers = {"x" * i: torch.ones(1) for i in range(1, 1001)}
    change(one_file, lambda state: state.update(strangers))
    error = refused(one_file, r"and 960 more \(the error's \.problems has all\)")
    assert len(error.problems) == 1000


# Saves


def unsaved(folder, model, *patterns, cfg=None, state=None, **options):
    with pytest.raises(CheckpointError) as caught:
        checkpoint.save(folder, cfg or model.cfg, state or model.state_dict(), **options)
    text = str(caught.value)
    assert text.startswith(f"No checkpoint was written to {folder.name!r}:\n  - ")
    assert "Half a checkpoint would be worse than none" in text and "then save again." in text
    for pattern in patterns:
        assert re.search(pattern, text), text


def test_nothing_is_saved_that_no_load_would_accept(model, tmp_path):
    folder = tmp_path / "model"
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    unsaved(folder, model, "'int3' is not implemented", quantize="int3")
    unsaved(folder, model, "dtype=torch.int8 is not", dtype=torch.int8)
    large = {**state, "lm_head.weight": state["lm_head.weight"] + 1e6}
    unsaved(folder, model, r"infinite .*lm_head", state=large, dtype=torch.float16)
    state["model.norm.weight"][0] = float("nan")
    state["lm_head.weight"] = state["lm_head.weight"].double()
    unsaved(folder, model, r"infinite .*norm\.weight", r"float16: lm_head\.weight", state=state)
    two = replace(model.cfg, num_nextn_predict_layers=2)
    unsaved(folder, model, r"announces an MTP module at model\.layers\.3\.\*", cfg=two)
    assert not folder.exists()


def test_a_folder_that_holds_more_than_files_is_not_replaced(model, tmp_path):
    home = tmp_path / "home"
    (home / "documents").mkdir(parents=True)
    unsaved(home, model, r"holds more than files \(documents\).*checkpoint's own")
    assert [path.name for path in home.iterdir()] == ["documents"]
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_a_file_where_the_folder_should_be_stays(model, tmp_path):
    (tmp_path / "model").write_text("mine")
    unsaved(tmp_path / "model", model, "model is a file: name a folder")
    assert (tmp_path / "model").read_text() == "mine"
