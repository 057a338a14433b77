"""The corpus: what is held out stays held out, and a window is what it says."""

import hashlib
import sysconfig
from pathlib import Path

import pytest
import torch

from dsv3_tutorial.train import corpus


def test_a_file_is_held_out_by_the_hash_of_its_relative_path():
    for name in ("ast.py", "json/decoder.py", "asyncio/tasks.py"):
        expected = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 20 == 0
        assert corpus.is_held_out(name) is expected


def test_the_standard_library_splits_without_overlap_and_without_tests():
    folder = Path(sysconfig.get_path("stdlib"))
    names = corpus.text_files(folder)
    assert names == sorted(names)
    assert not any(corpus.SKIPPED & set(Path(name).parts) for name in names)
    held_out = [name for name in names if corpus.is_held_out(name)]
    assert 0.02 < len(held_out) / len(names) < 0.1


def test_the_loaded_bytes_are_the_files_bytes(tmp_path):
    for i in range(120):
        (tmp_path / f"{i}.txt").write_bytes(f"file {i}".encode())
    loaded = corpus.load(tmp_path)
    names = corpus.text_files(tmp_path)
    expected = b"\n".join((tmp_path / n).read_bytes() for n in names if not corpus.is_held_out(n))
    assert bytes(loaded.train.numpy()) == expected
    assert loaded.train_files + loaded.held_out_files == 120
    assert loaded.held_out_files > 0


def test_a_place_names_the_file_that_a_byte_comes_from(tmp_path):
    texts = {f"{i}.txt": f"file {i}".encode() * (i % 3) for i in range(120)}  # some are empty
    for name, text in texts.items():
        (tmp_path / name).write_bytes(text)
    loaded = corpus.load(tmp_path)
    assert len(loaded.places) == loaded.train_files
    for begin, name in loaded.places:
        stretch = bytes(loaded.train[begin : begin + len(texts[name])].numpy())
        assert stretch == texts[name]
        if texts[name]:
            assert loaded.place(begin) == f"{name} + 0"
            last = len(texts[name]) - 1
            assert loaded.place(begin + last) == f"{name} + {last}"


def test_a_fingerprint_changes_with_any_byte_of_either_split():
    data = torch.arange(100, dtype=torch.uint8)
    one = corpus.Corpus(data[:50], data[50:], 1, 1).fingerprint()
    changed = data.clone()
    for at in (0, 49, 50, 99):
        changed[at] += 1
        assert corpus.Corpus(changed[:50], changed[50:], 1, 1).fingerprint() != one
        changed[at] -= 1
    assert corpus.Corpus(changed[:50], changed[50:], 1, 1).fingerprint() == one


def test_a_sampler_draws_the_windows_of_sample_and_goes_on_where_it_stood():
    data = torch.randint(256, (999,), dtype=torch.uint8)
    plain = torch.Generator().manual_seed(3)
    sampler = corpus.Sampler(data, 4, 8, seed=3)
    for _ in range(3):
        drawn = sampler.draw()
        assert torch.equal(drawn, corpus.sample(data, 4, 8, plain))
        for row, start in zip(drawn, sampler.starts.flatten().tolist()):
            assert torch.equal(row, data[start : start + 9].long())
    later = corpus.Sampler(data, 4, 8, seed=0)
    later.load_state_dict(sampler.state_dict())
    assert later.drawn == 3 and torch.equal(later.draw(), sampler.draw())


def test_a_folder_that_leaves_a_split_empty_is_refused(tmp_path):
    (tmp_path / "one.txt").write_text("alone")
    with pytest.raises(ValueError, match="both must have some"):
        corpus.load(tmp_path)


def test_a_sampled_window_is_a_stretch_of_the_text():
    data = torch.arange(200, dtype=torch.uint8)
    batch = corpus.sample(data, 5, 16, torch.Generator().manual_seed(0))
    assert batch.shape == (5, 17)
    assert torch.equal(batch[:, 1:] - batch[:, :-1], torch.ones(5, 16, dtype=torch.long))


def test_the_same_seed_draws_the_same_windows():
    data = torch.randint(256, (999,), dtype=torch.uint8)
    one, two = (corpus.sample(data, 4, 8, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one, two)


def test_every_byte_can_be_drawn_the_last_one_included():
    data = torch.arange(9, dtype=torch.uint8)
    drawn = corpus.sample(data, 200, 7, torch.Generator().manual_seed(0))
    assert set(drawn.flatten().tolist()) == set(range(9))


def test_a_window_longer_than_the_text_is_refused():
    with pytest.raises(ValueError, match="a window needs 11"):
        corpus.sample(torch.zeros(10, dtype=torch.uint8), 1, 10, torch.Generator())


def test_evaluation_windows_span_the_text_and_repeat():
    data = torch.arange(250, dtype=torch.uint8)
    first = torch.cat(list(corpus.windows(data, 2, 9, 3)))
    assert first.shape == (6, 10)
    assert first[0, 0] == 0 and first[-1, -1] == 249
    assert torch.equal(first, torch.cat(list(corpus.windows(data, 2, 9, 3))))
