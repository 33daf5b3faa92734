"""Feed-forward networks: SwiGLU and the mixture of experts (DeepSeekMoE, with V2's and V3's routing).

N tokens · D hidden · E experts · K experts per token · I expert width · G expert groups.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_def.attention import linear
from model_def.specs import MoeSpec, RoutingSpec

SUM_EPSILON = 1e-20  # keeps the renormalised weights finite when every chosen score underflows


def gated(gate: Tensor, up: Tensor, limit: float | None) -> Tensor:
    """silu(gate) ⊙ up; with a limit the gate is at most that and the up within ± it, as in DeepSeek-V4."""
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return F.silu(gate) * up


class SwiGlu(nn.Module):
    """(silu(x·W_gateᵀ) ⊙ x·W_upᵀ)·W_downᵀ (Shazeer 2020)."""

    def __init__(
        self, hidden: int, width: int, limit: float | None, dtype: torch.dtype, device: torch.device | str | None
    ):
        super().__init__()
        self.limit = limit
        self.gate_proj = linear(hidden, width, dtype, device)
        self.up_proj = linear(hidden, width, dtype, device)
        self.down_proj = linear(width, hidden, dtype, device)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(gated(self.gate_proj(x), self.up_proj(x), self.limit))


def route(spec: RoutingSpec, logits_NE: Tensor, bias_E: Tensor | None) -> tuple[Tensor, Tensor]:
    """The experts of every token and their weights: → indices int64 [N, K], weights [N, K].

    V2: softmax, groups ranked by their best expert. V3: sigmoid, a bias in the selection only, groups
    ranked by the sum of their two best experts. V4 scores by the root of softplus. Among equal scores the choice is
    torch.topk's.
    """
    if spec.scoring == "sigmoid":
        scores_NE = logits_NE.sigmoid()
    elif spec.scoring == "sqrtsoftplus":
        scores_NE = F.softplus(logits_NE).sqrt()
    else:
        scores_NE = logits_NE.softmax(-1)
    choice_NE = scores_NE if bias_E is None else scores_NE + bias_E
    if spec.groups > 1:
        choice_NGX = choice_NE.unflatten(-1, (spec.groups, -1))
        if spec.group_score == "top2":
            group_NG = choice_NGX.topk(2, -1).values.sum(-1)
        else:
            group_NG = choice_NGX.amax(-1)
        chosen = group_NG.topk(spec.top_groups, -1).indices
        kept_NG = torch.zeros_like(group_NG).scatter(-1, chosen, 1.0) > 0
        choice_NE = choice_NGX.masked_fill(~kept_NG[..., None], spec.masked).flatten(-2)
    indices_NK = choice_NE.topk(spec.top_k, -1).indices
    weights_NK = scores_NE.gather(-1, indices_NK)
    if spec.normalise:
        weights_NK = weights_NK / (weights_NK.sum(-1, keepdim=True) + SUM_EPSILON)
    return indices_NK, weights_NK * spec.scale


class Router(nn.Module):
    """g(x): every expert's weight for every token, zero where it is not chosen."""

    e_score_correction_bias: Tensor | None

    def __init__(self, spec: RoutingSpec, hidden: int, dtype: torch.dtype, device: torch.device | str | None):
        super().__init__()
        self.spec = spec
        weight_ED = torch.randn(spec.experts, hidden, dtype=dtype, device=device) * hidden**-0.5
        self.weight = nn.Parameter(weight_ED)
        # fp32 whatever the model's dtype: rounding the sum of score and bias to bf16 changes the selection
        wide = torch.promote_types(dtype, torch.float32)
        bias_E = torch.zeros(spec.experts, dtype=wide, device=device) if spec.bias else None
        self.register_buffer("e_score_correction_bias", bias_E)

    def forward(self, x_ND: Tensor) -> Tensor:
        wide = torch.promote_types(x_ND.dtype, torch.float32)
        logits_NE = F.linear(x_ND.to(wide), self.weight.to(wide))
        indices_NK, weights_NK = route(self.spec, logits_NE, self.e_score_correction_bias)
        return torch.zeros_like(logits_NE).scatter(-1, indices_NK, weights_NK)


class Experts(nn.Module):
    """Σ_e g_e(x) · FFN_e(x), over all experts; most of the sum is zero."""

    def __init__(
        self,
        experts: int,
        hidden: int,
        width: int,
        limit: float | None,
        dtype: torch.dtype,
        device: torch.device | str | None,
    ):
        super().__init__()
        self.limit = limit

        def stacked(outputs: int, inputs: int) -> nn.Parameter:
            weight = torch.randn(experts, outputs, inputs, dtype=dtype, device=device) * inputs**-0.5
            return nn.Parameter(weight)

        self.gate_proj = stacked(width, hidden)
        self.up_proj = stacked(width, hidden)
        self.down_proj = stacked(hidden, width)

    def forward(self, x_ND: Tensor, g_NE: Tensor) -> Tensor:
        gate_NEI = torch.einsum("nd,eid->nei", x_ND, self.gate_proj)
        up_NEI = torch.einsum("nd,eid->nei", x_ND, self.up_proj)
        return torch.einsum("ne,nei,edi->nd", g_NE, gated(gate_NEI, up_NEI, self.limit), self.down_proj)


class MixtureOfExperts(nn.Module):
    """Routed experts, plus the shared experts that every token uses."""

    def __init__(self, spec: MoeSpec, hidden: int, dtype: torch.dtype, device: torch.device | str | None):
        super().__init__()
        self.gate = Router(spec.routing, hidden, dtype, device)
        self.experts = Experts(spec.routing.experts, hidden, spec.width, spec.limit, dtype, device)
        self.shared_experts = None
        if spec.shared_width:
            self.shared_experts = SwiGlu(hidden, spec.shared_width, spec.limit, dtype, device)

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_ND = x_BSD.flatten(0, 1)
        g_NE = self.gate(x_ND).to(x_ND.dtype)
        y_ND = self.experts(x_ND, g_NE)
        if self.shared_experts is not None:
            y_ND = y_ND + self.shared_experts(x_ND)
        return y_ND.view_as(x_BSD)
