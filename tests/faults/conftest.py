"""A small run of the real command, and a server that forks it: torch is imported only once."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Reaped only when asked: until then the pid belongs to the child, dead or alive, and can be killed.
SERVER = """
import contextlib, importlib, json, os, sys, traceback
for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
import torch
torch.set_num_threads(1)
from dsv3_tutorial.train.run import main
print("ready", flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    if "reap" in asked:
        print(os.waitstatus_to_exitcode(os.waitpid(asked["reap"], 0)[1]), flush=True)
        continue
    child = os.fork()
    if child:
        print(child, flush=True)
        continue
    status = 1
    with open(asked["said"], "w", buffering=1) as said:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            try:
                status = main(asked["arguments"])
            except BaseException:
                traceback.print_exc()
    os._exit(status)
"""
WARM = ("torch._dynamo", "torch.distributed.checkpoint", "safetensors.torch", "numpy")

MODEL = {
    "model_type": "deepseek_v3",
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 16,
    "n_group": 2,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "num_nextn_predict_layers": 1,
    "max_position_embeddings": 64,
    "rope_theta": 10000,
    "rms_norm_eps": 1e-06,
    "hidden_act": "silu",
    "initializer_range": 0.06,
    "tie_word_embeddings": False,
}


class Server:
    """Starts `train` in a forked process, and tells how it ended."""

    def __init__(self):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER, json.dumps(WARM)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert self.process.stdout.readline() == "ready\n"

    def ask(self, **asked) -> int:
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def start(self, arguments: list, said: Path) -> int:
        """Begin a run; its pid, which stays its own until `end`."""
        return self.ask(arguments=[str(a) for a in arguments], said=str(said))

    def end(self, pid: int) -> int:
        """Wait until the run is over: its exit status, or minus the signal that ended it."""
        return self.ask(reap=pid)

    def run(self, arguments: list, said: Path) -> int:
        return self.end(self.start(arguments, said))

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=30)
        self.process.stdout.close()


@pytest.fixture(scope="session")
def server():
    made = Server()
    yield made
    made.close()


@pytest.fixture(scope="session")
def small_run(tmp_path_factory):
    """The options of a run of 24 small steps that saves after every third."""
    folder = tmp_path_factory.mktemp("small_run")
    words, draw = ("the", "cat", "sat", "on", "a", "mat", "and", "ran"), random.Random(0)
    (folder / "text").mkdir()
    for i in range(60):
        text = " ".join(draw.choice(words) for _ in range(60))
        (folder / "text" / f"{i}.txt").write_text(text)
    (folder / "config.json").write_text(json.dumps(MODEL))
    begin = ("--config", folder / "config.json", "--text", folder / "text", "--device", "cpu")
    size = ("--steps", 24, "--batch", 2, "--seq-len", 16, "--save-every", 3, "--threads", 1)
    return [*begin, *size, "--evaluate-every", 12, "--evaluate-windows", 2]
