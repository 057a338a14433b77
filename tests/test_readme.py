"""What the README shows of the planner is what the planner prints today."""

import re
from pathlib import Path

import pytest

from dsv3_tutorial import __main__ as cli

README = Path(__file__).resolve().parents[1] / "README.md"
_BLOCK = r"```\n\$ \S+ -m dsv3_tutorial (plan [^\n]+)\n(.*?)\n```"
SHOWN = re.findall(_BLOCK, README.read_text(encoding="utf-8"), re.DOTALL)


def test_three_real_cases_are_shown():
    assert len(SHOWN) == 3


@pytest.mark.parametrize("number", range(3))
def test_a_plan_in_the_readme_is_current(number, capsys):
    words, shown = SHOWN[number]
    assert cli.main(words.split()) == 0
    assert capsys.readouterr().out.startswith(shown)
