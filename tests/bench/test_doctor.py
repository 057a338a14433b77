import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from dsv3_tutorial import receipts
from dsv3_tutorial.bench import doctor, machine, parts
from dsv3_tutorial.receipts import Receipt

HOWS = {"measured", "emulated", "receipts", "derived", "not here"}


def run(*arguments, **environment):
    command = [sys.executable, "-m", "dsv3_tutorial", "doctor", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=120
    )


def facts(**changes):
    """What backend.facts() says on a laptop, with changes."""
    usual = {
        "torch": "2.13.0+cpu",
        "cuda": None,
        "device": None,
        "capability": None,
        "triton": "3.6.0",
        "triton_problem": "no CUDA",
        "transformer_engine": None,
        "transformer_engine_problem": "it is not installed",
    }
    return SimpleNamespace(**{**usual, **changes})


H100 = {
    "cuda": "12.8",
    "device": "NVIDIA H100",
    "capability": (9, 0),
    "triton_problem": None,
    "transformer_engine": "2.8",
    "transformer_engine_problem": None,
}


@pytest.fixture
def laptop(monkeypatch):
    """Give probe() the kernels of a machine of our choice."""

    def become(kernels, loads=True, problem=None, smi=None):
        monkeypatch.setattr(parts, "_kernels", lambda: (kernels, loads, problem))
        monkeypatch.setattr(parts, "_nvidia_smi", lambda: smi)
        return parts.probe()

    return become


def test_the_json_report_is_json_and_nothing_else():
    done = run("--json", "--quick")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found) == {"machine", "parts", "measured", "receipts", "course"}
    assert found["parts"]["torch"]["usable"]
    assert "--quick" in found["measured"]["reason"]


def test_what_a_library_prints_while_it_loads_is_kept_out_of_the_json(monkeypatch, capsys):
    probe = parts.probe
    monkeypatch.setattr(parts, "probe", lambda: print("a library greets you") or probe())
    assert doctor.main(["--json", "--quick"]) == 0
    printed = capsys.readouterr()
    json.loads(printed.out)
    assert "greets" in printed.err


def test_a_torch_that_does_not_load_is_reported_and_not_a_traceback(tmp_path):
    (tmp_path / "torch.py").write_text("raise OSError('libtorch_cpu.so: wrong ELF class')")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = run("--json", PYTHONPATH=path)
    assert (done.returncode, done.stderr) == (1, "")
    found = json.loads(done.stdout)
    assert "wrong ELF class" in found["parts"]["torch"]["reason"]
    assert found["measured"] == {"reason": "torch does not load"}
    assert {row["how"] for row in found["course"]} <= {"not here", "derived", "receipts"}


def test_everything_not_usable_has_its_reason_and_what_to_do(laptop):
    for machine_here in (laptop(facts()), laptop(None, False, "OSError: gone"), parts.probe()):
        for name, part in machine_here.items():
            assert part["usable"] or (part["reason"] and part["do"]), name


def test_a_gpu_that_torch_cannot_use_is_told_from_no_gpu(laptop):
    assert "no NVIDIA GPU" in laptop(facts())["GPU"]["reason"]
    blind = laptop(facts(), smi="NVIDIA L4, 23034 MiB, 550.54")["GPU"]
    assert not blind["usable"]
    assert "built without CUDA" in blind["reason"] and "NVIDIA L4" in blind["reason"]
    stale = laptop(facts(cuda="12.8"), smi="NVIDIA L4, 23034 MiB, 390.1")["GPU"]
    assert "torch does not reach it" in stale["reason"]


def test_a_broken_triton_is_told_from_a_machine_without_a_gpu(laptop):
    fine = laptop(facts())["Triton"]
    assert (fine["emulates"], fine["reason"]) == (True, "its kernels need a CUDA device")
    broken = laptop(facts(triton_problem="its import raised ImportError: x"), loads=False)["Triton"]
    assert (broken["emulates"], broken["usable"]) == (False, False)
    assert "ImportError" in broken["reason"]


