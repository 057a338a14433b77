"""The engines are one function: equal results and gradients, whatever the load and the layout."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_tutorial.moe import experts
from dsv3_tutorial.moe.experts import (
    ENGINES,
    EngineError,
    Experts,
    combine,
    dispatch,
    fastest,
    permute,
    run_experts,
    unpermute,
)

NAMES = ("x", "weights", "gate_up", "down")
LOADS = {
    "uneven": [[0, 2], [0, 1], [2, 0], [0, 5], [1, 0], [0, 2], [2, 5]],  # 3 and 4 get nobody
    "one expert takes every token": [[3]] * 6,
    "two experts take every token": [[5, 0]] * 6,
    "one token": [[4, 1, 0]],
    "every expert for every token": [[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0]],
    "first and last stay empty": [[1, 2], [3, 4], [4, 1]],
    "no token at all": torch.empty(0, 2, dtype=torch.int64).tolist(),
}


def case(load, n_experts=6, hidden=8, width=12, dtype=torch.float64, device="cpu"):
    """x, indices, weights, gate_up, down with gradients wanted, and a gradient for the result."""
    indices = torch.tensor(load, dtype=torch.int64).reshape(len(load), -1 if load else 2)
    x, weights = torch.randn(len(indices), hidden), torch.rand(indices.shape)
    gate_up, down = torch.randn(n_experts, 2 * width, hidden), torch.randn(n_experts, hidden, width)
    floats = [t.to(device, dtype).requires_grad_() for t in (x, weights, gate_up, down)]
    return floats, indices.to(device), torch.randn(x.shape).to(device, dtype)


def run(engine, floats, indices, grad):
    """The result and the four gradients, in the order of NAMES, of an engine."""
    x, weights, gate_up, down = floats
    out = run_experts(x, indices, weights, gate_up, down, engine)
    return out, torch.autograd.grad(out, floats, grad)


def by_hand(floats, indices):
    """One token, one chosen expert after the other, from the definition."""
    x, weights, gate_up, down = floats
    out = []
    for token in range(len(x)):
        total = torch.zeros_like(x[token])
        for choice, e in enumerate(indices[token].tolist()):
            gate, up = gate_up[e][: down.shape[-1]], gate_up[e][down.shape[-1] :]
            z = gate @ x[token]
            total = total + weights[token, choice] * (
                down[e] @ (z / (1 + (-z).exp()) * (up @ x[token]))
            )
        out.append(total)
    return torch.stack(out) if out else torch.zeros_like(x)


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
@pytest.mark.parametrize("engine", ["loop", "sorted"])
def test_an_engine_computes_the_definition_and_its_gradients_in_float64(engine, load):
    floats, indices, grad = case(load)
    out, grads = run(engine, floats, indices, grad)
    expected = by_hand(floats, indices)
    wanted = (
        torch.autograd.grad(expected, floats, grad)
        if load
        else [torch.zeros_like(t) for t in floats]
    )
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    for name, got, want in zip(NAMES, grads, wanted):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
@pytest.mark.parametrize("engine", ["sorted", "grouped_mm", "triton"])
def test_every_engine_equals_the_loop_in_float32(engine, load, request):
    device = request.getfixturevalue("kernel_device") if engine == "triton" else "cpu"
    floats, indices, grad = case(load, dtype=torch.float32, device=device)
    out, grads = run(engine, floats, indices, grad)
    expected, wanted = run("loop", floats, indices, grad)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    for name, got, want in zip(NAMES, grads, wanted):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-4, msg=name)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 7), st.integers(0, 9), st.data())
def test_loop_and_sorted_agree_for_any_load(n_experts, tokens, data):
    k = data.draw(st.integers(1, n_experts))
    row = st.lists(st.integers(0, n_experts - 1), min_size=k, max_size=k, unique=True)
    load = data.draw(st.lists(row, min_size=tokens, max_size=tokens))
    floats, indices, grad = case(load, n_experts, 3, 2)
    (out, grads), (expected, wanted) = (run(e, floats, indices, grad) for e in ("sorted", "loop"))
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grads, wanted, rtol=1e-12, atol=1e-12)


def norm_error(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


@pytest.mark.parametrize("engine", ["loop", "sorted", "grouped_mm"])
def test_bfloat16_stays_within_its_rounding_of_float64(engine):
    indices = torch.rand(64, 6).argsort(1)[:, :2].tolist()
    floats, indices, grad = case(indices, 6, 32, 16, torch.bfloat16)
    out, grads = run(engine, floats, indices, grad)
    wide = [t.detach().double().requires_grad_() for t in floats]
    expected, wanted = run("loop", wide, indices, grad.double())
    assert out.dtype == torch.bfloat16
    assert norm_error(out, expected) < 0.01
    for name, got, want in zip(NAMES, grads, wanted):
        assert norm_error(got, want) < 0.015, name


@pytest.mark.parametrize("engine", ["loop", "sorted", "grouped_mm"])
def test_autocast_is_an_explicit_cast_to_bfloat16_bit_for_bit(engine):
    floats, indices, grad = case(LOADS["uneven"], hidden=16, width=8, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out, grads = run(engine, floats, indices, grad.bfloat16())
    x, weights, gate_up, down = floats
    cast = [x.bfloat16(), weights, gate_up.bfloat16(), down.bfloat16()]
    expected = run_experts(cast[0], indices, *cast[1:], engine)
    wanted = torch.autograd.grad(expected, floats, grad.bfloat16())
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected)
    for name, got, want in zip(NAMES, grads, wanted):
        assert got.dtype == torch.float32
        assert torch.equal(got, want), name


def test_autocast_leaves_float64_alone_as_it_does_for_a_plain_product():
    floats, indices, grad = case(LOADS["uneven"])
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = run("sorted", floats, indices, grad)
    assert torch.equal(out, run("sorted", floats, indices, grad)[0])


@pytest.mark.parametrize("wanted", range(4), ids=NAMES)
@pytest.mark.parametrize("engine", ["loop", "sorted", "grouped_mm"])
def test_a_gradient_is_the_same_when_everything_else_is_frozen(engine, wanted):
    floats, indices, grad = case(LOADS["uneven"], dtype=torch.float32)
    _, grads = run(engine, floats, indices, grad)
    frozen = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(floats)]
    x, weights, gate_up, down = frozen
    run_experts(x, indices, weights, gate_up, down, engine).backward(grad)
    assert torch.equal(frozen[wanted].grad, grads[wanted])
    assert all(t.grad is None for i, t in enumerate(frozen) if i != wanted)


@pytest.mark.parametrize("engine", ["loop", "sorted"])
def test_the_gradients_are_those_of_finite_differences(engine):
    floats, indices, _ = case([[0, 2], [2, 0], [2, 3]], 4, 3, 2)
    assert torch.autograd.gradcheck(
        lambda x, w, gu, d: run_experts(x, indices, w, gu, d, engine), floats
    )


@pytest.mark.parametrize("engine", ["loop", "sorted", "grouped_mm"])
def test_how_inputs_and_gradients_lie_in_memory_changes_nothing(engine):
    floats, indices, _ = case(LOADS["uneven"], dtype=torch.float32)
    _, dense = run(engine, floats, indices, torch.ones(7, 8))
    strided = [t.detach().mT.contiguous().mT.requires_grad_() for t in floats]
    assert not any(t.is_contiguous() for t in strided)
    x, weights, gate_up, down = strided
    out = run_experts(x, indices.T.contiguous().T, weights, gate_up, down, engine)
    out.sum().backward()  # a gradient of stride 0
    for name, got, want in zip(NAMES, strided, dense):
        torch.testing.assert_close(got.grad, want, rtol=1e-5, atol=1e-5, msg=name)


def test_each_expert_learns_from_its_own_tokens_alone():
    floats, indices, grad = case(LOADS["uneven"])
    _, (_, _, gate_up, down) = run("sorted", floats, indices, grad)
    chosen = {0, 1, 2, 5}
    assert {e for e in range(6) if gate_up[e].any()} == chosen
    assert {e for e in range(6) if down[e].any()} == chosen


loads = st.integers(1, 6).flatmap(
    lambda e: st.integers(1, e).flatmap(
        lambda k: st.tuples(
            st.just(e),
            st.just(k),
            st.lists(st.lists(st.integers(0, e - 1), min_size=k, max_size=k), max_size=12),
        )
    )
)


@settings(deadline=None)
@given(loads)
def test_dispatch_sorts_by_expert_and_keeps_the_tokens_order_within_one(load):
    n_experts, k, rows = load
    order, counts = dispatch(torch.tensor(rows, dtype=torch.int64).reshape(-1, k), n_experts)
    flat = [expert for row in rows for expert in row]
    assert order.tolist() == sorted(range(len(flat)), key=lambda place: (flat[place], place))
    assert counts.tolist() == [Counter(flat)[expert] for expert in range(n_experts)]


@settings(deadline=None)
@given(loads)
def test_permute_and_unpermute_are_exact_inverses_and_each_others_gradient(load):
    n_experts, k, rows = load
    indices = torch.tensor(rows, dtype=torch.int64).reshape(-1, k)
    order, _ = dispatch(indices, n_experts)
    x = torch.randn(len(rows), 3, requires_grad=True)
    sorted_rows = permute(x, order, k)
    back = unpermute(sorted_rows, order)
    assert torch.equal(back, x.repeat_interleave(k, dim=0))
    assert torch.equal(permute(back, order, 1), sorted_rows)
    grad = torch.randint(-8, 8, back.shape).to(x.dtype)  # whole numbers: sums are exact
    (got,) = torch.autograd.grad(back, x, grad)
    assert torch.equal(got, grad.reshape(len(rows), k, 3).sum(1))


@settings(deadline=None)
@given(loads)
def test_combining_copies_with_weights_that_sum_to_one_gives_the_token_back(load):
    n_experts, k, rows = load
    indices = torch.tensor(rows, dtype=torch.int64).reshape(-1, k)
    order, _ = dispatch(indices, n_experts)
    x = torch.randn(len(rows), 3, dtype=torch.float64)
    weights = torch.rand(len(rows), k, dtype=torch.float64).softmax(-1)
    torch.testing.assert_close(combine(permute(x, order, k), order, weights), x)


def test_an_unknown_engine_is_refused_with_the_ones_there_are():
    floats, indices, grad = case(LOADS["one token"])
    with pytest.raises(ValueError, match=r"does not exist.*No expert would run") as caught:
        run("fused", floats, indices, grad)
    assert all(engine in str(caught.value) for engine in ENGINES)


def refusal(engine, **sizes) -> str:
    floats, indices, grad = case(LOADS["uneven"], **sizes)
    with pytest.raises(EngineError) as caught:
        run(engine, floats, indices, grad)
    what, why, do = str(caught.value).split(". ", 2)
    assert why == "It was forced, so nothing else was run in its place"
    assert do.startswith("Pass engine='sorted'")
    return what


def test_a_forced_engine_that_cannot_run_says_what_is_wrong(monkeypatch):
    assert "x is torch.float64" in refusal("grouped_mm")
    assert "float64" in refusal("triton")
    assert "6 numbers of torch.float32" in refusal("grouped_mm", hidden=6, dtype=torch.float32)
    assert "5 numbers of torch.float32" in refusal("grouped_mm", width=5, dtype=torch.float32)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    problem = refusal("triton", dtype=torch.float32)
    assert "the tensor is on 'cpu'" in problem or "not installed" in problem


def test_without_a_choice_a_cpu_tensor_is_run_by_the_fastest_that_takes_it():
    floats, indices, grad = case(LOADS["uneven"], dtype=torch.float32)
    assert fastest(floats[0], 12) == "grouped_mm"
    chosen, forced = (run(engine, floats, indices, grad) for engine in (None, "grouped_mm"))
    assert torch.equal(chosen[0], forced[0])
    assert fastest(floats[0].double(), 12) == fastest(floats[0], 13) == "sorted"


@pytest.mark.parametrize("load", [name for name, load in LOADS.items() if load])
def test_a_few_rows_without_sorting_are_the_definition(load):
    floats, indices, _ = case(LOADS[load])
    with torch.no_grad():
        out = experts.experts_few(floats[0], indices, *floats[1:])
    torch.testing.assert_close(out, by_hand(floats, indices))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_few_rows_of_a_narrow_type_are_computed_wide_and_rounded_once(dtype):
    floats, indices, _ = case(LOADS["uneven"], hidden=32, width=16, dtype=dtype)
    with torch.no_grad():
        out = experts.experts_few(floats[0], indices, *floats[1:])
        exact = by_hand([t.double() for t in floats], indices)
    assert out.dtype == dtype
    assert norm_error(out, exact) < torch.finfo(dtype).eps / 2


def test_only_a_few_rows_without_a_gradient_are_left_unsorted(monkeypatch):
    """Eight tokens of top 4 are decoding; 33 rows are not, and neither is anything that learns."""
    asked = []
    monkeypatch.setattr(experts, "experts_few", lambda x, *_: asked.append(len(x)) or x)

    def forward(load, engine=None):
        floats, indices, _ = case(load)
        run_experts(floats[0], indices, *floats[1:], engine)

    with torch.no_grad():
        forward([[0, 1, 2, 3]])
        forward([[0, 1, 2, 3]] * 8)
        forward([[0, 1, 2]] * 11)
        forward([[0, 1, 2, 3]], engine="sorted")
        forward([])
    forward([[0, 1, 2, 3]])
    assert asked == [1, 8]


@pytest.mark.parametrize(
    ("dtype", "hidden", "width", "triton", "expected"),
    [
        (torch.bfloat16, 64, 32, None, "grouped_mm"),
        (torch.bfloat16, 60, 32, None, "triton"),  # 120 bytes: grouped_mm would refuse
        (torch.bfloat16, 64, 12, None, "triton"),
        (torch.float32, 64, 32, None, "triton"),
        (torch.float32, 64, 32, "it is not installed", "sorted"),
        (torch.float64, 64, 32, None, "sorted"),
    ],
)
def test_on_a_gpu_the_fastest_engine_that_can_take_the_tensor_is_chosen(
    monkeypatch, dtype, hidden, width, triton, expected
):
    monkeypatch.setattr(experts, "triton_problem", lambda device: triton)
    monkeypatch.setattr(experts, "triton_is_interpreted", lambda: False)
    x = SimpleNamespace(is_cuda=True, device=torch.device("cuda"), dtype=dtype, shape=(4, hidden))
    x.element_size = lambda: dtype.itemsize
    assert fastest(x, width) == expected


def test_the_layer_runs_the_engine_it_was_given_and_none_is_left_over():
    layer = Experts(6, 8, 12, engine="grouped_mm").double()
    for weight in layer.parameters():
        torch.nn.init.normal_(weight)
    x, indices = torch.randn(3, 8).double(), torch.tensor([[0, 1], [2, 3], [4, 5]])
    weights = torch.rand(3, 2).double()
    with pytest.raises(EngineError):
        layer(x, indices, weights)
    layer.engine = None
    expected = by_hand((x, weights, layer.gate_up_proj, layer.down_proj), indices)
    torch.testing.assert_close(layer(x, indices, weights), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("engine", [*ENGINES, None])
@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
def test_on_a_gpu_every_engine_stays_within_bfloat16s_rounding_of_float64(engine, load):
    floats, indices, grad = case(load, hidden=64, width=32, dtype=torch.float32, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        out, grads = run(engine, floats, indices, grad.bfloat16())
    wide = [t.detach().double().requires_grad_() for t in floats]
    expected, wanted = run("loop", wide, indices, grad.double())
    if load:
        assert norm_error(out, expected) < 0.01
    for name, got, want in zip(NAMES, grads, wanted):
        assert not load or norm_error(got, want) < 0.015, name
        assert load or not got.any(), name
