"""A panel that writes: prompt, temperature, drafts, Run and Stop, and the text as it comes.

The model writes in a thread, so that Stop and other cells are heard meanwhile. Stored, and before
Run is pressed, the panel is one fixed greedy run, which never changes.
"""

import atexit
import html
import sys
import time
from contextlib import suppress
from threading import Event, Thread
from typing import Any

import ipywidgets as w
import torch

from dsv3_tutorial.files import data_path
from dsv3_tutorial.inference.generate import Generation, generate
from dsv3_tutorial.inference.requests import GenerationError
from dsv3_tutorial.inference.sample import Sampling
from dsv3_tutorial.inference.text import Vocabulary
from dsv3_tutorial.learn.figures.guessed import Made, Pieces, Watch, run
from dsv3_tutorial.model import DeepSeekV3

PROMPT = "def read(self, size=None):\n"
STORED_TOKENS = 48
FRAME = 0.1  # seconds between two pictures of the text: faster is not seen, and costs the model
LEAVE = 2.0  # seconds that an ending interpreter waits for the thread
DRAFTS = {"none": 0, "1 a pass": 1, "2 a pass": 2, "3 a pass": 3}


class GenerationPanel(w.VBox):
    """Controls over `generate`, and its text, coloured by who made each token.

    `start` and `stop` are the two buttons; `wait` is for a test. A request that cannot be served
    is answered in words. While the model writes, Run sleeps, and a cell's interrupt stops it too.
    """

    def __init__(self, model: DeepSeekV3, vocabulary: Vocabulary):
        self.model, self.vocabulary = model, vocabulary
        most = min(400, model.cfg.max_position_embeddings // 2)
        wide = {"layout": {"width": "40em"}, "style": {"description_width": "7em"}}
        self.prompt = w.Textarea(value=PROMPT, description="prompt", rows=3, **wide)
        self.temperature = w.FloatSlider(0.0, min=0, max=1.5, step=0.1, description="temperature")
        self.drafts = w.Dropdown(options=list(DRAFTS.items()), value=1, description="drafts")
        self.tokens = w.IntSlider(min(120, most), min=1, max=most, description="tokens")
        for control in (self.temperature, self.drafts, self.tokens):
            control.style.description_width, control.layout.width = "7em", "32em"
        self.run_button = w.Button(description="Run", button_style="primary")
        self.stop_button = w.Button(description="Stop", disabled=True)
        self.run_button.on_click(self.start)
        self.stop_button.on_click(self.stop)
        self._stored = _stored_run(model, vocabulary)
        self._text = w.HTML(value=self._stored.as_html())
        self._status = w.HTML(value="A stored run, greedy. Run writes another.")
        self._thread, self._stopped = None, Event()
        buttons = w.HBox([self.run_button, self.stop_button])
        controls = [self.prompt, self.temperature, self.drafts, self.tokens]
        super().__init__([*controls, buttons, self._text, self._status])

    @property
    def running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    @property
    def text(self) -> str:
        """The HTML on show."""
        return self._text.value

    @property
    def status(self) -> str:
        """The words under it."""
        return self._status.value

    def start(self, _button: Any = None) -> None:
        """Write what the controls ask for; nothing while a run is under way."""
        if self.running:
            return
        self._stopped.clear()
        self._show_running(True)
        self._status.value = "Reading the prompt."
        asked = self.prompt.value, self.temperature.value, self.drafts.value, self.tokens.value
        self._thread = Thread(target=self._work, args=asked, daemon=True)
        atexit.register(self._leave)
        _on_cell_end("register", self._cell_ended)
        self._thread.start()

    def stop(self, _button: Any = None) -> None:
        """End the run after the token that is being made."""
        self._stopped.set()

    def wait(self, seconds: float | None = None) -> bool:
        """Until the run has ended; whether it has."""
        if self._thread is not None:
            self._thread.join(seconds)
        return not self.running

    def close(self) -> None:
        """End the run, and take the panel away."""
        self.stop()
        super().close()

    def _work(self, prompt: str, temperature: float, drafts: int, tokens: int) -> None:
        """The thread: nothing is raised out of it, all is said in the status."""
        self._pieces = Pieces(self.vocabulary, prompt)
        self._began, self._drawn = time.perf_counter(), 0.0
        try:
            self._say(self._generate(prompt, temperature, drafts, tokens))
        except GenerationError as error:
            self._status.value = html.escape(str(error))
        except Exception as error:
            said = f"The run broke off: {type(error).__name__}: {error}"
            self._status.value = html.escape(said)
        finally:
            self._text.value = self._pieces.as_html()
            self._show_running(False)
            atexit.unregister(self._leave)
            _on_cell_end("unregister", self._cell_ended)

    def _generate(self, prompt: str, temperature: float, drafts: int, tokens: int) -> Generation:
        ids, sampling = self.vocabulary.encode(prompt), Sampling(temperature)
        ends = self.vocabulary.last_tokens()
        with Watch(self.model, self._came) as watch:
            return generate(
                self.model, [ids], tokens, sampling, ends, speculate=drafts, on_token=watch
            )

    def _came(self, made: Made) -> bool:
        """Take one token; whether that was the last."""
        self._pieces.add(made)
        now = time.perf_counter()
        if now - self._drawn > FRAME:
            self._drawn = now
            self._text.value = self._pieces.as_html()
            self._status.value = f"{len(self._pieces.made)} tokens in {now - self._began:.1f} s"
        return self._stopped.is_set()

    def _say(self, made: Generation) -> None:
        """Tokens a second, acceptance, passes."""
        said = ["Stopped." if self._stopped.is_set() else "Done."]
        if made.decoded:
            rate = made.decoded / made.decode_s
            said.append(f"{rate:.0f} tokens a second, {made.decoded / made.passes:.2f} a pass.")
        if made.drafted:
            said.append(f"{made.accepted / made.drafted:.0%} of {made.drafted} drafts accepted.")
        self._status.value = " ".join(said)

    def _show_running(self, now: bool) -> None:
        self.run_button.disabled, self.stop_button.disabled = now, not now

    def _cell_ended(self, result: Any) -> None:
        """Stop with a cell that was interrupted while the panel wrote."""
        if isinstance(result.error_in_exec, KeyboardInterrupt):
            self.stop()

    def _leave(self) -> None:
        """An interpreter that ends under a running thread may crash."""
        self.stop()
        self.wait(LEAVE)

    def twin(self) -> str:
        """What stands for the panel where no widget is shown: how to get it, and a fixed run."""
        return f"Generation panel: run this cell to write with it. A run:\n{self._stored.as_text()}"

    def __repr__(self) -> str:
        return self.twin()

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        bundle = super()._repr_mimebundle_(**kwargs)
        data, *metadata = bundle if isinstance(bundle, tuple) else (bundle,)
        rich = f"<p>Generation panel: run this cell to write with it. A run:</p>{self._as_stored()}"
        data = {**(data or {}), "text/plain": self.twin(), "text/html": rich}
        return (data, *metadata) if metadata else data

    def _as_stored(self) -> str:
        return self._stored.as_html()


def generation_panel(
    model: DeepSeekV3 | None = None, vocabulary: Vocabulary | None = None
) -> GenerationPanel:
    """The panel over a model with its MTP module; without one, over data/checkpoints/small."""
    folder = data_path("checkpoints", "small")
    if model is None:
        model = DeepSeekV3.from_pretrained(folder, dtype=torch.float32).eval()
    return GenerationPanel(model, vocabulary or Vocabulary(folder, model.cfg.vocab_size))


def _stored_run(model: DeepSeekV3, vocabulary: Vocabulary) -> Pieces:
    made = run(model, vocabulary.encode(PROMPT), STORED_TOKENS, drafts=1)
    return Pieces(vocabulary, PROMPT, made)


def _on_cell_end(what: str, call: Any) -> None:
    """Register or unregister a call after each cell, where there are cells."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    if shell is not None:
        with suppress(ValueError):  # not registered any more
            getattr(shell.events, what)("post_run_cell", call)
