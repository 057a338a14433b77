"""The loop of ten lines: what it says is what the model alone says, drafts or not."""

import torch

from dsv3_tutorial.inference.speculative_loop import speculated


class Markov:
    """A model whose next token hangs on the last two, so that a stale cache shows."""

    def __init__(self, seed, vocab, sharp=0.5):
        made = torch.Generator().manual_seed(seed)
        self.p = (sharp * torch.randn(vocab, vocab, vocab, generator=made)).softmax(-1)
        self.q = torch.randn(vocab, vocab, vocab, generator=made).softmax(-1)
        self.cache, self.reads = [0], 0

    def read(self, tokens):
        self.reads += 1
        pairs = list(zip([*self.cache[-1:], *tokens], tokens))
        self.cache += tokens
        hidden = torch.tensor(pairs)  # (S, 2)
        return hidden, self.p[hidden[:, 0], hidden[:, 1]]

    def trim(self, length):
        del self.cache[1 + length :]  # the cache begins with one token of its own

    def mtp(self, hidden, token):
        return self.q[hidden[1], token]


def dealt(seed):
    made = torch.Generator().manual_seed(seed)
    return lambda probs: int(torch.multinomial(probs, 1, generator=made)), lambda: float(
        torch.rand((), generator=made)
    )


def test_greedy_text_is_the_models_own_and_takes_fewer_passes_where_drafts_are_right():
    for good in (False, True):
        model = Markov(1, 5)
        model.p = torch.eye(5)[model.p.argmax(-1)]
        model.q = model.p if good else torch.eye(5)[model.q.argmax(-1)]
        text = speculated([2, 3], 40, model, model.mtp, lambda p: int(p.argmax()), lambda: 0.5)
        plain = [2, 3]
        while len(plain) < 40:
            plain.append(int(model.p[plain[-2], plain[-1]].argmax()))
        assert text == plain
        assert model.reads == 20 if good else model.reads > 20


def test_sampled_text_is_distributed_as_without_drafts():
    vocab, rounds = 3, 2500
    seen = torch.zeros(vocab, vocab, vocab)
    model = Markov(2, vocab)
    for seed in range(rounds):
        model.cache = [0]
        a, b, c = speculated([1], 4, model, model.mtp, *dealt(seed))[1:]
        seen[a, b, c] += 1
    first = model.p[0, 1]
    expected = rounds * first[:, None, None] * model.p[1][:, :, None] * model.p
    assert expected.min() > 5  # each cell may be held against a normal distribution
    chi_square = float(((seen - expected) ** 2 / expected).sum())
    assert chi_square < 48.3  # 26 degrees of freedom: one seed in 200 is above
