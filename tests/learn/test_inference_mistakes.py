"""Wrong answers that people give in lesson 5: none passes, and each hears what it got wrong."""

import inspect
import math
import textwrap

import pytest
import torch
import torch.nn.functional as F

from dsv3_tutorial.learn import registry
from dsv3_tutorial.learn.exercises.inference.scales import QUANTIZE_INT8
from dsv3_tutorial.learn.verdict import NOT_YET, PASSED, RAISED, judge


def verdict(name, body):
    exercise = registry.find(f"inference.{name}")
    head = inspect.signature(exercise.function)
    plain = [one.replace(annotation=one.empty) for one in head.parameters.values()]
    head = head.replace(parameters=plain, return_annotation=head.empty)
    body = textwrap.indent(textwrap.dedent(body).strip("\n"), "    ")
    space = {"torch": torch, "math": math, "F": F}
    exec(f"def answer{head}:\n{body}", space)
    return judge(exercise, space["answer"])


INT8 = """
    s = weight.float().abs().amax(dim={dim}, keepdim=True) / {levels}
    s = {safe}
    q = {code}
    return {give}"""
INT8_PARTS = {
    "dim": "1",
    "levels": "127",
    "safe": "torch.where(s == 0, 1.0, s)",
    "code": "(weight.float() / s).round().to(torch.int8)",
    "give": "q, s.squeeze(1)",
}

ATTEND = """
    scores, values = {start}, []
    for i, (q, c) in enumerate(zip({queries}, {tiles})):
        scores = scores + (q.float() @ c.float().T){in_scale}
    probs = {probs}
    for i, c in enumerate({tiles}):
        values.append({value})
    return torch.cat(values, dim=-1){cast}"""
ATTEND_PARTS = {
    "cast": ".to(q_latent.dtype)",
    "start": "q_rope.float() @ k_rope.float().T",
    "queries": "q_latent.split(128, 1)",
    "tiles": "codes.split(128, 1)",
    "in_scale": " * scales[:, i]",
    "probs": "(scores * softmax_scale).softmax(-1)",
    "value": "(probs * scales[:, i]) @ c.float()",
}

ACCEPT = """
    n = 0
    while n < len(drafted) and {keep}:
        n += 1
    if {all_kept}:
        w = {bonus}
    else:
        w = {rest}
    return n, {draw}"""
ACCEPT_PARTS = {
    "keep": "uniforms[n] < target_probs[n, drafted[n]] / draft_probs[n, drafted[n]]",
    "all_kept": "n == len(drafted)",
    "bonus": "target_probs[-1]",
    "rest": "(target_probs[n] - draft_probs[n]).clamp(min=0)",
    "draw": "int((w.cumsum(0) <= uniforms[-1] * w.sum()).sum())",
}

TOP = """
    s, order = probs.sort(dim=-1, descending=True)
    keep = {keep}
    s = torch.where(keep, s, 0)
    return torch.zeros_like(probs).scatter(-1, order, s / s.sum({axis}))"""
TOP_PARTS = {"keep": "s.cumsum(-1) - s < p", "axis": "-1, keepdim=True"}

TEMPLATES = {
    "quantize_int8": (INT8, INT8_PARTS),
    "fp8_attend": (ATTEND, ATTEND_PARTS),
    "accept": (ACCEPT, ACCEPT_PARTS),
    "top_p": (TOP, TOP_PARTS),
}


def filled(name, **wrong):
    template, parts = TEMPLATES[name]
    return template.format(**{**parts, **wrong})


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_template_of_the_wrong_answers_is_right_as_it_stands(name):
    assert verdict(name, filled(name)).status == PASSED, verdict(name, filled(name)).line


