"""The ranks of one start agree on a name, whatever an earlier start has left on the store."""

import threading
from datetime import timedelta

import pytest
import torch.distributed as dist

from dsv3_tutorial.parallel import meeting


def start(store, size, before=lambda rank: None):
    """The names that `size` ranks, as threads, come to."""
    names = [None] * size

    def rank(index):
        before(index)
        names[index] = meeting.life(store, index, size)

    threads = [threading.Thread(target=rank, args=(i,)) for i in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    return names


def test_all_ranks_of_a_start_have_one_name_and_every_start_another():
    store = dist.HashStore()
    lives = [start(store, size) for size in (4, 4, 2, 4)]  # on what the others have left
    assert all(len(set(names)) == 1 and None not in names for names in lives)
    assert len({names[0] for names in lives}) == len(lives)


@pytest.mark.parametrize("late", [0, 2])
def test_a_rank_that_comes_late_is_waited_for(late):
    store = dist.HashStore()
    start(store, 3)
    ready = threading.Event()
    threading.Timer(0.3, ready.set).start()
    names = start(store, 3, before=lambda rank: ready.wait() if rank == late else None)
    assert len(set(names)) == 1 and None not in names


def test_a_start_that_ended_halfway_is_not_gone_on_with(monkeypatch):
    store = dist.HashStore()
    monkeypatch.setattr(meeting, "TIMEOUT", timedelta(seconds=0.2))
    with pytest.raises(meeting.RankLost, match="the first rank has waited 0 seconds for rank 1"):
        meeting.life(store, 0, 3)  # the others died before they came
    with pytest.raises(meeting.RankLost, match="rank 2 has waited"):
        meeting.life(store, 2, 3)
    monkeypatch.undo()
    assert len(set(start(store, 3))) == 1


def test_a_rank_alone_waits_for_nobody():
    assert meeting.life(dist.HashStore(), 0, 1)
