"""The losses that DeepSeek has used to spread tokens over experts, as pure functions.

M flattened tokens, E experts, K experts per token. Every loss here takes the gate's unbiased
affinities `scores` (M, E), with their gradient, and the choice `indices` (M, K), and gives a scalar
that is 1.0 where load and scores are both uniform. The factor alpha is the caller's:
`loss = cross_entropy + alpha * sequence_wise_loss(...)`.

All are one idea. A load f counts tokens and has no gradient; P is the mean score, and has one. The
sum of f P weighs each expert's score by its load, so its gradient pushes scores from the busy
experts to the idle ones. 1.0 is no floor: an expert may be chosen often and barely, another seldom
and with great scores, and then the sum is smaller.

What differs is over which tokens and which experts load is evened out:

    sequence_wise_loss    V3 report, equations 17-20      alpha 0.0001, beside the bias update
    batch_wise_loss       V3 report, section 4.5.3        compared there, not used
    expert_level_loss     DeepSeekMoE, equations 12-14    alpha 0.01 (2B), 0.001 (16B), V2 0.003
    device_level_loss     DeepSeekMoE, equations 15-17    alpha 0.05
    communication_loss    V2 report, section 2.2.3        alpha 0.02

V2 also *dropped* the tokens that exceeded a device's capacity, in training; V3 drops none, in
training or inference, and nothing in this package does.
"""

import torch
from torch import Tensor


def sequence_wise_loss(scores: Tensor, indices: Tensor, batch: int) -> Tensor:
    """Balance inside every single sequence: the mean over sequences of sum_i f_i P_i.

    scores (M, E) sigmoid or softmax, M = batch * S in the order of the batch, indices (M, K)
    -> scalar. Scores are normalised over the experts of each token (equation 19).

    The report counts f over the top K of the *unbiased* scores, without bias and groups; the
    choice that was really made is what Routing holds. Pass either: this counts what it is given.
    Raises ValueError when M is no multiple of `batch`. V3 report, section 2.1.2.
    """
    _check(scores, indices, batch=batch)
    n_experts, top_k = scores.shape[-1], indices.shape[-1]
    share = scores / scores.sum(dim=-1, keepdim=True).clamp(min=1e-20)
    chosen = torch.zeros_like(scores).scatter(1, indices, 1.0)
    load = chosen.view(batch, -1, n_experts).mean(dim=1) * (n_experts / top_k)  # (B, E), f
    mean_share = share.view(batch, -1, n_experts).mean(dim=1)  # (B, E), P
    return (load * mean_share).sum(dim=-1).mean()


def batch_wise_loss(scores: Tensor, indices: Tensor) -> Tensor:
    """Balance over the whole batch only: a sequence may still use few experts, as code or prose.

    scores (M, E), indices (M, K) -> scalar: the sequence-wise loss of one sequence of M tokens.
    This freer goal, and not the lack of a loss, is what loss-free balancing gains by: both reach
    the same validation loss (V3 report, section 4.5.3).
    """
    return sequence_wise_loss(scores, indices, batch=1)


def expert_level_loss(scores: Tensor, indices: Tensor) -> Tensor:
    """DeepSeekMoE's first loss, against the collapse onto few experts.

    scores (M, E) from a softmax, indices (M, K) -> scalar. Scores are taken as they are: a
    softmax already sums to 1, and sigmoid scores would make the value grow with their size.
    Equations 12-14, over the tokens of one batch.
    """
    _check(scores, indices)
    return (expert_loads(indices, scores.shape[-1]) * scores.mean(dim=0)).sum()


def device_level_loss(scores: Tensor, indices: Tensor, n_devices: int) -> Tensor:
    """Balance between devices only: experts of one device may differ, its sum of work may not.

    scores (M, E) from a softmax, indices (M, K) -> scalar. Device d holds the E / n_devices experts
    from d * E / n_devices on. f' is the mean of its experts' f, P' the sum of their P.
    Raises ValueError when the experts cannot be dealt out evenly. DeepSeekMoE, equations 15-17.
    """
    _check(scores, indices, n_devices=n_devices)
    load = expert_loads(indices, scores.shape[-1]).view(n_devices, -1).mean(dim=1)  # (devices,), f'
    mean_score = scores.mean(dim=0).view(n_devices, -1).sum(dim=1)  # (devices,), P'
    return (load * mean_score).sum()


def communication_loss(
    scores: Tensor, indices: Tensor, n_devices: int, devices_per_token: int
) -> Tensor:
    """Balance of what devices *receive*: a token counts once per device, not once per expert.

    scores (M, E) from a softmax, indices (M, K) -> scalar. f'' = n_devices / (devices_per_token M)
    times the tokens sent to a device; devices_per_token (the paper's M) is the cap of the
    device-limited routing, and 1.0 is reached when every token uses it up.
    Raises ValueError for a cap that K experts or n_devices devices cannot fill.
    DeepSeek-V2 report, section 2.2.3, equations 29-31.
    """
    _check(scores, indices, n_devices=n_devices, devices_per_token=devices_per_token)
    device = indices // (scores.shape[-1] // n_devices)
    sent = scores.new_zeros(len(scores), n_devices).scatter(1, device, 1.0)  # (M, devices)
    load = sent.mean(dim=0) * (n_devices / devices_per_token)
    return (
        load * scores.mean(dim=0).view(n_devices, -1).sum(dim=1)
    ).sum()  # (devices, E / devices)


def expert_loads(indices: Tensor, n_experts: int) -> Tensor:
    """How busy each expert is, 1.0 being its fair share: f_i of every paper.

    indices (M, K) int64 -> (E,) float32, mean 1.
    """
    tokens, top_k = indices.shape
    chosen = torch.zeros(tokens, n_experts, device=indices.device).scatter(1, indices, 1.0)
    return chosen.mean(dim=0) * (n_experts / top_k)


def _check(
    scores: Tensor,
    indices: Tensor,
    batch: int = 1,
    n_devices: int = 1,
    devices_per_token: int = 1,
) -> None:
    """Refuse shapes that would give a number all the same, and a wrong one. Looks at no value."""
    shapes = f"scores {tuple(scores.shape)} and indices {tuple(indices.shape)}"
    if scores.ndim != 2 or indices.ndim != 2 or len(scores) != len(indices) or not len(scores):
        raise ValueError(
            f"A balance loss got {shapes}. Loads and scores of different tokens would be "
            "multiplied. Flatten both to one row a token: (M, E) and (M, K), M at least 1."
        )
    tokens, n_experts = scores.shape
    top_k = indices.shape[1]
    if not 1 <= top_k <= n_experts:
        raise ValueError(
            f"A balance loss got {shapes}: {top_k} of {n_experts} experts a token. The fair share "
            "K / E has no meaning there. Give between 1 and E indices a token."
        )
    if batch < 1 or tokens % batch:
        raise ValueError(
            f"{tokens} tokens are no {batch} sequences of one length. Tokens of two sequences "
            "would be counted as one. Give the batch size that the scores were flattened from."
        )
    if n_devices < 1 or n_experts % n_devices:
        raise ValueError(
            f"{n_experts} experts cannot be dealt out evenly to {n_devices} devices. A device's "
            "fair share would not be 1. Change n_devices to a divisor of the number of experts."
        )
    if not 1 <= devices_per_token <= min(top_k, n_devices):
        raise ValueError(
            f"A token of {top_k} experts on {n_devices} devices cannot reach {devices_per_token}. "
            "The loss would never come to 1, however even the traffic. Change devices_per_token "
            f"to a number from 1 to {min(top_k, n_devices)}."
        )
