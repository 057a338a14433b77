"""What `quantize` prints: the bytes add up, and what it predicts of outputs is what they show."""

import re
from dataclasses import replace

import pytest
import torch

from dsv3_tutorial.bench import quantize_report
from dsv3_tutorial.bench.quantize_inputs import seen
from dsv3_tutorial.checkpoint_layout import is_fp8
from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.files import data_path
from dsv3_tutorial.model import DeepSeekV3

TRAINED = data_path("checkpoints", "small")


@pytest.fixture(scope="module")
def trained():
    return DeepSeekV3.from_pretrained(TRAINED, torch.float32).eval()


@pytest.fixture(scope="module")
def ids(trained):
    symbols, _ = quantize_report.held_out(TRAINED, trained.cfg.vocab_size)
    return symbols[: 2 * 96].view(2, 96).long()


def small(vocab_size, folder):
    sizes = {"num_hidden_layers": 2, "vocab_size": vocab_size, "first_k_dense_replace": 2}
    DeepSeekV3(replace(ModelConfig.named("tiny"), **sizes)).save_pretrained(folder)
    return folder


def test_every_matrix_of_the_main_model_is_seen_with_its_own_inputs(trained, ids):
    with torch.no_grad():
        found = {name: (weight, x) for name, weight, x in seen(trained, ids, 16)}
    plain = [name for name in found if ".experts." not in name]
    draft = f"model.layers.{trained.cfg.num_hidden_layers}."
    wanted = [k for k in trained.state_dict() if is_fp8(k) and not k.startswith(draft)]
    assert sorted(plain) == sorted(wanted)
    experts = [name for name in found if ".experts." in name]
    assert len(experts) > 0.8 * 3 * 16 * 11  # a few may have been chosen by nobody
    for weight, x in found.values():
        assert x.shape[1] == weight.shape[1] and 0 < len(x) <= 16
    name = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    assert torch.equal(found[name][1], found[name.replace("kv_a_proj_with_mqa", "q_a_proj")][1])


@pytest.mark.parametrize("fmt,most", [("int8", 0.01), ("int4", 0.14), ("fp8", 0.03)])
def test_the_predicted_error_of_each_kind_of_layer_is_near_the_measured_one(
    trained, ids, fmt, most
):
    found = quantize_report.kinds(trained, ids, fmt)
    assert {row.name for row in found} >= {"kv_b_proj", "experts.down_proj", "o_proj"}
    for row in found:
        assert 0.85 < row.predicted / row.measured < 1.2, row
        assert 0 < row.weights < most
        assert row.after < row.before * (0.36 if fmt == "int4" else 0.6)


def test_the_same_text_gives_the_same_bits_and_rounding_costs_little(trained):
    text = quantize_report.held_out(TRAINED, trained.cfg.vocab_size)
    one, two = (quantize_report.bits_per_byte(trained, text, 2, 128) for _ in range(2))
    assert one == two and 1.0 < one < 2.5


def test_the_command_writes_the_folder_and_says_what_it_cost(tmp_path, capsys):
    src = small(256, tmp_path / "plain")
    assert quantize_report.main([str(src), str(tmp_path / "out"), "--to", "int8"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("wrote out: int8, ")
    totals = re.search(r"all of them\s+\d+\s+([\d,]+) -> ([\d,]+)", said).groups()
    before, after = (int(number.replace(",", "")) for number in totals)
    lines = re.findall(r"^\w\S*proj\S*\s+\d+\s+([\d,]+) -> ([\d,]+)", said, re.MULTILINE)
    for column, total in zip(zip(*lines), (before, after)):
        assert sum(int(number.replace(",", "")) for number in column) == total
    assert re.search(r"held-out bits per byte: \d+\.\d{4} before, \d+\.\d{4} after", said)


def test_without_a_tokenizer_it_says_so_and_reports_the_rest(tmp_path, capsys):
    src = small(100, tmp_path / "plain")
    assert quantize_report.main([str(src), str(tmp_path / "out"), "--to", "fp8"]) == 0
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 100
    assert "no tokenizer.json" in said and "kv_b_proj" in said and "bits per byte:" not in said


def test_no_report_is_one_line(tmp_path, capsys):
    src = small(256, tmp_path / "plain")
    quantize_report.main([str(src), str(tmp_path / "out"), "--to", "int4", "--no-report"])
    assert len(capsys.readouterr().out.splitlines()) == 1
    assert (tmp_path / "out" / "model.safetensors").is_file()
