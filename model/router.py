"""The router of a mixture of experts: which experts a token uses, and with which weights."""

from __future__ import annotations

import torch

from llmkit.kernels.cpu import cpu_experts, cpu_kernels
from llmkit.model.spec import MoeSpec


def select_experts(
    logits: torch.Tensor,
    moe: MoeSpec,
    correction_bias: torch.Tensor | None,
    expert_scales: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights and the ids of each token's experts, float32 and int64 [T, num_experts_per_tok].

    logits: [T, num_experts]. correction_bias: float32 [num_experts], added to the scores to choose
    the experts, not to weight them (auxiliary-loss-free balancing, arXiv 2408.15664).
    expert_scales: [num_experts], multiplied by the weights. Of experts with equal scores, the
    compiled kernel chooses the first; torch does not say which it chooses.
    """
    vectors = (correction_bias, expert_scales)
    if (
        cpu_kernels.supports(logits)
        and logits.is_contiguous()
        and moe.num_experts <= cpu_experts.MAX_EXPERTS
        and all(vector is None or vector.dtype == torch.float32 for vector in vectors)
    ):
        return cpu_experts.select_experts(
            logits,
            *vectors,
            moe.num_experts_per_tok,
            num_groups=moe.num_groups,
            topk_groups=moe.topk_groups,
            scoring=moe.scoring,
            normalize=moe.norm_topk_prob,
            group_max=moe.group_score == "max",
            softcap=moe.router_logit_softcapping,
            scaling_factor=moe.routed_scaling_factor,
        )
    logits = logits.float()
    softcap = moe.router_logit_softcapping
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    scores = logits.softmax(-1) if moe.scoring == "softmax" else logits.sigmoid()
    choice = scores if correction_bias is None else scores + correction_bias.flatten()
    if moe.topk_groups < moe.num_groups:
        choice = _within_best_groups(choice, moe)
    topk_ids = choice.topk(moe.num_experts_per_tok, dim=-1).indices
    topk_weights = scores.gather(-1, topk_ids)
    if moe.norm_topk_prob:
        topk_weights = topk_weights / topk_weights.sum(-1, keepdim=True)
    topk_weights = topk_weights * moe.routed_scaling_factor
    if expert_scales is not None:
        topk_weights = topk_weights * expert_scales[topk_ids]
    return topk_weights, topk_ids


def _within_best_groups(choice: torch.Tensor, moe: MoeSpec) -> torch.Tensor:
    """The scores [T, num_experts], minus infinity outside each token's best groups.

    A group's score is the sum of its two best experts' (DeepSeek-V3, arXiv 2412.19437), or that of
    its best one (DeepSeek-V2, arXiv 2405.04434).
    """
    groups = choice.unflatten(-1, (moe.num_groups, -1))
    group_scores = groups.topk(2 if moe.group_score == "top2" else 1, dim=-1).values.sum(-1)
    best = group_scores.topk(moe.topk_groups, dim=-1).indices
    is_best = torch.zeros_like(group_scores, dtype=torch.bool).scatter_(-1, best, True)
    allowed: torch.Tensor = groups.masked_fill(~is_best[..., None], float("-inf"))
    return allowed.flatten(-2)
