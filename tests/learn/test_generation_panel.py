"""The generation panel: it writes what generate writes, stops, refuses in words, and leaves."""

import html
import json
import re
import threading
import time
from types import SimpleNamespace

import nbformat
import pytest
import torch
from nbclient import NotebookClient

from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.inference.generate import generate
from dsv3_tutorial.inference.text import Vocabulary
from dsv3_tutorial.learn.figures import panel
from dsv3_tutorial.model import DeepSeekV3

BYTES = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "num_nextn_predict_layers": 1,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
}


@pytest.fixture(scope="module")
def model():
    """Random weights over bytes."""
    torch.manual_seed(3)
    return DeepSeekV3(ModelConfig(**BYTES)).eval().requires_grad_(False)


@pytest.fixture
def made(model, tmp_path):
    made = panel.GenerationPanel(model, Vocabulary(tmp_path, 256))
    yield made
    made.close()
    assert made.wait(10)
    assert not model.model._forward_pre_hooks, "the run left its hook on the model"


def words_of(page):
    """The letters of a page that are text: no tags, no refused drafts, nothing below it."""
    body = re.sub(r"<s .*?</s>|<p>.*", "", page, flags=re.DOTALL)
    return html.unescape(re.sub(r"<[^>]+>", "", body))


@pytest.mark.parametrize("drafts", [0, 1, 3])
def test_the_panel_writes_what_generate_writes(made, model, drafts):
    made.prompt.value, made.drafts.value, made.tokens.value = "ab <b>&", drafts, 40
    made.start()
    assert made.wait(30)
    tokens = generate(model, [list(b"ab <b>&")], 40).sequences[0]
    assert words_of(made.text) == "ab <b>&" + bytes(tokens).decode(errors="replace")
    assert made.status.startswith("Done. ") and "tokens a second" in made.status
    assert ("drafts accepted" in made.status) == (drafts > 0)
    assert (made.run_button.disabled, made.stop_button.disabled) == (False, True)


def test_what_is_on_show_before_a_run_is_what_is_stored(made):
    whole = made._repr_mimebundle_()
    bundle = whole[0] if isinstance(whole, tuple) else whole
    assert made.text in bundle["text/html"]
    assert bundle["text/plain"] == repr(made) == made.twin()
    assert f"{panel.STORED_TOKENS} tokens: " in made.twin()
    made.start()
    made.wait(30)
    assert made._repr_mimebundle_() == whole


@pytest.mark.parametrize(
    ("prompt", "says"),
    [("", "is empty: the first new token"), ("x" * 500, "620 in all; this model has 512")],
)
def test_a_prompt_that_cannot_be_served_is_answered_in_words_and_another_run_follows(
    made, prompt, says
):
    made.tokens.value, made.prompt.value = 120, prompt
    made.start()
    made.wait(10)
    assert says in made.status and not made.run_button.disabled
    made.prompt.value, made.tokens.value = "x", 5
    made.start()
    made.wait(10)
    assert made.status.startswith("Done.")


def test_any_other_error_is_said_and_the_panel_lives_on(made, monkeypatch):
    with monkeypatch.context() as broken:
        broken.setattr(panel, "generate", lambda *_, **__: 1 / 0)
        made.start()
        made.wait(10)
    assert made.status == "The run broke off: ZeroDivisionError: division by zero"
    made.start()
    made.wait(30)
    assert made.status.startswith("Done.")


@pytest.fixture
def slow(monkeypatch):
    """Tokens that take a hundredth of a second each, and the threads that make them."""
    began = []

    def slowed(self, made):
        began.append(threading.current_thread())
        time.sleep(0.01)
        return came(self, made)

    came = panel.GenerationPanel._came
    monkeypatch.setattr(panel.GenerationPanel, "_came", slowed)
    return began


def started(made, slow):
    made.tokens.value, made.drafts.value = 250, 0
    made.start()
    while not slow:
        time.sleep(0.005)


def test_stop_ends_a_run_and_a_second_run_does_not_begin_beside_the_first(made, slow):
    started(made, slow)
    made.start()
    assert made.running and made.run_button.disabled and not made.stop_button.disabled
    made.stop()
    assert made.wait(5)
    assert made.status.startswith("Stopped.")
    assert len(set(slow)) == 1 and len(slow) < 250
    made.tokens.value = 4
    made.start()
    made.wait(10)
    assert made.status.startswith("Done."), "a stopped run must not stop the next"


def test_an_interrupted_cell_and_the_end_of_the_interpreter_stop_a_run(made, slow):
    started(made, slow)
    made._cell_ended(SimpleNamespace(error_in_exec=None))
    made._cell_ended(SimpleNamespace(error_in_exec=ValueError()))
    assert not made._stopped.is_set()
    made._cell_ended(SimpleNamespace(error_in_exec=KeyboardInterrupt()))
    assert made.wait(5) and len(slow) < 250
    slow.clear()
    started(made, slow)
    made._leave()
    assert not made.running and len(slow) < 250


def test_a_model_used_elsewhere_meanwhile_is_not_mistaken_for_the_run(made, model, slow):
    started(made, slow)
    generate(model, [[1, 2, 3]], 10, speculate=2)
    made.stop()
    assert made.wait(5)
    assert not any(one.drafted or one.refused for one in made._pieces.made)


CELLS = [
    "import torch\nfrom dsv3_tutorial.learn.figures.panel import generation_panel\n"
    "writer = generation_panel()\nwriter",
    "writer.tokens.value = 20\nwriter.start()\nwriter.wait(60)",
    "writer.status.split()[0], 'def read' in writer.text",
    "import time\nwriter.tokens.value = 400\nwriter.start()\ntime.sleep(0.3)\n"
    "raise KeyboardInterrupt",
    "writer.wait(5), writer.status.split()[0]",
]


@pytest.mark.slow
def test_in_a_kernel_the_stored_panel_repeats_and_an_interrupt_ends_its_run(tmp_path, monkeypatch):
    monkeypatch.setenv("DSV3_HOME", str(tmp_path))
    found = []
    for _ in range(2):
        cells = [nbformat.v4.new_code_cell(source) for source in CELLS]
        cells[3].metadata["tags"] = ["raises-exception"]
        book = nbformat.v4.new_notebook(cells=cells)
        NotebookClient(book, timeout=60, kernel_name="python3", record_timing=False).execute()
        stored, _, done, _, ended = (cell.outputs[0].get("data") for cell in book.cells)
        assert done["text/plain"] == "('Done.', True)"
        assert ended["text/plain"] == "(True, 'Stopped.')"
        assert stored.pop("application/vnd.jupyter.widget-view+json")
        assert set(stored) == {"text/plain", "text/html"}
        found.append(json.dumps(stored))
    assert found[0] == found[1]
