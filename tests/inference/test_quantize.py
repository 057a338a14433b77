"""A quantised model: in memory and from a folder the same numbers, small, and refused twice."""

import copy
import json
import pickle
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from dsv3_tutorial import checkpoint
from dsv3_tutorial.checkpoint_codes import CODED
from dsv3_tutorial.checkpoint_files import CheckpointError
from dsv3_tutorial.checkpoint_layout import is_fp8
from dsv3_tutorial.config import ModelConfig, QuantizationConfig
from dsv3_tutorial.files import data_path
from dsv3_tutorial.fp8.checks import QuantizationError
from dsv3_tutorial.inference.quantize import (
    load,
    load_codes,
    nbytes,
    quantize_folder,
    quantized,
)
from dsv3_tutorial.inference.quantized_experts import QuantizedExperts
from dsv3_tutorial.model import DeepSeekV3
from dsv3_tutorial.moe.experts import Experts
from dsv3_tutorial.weights import cpu
from dsv3_tutorial.weights.formats import FORMATS, dequantize, quantize
from dsv3_tutorial.weights.layers import QuantizedLinear

TRAINED = data_path("checkpoints", "small")
NAME = "model.safetensors"


def sparse():
    """Two layers, the second of experts, and an MTP module; sides that transformers' FP8 takes."""
    sizes = {"num_hidden_layers": 2, "first_k_dense_replace": 1, "num_nextn_predict_layers": 1}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    return replace(ModelConfig.named("tiny"), **sizes, **experts, n_shared_experts=1)


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return DeepSeekV3(sparse()).eval()


@pytest.fixture(scope="module")
def trained():
    return DeepSeekV3.from_pretrained(TRAINED, torch.float32).eval()


@pytest.fixture
def plain(model, tmp_path):
    model.save_pretrained(tmp_path / "plain")
    (tmp_path / "plain" / "tokenizer.json").write_text("{}")
    return tmp_path / "plain"


def ids_for(model, *size):
    return torch.randint(model.cfg.vocab_size, size)


def stands_for(model, fmt):
    """The plain model with its weights rounded, made without the code under test."""
    rounded = copy.deepcopy(model)
    for name, tensor in rounded.state_dict().items():
        if name.endswith("gate_up_proj"):
            halves = [dequantize(quantize(part, fmt)) for part in tensor.chunk(2, dim=1)]
            tensor.copy_(torch.cat(halves, dim=1))
        elif ".experts." in name or is_fp8(name):
            tensor.copy_(dequantize(quantize(tensor, fmt)))
    return rounded


@pytest.mark.parametrize("fmt", FORMATS)
def test_it_says_the_same_weights_as_the_rounded_model_and_leaves_the_plain_one_alone(model, fmt):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    made = quantized(model, fmt)
    state, wanted = made.state_dict(), stands_for(model, fmt).state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[name], wanted[name]) for name in wanted)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert made.lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr()  # shared


@pytest.mark.parametrize("fmt", FORMATS)
def test_logits_are_the_rounded_models_up_to_its_inputs_rounding(trained, fmt):
    ids = ids_for(trained, 2, 40)
    made, wanted = quantized(trained, fmt)(ids), stands_for(trained, fmt)(ids)
    assert (made - wanted).norm() < 0.05 * wanted.norm()  # a choice of experts may tip
    exact = fmt in ("fp8", "int8-tile")
    assert not exact or torch.allclose(made, wanted, atol=1e-3)


@pytest.mark.parametrize("fmt", ["int8", "int4"])
def test_decoding_with_a_cache_gives_the_same_logits_as_one_pass(trained, fmt):
    made, ids = quantized(trained, fmt), ids_for(trained, 1, 12)
    caches = made.caches(1, 12)
    steps = torch.cat([made(ids[:, i : i + 1], caches) for i in range(12)], dim=1)
    assert (steps - made(ids)).norm() < 0.02 * steps.norm()


