import pytest

from dsv3_tutorial.learn.live import live_seconds


@pytest.mark.parametrize("given, seconds", [("4", 4.0), ("0.5", 0.5)])
def test_the_variable_sets_the_length_of_a_live_cell(monkeypatch, given, seconds):
    monkeypatch.setenv("DSV3_LIVE_SECONDS", given)
    assert live_seconds() == seconds


@pytest.mark.parametrize("given", ["", "soon", "0", "-3", "nan", "inf"])
def test_a_variable_that_is_no_length_is_as_none(monkeypatch, given):
    monkeypatch.setenv("DSV3_LIVE_SECONDS", given)
    assert live_seconds() == 45.0
