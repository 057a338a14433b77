"""Data is found, and a file is never half written."""

import os

import pytest

from dsv3_tutorial.files import data_path, write_whole


def test_data_lies_where_data_path_says():
    assert data_path("models", "deepseek-v3.json").is_file()


def test_write_whole_makes_folders_and_replaces_the_old_text(tmp_path):
    target = tmp_path / "new" / "folder" / "note.txt"
    write_whole(target, "first")
    write_whole(target, "second é")
    assert target.read_text(encoding="utf-8") == "second é"
    assert [path.name for path in target.parent.iterdir()] == ["note.txt"]


def test_a_failed_write_leaves_the_old_text_and_no_temporary_file(tmp_path, monkeypatch):
    target = tmp_path / "note.txt"
    write_whole(target, "old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_whole(target, "new")
    assert target.read_text(encoding="utf-8") == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]


def test_a_written_file_can_be_read_by_whoever_could_read_any_new_file(tmp_path):
    plain, whole = tmp_path / "plain", tmp_path / "whole"
    plain.write_text("x")
    write_whole(whole, "x")
    assert whole.stat().st_mode == plain.stat().st_mode
