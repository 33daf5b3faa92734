"""What a caller asks of a running model, checked: ValueError in one line for what does not fit it."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


def checked_ids(ids: Any, most_rows: int, vocabulary: int) -> Tensor:
    """Token ids, int64 [batch, tokens]."""
    if not isinstance(ids, Tensor) or ids.dtype != torch.int64 or ids.dim() != 2 or 0 in ids.shape:
        given = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, Tensor) else f"a {type(ids).__name__}"
        raise ValueError(f"token ids are {given}; expected a tensor int64 [batch, tokens]")
    if len(ids) > most_rows:
        raise ValueError(f"the batch has {len(ids)} rows; this artifact was made for {most_rows}")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocabulary:
        raise ValueError(f"token id {low if low < 0 else high} is not in the vocabulary of {vocabulary}")
    return ids


def checked_count(max_new_tokens: Any) -> int:
    if not isinstance(max_new_tokens, int) or isinstance(max_new_tokens, bool) or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens!r}; expected a whole number from 1")
    return max_new_tokens


def checked_ends(eos: Any, vocabulary: int) -> list[int]:
    """End tokens: one id, or several."""
    refusal = ValueError(f"eos is {eos!r}; expected a token id or several, below {vocabulary}")
    try:
        several = list(eos) if isinstance(eos, Iterable) else [eos]
        ends = [operator.index(end) for end in several]
    except TypeError:
        raise refusal from None
    no_ids = isinstance(eos, str) or any(isinstance(end, bool) for end in several)
    if no_ids or any(not 0 <= end < vocabulary for end in ends):
        raise refusal
    return ends


def checked_lengths(lengths: Tensor | Sequence[int] | None, batch: int, queries: int) -> Tensor:
    """The true length of each row, int64 [batch]: all of its `queries` tokens where omitted."""
    if lengths is None:
        return torch.full((batch,), queries, dtype=torch.int64)
    try:
        found = torch.as_tensor(lengths if isinstance(lengths, Tensor) else [_no_bool(one) for one in lengths])
    except (TypeError, ValueError, RuntimeError):  # text, ragged lists, numbers of no dtype
        found = torch.empty(0)
    whole = found.shape == (batch,) and found.dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
    if not whole or int(found.min()) < 1 or int(found.max()) > queries:
        given = lengths.tolist() if isinstance(lengths, Tensor) else lengths
        raise ValueError(f"lengths is {given!r}; expected {batch} whole numbers from 1 to {queries}")
    return found.to(torch.int64)


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise TypeError("a truth value among numbers, which torch would count as one")
    return value
