"""Lesson 5's exercises: right answers in any style pass, the hints' own words among them."""

import math
import textwrap

import pytest
import torch
import torch.nn.functional as F

from dsv3_tutorial.learn import registry
from dsv3_tutorial.learn.exercises.inference.check import ACCEPT
from dsv3_tutorial.learn.exercises.inference.check_cases import drawn, largest_left
from dsv3_tutorial.learn.submission import recheck
from dsv3_tutorial.learn.verdict import PASSED, RAISED, judge

HEADS = {
    "experts_touched": "n_experts, top_k, tokens",
    "tokens_per_second": "bandwidth, weight_bytes, cache_bytes, batch=1",
    "quantize_int8": "weight",
    "fp8_attend": "q_latent, q_rope, codes, scales, k_rope, softmax_scale",
    "mtp_inputs": "hidden, input_ids, chosen",
    "accept": "drafted, draft_probs, target_probs, uniforms",
    "predicted_error": "x, scale",
    "pack_rows": "codes, scales, k_rope",
    "slots": "tables, positions, page_size",
    "top_p": "probs, p",
    "find_the_bug": "prompt, length, model, mtp, draw, uniform",
}


def source(name, body):
    body = textwrap.indent(textwrap.dedent(body).strip("\n"), "    ")
    return f"def answer({HEADS[name]}):\n{body}"


def verdict(name, body):
    space = {"torch": torch, "math": math, "F": F}
    exec(source(name, body), space)
    return judge(registry.find(f"inference.{name}"), space["answer"])


