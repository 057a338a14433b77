"""`python -m dsv3_tutorial generate`: continue a prompt with the model in a folder, as it comes."""

import argparse
import os
import sys
from typing import TextIO

import torch

from dsv3_tutorial.inference import quantize
from dsv3_tutorial.inference.generate import Generation, generate
from dsv3_tutorial.inference.receipt import report
from dsv3_tutorial.inference.sample import Sampling
from dsv3_tutorial.inference.text import StopText, Vocabulary

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
_WARM_UP = 8  # tokens that --bench makes first: a first step allocates, and compiles what it must


def main(argv: list[str] | None = None) -> int:
    """Write the new text alone to standard output; figures, if wanted, to standard error.

    Raises GenerationError, ConfigError or CheckpointError, with the reason.
    """
    options = _options(argv)
    shown = Output(sys.stdout, StopText(options.stop))
    task = _Task(options)
    if options.bench:
        task.run(min(_WARM_UP, options.max_new_tokens))
    try:
        made = task.run(options.max_new_tokens, shown)
    except BrokenPipeError:  # whoever read has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    if options.bench:
        figures = report(made, task.model, len(task.prompt), options.speculate)
        print(f"\n{figures}", file=sys.stderr)  # the text need not end its line
    return 0


class _Task:
    """A model, a prompt in its tokens, and how it is to be continued."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.sampling = Sampling(
            options.temperature, options.top_k, options.top_p, options.seed
        )  # refused before a model is read
        text = sys.stdin.read() if options.prompt == "-" else options.prompt
        device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype, drafts = DTYPES.get(options.dtype), options.speculate > 0
        self.model = quantize.load(options.folder, dtype, device, mtp=drafts)
        self.vocabulary = Vocabulary(options.folder, self.model.cfg.vocab_size)
        self.prompt = self.vocabulary.encode(text)

    def run(self, new_tokens: int, output: "Output | None" = None) -> Generation:
        """Generate, and write the text as it comes if there is an output."""
        letters = self.vocabulary.stream()

        def show(_: int, token: int) -> bool:
            return output.write(letters.add(token))

        made = generate(
            self.model,
            [self.prompt],
            new_tokens,
            self.sampling,
            self.vocabulary.last_tokens(),
            self.options.cache,
            self.options.speculate,
            show if output else None,
            self.options.compile,
        )
        if output:
            output.end()
        return made


class Output:
    """Writes text to a stream at once, up to a stop string."""

    def __init__(self, stream: TextIO, stop: StopText):
        self.stream, self.stop = stream, stop

    def write(self, text: str) -> bool:
        """Show what can be shown by now; whether a stop string has ended it."""
        self._show(self.stop.add(text))
        return self.stop.found

    def end(self) -> None:
        """Show what was held back, and leave a terminal's next line free."""
        self._show(self.stop.rest() + "\n" * self.stream.isatty())

    def _show(self, text: str) -> None:
        if text:
            self.stream.write(text)
            self.stream.flush()


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m dsv3_tutorial generate", description=__doc__)
    add = parser.add_argument
    add("folder", metavar="FOLDER", help="a checkpoint, with its tokenizer.json")
    add("--prompt", required=True, metavar="P", help="the text to continue; - reads it from stdin")
    add("--max-new-tokens", type=int, default=100, metavar="N", help="at most so many (100)")
    add("--dtype", choices=DTYPES, help="compute in (default: as the weights are stored)")
    add("--temperature", type=float, default=0.0, metavar="T", help="0, the default: the likeliest")
    add("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens")
    add("--top-p", type=float, metavar="P", help="draw from the likeliest that hold mass P")
    add("--seed", type=int, metavar="S", help="the same draws each time")
    add("--stop", action="append", default=[], metavar="S", help="end before this text; repeatable")
    add("--speculate", type=int, default=0, metavar="K", help="draft K tokens a pass (MTP module)")
    add("--cache", choices=("bf16", "fp8", "fp8-rope"), help="what the cache holds")
    add("--compile", action="store_true", help="GPU: replay each step as one CUDA graph")
    add("--bench", action="store_true", help="say on standard error how fast it was")
    add("--device", metavar="D", help="default: cuda where there is one, else cpu")
    options = parser.parse_args(argv)
    if options.temperature == 0 and (options.top_k or options.top_p):
        parser.error("--top-k and --top-p choose among drawn tokens: give a --temperature too")
    return options
