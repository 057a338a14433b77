"""What a lesson says of two results: equal, or how far apart."""

import torch

from dsv3_tutorial.learn.equality import check_equal


def test_equal_tensors_are_said_to_be_equal_with_the_bound(capsys):
    check_equal("rank 0", torch.ones(3), torch.ones(3) + 1e-12)
    assert capsys.readouterr().out == "rank 0: equal to one process, error < 1e-10\n"


def test_a_difference_is_named_relative_to_the_largest_number(capsys):
    check_equal("rank 1", torch.tensor([0.0, 4.0]), torch.tensor([1.0, 4.0]), below=0.2)
    assert "NOT equal to one process, off by 0.25" in capsys.readouterr().out


def test_of_a_dict_every_entry_counts(capsys):
    whole = [torch.ones(2), torch.full((2,), 2.0)]
    check_equal("stages", {1: torch.full((2,), 2.0), 0: torch.zeros(2)}, whole)
    assert "NOT equal" in capsys.readouterr().out
    check_equal("stages", {1: torch.full((2,), 2.0)}, whole)
    assert "NOT" not in capsys.readouterr().out


def test_nothing_that_is_not_a_number_is_equal(capsys):
    check_equal("rank 0", torch.tensor([float("nan")]), torch.ones(1))
    assert "NOT equal" in capsys.readouterr().out