# the first of each exercise is its hints, word by word; then other right styles
RIGHT = {
    "quantize_int8": [
        """
        scale = weight.float().abs().amax(dim=-1) / 127
        scale = torch.where(scale == 0, 1.0, scale)
        return (weight.float() / scale[:, None]).round().to(torch.int8), scale""",
        """
        w = weight.to(torch.float32)
        peak = torch.maximum(w.amax(1, keepdim=True), -w.amin(1, keepdim=True))
        peak[peak == 0] = 1e-3
        return torch.round(w * (127 / peak)).char(), (peak / 127)[:, 0]""",
        """
        codes, scales = [], []
        for row in weight.float():
            s = float(row.abs().max()) / 127 or 1.0
            codes.append(torch.clamp((row / s).round(), -127, 127).to(torch.int8))
            scales.append(s)
        return torch.stack(codes), torch.tensor(scales)""",
        """
        w = weight.float()
        s = torch.linalg.vector_norm(w, ord=torch.inf, dim=1) / 127
        s = s.clamp_min(1e-38)
        return torch.round(w / s.unsqueeze(1)).to(torch.int8), s""",
        """
        w = weight.double()
        s = w.abs().max(dim=1).values.div(127)
        s[s == 0] = 1
        return w.div(s[:, None]).round().clip(-128, 127).to(torch.int8), s.float()""",
    ],
    "experts_touched": [
        "return n_experts * (1 - (1 - top_k / n_experts) ** tokens)",
        "return n_experts - n_experts * ((n_experts - top_k) / n_experts) ** tokens",
        """
        touched = 0.0
        for _ in range(tokens):
            touched += top_k * (1 - touched / n_experts)
        return touched""",
        "return sum(1 - math.pow(1 - top_k / n_experts, tokens) for _ in range(n_experts))",
        """
        alone = torch.tensor(1 - top_k / n_experts, dtype=torch.float64)
        return n_experts * (1 - alone**tokens)""",
    ],
    "fp8_attend": [
        """
        parts = list(zip(q_latent.split(128, dim=1), codes.split(128, dim=1)))
        scores = 0
        for i, (q, c) in enumerate(parts):
            scores = scores + (q.float() @ c.float().T) * scales[:, i]
        scores = scores + q_rope.float() @ k_rope.float().T
        probs = (scores * softmax_scale).softmax(dim=-1)
        out = [(probs * scales[:, i]) @ c.float() for i, (q, c) in enumerate(parts)]
        return torch.cat(out, dim=-1).to(q_latent.dtype)""",
        """
        (h, width), n = q_latent.shape, scales.shape[1]
        fill = n * 128 - width
        q = F.pad(q_latent.float(), (0, fill)).view(h, n, 128)
        c = F.pad(codes.float(), (0, fill)).view(-1, n, 128)
        s = (torch.einsum("hnc,tnc->htn", q, c) * scales).sum(-1)
        p = ((s + q_rope.float() @ k_rope.float().T) * softmax_scale).softmax(-1)
        out = torch.einsum("htn,tnc->hnc", p[..., None] * scales, c)
        return out.flatten(1)[:, :width].to(q_latent.dtype)""",
        """
        rope = torch.einsum("hr,tr->ht", q_rope.float(), k_rope.float())
        scores = rope
        for i in range(scales.shape[1]):
            a, b = 128 * i, 128 * i + 128
            one = torch.einsum("hc,tc->ht", q_latent[:, a:b].float(), codes[:, a:b].float())
            scores = torch.addcmul(scores, one, scales[None, :, i])
        probs = torch.softmax(scores * softmax_scale, 1)
        out = torch.empty(q_latent.shape)
        for i in range(scales.shape[1]):
            a, b = 128 * i, 128 * i + 128
            out[:, a:b] = torch.matmul(probs * scales[:, i], codes[:, a:b].float())
        return out.type_as(q_latent)""",
        """
        out = []
        for h in range(len(q_latent)):
            s = k_rope.float() @ q_rope[h].float()
            for i, c in enumerate(codes.split(128, 1)):
                s = s + (c.float() @ q_latent[h, 128 * i : 128 * i + 128].float()) * scales[:, i]
            p = torch.exp(s * softmax_scale - (s * softmax_scale).max())
            p = p / p.sum()
            out.append(torch.cat([(p * scales[:, i]) @ c.float()
                                  for i, c in enumerate(codes.split(128, 1))]))
        return torch.stack(out).to(q_latent.dtype)""",
        """
        wide = codes.float()
        tiles = [slice(i, i + 128) for i in range(0, codes.shape[1], 128)]
        q, k = q_latent.float() * softmax_scale, (q_rope.float() * softmax_scale) @ k_rope.float().T
        scores = k + sum((q[:, t] @ wide[:, t].T) * s for t, s in zip(tiles, scales.T))
        probs = scores.softmax(-1)
        mixed = [(probs * s) @ wide[:, t] for t, s in zip(tiles, scales.unbind(1))]
        return torch.hstack(mixed).to(q_latent.dtype)""",
        """
        h, n = len(q_latent), scales.shape[1]
        wide, at = codes.float(), torch.arange(codes.shape[1]) // 128
        apart = q_latent.float()[:, None] * (at == torch.arange(n)[:, None])  # (H, n, C)
        one = (apart.flatten(0, 1) @ wide.T).view(h, n, -1) * scales.T
        rope = torch.einsum("hr,tr->ht", q_rope.float(), k_rope.float())
        probs = torch.softmax((one.sum(1) + rope) * softmax_scale, -1)
        mixed = ((probs[:, None] * scales.T).flatten(0, 1) @ wide).view(h, n, -1)
        return (mixed * (at == torch.arange(n)[:, None])).sum(1).to(q_latent.dtype)""",
        """
        c = codes.to(torch.float32)
        s = q_rope.float() @ k_rope.float().T
        for i in range(scales.shape[1]):
            tile = slice(128 * i, 128 * (i + 1))
            s += q_latent[:, tile].float() @ c[:, tile].T @ torch.diag(scales[:, i])
        p = (s * softmax_scale).softmax(-1)
        out = [p @ scales[:, i].diag() @ part for i, part in enumerate(c.split(128, 1))]
        return torch.cat(out, 1).to(q_latent.dtype)""",
    ],
    "tokens_per_second": [
        """
        seconds = (weight_bytes + batch * cache_bytes) / bandwidth
        return batch / seconds""",
        "return bandwidth / (weight_bytes / batch + cache_bytes)",
        "return batch * bandwidth / (weight_bytes + batch * cache_bytes)",
        """
        total = weight_bytes
        for _ in range(batch):
            total += cache_bytes
        return batch / (total / bandwidth)""",
        "return batch * (weight_bytes / bandwidth + batch * cache_bytes / bandwidth) ** -1",
    ],
    "mtp_inputs": [
        "return hidden, torch.cat([input_ids[:, 1:], chosen[:, None]], dim=1)",
        """
        ids = input_ids.roll(-1, dims=1)
        ids[:, -1] = chosen
        return hidden, ids""",
        "return hidden, torch.hstack([input_ids, chosen.view(-1, 1)])[:, 1:]",
        """
        ids = torch.empty_like(input_ids)
        ids[:, :-1], ids[:, -1] = input_ids[:, 1:], chosen
        return hidden, ids""",
        "return [hidden.clone(), F.pad(input_ids[:, 1:], (0, 1)).index_fill(1, torch.tensor("
        "[input_ids.shape[1] - 1]), 0) + F.pad(chosen[:, None], (input_ids.shape[1] - 1, 0))]",
    ],
    "accept": [
        """
        n, u = len(drafted), uniforms[-1]
        probs = target_probs[-1]
        for i, t in enumerate(drafted):
            p, q = target_probs[i, t], draft_probs[i, t]
            if not uniforms[i] < p / q:
                rest = (target_probs[i] - draft_probs[i]).clamp(min=0)
                n, probs = i, rest / rest.sum()
                break
        return n, int((probs.cumsum(0) > u).float().argmax())""",
        """
        at = torch.arange(len(drafted))
        ratio = target_probs[at, drafted] / draft_probs[at, drafted]
        n = int((uniforms[:-1] < ratio).long().cumprod(0).sum())
        padded = torch.cat([draft_probs, torch.zeros_like(draft_probs[:1])])
        rest = (target_probs[n] - padded[n]).relu()
        return n, torch.searchsorted((rest / rest.sum()).cumsum(0), uniforms[-1], right=True)""",
        """
        K, n = len(drafted), 0
        while n < K:
            t = drafted[n]
            if uniforms[n] >= min(1, target_probs[n][t] / draft_probs[n][t]):
                break
            n += 1
        w = target_probs[n] if n == K else torch.maximum(
            target_probs[n] - draft_probs[n], torch.tensor(0.0, dtype=target_probs.dtype))
        mass, goal = 0.0, float(uniforms[-1]) * float(w.sum())
        for token, each in enumerate(w.tolist()):
            mass += each
            if mass > goal:
                return n, token""",
        """
        for i, (t, u) in enumerate(zip(drafted.tolist(), uniforms.tolist())):
            if u * draft_probs[i, t] >= target_probs[i, t]:
                w = F.relu(target_probs[i] - draft_probs[i])
                return i, int((w.cumsum(0) <= uniforms[-1] * w.sum()).sum())
        return len(drafted), int((target_probs[-1].cumsum(0) <= uniforms[-1]).sum())""",
        """
        kept = [bool(uniforms[i] < target_probs[i, t] / draft_probs[i, t])
                for i, t in enumerate(drafted)]
        n = kept.index(False) if False in kept else len(kept)
        w = target_probs[n].double()
        if n < len(kept):
            w = (w - draft_probs[n].double()).clamp_min(0)
        w = w / w.sum()
        return n, next(j for j in range(len(w)) if w[: j + 1].sum() > uniforms[-1])""",
    ],
    "predicted_error": [
        "return x.norm(dim=-1)[:, None] * scale / math.sqrt(12)",
        "return torch.outer(x.square().sum(-1).sqrt(), scale / 12**0.5)",
        "return ((x**2).sum(1, keepdim=True) * (scale**2 / 12)).sqrt()",
        "return torch.einsum('tk,tk->t', x, x).sqrt()[:, None] * scale[None] * (1 / 12) ** 0.5",
        """
        each = x[:, None, :] * (scale / 12**0.5)[None, :, None]
        return each.square().sum(-1).sqrt()""",
    ],
    "pack_rows": [
        """
        parts = codes, scales, k_rope.to(torch.bfloat16)
        return torch.cat([part.contiguous().view(torch.uint8) for part in parts], dim=-1)""",
        """
        key = k_rope.bfloat16().contiguous()
        c, s = codes.contiguous(), scales.contiguous()
        return torch.cat((c.view(torch.uint8), s.view(torch.uint8), key.view(torch.uint8)), -1)""",
        """
        a, b, lead = codes.shape[-1], 4 * scales.shape[-1], codes.shape[:-1]
        row = torch.empty(*lead, a + b + 2 * k_rope.shape[-1], dtype=torch.uint8)
        row[..., :a] = codes.view(torch.uint8)
        row[..., a : a + b] = scales.view(torch.uint8)
        row[..., a + b :] = k_rope.bfloat16().view(torch.uint8)
        return row""",
    ],
    "slots": [
        """
        page = tables.long().gather(1, positions // page_size)
        return page * page_size + positions % page_size""",
        """
        rows = torch.arange(len(tables))[:, None]
        return tables[rows, positions // page_size].long() * page_size + positions % page_size""",
        """
        out = []
        for table, at in zip(tables.tolist(), positions.tolist()):
            out.append([table[p // page_size] * page_size + p % page_size for p in at])
        return torch.tensor(out)""",
        """
        all_slots = tables.long()[..., None] * page_size + torch.arange(page_size)
        return all_slots.flatten(1).gather(1, positions)""",
        """
        page, place = torch.div(positions, page_size, rounding_mode="floor"), positions % page_size
        return torch.take_along_dim(tables.to(torch.int64), page, 1).mul(page_size).add(place)""",
    ],
    "top_p": [
        """
        ranked, order = probs.sort(dim=-1, descending=True)
        before = ranked.cumsum(dim=-1) - ranked
        ranked[before >= p] = 0
        ranked = ranked / ranked.sum(dim=-1, keepdim=True)
        return torch.zeros_like(probs).scatter(-1, order, ranked)""",
        """
        ranked, order = torch.sort(probs, -1, True)
        drop = ranked.cumsum(-1) >= p
        drop = F.pad(drop, (1, 0))[..., :-1]
        kept = probs.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), 0.0)
        return F.normalize(kept, p=1, dim=-1)""",
        """
        flat = probs.reshape(-1, probs.shape[-1])
        out = torch.zeros_like(flat)
        for row, kept in zip(flat, out):
            mass = 0.0
            for token in row.argsort(descending=True).tolist():
                kept[token] = row[token]
                mass += float(row[token])
                if mass >= p:
                    break
        return (out / out.sum(-1, keepdim=True)).view_as(probs)""",
        """
        ranked, order = probs.sort(dim=-1, descending=True)
        count = ((ranked.cumsum(-1) - ranked) < p).sum(-1, keepdim=True)
        kept = torch.where(order.argsort(-1) < count, probs, 0)
        return kept / kept.sum(-1, keepdim=True)""",
        """
        at = torch.arange(probs.shape[-1])
        mine, others = probs[..., None], probs[..., None, :]
        ahead = (others > mine) | ((others == mine) & (at > at[:, None]))  # the last of equals
        kept = probs * (torch.where(ahead, others, 0).sum(-1) < p)
        return kept / kept.sum(-1, keepdim=True)""",
    ],
    "find_the_bug": [
        """
        hidden, probs = model.read(prompt)
        tokens = [*prompt, draw(probs[-1])]
        while len(tokens) < length:
            q = mtp(hidden[-1], tokens[-1])
            draft = draw(q)
            hidden, p = model.read([tokens[-1], draft])
            if uniform() < p[0, draft] / q[draft]:
                tokens += [draft, draw(p[1])]
            else:
                rest = torch.relu(p[0] - q)
                tokens.append(draw(rest / rest.sum()))
                model.trim(len(tokens) - 1)
                hidden = hidden[:1]
        return tokens[:length]""",
    ],
}
ANSWERS = [(name, at) for name, bodies in RIGHT.items() for at in range(len(bodies))]


