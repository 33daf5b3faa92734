"""However the same attention is written, its decode step is absorbed."""

import math
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tests.foreign.mla_zoo import HEADS, NOPE, RANK, ROPE, VALUE, WIDTH, HeadFirst, causal
from tests.foreign.test_attention_zoo import compiled, ops, reasons


@dataclass(frozen=True)
class Choices:
    """How to write one MLA step; all of them compute the same."""

    fused: bool  # scaled_dot_product_attention, or products and a softmax
    rope_first: bool  # the order within the concatenated query and key
    summed: bool  # two products added, or one of concatenated operands
    swapped: bool  # operands of einsums in the other order
    matmul: bool  # matmul or einsum
    heads_late: bool  # transposes behind the products, or before
    scaled_query: bool  # scale the query, or the scores
    per_head: bool  # weights viewed as one matrix per head, or one linear map
    merged: bool  # views in one step, or several


class Rewritten(HeadFirst):
    def __init__(self, choices: Choices) -> None:
        super().__init__()
        self.choices = choices

    def split_heads(self, x, width):
        """[B, L, H, width]"""
        if self.choices.merged:
            return x.view(*x.shape[:-1], HEADS, width)
        return x.flatten(0, 1).view(-1, HEADS, width).unflatten(0, x.shape[:2])

    def product(self, equation, left, right):
        left_letters, right_letters, out = equation.replace("->", ",").split(",")
        if self.choices.swapped:
            return torch.einsum(f"{right_letters},{left_letters}->{out}", right, left)
        return torch.einsum(equation, left, right)

    def up(self, latent):
        """[B, T, H, N] and [B, T, H, V]"""
        weight = self.kv_b_proj.weight
        if self.choices.per_head:
            keys, values = weight.unflatten(0, (HEADS, -1)).split([NOPE, VALUE], 1)
            return self.product("btc,hnc->bthn", latent, keys), self.product("btc,hvc->bthv", latent, values)
        return self.split_heads(self.kv_b_proj(latent), NOPE + VALUE).split([NOPE, VALUE], -1)

    def scores(self, q_parts, k_parts):
        """[B, H, S, T] of parts [B, S, H, ·] and [B, T, H, ·]"""
        if self.choices.matmul:
            return torch.matmul(q_parts.transpose(1, 2), k_parts.permute(0, 2, 3, 1))
        if self.choices.heads_late:
            return self.product("bshx,bthx->bsht", q_parts, k_parts).transpose(1, 2)
        return self.product("bhsx,bhtx->bhst", q_parts.transpose(1, 2), k_parts.transpose(1, 2))

    def forward(self, x_BSD, positions_BS, latent_BTC, rope_key_BTR):
        choices, scale = self.choices, WIDTH**-0.5
        q_nope, q_rope = self.split_heads(self.q_proj(x_BSD), WIDTH).split([NOPE, ROPE], -1)
        q = [q_nope, torch.tanh(q_rope)]
        k_nope, v = self.up(latent_BTC)
        k = [k_nope, rope_key_BTR[:, :, None].expand(-1, -1, HEADS, -1)]
        if choices.rope_first:
            q, k = q[::-1], k[::-1]
        if choices.scaled_query:
            q, scale = [part * scale for part in q], 1.0
        mask = causal(positions_BS, latent_BTC)
        if choices.fused:
            heads_first = [one.transpose(1, 2) for one in (torch.cat(q, -1), torch.cat(k, -1), v)]
            out = F.scaled_dot_product_attention(*heads_first, attn_mask=mask, scale=scale).transpose(1, 2)
        else:
            if choices.summed:
                scores = self.scores(q[0], k[0]) + self.scores(q[1], k[1])
            else:
                scores = self.scores(torch.cat(q, -1), torch.cat(k, -1))
            shares = (scores * scale).masked_fill(~mask, -math.inf).softmax(-1)
            out = self.product("bhst,bthv->bshv", shares, v)
        if choices.per_head:
            return self.product("bshv,dhv->bsd", out, self.o_proj.weight.unflatten(1, (HEADS, VALUE)))
        return self.o_proj(out.reshape(*x_BSD.shape[:2], HEADS * VALUE))


@settings(derandomize=True, max_examples=10, deadline=None, database=None, phases=[Phase.generate])
@given(st.builds(Choices, *(st.booleans() for _ in fields(Choices))))
def test_every_way_of_writing_it_is_absorbed(choices):
    graph, records = compiled(Rewritten(choices))
    assert ops(graph) == ["mla_attention"], reasons(records, "fuse-attention")
    wide = [node for node in graph.nodes if "val" in node.meta and _expands(node.meta["val"])]
    assert not wide


def _expands(value):
    """Does the value hold a row per cached position and head?"""
    return isinstance(value, torch.Tensor) and value.numel() >= 2 * 33 * HEADS * NOPE and RANK not in value.shape
