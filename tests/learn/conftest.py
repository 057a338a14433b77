"""Every test here keeps its progress in a folder of its own."""

import pytest

from dsv3_tutorial.learn import notebook, predictions, record


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch):
    """A fresh DSV3_HOME, and nothing remembered from another test."""
    monkeypatch.setenv("DSV3_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("DSV3_STRICT", raising=False)
    monkeypatch.setattr(record, "_session", {"exercises": {}, "predictions": {}})
    monkeypatch.setattr(record, "_said", set())
    monkeypatch.setattr(predictions, "_asked", {})
    monkeypatch.setattr(notebook, "_hints_given", {})
    return tmp_path / "home"