@pytest.mark.parametrize(("name", "at"), ANSWERS)
def test_a_right_answer_passes_in_whatever_style(name, at):
    assert verdict(name, RIGHT[name][at]).status == PASSED, verdict(name, RIGHT[name][at]).line


def test_every_exercise_of_the_lesson_has_right_answers_here():
    assert [f"inference.{name}" for name in HEADS] == list(registry.load("inference"))
    assert set(RIGHT) == set(HEADS)


def test_the_core_exercises_fit_their_forty_minutes():
    core = list(registry.load("inference").values())[:6]
    assert sum(one.minutes for one in core) <= 40


def test_an_answer_is_judged_alike_from_a_notebooks_source():
    cell = '@exercise("inference.accept")\n' + source("accept", RIGHT["accept"][0])
    assert recheck(["import torch", cell], "inference.accept")["status"] == PASSED


def test_an_error_of_the_learners_own_names_its_line():
    found = verdict("accept", "return len(drafted), target_probs[len(drafted) + 1].argmax()")
    assert found.status == RAISED and "on line 2" in found.message


REFUSED = [case for case in ACCEPT.cases if case.name.startswith("many tokens left")]


def test_cases_of_a_refusal_leave_many_tokens_to_draw_from():
    assert len(REFUSED) >= 3
    for case in REFUSED:
        drafted, *_ = arguments = case.make()
        assert ACCEPT.function(*arguments)[0] < len(drafted)
        assert largest_left(*arguments) < 0.4


@pytest.mark.parametrize(("drafts", "accepted"), [(1, 0), (3, 3), (4, 2)])
def test_a_drawn_case_accepts_as_many_as_it_says(drafts, accepted):
    accept = registry.find("inference.accept").function
    assert accept(*drawn(11, drafts, 9, accepted)())[0] == accepted
