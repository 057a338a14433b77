"""The pure functions that learners write: expanded equals absorbed, and positions block it."""

import ast
import inspect
import textwrap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_tutorial.attention import rope
from dsv3_tutorial.attention.latent import (
    absorb_query,
    absorbed_scores,
    absorbed_values,
    compress,
    expanded_scores,
    expanded_values,
    latent_attention,
)
from dsv3_tutorial.attention.rope import rotate_pairs, rotation_table
from dsv3_tutorial.config import ModelConfig

F64 = torch.float64
REFERENCES = [
    *(rope.rotate_pairs, rope.rotate_halves, compress, absorb_query, latent_attention),
    *(expanded_scores, absorbed_scores, expanded_values, absorbed_values),
]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.manual_seed(seed), dtype=F64)


def close(got, wanted, tolerance):
    torch.testing.assert_close(got, wanted, rtol=0, atol=tolerance)


sizes = st.integers(1, 5)


@settings(deadline=None, max_examples=40)
@given(*[sizes] * 7, st.integers(1, 4))
def test_absorbed_scores_and_values_are_the_expanded_ones(b, s, t, h, n, v, c, half_r):
    q_nope, q_rope = draw(b, s, h, n), draw(b, s, h, 2 * half_r, seed=1)
    c_kv, k_rope = draw(b, t, c, seed=2), draw(b, t, 2 * half_r, seed=3)
    w_uk, w_uv = draw(h, n, c, seed=4), draw(h, v, c, seed=5)
    parts = q_nope, q_rope, c_kv, k_rope, w_uk
    scores = expanded_scores(*parts)
    assert scores.shape == (b, h, s, t)
    close(absorbed_scores(*parts), scores, 1e-12)
    probs = scores.softmax(-1)
    values = expanded_values(probs, c_kv, w_uv)
    assert values.shape == (b, s, h, v)
    close(absorbed_values(probs, c_kv, w_uv), values, 1e-12)


def test_the_scores_are_the_equation_written_out():
    q_nope, q_rope, c_kv, k_rope = draw(1, 2, 3, 4), draw(1, 2, 3, 2), draw(1, 5, 6), draw(1, 5, 2)
    w_uk = draw(3, 4, 6)
    key = w_uk[2] @ c_kv[0, 4]
    wanted = q_nope[0, 1, 2] @ key + q_rope[0, 1, 2] @ k_rope[0, 4]
    close(expanded_scores(q_nope, q_rope, c_kv, k_rope, w_uk)[0, 2, 1, 4], wanted, 1e-12)
    close(absorb_query(q_nope, w_uk)[0, 1, 2], w_uk[2].T @ q_nope[0, 1, 2], 1e-12)


def test_the_latent_is_normalised_and_the_shared_key_is_not():
    x, weight, scale = draw(2, 5, 7), draw(6 + 4, 7), draw(6, seed=1)
    c_kv, k_rope = compress(x, weight, scale)
    latent = x @ weight[:6].T
    rms = latent.square().mean(-1, keepdim=True).add(1e-6).sqrt()
    close(c_kv, latent / rms * scale, 1e-12)
    close(k_rope, x @ weight[6:].T, 1e-12)
    shifted = compress(x, weight, scale, bias=torch.ones(10, dtype=F64))[1]
    close(shifted, k_rope + 1, 1e-12)


def test_positions_on_the_latent_block_absorption():
    """Rotate the latent's keys and W_UK can no longer move to the query: the error is the signal.

    k_t = Rot(t) W_UK c_t has its rotation between W_UK and c_t. Absorbing as if the rotation could
    be done on the latent instead is right where nothing turns, and worthless otherwise.
    """
    heads, n, c, tokens = 4, 16, 16, 64
    q, c_kv, w_uk = draw(1, tokens, heads, n), draw(1, tokens, c, seed=1), draw(heads, n, c, seed=2)
    cfg = ModelConfig(8, 8, 8, 1, heads, model_type="llama", head_dim=n)

    def error(positions):
        cos, sin = rotation_table(cfg, positions, dtype=F64)
        turned_q = rotate_pairs(q, cos, sin)
        keys = rotate_pairs(torch.einsum("btc,hnc->bthn", c_kv, w_uk), cos, sin)
        true = torch.einsum("bshn,bthn->bhst", turned_q, keys)
        turned_c = rotate_pairs(c_kv[:, :, None], cos, sin)[:, :, 0]
        absorbed = torch.einsum("bshc,btc->bhst", absorb_query(turned_q, w_uk), turned_c)
        return ((absorbed - true).norm() / true.norm()).item()

    assert error(torch.zeros(tokens, dtype=torch.int64)) < 1e-12
    assert error(torch.arange(tokens)) == pytest.approx(1.119, abs=1e-3)


@pytest.mark.parametrize("function", REFERENCES, ids=lambda f: f.__name__)
def test_what_learners_write_stands_alone_in_fifteen_lines(function):
    tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    body = tree.body[1:]  # after the docstring
    assert body[-1].end_lineno - body[0].lineno < 15
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert names.isdisjoint(f.__name__ for f in REFERENCES)


def test_a_query_reads_no_later_token_and_a_decode_step_reads_them_all():
    parts = (
        draw(1, 4, 2, 3),
        draw(1, 4, 2, 2),
        draw(1, 4, 5),
        draw(1, 4, 2),
        draw(2, 3, 5),
        draw(2, 4, 5),
    )
    q_nope, q_rope, *rest = parts
    whole = latent_attention(*parts)
    close(latent_attention(q_nope[:, 3:], q_rope[:, 3:], *rest), whole[:, 3:], 1e-12)
    first = latent_attention(
        q_nope[:, :1], q_rope[:, :1], rest[0][:, :1], rest[1][:, :1], *rest[2:]
    )
    close(first, whole[:, :1], 1e-12)
