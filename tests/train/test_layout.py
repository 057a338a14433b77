"""`train --dp --ep --tp --pp`: what was meant where little is said, and every problem at once."""

import json
import re
import shlex
from pathlib import Path

import pytest

from dsv3_tutorial.parallel.mesh import Layout
from dsv3_tutorial.train import layout
from dsv3_tutorial.train.options import parser, plan
from dsv3_tutorial.train.recipe import RecipeError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def out(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def world(monkeypatch):
    """As torchrun with that many ranks, in its n-th life."""

    def started(size, life=0, job="a job"):
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", str(size))
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(life))
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", job)

    return started


def asked(out, *argv):
    return plan(parser().parse_args(["--out", str(out), *map(str, argv)]))


def begun(planned, **more):
    """As a run writes it down when it begins."""
    planned.out.mkdir()
    (planned.out / "run.json").write_text(json.dumps({**planned.to_dict(), **more}))


@pytest.mark.parametrize(
    ("ranks", "flags", "expected"),
    [
        (4, "", Layout(dp=4, zero=3)),
        (1, "", Layout()),
        (4, "--dp 4", Layout(dp=4, zero=3)),
        (4, "--tp 2", Layout(dp=2, tp=2, zero=1)),
        (4, "--tp 4", Layout(tp=4)),
        (8, "--pp 2 --ep 4", Layout(dp=4, ep=4, pp=2, zero=1)),
        (4, "--ep 2 --zero 0", Layout(dp=4, ep=2)),
        (4, "--pp 2 --pp-schedule gpipe", Layout(dp=2, pp=2, zero=1, schedule="gpipe")),
    ],
)
def test_what_is_not_said_is_what_deepseek_v3_did_and_fsdp2_for_replicas_alone(
    world, out, ranks, flags, expected
):
    world(ranks)
    planned = asked(out, "--micro-batches", 2, *flags.split())
    assert planned.layout == expected and planned.layout.check(ranks, planned.config) == []
    assert planned.laid_out == bool(flags) and not out.exists()


def test_all_that_does_not_fit_is_told_at_once_with_the_rest_and_nothing_is_written(world, out):
    world(4)
    with pytest.raises(RecipeError) as caught:
        asked(out, "--text", "nowhere", "--dp", 6, "--ep", 4, "--tp", 5, "--pp", 99)
    told = [problem.split(" ")[0] for problem in caught.value.problems]
    assert told[:3] == ["text", "dp", "ep"] and set(told[3:]) == {"tp", "pp"}
    assert not out.exists()


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ("--dp 3", "is 3 ranks, and there are 4"),
        ("--batch 6 --dp 4", "batch = 6: 4 ranks of 1 micro-batches"),
        ("--tp 2 --precision fp8", "cut through its 128 x 128 blocks"),
        ("--ep 2 --zero 3", "zero = 3 together with ep or pp"),
        ("--dp many", "dp = 'many': it must be a whole number"),
        ("--zero 2", "zero = 2: it must be 0, 1 or 3"),
        ("--pp 2 --pp-schedule luck", "pp_schedule = 'luck'"),
        ("--pp 2 --micro-batches 1", "micro_batches = 1"),
        ("--ep 2 --config tiny", "the config has no experts"),
    ],
)
def test_a_layout_that_does_not_fit_the_world_or_the_model_is_refused(world, out, flags, problem):
    world(4)
    with pytest.raises(RecipeError) as caught:
        asked(out, *flags.split())
    assert problem in str(caught.value) and not out.exists()


def test_outside_torchrun_there_is_one_rank(out):
    with pytest.raises(RecipeError, match="is 2 ranks, and there is 1"):
        asked(out, "--dp", 2)


def test_a_run_remembers_the_layout_that_was_asked_for_and_may_be_given_another(world, out):
    world(4)
    begun(asked(out, "--ep", 2))
    assert asked(out, "--resume").layout == Layout(dp=4, ep=2, zero=1)
    assert asked(out, "--resume", "--tp", 2).layout == Layout(dp=2, tp=2, zero=1)
    world(2)
    with pytest.raises(RecipeError, match="the run was begun so: give --dp") as caught:
        asked(out, "--resume")
    assert "is 4 ranks, and there are 2" in str(caught.value)
    assert asked(out, "--resume", "--dp", 2).layout == Layout(dp=2, zero=3)


def test_a_run_that_was_told_nothing_takes_the_ranks_that_there_are(world, out):
    world(4)
    begun(asked(out))
    assert "layout" not in json.loads((out / "run.json").read_text())
    world(2)
    assert asked(out, "--resume").layout == Layout(dp=2, zero=3)


@pytest.mark.parametrize("written", ["none", {"dp": 2, "luck": 1}])
def test_a_damaged_layout_is_not_guessed(world, out, written):
    begun(asked(out), layout=written)
    with pytest.raises(RecipeError, match=r"run\.json is not as a run wrote it"):
        asked(out, "--resume")


def test_ranks_that_torchrun_starts_again_resume_the_run_of_their_own_job(world, out):
    world(2, job="their own")
    begun(asked(out), job="their own")
    for life in (0, 1):  # a node that lost no rank of its own counts no restart
        world(2, life, job="their own")
        assert asked(out).resume
        world(2, life, job="another")
        with pytest.raises(RecipeError, match="a run is there already"):
            asked(out)


def test_jobs_without_a_name_are_told_apart_by_the_count_of_restarts(world, out):
    world(2, job="none")
    begun(asked(out), job="none")
    with pytest.raises(RecipeError, match="a run is there already"):
        asked(out)
    world(2, life=1, job="none")
    assert asked(out).resume


def test_ranks_that_died_before_they_wrote_anything_begin(world, out):
    world(2, life=1)
    assert not asked(out).resume
    out.mkdir()
    (out / "run.json").write_text("{")
    assert not layout.restarted(out / "run.json")


def commands(page):
    """Every torchrun command of a page: the ranks it starts, and what it gives to `train`."""
    joined = (ROOT / page).read_text().replace("\\\n", " ").replace('"$SLURM_NNODES"', "2")
    for line in joined.splitlines():
        if "torchrun" in line and "-m dsv3_tutorial train " in line and "`" not in line:
            before, after = line.split("-m dsv3_tutorial train ")
            nodes = re.search(r"--nnodes (\d+)", before)
            here = int(re.search(r"--nproc-per-node (\d+)", before)[1])
            yield here * int(nodes[1] if nodes else 1), shlex.split(after)


@pytest.mark.parametrize(("page", "least"), [("docs/multi_node.md", 4), ("README.md", 1)])
def test_every_layout_that_a_page_shows_is_possible(world, out, page, least):
    found = list(commands(page))
    assert len(found) >= least
    for ranks, given in found:
        world(ranks)
        planned = plan(parser().parse_args([*given, "--out", str(out)]))
        assert planned.layout.world == ranks and planned.laid_out