@pytest.mark.parametrize("fmt", FORMATS)
def test_company_moves_logits_by_less_than_the_weights_rounding_and_1e_5_without_such(trained, fmt):
    """Inputs rounded to BF16 or INT8 amplify a last bit; products with none keep float32's."""
    torch.manual_seed(2)
    made, ids = quantized(trained, fmt), ids_for(trained, 3, 20)
    together, alone = made(ids), torch.cat([made(text[None]) for text in ids])
    assert (together - alone).norm() < (trained(ids) - alone).norm()
    kinds = {m.product.name for m in made.modules() if getattr(m, "product", None)}
    if kinds <= {"dequantized"}:
        assert (together - alone).abs().max() <= 1e-5 * alone.abs().max()
    assert (kinds == {"dequantized"}) == (fmt in ("int8-tile", "fp8"))


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("tokens", [1, 3, 50])
def test_experts_are_the_rounded_experts_for_few_rows_and_many(fmt, tokens):
    experts = Experts(8, 32, 48)
    experts.gate_up_proj.normal_(), experts.down_proj.normal_()
    made = QuantizedExperts.of(experts, fmt)
    x, weights = torch.randn(tokens, 32), torch.rand(tokens, 3)
    indices = torch.stack([torch.randperm(8)[:3] for _ in range(tokens)])
    wanted = experts.run(x, indices, weights, made.gate_up_proj, made.down_proj)
    torch.testing.assert_close(made(x, indices, weights), wanted, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("fmt", ["int8", "int4", "fp8"])
def test_large_experts_go_one_by_one_to_the_same_sums(fmt, monkeypatch):
    monkeypatch.setattr(cpu, "LARGE", 64)
    experts = Experts(5, 32, 64)
    experts.gate_up_proj.normal_(), experts.down_proj.normal_()
    made = QuantizedExperts.of(experts, fmt)
    assert made.down.apart
    x, weights, indices = (
        torch.randn(4, 32),
        torch.rand(4, 2),
        torch.tensor([[0, 3]] * 3 + [[4, 0]]),
    )
    wanted = experts.run(x, indices, weights, made.gate_up_proj, made.down_proj)
    assert (made(x, indices, weights) - wanted).norm() < 0.02 * wanted.norm()
    assert made(x[:0], indices[:0], weights[:0]).shape == (0, 32)
    assert set(made.state_dict()) == {"gate_up_proj", "down_proj"}


def test_bytes_are_counted_as_they_lie_in_memory(model):
    plain = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert nbytes(model) == plain
    for fmt, bits in {"int8": 8, "int4": 4, "fp8": 8}.items():
        made = quantized(model, fmt)
        counted = nbytes(made)
        made(ids_for(made, 1, 4))  # packs what is packed
        assert nbytes(made) == counted
        narrow = wide = scales = 0
        for name, tensor in model.state_dict().items():
            if "kv_b_proj" in name or not (is_fp8(name) or ".experts." in name):
                wide += tensor.nbytes
            else:
                narrow += tensor.numel() * bits // 8
                scales += tensor.nbytes // 8
        assert wide + narrow < counted < wide + narrow + scales


@pytest.mark.parametrize("fmt", ["fp8", "int8", "int4"])
def test_a_folder_loads_to_the_model_that_was_quantised_in_memory(model, plain, fmt):
    out = plain.with_name("out")
    quantize_folder(plain, out, fmt)
    assert (out / "tokenizer.json").read_text() == "{}"
    ids, made = ids_for(model, 2, 9), quantized(model, fmt)
    loaded = load_codes(out, torch.float32)
    state = loaded.state_dict()
    assert all(torch.equal(state[name], t) for name, t in made.state_dict().items())
    assert torch.equal(loaded(ids), made(ids)) and nbytes(loaded) == nbytes(made)
    kept = any(isinstance(module, QuantizedLinear) for module in load(out).modules())
    assert kept == (fmt != "fp8")
    narrow = load(out, torch.bfloat16)
    assert narrow(ids).dtype == torch.bfloat16
    assert not load(out, mtp=False).mtp


def test_a_plain_folder_loads_as_it_is(model, plain):
    ids = ids_for(model, 1, 5)
    assert torch.equal(load(plain)(ids), model(ids))


def test_a_quantised_model_saves_as_the_plain_model_that_it_stands_for(model, tmp_path):
    quantized(model, "int4").save_pretrained(tmp_path / "saved")
    back = DeepSeekV3.from_pretrained(tmp_path / "saved").state_dict()
    wanted = stands_for(model, "int4").state_dict()
    assert all(torch.equal(back[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("called", [False, True], ids=["fresh", "called"])
@pytest.mark.parametrize("fmt", FORMATS)
def test_a_quantised_model_is_pickled_and_saved_whole_before_and_after_its_first_call(
    model, tmp_path, fmt, called
):
    made, ids = quantized(model, fmt), ids_for(model, 2, 7)
    wanted = quantized(model, fmt)(ids)
    if called:
        made(ids)
    torch.save(made, tmp_path / "made.pt")
    others = [torch.load(tmp_path / "made.pt", weights_only=False), copy.deepcopy(made)]
    if fmt != "fp8":  # PyTorch itself cannot read a pickle of tensors in FP8
        others.append(pickle.loads(pickle.dumps(made)))
    for other in others:
        assert not any(getattr(m, "product", None) for m in other.modules())
        assert torch.equal(other(ids), wanted) and nbytes(other) == nbytes(made)
    assert torch.equal(made(ids), wanted)


def announce(folder, fmt):
    """config.json says that the weights are codes; what is stored stays."""
    cfg = replace(checkpoint.read_config(folder), quantization_config=QuantizationConfig.of(fmt))
    (folder / "config.json").write_text(json.dumps(cfg.to_dict()))


@pytest.mark.parametrize("fmt", CODED)
def test_codes_that_are_announced_and_nowhere_stored_are_refused(model, plain, fmt):
    announce(plain, fmt)
    said = rf"announces weights in {fmt.upper()} .*hold plain ones \(F32\).*remove .*or fetch"
    for read in (load, load_codes, DeepSeekV3.from_pretrained):
        with pytest.raises(CheckpointError, match=said):
            read(plain)
    with pytest.raises(CheckpointError, match=said):
        quantize_folder(plain, plain.with_name("out"), "int8")
    assert not plain.with_name("out").exists()


@pytest.mark.parametrize("fmt", CODED)
def test_some_tensors_of_a_quantised_checkpoint_may_be_plain(model, plain, fmt):
    out = plain.with_name("out")
    quantize_folder(plain, out, fmt)
    state, coded = load_file(plain / NAME), "model.layers.0.mlp.up_proj.weight"
    codes = {k: t for k, t in load_file(out / NAME).items() if k.startswith(coded)}
    wanted = dequantize(quantize(state.pop(coded), fmt))
    save_file(state | codes, out / NAME, metadata={"format": "pt"})
    back = DeepSeekV3.from_pretrained(out, torch.float32).state_dict()
    assert torch.equal(back[coded], wanted)
    assert all(torch.equal(back[name], t) for name, t in state.items() if name in back)


def test_a_folder_that_holds_a_checkpoint_is_never_replaced(model, plain):
    out = plain.with_name("out")
    out.mkdir()
    (out / "note.txt").write_text("mine")
    quantize_folder(plain, out, "int8")  # a folder with a note alone is no checkpoint
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert before["note.txt"] == b"mine"
    with pytest.raises(CheckpointError, match=r"stands there already \(config.json, model.*new f"):
        quantize_folder(plain, out, "int4")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_what_is_quantised_already_is_refused(model, plain):
    with pytest.raises(QuantizationError, match=r"is quantised already.*plain checkpoint"):
        quantized(quantized(model, "int8"), "int4")
    for fmt in ("int8", "fp8"):
        out = plain.with_name(fmt)
        quantize_folder(plain, out, fmt)
        with pytest.raises(QuantizationError, match=r"is quantised already.*plain checkpoint"):
            quantize_folder(out, plain.with_name("twice"), "int4")
        assert not plain.with_name("twice").exists()


def test_unknown_formats_and_a_folder_onto_itself_are_refused(model, plain):
    listing = sorted(path.name for path in plain.iterdir())
    with pytest.raises(QuantizationError, match=r"no weight format 'int5'"):
        quantized(model, "int5")
    with pytest.raises(QuantizationError, match=r"format 'int8-tile'.*fp8, int8, int4"):
        quantize_folder(plain, plain.with_name("out"), "int8-tile")
    with pytest.raises(CheckpointError, match="it is the folder that is read"):
        quantize_folder(plain, plain, "int8")
    assert sorted(path.name for path in plain.iterdir()) == listing
    assert [path.name for path in plain.parent.iterdir()] == ["plain"]


def test_an_interrupted_write_leaves_nothing(plain, monkeypatch):
    def full(*args, **options):
        raise OSError("No space left on device")

    monkeypatch.setattr("dsv3_tutorial.checkpoint.save_file", full)
    with pytest.raises(CheckpointError, match="No space left"):
        quantize_folder(plain, plain.with_name("out"), "int8")
    assert [path.name for path in plain.parent.iterdir()] == ["plain"]


def test_transformers_own_fp8_loader_reads_the_folder_to_the_bit(plain, model, monkeypatch):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers.quantizers import quantizer_finegrained_fp8 as loader

    # asked for first, and not used where the weights are dequantised on a CPU
    monkeypatch.setattr(loader, "is_accelerate_available", lambda *args: True)
    quantize_folder(plain, plain.with_name("out"), "fp8")
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        plain.with_name("out"), dtype=torch.bfloat16, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["mismatched_keys"]
    ours = load(plain.with_name("out"), torch.bfloat16)
    mine = ours.state_dict()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor.to(mine[name].dtype), mine[name]), name
