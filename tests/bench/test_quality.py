import pytest
import torch

from dsv3_tutorial import receipts
from dsv3_tutorial.bench import quality, quantize_report
from dsv3_tutorial.files import data_path
from dsv3_tutorial.inference.quantize import nbytes, quantized
from dsv3_tutorial.model import DeepSeekV3

FOLDER = data_path("checkpoints", "small")


@pytest.fixture(scope="module")
def model():
    return DeepSeekV3.from_pretrained(FOLDER, torch.float32, mtp=False).eval()


@pytest.fixture(scope="module")
def module(model):
    """The written text alone: it is the same under every Python."""
    vocabulary = (FOLDER / "tokenizer.json").read_text("utf-8")
    return quality.bpe.symbols_of(data_path("text", "held_out.txt").read_bytes(), vocabulary)


@pytest.fixture(scope="module")
def rows(model, module):
    """Receipts of three windows, weights and caches."""
    size = (3, 48)
    found = list(quality.weight_receipts(model, {"module": module}, size))
    return found + list(quality.cache_receipts(model, {"module": module}, size))


def of(rows, what, part):
    return {r.shapes["form"]: r for r in rows if (r.what, r.shapes["part"]) == (what, part)}


def test_bits_are_those_of_the_quantize_report(model, module):
    run = quality.seen(model, module, 3, 48)
    assert run.bits_per_byte == pytest.approx(quantize_report.bits_per_byte(model, module, 3, 48))


def test_every_format_and_cache_is_held_against_float32(rows):
    assert list(of(rows, "bits per byte", "weights")) == list(quality.WEIGHTS)
    assert list(of(rows, "bits per byte", "cache")) == list(quality.CACHES)
    for part in ("weights", "cache"):
        bits, more = of(rows, "bits per byte", part), of(rows, "bits per byte more", part)
        wide = bits[quality.WIDE].value
        assert {form: r.value - wide for form, r in bits.items()} == {
            form: r.value for form, r in more.items()
        }
        assert of(rows, "top token kept", part)[quality.WIDE].value == 1


def test_bytes_are_those_of_the_weights_and_of_a_cached_token(rows, model):
    weights, cached = of(rows, "bits per byte", "weights"), of(rows, "bits per byte", "cache")
    assert weights["int8"].shapes["bytes"] == nbytes(quantized(model, "int8"))
    half = weights["float32"].shapes["bytes"] / 2
    assert weights["bf16"].shapes["bytes"] == pytest.approx(half, rel=1e-3)  # a gate's bias stays
    per_token = {form: r.shapes["bytes"] for form, r in cached.items()}
    layers = model.cfg.num_hidden_layers
    width = model.cfg.kv_lora_rank + model.cfg.qk_rope_head_dim
    assert per_token["float32"] == 2 * per_token["bf16"] == 4 * layers * width
    assert per_token["fp8-rope"] < per_token["fp8"] < per_token["bf16"]


def test_a_cache_in_float32_changes_nothing_and_a_narrow_one_is_really_read(rows):
    weights, cached = of(rows, "bits per byte", "weights"), of(rows, "bits per byte", "cache")
    wide = weights["float32"].value
    assert cached["float32"].value == pytest.approx(wide, abs=1e-5)
    assert abs(cached["fp8"].value - wide) > 1e-5


def test_the_model_that_is_measured_stays_as_it_was(model, rows):
    assert all(layer.self_attn.absorb is None for layer in model.model.layers)


def test_an_error_needs_two_windows():
    run = quality.Seen(torch.ones(1), torch.ones(1), torch.zeros(1))
    assert quality._error(run, run) == 0
    bits = torch.tensor([1.0, 3.0]) * quality.math.log(2)
    two, none = (quality.Seen(x, torch.ones(2), torch.zeros(2)) for x in (bits, 0 * bits))
    assert quality._error(two, none) == pytest.approx(2**0.5 / 2**0.5)  # their spread / sqrt(2)


def test_the_table_says_whether_our_bar_is_met(rows):
    said = "\n".join(quality.lines(rows))
    assert all(f"\n  {form} " in said for form in (*quality.WEIGHTS, *quality.CACHES))
    assert "target at most 0.005" in said and "bytes a token" in said


def test_the_command_keeps_receipts_that_can_be_read(rows, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(quality, "measured", lambda folder, quick: iter(rows))
    assert quality.main(["--quick", "--out", str(tmp_path)]) == 0
    kept = receipts.read("quality", folder=tmp_path, part="weights", form="int8")
    assert [r.what for r in kept] == ["bits per byte", "bits per byte more", "top token kept"]
    assert str(tmp_path / "quality.jsonl") in capsys.readouterr().out
