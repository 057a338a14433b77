"""The engines side by side: ours in every format, speculating and batching, and transformers'.

CPU: one thread, process CPU time, contestants in turn, medians. Receipts `inference`:

  decode step           s; model (trained, wide), form, batch, context, weight_bytes, cache_bytes,
                        working_bytes (most that one step holds besides). tokens/s = batch / value.
  time per cached token s; model, form, batch, contexts, fixed_s, r2: the line t = fixed + value L.
  generation            tokens/s of whole calls, prompts read; form, batch, prompt, new_tokens, same
                        (share of tokens that are float32's in the same place: one early tie makes
                        all behind it differ; 1 is asserted for the exact forms).
  speculation           tokens/s from the first token on; batch, drafts (0: plain), new_tokens,
                        acceptance, tokens_per_pass (a text's), passes, bound (gain by bytes).
  pass cost, draft cost s; batch, queries (tokens of each text that it reads), context.
  speculation gain      x against plain; batch, drafts, predicted (the law), bound.
  law                   R2 as value; law, points: how well the predictions fit.
  acceptance by kind    share; text, rule, kind, tokens.
  product by rows       s; form, rows, side.
  batching              tokens/s; form, requests, slots.
  phase                 tokens/s, FLOP/s, bytes/s; model, phase, batch, tokens; with ceilings.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from dsv3_tutorial import receipts
from dsv3_tutorial.bench import inference_gpu, inference_table
from dsv3_tutorial.bench.inference_plan import QUICK, Plan
from dsv3_tutorial.bench.inference_receipts import parts
from dsv3_tutorial.receipts import Receipt

NAME = "inference"
PARTS = tuple(parts(Plan()))


def main(argv: list[str] | None = None) -> int:
    """`bench inference`: measure, keep receipts, print the tables with the targets beside them."""
    parser = argparse.ArgumentParser(prog="dsv3_tutorial bench inference", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, help="folder of the receipts (default: data/measured)")
    parser.add_argument("--quick", action="store_true", help="small sizes, to try the benchmark")
    parser.add_argument("--only", choices=("cpu", "gpu"), help="one of the two parts")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="of the CPU's")
    options = parser.parse_args(argv)
    if options.only == "gpu" and not torch.cuda.is_available():
        parser.error("--only gpu: torch sees no CUDA device")
    if options.only != "gpu":
        _cpu(QUICK if options.quick else Plan(), options.out, options.parts)
    if options.only != "cpu" and torch.cuda.is_available():
        inference_gpu.run(options.out, options.quick)
    return 0


def _cpu(plan: Plan, folder: Path | None, wanted: Sequence[str]) -> None:
    threads, path = torch.get_num_threads(), None
    rows: list[Receipt] = []
    torch.set_num_threads(1)
    try:
        for name, part in parts(plan).items():
            if name not in wanted:
                continue
            found = list(part())
            path = receipts.append(NAME, found, folder=folder)  # kept, whatever comes after
            rows += found
            print(f"{name}: {len(rows)} receipts", flush=True)
    finally:
        torch.set_num_threads(threads)
    print("\n".join(inference_table.lines(rows)))
    print(path)