PARTS = [
    ("quantize_int8", {"dim": "0", "give": "q, s.squeeze(0)"}, "an input: it could not be taken"),
    ("quantize_int8", {"levels": "128"}, "NOT YET"),
    ("quantize_int8", {"levels": "255"}, "one side has 127 codes"),
    ("quantize_int8", {"safe": "s"}, "give it any scale above 0"),
    ("quantize_int8", {"safe": "s.clamp(min=1e-8)"}, "change a scale of 0 only"),
    ("quantize_int8", {"safe": "s.clamp(min=1e-12)"}, "Very small rows exist"),
    ("quantize_int8", {"safe": "s.clamp(min=torch.finfo(s.dtype).eps)"}, "Very small rows exist"),
    ("quantize_int8", {"safe": "(s * 127).clamp(min=1e-12) / 127"}, "Very small rows exist"),
    ("quantize_int8", {"safe": "s.clamp(min=3e-7)"}, "Very small rows exist"),
    ("quantize_int8", {"safe": "s + 1e-10"}, "case 4"),
    ("quantize_int8", {"code": "(weight.float() / s).to(torch.int8)"}, "Digits are cut off"),
    ("quantize_int8", {"code": "(weight / s.to(weight.dtype)).round().to(torch.int8)"},
     "divide and round in float32"),
    ("quantize_int8", {"code": "(weight / s.bfloat16()).round().to(torch.int8)"}, "case 1"),
    ("quantize_int8", {"code": "weight.div_(s).round().to(torch.int8)"}, "was changed"),
    ("quantize_int8", {"code": "(weight.float() / s).round()"}, "The codes are not int8"),
    ("quantize_int8", {"give": "q, s"}, "Return scale (m,), not (m, 1)."),
    ("quantize_int8", {"give": "q, s.squeeze(1).to(weight.dtype)"}, "dtype bfloat16"),
    ("quantize_int8", {"give": "q, 1 / s.squeeze(1)"}, "The scale is upside down"),
    ("quantize_int8", {"give": "(q, s.max().expand(len(q)))"}, "case 1"),
    ("fp8_attend", {"in_scale": ""}, "The values have their scales, the scores do not."),
    ("fp8_attend", {"value": "probs @ c.float()"}, "the values do not"),
    ("fp8_attend", {"value": "probs @ (c.float() * scales[:, i, None])"},
     "budget is 0. Hint: A scaled"),
    ("fp8_attend", {"value": "(probs @ c.float()) * scales[:, i].mean()"}, "case 1"),
    ("fp8_attend", {"in_scale": " * scales[0, i]"}, "case 1"),
    ("fp8_attend", {"tiles": "codes.chunk(scales.shape[1], 1)",
                    "queries": "q_latent.chunk(scales.shape[1], 1)"}, "cut into equal parts"),
    ("fp8_attend", {"tiles": "codes.view(len(codes), -1, 128).unbind(1)",
                    "queries": "q_latent.view(len(q_latent), -1, 128).unbind(1)"},
     "the last one what is left"),
    ("fp8_attend", {"queries": "(q_latent[:, :128],) * scales.shape[1]"}, "case 2"),
    ("fp8_attend", {"probs": "scores.softmax(-1)"}, "softmax_scale is not used."),
    ("fp8_attend", {"probs": "(scores * softmax_scale).softmax(0)"}, "The softmax runs over heads"),
    ("fp8_attend", {"probs": "(scores * q_latent.shape[1] ** -0.5).softmax(-1)"}, "case 1"),
    ("fp8_attend", {"start": "0"}, "The position part, q_rope with k_rope, is missing."),
    ("fp8_attend", {"value": "(probs * scales[:, i]) @ c"}, ".float() widens them"),
    ("fp8_attend", {"value": "(probs * scales[:, i]) @ c.view(torch.int8).float()"}, "case 1"),
    ("fp8_attend", {"cast": ""}, "end with .to(q_latent.dtype)"),
    ("accept", {"keep": "uniforms[n] < target_probs[n, drafted[n]]"}, "probability p here"),
    ("accept", {"keep": "uniforms[n] < draft_probs[n, drafted[n]] / target_probs[n, drafted[n]]"},
     "The ratio is upside down"),
    ("accept", {"keep": "uniforms[n] <= target_probs[n, drafted[n]] / draft_probs[n, drafted[n]]"},
     "With u = 0 and p = 0"),
    ("accept", {"keep": "target_probs[n].argmax() == drafted[n]"}, "for greedy decoding only"),
    ("accept", {"keep": "target_probs[n, drafted[n]] >= draft_probs[n, drafted[n]]"},
     "The uniforms are not used"),
    ("accept", {"rest": "target_probs[n]"}, "this draws from target_probs"),
    ("accept", {"rest": "draft_probs[n]"}, "which were refused"),
    ("accept", {"rest": "(target_probs[n] - draft_probs[n]).abs()"}, "clamp at 0, no abs"),
    ("accept", {"rest": "target_probs[n] - draft_probs[n]"}, "case 2"),
    ("accept", {"rest": "target_probs[n].scatter(0, drafted[n], 0)"}, "case 2|a hidden case"),
    ("accept", {"rest": "(target_probs[n] - draft_probs[n]).softmax(0)"}, "case 2"),
    ("accept", {"draw": "int((w.cumsum(0) <= uniforms[-1]).sum())"}, "divide by its sum"),
    ("accept", {"draw": "int((w.cumsum(0) < uniforms[-1] * w.sum()).sum())"},
     "the running sum must be above u"),
    ("accept", {"draw": "int((w.cumsum(0) <= uniforms[n] * w.sum()).sum())"}, "take the last"),
    ("accept", {"draw": "int(w.argmax())"}, "The next token is the most likely one"),
    ("accept", {"draw": "int(torch.multinomial(w, 1))"}, "the token must come from uniforms[-1]"),
    ("accept", {"draw": "int(torch.multinomial(w / w.sum(), 1)[0])"}, "of your own is drawn"),
    ("accept", {"draw": "int(torch.distributions.Categorical(w).sample())"}, "of your own"),
    ("accept", {"draw": "int((w.cumsum(0) <= torch.rand(()) * w.sum()).sum())"}, "of your own"),
    ("accept",
     {"keep": "torch.rand(()) * draft_probs[n, drafted[n]] < target_probs[n, drafted[n]]"},
     "case"),
    ("accept", {"bonus": "target_probs[n - 1]"}, "the last row of target_probs"),
    ("accept", {"all_kept": "False"}, "draft_probs has K rows"),
    ("accept", {"bonus": "F.one_hot(drafted[-1], target_probs.shape[1]).double()"}, "it is lost"),
    ("top_p", {"keep": "s.cumsum(-1) <= p"}, "Not even the most likely token|crosses p"),
    ("top_p", {"keep": "s.cumsum(-1) - s <= p"}, "keep while the mass before is < p"),
    ("top_p", {"keep": "s.cumsum(-1) < p"}, "case 1"),
    ("top_p", {"keep": "s >= p"}, "case 1"),
    ("top_p", {"keep": "s >= s[s.cumsum(-1) - s < p].min()"}, "case 4|only as many as p needs"),
    ("top_p", {"axis": ""}, "each sums to 1 by itself"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "wrong", "said"), PARTS, ids=range(len(PARTS)))
