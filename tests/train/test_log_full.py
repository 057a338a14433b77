import errno

import pytest

from dsv3_tutorial.train import log


def rows(*steps):
    return [{"step": step, "loss": step / 8, "lr": 1e-3} for step in steps]


class Full:
    """A file on a disk that has `room` bytes left."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        n = self.file.write(data[: self.room])
        self.room -= n
        return n

    def close(self):
        self.file.close()


def test_rows_that_find_no_room_wait_and_are_written_later_each_whole_and_once(tmp_path, capsys):
    with log.Log(tmp_path) as opened:
        opened._jsonl.file = full = Full(opened._jsonl.file, 50)
        for row in rows(1, 2, 3):
            opened.write(row)
        assert len(log.read(tmp_path)) == 1
        full.room = 10**6
        opened.write(rows(4)[0])
        assert log.read(tmp_path) == rows(1, 2, 3, 4)
    assert (
        capsys.readouterr().err.count("log.jsonl cannot be written (No space left on device)") == 1
    )


def test_rows_that_still_wait_at_the_end_are_counted_and_the_run_can_be_resumed(tmp_path):
    with pytest.raises(log.LogError, match="lacks its last 2 rows"), log.Log(tmp_path) as opened:
        opened._jsonl.file = Full(opened._jsonl.file, 50)
        for row in rows(1, 2, 3):
            opened.write(row)
    with log.Log(tmp_path, step=1) as opened:
        for row in rows(2, 3):
            opened.write(row)
    assert log.read(tmp_path) == rows(1, 2, 3)