def test_the_kernel_is_measured_on_a_gpu_and_taken_from_receipts_without_one(laptop):
    def how(found, kept):
        rows = {row["part"]: row["how"] for row in doctor.course(found, kept)}
        return rows["decode kernel's speed"], rows["decode kernel's correctness"]

    gpu, cpu = laptop(facts(**H100)), laptop(facts())
    assert how(gpu, {}) == ("measured", "measured")
    assert how(cpu, {}) == ("derived", "emulated")
    assert how(cpu, {"attention": {"gpu": False}}) == ("derived", "emulated")
    assert how(cpu, {"attention": {"gpu": True}}) == ("receipts", "emulated")
    interpreted = laptop(facts(triton_problem=None))  # TRITON_INTERPRET=1, and still no GPU
    assert how(interpreted, {}) == ("derived", "emulated")


@pytest.mark.parametrize("kernels", [facts(), facts(**H100), None], ids=["cpu", "gpu", "broken"])
def test_the_words_name_every_part_and_every_row(laptop, kernels, monkeypatch):
    found = laptop(kernels, kernels is not None, None if kernels else "OSError: gone")
    monkeypatch.setattr(parts, "probe", lambda: found)
    report = doctor.report(quick=True)
    words = doctor.render(report)
    assert all(name in words for name in report["parts"])
    assert all(row["part"] in words and row["how"] in HOWS for row in report["course"])
    assert "None" not in words
    json.dumps(report, allow_nan=False)


def test_a_machine_that_hides_its_facts_still_gets_a_report(monkeypatch):
    nothing = ("physical_cores", "core_limit", "memory_bytes", "memory_limit_bytes")
    for name in nothing:
        monkeypatch.setattr(doctor.host, name, lambda: None)
    assert "an unknown number of physical" in doctor.render(doctor.report(quick=True))


def test_limits_on_cores_and_memory_are_said(monkeypatch):
    monkeypatch.setattr(doctor.host, "core_limit", lambda: 1.5)
    monkeypatch.setattr(doctor.host, "memory_limit_bytes", lambda: 2**30)
    words = doctor.render(doctor.report(quick=True))
    assert "limited to the time of 1.5" in words and "limited to 1.0 GiB" in words


def test_measured_ceilings_are_in_the_report(monkeypatch):
    ceilings = machine.measure(0.1, device="cpu")
    monkeypatch.setattr(machine, "measure", lambda seconds: ceilings)
    report = doctor.report()
    assert report["measured"]["copy_bytes_per_second"] == ceilings.copy.value
    assert set(report["measured"]["flops_per_second"]) == {"fp32", "bf16"}
    assert "GB/s" in doctor.render(report)


def test_a_measurement_that_fails_is_a_line_and_not_the_end(monkeypatch):
    def fail(seconds):
        raise MemoryError("no room")

    monkeypatch.setattr(machine, "measure", fail)
    assert "MemoryError: no room" in doctor.render(doctor.report())


def test_a_damaged_receipts_file_is_reported(tmp_path, monkeypatch):
    (tmp_path / "attention.jsonl").write_text("{\n")
    good = {"what": "copy", "device": "H100", "device_kind": "gpu", "versions": {"torch": "2.11"}}
    good |= {"date": "2026-11-21", "shapes": {}, "value": 1, "unit": "B/s", "repeats": 1}
    receipt = Receipt(**good, spread={"min": 1, "max": 1}, threads=1)
    receipts.append("machine", [receipt], folder=tmp_path)
    monkeypatch.setattr(receipts, "data_path", lambda *_: tmp_path)
    kept = doctor.report(quick=True)["receipts"]
    assert "line 1 is damaged" in kept["attention"]["caption"]
    assert kept["machine"] == {"count": 1, "gpu": True, "caption": "H100, 2026-11-21, torch 2.11"}


def test_a_driver_that_answers_nothing_or_never_is_no_gpu(monkeypatch):
    def hang(*_, **options):
        raise subprocess.TimeoutExpired("nvidia-smi", options["timeout"])

    monkeypatch.setattr(subprocess, "run", hang)
    assert parts._nvidia_smi() is None
    for answer in (SimpleNamespace(returncode=0, stdout="\n"), SimpleNamespace(returncode=9)):
        monkeypatch.setattr(subprocess, "run", lambda *_, answer=answer, **__: answer)
        assert parts._nvidia_smi() is None