def test_a_right_answer_with_one_part_wrong_is_told_which(name, wrong, said):
    found = verdict(name, filled(name, **wrong))
    assert found.status != PASSED
    assert any(each in found.line for each in said.split("|")), found.line


WHOLE = [
    ("quantize_int8", "s = weight.float().abs().amax(1) / 127\n"
     "return (weight.float() / s).round().to(torch.int8), s", "as scale[:, None] it stands"),
    ("fp8_attend", "c = codes.float() * scales.repeat_interleave(128, 1)[:, : codes.shape[1]]\n"
     "s = q_latent.float() @ c.T + q_rope.float() @ k_rope.float().T\n"
     "return ((s * softmax_scale).softmax(-1) @ c).to(q_latent.dtype)",
     "budget is 0. Hint: A scaled"),
    ("experts_touched", "return min(n_experts, top_k * tokens)", "no two tokens chose the same"),
    ("experts_touched", "return n_experts * (1 - (1 - 1 / n_experts) ** (top_k * tokens))",
     "A token's top_k experts are all different"),
    ("experts_touched", "return n_experts * (1 - math.exp(-top_k * tokens / n_experts))",
     "the number is exact"),
    ("experts_touched", "return n_experts * (1 - top_k / n_experts) ** tokens", "nobody chose"),
    ("experts_touched", "return top_k * (1 + (1 - top_k / n_experts) * (tokens - 1))", "case 2"),
    ("tokens_per_second", "return bandwidth / (weight_bytes + cache_bytes)", "batch changes noth"),
    ("tokens_per_second", "return bandwidth / (weight_bytes + batch * cache_bytes)",
     "a token for each of the batch"),
    ("tokens_per_second", "return batch * bandwidth / (weight_bytes + cache_bytes)",
     "each of the batch has its own"),
    ("tokens_per_second", "return batch * bandwidth / (weight_bytes + cache_bytes / batch)",
     "it is given for one sequence"),
    ("tokens_per_second", "return batch * bandwidth / (batch * (weight_bytes + cache_bytes))",
     "batch changes nothing"),
    ("mtp_inputs", "return hidden, input_ids", "which it has read already"),
    ("mtp_inputs", "return hidden, torch.roll(input_ids, -1, 1)", "comes round to the end"),
    ("mtp_inputs", "return hidden, torch.roll(input_ids, 1, 1)", "case 1"),
    ("mtp_inputs", "return hidden[:, :-1], input_ids[:, 1:]", "The last position is dropped"),
    ("mtp_inputs", "return hidden[:, 1:], torch.cat([input_ids[:, 2:], chosen[:, None]], 1)",
     "case 1"),
    ("mtp_inputs", "return hidden, torch.cat([chosen[:, None], input_ids[:, :-1]], 1)",
     "shifted the wrong way"),
    ("mtp_inputs", "return hidden, torch.cat([input_ids[:, 1:], chosen], 1)",
     "makes it a column"),
    ("mtp_inputs",
     "return hidden, torch.cat([input_ids[:, 1:], chosen[:1, None].expand(len(chosen), 1)], 1)",
     "case 2"),
    ("mtp_inputs", "input_ids[:, :-1] = input_ids[:, 1:].clone()\ninput_ids[:, -1] = chosen\n"
     "return hidden, input_ids", "the input input_ids was changed"),
    ("predicted_error", "return x.norm(dim=-1)[:, None] * scale / 12", "take its root"),
    ("predicted_error", "return x.norm(dim=-1)[:, None] * scale / 2", "the largest error"),
    ("predicted_error", "return x.abs().sum(-1)[:, None] * scale / 12**0.5", "all had one sign"),
    ("predicted_error", "return x.std(-1)[:, None] * scale * (x.shape[1] / 12) ** 0.5", "case 1"),
    ("predicted_error", "return scale.expand(len(x), -1) * (x.shape[1] / 12) ** 0.5", "x is not"),
    ("predicted_error", "return x.norm() * scale.expand(len(x), -1) / 12**0.5", "case 1"),
    ("pack_rows", "return torch.cat([codes.view(torch.uint8), scales.view(torch.uint8), "
     "k_rope.view(torch.uint8)], -1)", "in the dtype it came in"),
    ("pack_rows", "return torch.cat([codes, scales, k_rope], -1)", ".view(torch.uint8) each"),
    ("pack_rows", "return torch.cat([codes.float(), scales, k_rope], -1).to(torch.uint8)",
     "case 1"),
    ("pack_rows", "parts = k_rope.bfloat16(), codes, scales\n"
     "return torch.cat([part.contiguous().view(torch.uint8) for part in parts], -1)",
     "The key comes first here"),
    ("pack_rows", "parts = codes, scales, k_rope.half()\n"
     "return torch.cat([part.contiguous().view(torch.uint8) for part in parts], -1)",
     "other ones: BF16"),
    ("slots", "return tables.gather(1, positions // page_size) * page_size + positions % page_size",
     "int32 runs over|dtype int32"),
    ("slots", "return tables[:, positions // page_size] * page_size + positions % page_size",
     "shape"),
    ("slots", "return positions", "tables is not used"),
    ("slots", "return tables.long().gather(1, positions // page_size) + positions % page_size",
     "Page j begins at slot j * page_size"),
    ("slots", "return tables.long().gather(1, positions // 64) * 64 + positions % 64", "case 1"),
    ("slots", "return tables.long()[torch.arange(len(tables)), positions // page_size] * page_size "
     "+ positions % page_size", "RAISED|case"),
    ("top_p", "s, order = probs.sort(dim=-1, descending=True)\ns[s.cumsum(-1) - s >= p] = 0\n"
     "return s / s.sum(-1, keepdim=True)", "come back in sorted order"),
    ("top_p", "s, order = probs.sort(dim=-1, descending=True)\ns[s.cumsum(-1) - s >= p] = 0\n"
     "return torch.zeros_like(probs).scatter(-1, order, s)", "does not sum to 1"),
    ("top_p", "s, order = probs.sort(dim=-1, descending=True)\ns[s.cumsum(-1) - s >= p] = 0\n"
     "return s.gather(-1, order) / s.sum(-1, keepdim=True)", "case"),
    ("top_p", "probs[probs < 1 - p] = 0\nreturn probs / probs.sum(-1, keepdim=True)", "case 1"),
    ("top_p", "return probs", "case 1"),
    ("top_p", "s = probs.sort(dim=-1, descending=True).values\n"
     "last = ((s.cumsum(-1) - s) < p).sum(-1, keepdim=True) - 1\n"
     "kept = torch.where(probs >= s.gather(-1, last), probs, 0)\n"
     "return kept / kept.sum(-1, keepdim=True)", "only as many as p needs"),
    ("top_p", "s, order = probs.float().sort(dim=-1, descending=True)\n"
     "s[s.cumsum(-1) - s >= p] = 0\n"
     "return torch.zeros_like(s).scatter(-1, order, s / s.sum(-1, keepdim=True))",
     "float32 loses digits"),
    ("top_p", "s, order = probs.float().sort(dim=-1, descending=True)\n"
     "s = torch.where(s.cumsum(-1) - s < p, s / s.sum(-1, keepdim=True), 0).to(probs.dtype)\n"
     "s = s / s.sum(-1, keepdim=True)\n"
     "return torch.zeros_like(probs).scatter(-1, order, s)", "float32 loses digits"),
    ("fp8_attend", "v = torch.cat([torch.diag(s) @ c for s, c in zip(scales.T, "
     "codes.float().split(128, 1))], 1)\n"
     "s = q_latent.float() @ v.T + q_rope.float() @ k_rope.float().T\n"
     "return ((s * softmax_scale).softmax(-1) @ v).to(q_latent.dtype)", "A scaled copy"),
    ("fp8_attend", "v = torch.stack([torch.cat([s * t.float() for s, t in zip(a, c.split(128))]) "
     "for a, c in zip(scales, codes)])\n"
     "s = q_latent.float() @ v.T + q_rope.float() @ k_rope.float().T\n"
     "return ((s * softmax_scale).softmax(-1) @ v).to(q_latent.dtype)", "A scaled copy"),
    ("experts_touched", "return -n_experts * math.expm1(tokens * math.log1p(-top_k / n_experts))",
     "has no logarithm"),
    ("mtp_inputs", "input_ids[:, :-1] = input_ids[:, 1:]\ninput_ids[:, -1] = chosen\n"
     "return hidden, input_ids", "Leave input_ids as they are"),
    ("mtp_inputs", "input_ids[:] = input_ids.roll(-1, 1)\nreturn hidden, input_ids",
     "Leave input_ids as they are"),
    ("mtp_inputs", "input_ids[:, 0] = chosen\nreturn hidden, input_ids.roll(-1, 1)",
     "Leave input_ids as they are"),
    ("mtp_inputs", "input_ids[:, -1] = chosen\nreturn hidden, input_ids",
     "Leave input_ids as they are"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "body", "said"), WHOLE, ids=range(len(WHOLE)))
def test_a_wrong_answer_that_people_give_is_refused_with_its_own_sentence(name, body, said):
    found = verdict(name, body)
    assert found.status in (NOT_YET, RAISED)
    assert any(each in found.line for each in said.split("|")), found.line


@pytest.mark.parametrize("skipped", range(8))
def test_no_luck_with_torchs_own_random_numbers_makes_a_draw_right(skipped):
    draw = f"(torch.rand({skipped}), int(torch.multinomial(w, 1)))[1]"
    assert verdict("accept", filled("accept", draw=draw)).status == NOT_YET


def test_a_budget_counts_what_is_multiplied_over_the_cache_and_nothing_else():
    wide = filled("fp8_attend", value="probs @ (c.float() * scales[:, i, None])")
    assert "2 products as large as a tile of the cache" in verdict("fp8_attend", wide).message
    by_head = filled("fp8_attend", probs="torch.stack([(s * softmax_scale).softmax(-1) "
                     "for s in scores])")  # fmt: skip
    assert verdict("fp8_attend", by_head).status == PASSED


@pytest.mark.parametrize("case", QUANTIZE_INT8.cases, ids=lambda case: case.name)
def test_no_code_hangs_on_how_a_quotient_is_computed_but_where_the_case_is_about_it(case):
    weight = case.make()[0].double()
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    quotient = weight / torch.where(scale == 0, 1.0, scale)
    ties = (quotient - quotient.floor() - 0.5).abs()
    assert (ties > 4e-4).all() or case.name == "halfway between two codes"
