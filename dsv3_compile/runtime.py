"""Running an artifact: prefill, decode, generate. Needs neither the compiler nor the model's definition."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn.functional import pad

from dsv3_compile.artifact import FILL, Artifact, ArtifactError, GraphEntry, Step
from dsv3_compile.device import device_for
from dsv3_compile.loading import load_graph
from dsv3_compile.native import cpu_identity, load_native
from dsv3_compile.recording import CudaRecorder, Layer, Prompt, Prompts, Recorder, Slot, Slots, padded_length
from dsv3_compile.requests import checked_count, checked_ends, checked_ids, checked_lengths
from dsv3_compile.sampling import Sampler

LOGGER = logging.getLogger(__name__)

SMALLEST_CAPACITY = 256  # positions
# Prompts of more tokens, all rows together, keep a GPU busy for longer than the host takes to call its kernels.
MOST_RECORDED_TOKENS = 4096


@dataclass
class Cache:
    """What the model remembers of a batch: per layer, the cached tensors [B, capacity, ...].

    `lengths` [B] int64 counts the positions each row has written; what lies behind is undefined. `longest` is
    the largest of them, kept beside so that no step waits for the device to say it. Where steps are recorded, the
    tensors are those of a `slot`, which another batch may get as soon as this cache is gone.
    """

    layers: list[Layer]
    lengths: Tensor
    longest: int
    slot: Slot | None = None
    release: Callable[[], Any] = field(default=lambda: None, repr=False)

    @property
    def capacity(self) -> int:
        return self.layers[0][0].shape[1]


@dataclass(frozen=True)
class Graph:
    """A graph ready to call: its function, and its inputs in calling order."""

    entry: GraphEntry
    function: Callable[..., Any]

    def __call__(self, values: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        result = self.function(*[values[port.name] for port in self.entry.inputs])
        return tuple(result) if isinstance(result, (tuple, list)) else (result,)

    def caches(self) -> list[Any]:
        return [port for port in self.entry.inputs if port.role == "cache"]


def load(folder: str | Path, *, device: str | None = None, native: bool = True) -> Model:
    """Check an artifact and load it.

    The artifact's graphs are code and are executed. device: cpu, cuda or cuda:N; the CPU or the first GPU where
    omitted, as the target asks. native: use code compiled for this CPU when the artifact has it; otherwise, or on
    another CPU, the graphs run as Python source with the same results up to rounding.
    Raises ArtifactError when the folder is not intact, holds no weights, or was made for another machine or device.
    """
    return Model(Artifact.open(folder), device=device, native=native)


class Model:
    """A compiled model with its weights."""

    def __init__(self, artifact: Artifact, *, device: str | None = None, native: bool = True) -> None:
        manifest = artifact.manifest
        if manifest.weights == "none":
            raise ArtifactError(f"{artifact.folder}: has no weights; compile it without --no-weights to run it")
        self.artifact = artifact
        self.device = device_for(artifact, device, native)
        self.config = manifest.config
        self.max_length = manifest.max_length
        self.max_batch = manifest.max_batch
        self.native = native and bool(manifest.native_cpu)
        if self.native and manifest.native_cpu != cpu_identity():
            LOGGER.warning("native code was made for another processor; running the graphs as Python source")
            self.native = False
        self.graphs = {
            (block, phase): Graph(entry, self._function(entry))
            for block, phases in manifest.graphs.items()
            for phase, entry in phases.items()
        }
        self.record: Recorder | None = CudaRecorder() if self.device.type == "cuda" else None
        self.slots, self.prompts = Slots(), Prompts()
        tensors = {
            name: tensor for shard in artifact.listed("weights") for name, tensor in _tensors(shard, self.device)
        }
        self.weights = [{name: tensors[key] for name, key in step.weights.items()} for step in manifest.schedule]

    def prefill(self, input_ids: Tensor, lengths: Tensor | Sequence[int] | None = None) -> tuple[Tensor, Cache]:
        """Run prompts from an empty context.

        input_ids: int64 [B, S], padded on the right with any valid id. lengths: the true length of each row,
        S where omitted. Returns float32 logits [B, S, V], undefined behind a row's end, and the cache. On a GPU
        short prompts are padded further, to sizes that come often; from the second time on such a size is replayed.
        Raises ValueError for ids, sizes or lengths that do not fit the model.
        """
        input_ids, lengths = self._checked_prompts(input_ids, lengths)
        x, cache = self._prefill_trunk(input_ids, lengths, None)
        return self._head(x, "prefill"), cache

    def decode(self, next_ids: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        """One more token per row: int64 [B, 1] → float32 logits [B, 1, V].

        The cache is written in place and returned; its buffers are doubled when full, up to the artifact's
        max_length, beyond which ValueError is raised. On a GPU the first step of a batch and capacity is recorded
        as a CUDA graph, which the others replay.
        """
        next_ids = self._checked_ids(next_ids)
        if next_ids.shape != (len(cache.lengths), 1):
            raise ValueError(f"next_ids has shape {list(next_ids.shape)}; expected [{len(cache.lengths)}, 1]")
        if cache.longest == self.max_length:
            raise ValueError(f"the context is full: this artifact was made for {self.max_length} positions")
        logits = self._step(next_ids, cache)
        return logits if self.record is None else logits.clone(), cache

    def generate(self, input_ids: Tensor, max_new_tokens: int, **options: Any) -> Tensor:
        """The tokens that `stream` yields, side by side: int64 [B, at most max_new_tokens].

        Takes the options of `stream`. Rows that ended early are filled with their end token.
        """
        return torch.stack(list(self.stream(input_ids, max_new_tokens, **options)), dim=1)

    def stream(
        self,
        input_ids: Tensor,
        max_new_tokens: int,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        eos: int | Sequence[int] | None = None,
    ) -> Iterator[Tensor]:
        """Continue prompts, yielding int64 [B] per step until every row has given an end token or the context is full.

        temperature 0 takes the most likely token; otherwise tokens are drawn from the smallest set whose
        probabilities reach top_p. eos: end tokens, the model's own where omitted, none where empty.
        Raises ValueError, at once, for an argument that is not of these kinds or does not fit the model.
        """
        room = checked_count(max_new_tokens)
        sampler = Sampler(temperature, top_p, seed, self.device)
        ends = self._ends(eos)
        return self._tokens(*self._checked_prompts(input_ids, lengths), room, sampler, ends)

    def _tokens(
        self, input_ids: Tensor, lengths: Tensor, max_new_tokens: int, sampler: Sampler, ends: Tensor
    ) -> Iterator[Tensor]:
        """What `stream` gives, from checked arguments: a generator would check them when it is first asked."""
        last = (lengths - 1).unsqueeze(1).to(self.device)
        x, cache = self._prefill_trunk(input_ids, lengths, last, max_new_tokens)
        logits = self._head(x, "decode")
        finished = torch.zeros(len(x), dtype=torch.bool, device=self.device)
        tokens = torch.zeros(len(x), dtype=torch.int64, device=self.device)
        for step in range(max_new_tokens):
            tokens = torch.where(finished, tokens, sampler(logits[:, -1]))
            yield tokens
            if step + 1 == max_new_tokens or cache.longest == self.max_length:
                return
            if len(ends):  # only then is it worth waiting for the device
                finished = finished | torch.isin(tokens, ends)
                if finished.all():
                    return
            logits = self._step(tokens.unsqueeze(1), cache)

    def _checked_prompts(self, input_ids: Tensor, lengths: Tensor | Sequence[int] | None) -> tuple[Tensor, Tensor]:
        input_ids = self._checked_ids(input_ids)
        batch, queries = input_ids.shape
        if queries > self.max_length:
            raise ValueError(f"prompts have {queries} positions; this artifact was made for {self.max_length}")
        return input_ids, checked_lengths(lengths, batch, queries)

    def _prefill_trunk(
        self, input_ids: Tensor, lengths: Tensor, last: Tensor | None, room: int = 1
    ) -> tuple[Tensor, Cache]:
        """What `_layers` gives, and a cache with room for that many more positions, as far as they are allowed."""
        batch, queries = input_ids.shape
        padded = min(padded_length(queries), self._capacity(queries))
        if self.record is not None and batch * padded <= MOST_RECORDED_TOKENS:
            x, layers = self._prefilled_again(self.record, pad(input_ids, (0, padded - queries)), last)
            x = x[:, :queries]
        else:
            x, layers = self._prefilled(self._prompt(input_ids, last, self._rows(batch * queries)))
        cache = Cache(layers, lengths.to(self.device), int(lengths.max()))
        self._resize(cache, self._capacity(min(queries + room, self.max_length)))
        return x, cache

    def _rows(self, count: int) -> list[Layer]:
        """Per layer, room for so many cached positions: [count, ...]."""
        return [
            tuple(
                torch.zeros(count, *port.shape[2:], dtype=getattr(torch, port.dtype), device=self.device)
                for port in self.graphs[step.block, "prefill"].caches()
            )
            for step in self._layer_steps()
        ]

    @cached_property
    def _recorded_rows(self) -> list[Layer]:
        """What all recorded prompts write: it is copied to a slot before the next one."""
        return self._rows(MOST_RECORDED_TOKENS)

    def _prompt(self, ids: Tensor, last: Tensor | None, rows: list[Layer]) -> Prompt:
        """The memory of a prompt, whose caches are the first of these rows."""
        batch, queries = ids.shape
        layers = [tuple(one[: batch * queries].view(batch, queries, *one.shape[1:]) for one in layer) for layer in rows]
        positions = torch.arange(queries, device=self.device).expand(batch, queries).contiguous()
        return Prompt(ids, positions, last, layers)

    def _prefilled(self, prompt: Prompt) -> tuple[Tensor, list[Layer]]:
        return self._layers("prefill", prompt.ids, prompt.positions, prompt.layers, prompt.last)

    def _prefilled_again(self, record: Recorder, ids: Tensor, last: Tensor | None) -> tuple[Tensor, list[Layer]]:
        """The same as a replay if prompts of this size have come before; it lasts until the next one."""
        batch, queries = ids.shape
        prompt = self.prompts.again(
            (batch, queries, last is None),
            lambda: self._prompt(ids.clone(), None if last is None else last.clone(), self._recorded_rows),
        )
        if prompt is None:
            return self._prefilled(self._prompt(ids, last, self._rows(batch * queries)))
        prompt.ids.copy_(ids)
        if prompt.last is not None and last is not None:
            prompt.last.copy_(last)
        if prompt.recording is None:
            prompt.recording = record(partial(self._prefilled_in_place, prompt))
        prompt.recording.replay()
        return prompt.recording.output, prompt.layers

    def _prefilled_in_place(self, prompt: Prompt) -> Tensor:
        x, written = self._prefilled(prompt)
        _keep(prompt.layers, written)
        return x

    def _step(self, next_ids: Tensor, cache: Cache) -> Tensor:
        """One decode step on checked input: the logits; the cache is updated."""
        needed = cache.longest + 1
        if needed > cache.capacity:
            self._resize(cache, self._capacity(needed))
        if self.record is not None and cache.slot is not None:
            logits = self._replayed(self.record, cache.slot, next_ids)
            cache.lengths += 1
        else:
            logits, cache.layers = self._decoded(next_ids, cache.lengths, cache.layers)
            cache.lengths = cache.lengths + 1
        cache.longest = needed
        return logits

    def _decoded(self, next_ids: Tensor, lengths: Tensor, layers: list[Layer]) -> tuple[Tensor, list[Layer]]:
        x, layers = self._layers("decode", next_ids, lengths.unsqueeze(1), layers)
        return self._head(x, "decode"), layers

    def _replayed(self, record: Recorder, slot: Slot, next_ids: Tensor) -> Tensor:
        """The step as a replay on the slot's memory; its logits last until the next one."""
        slot.ids.copy_(next_ids)
        if slot.recording is None:
            slot.recording = record(partial(self._decoded_in_place, slot.ids, slot.lengths, slot.layers))
        slot.recording.replay()
        return slot.recording.output

    def _decoded_in_place(self, next_ids: Tensor, lengths: Tensor, layers: list[Layer]) -> Tensor:
        logits, written = self._decoded(next_ids, lengths, layers)
        _keep(layers, written)
        return logits

    def _layers(
        self, phase: str, input_ids: Tensor, positions: Tensor, caches: list[Layer], last: Tensor | None = None
    ) -> tuple[Tensor, list[Layer]]:
        """Everything but the head: [B, S, D], and the caches with the new rows.

        Where of each row the position in last [B, 1] is asked for, [B, 1, D]: the other positions go no further than
        into the caches of the last layer.
        """
        first = self.graphs[self._schedule[0].block, phase]
        values = {"input_ids_BS": input_ids.contiguous(), "positions_BS": positions.contiguous()}
        x, cos, sin = first({**self.weights[0], **values})
        values |= {"x_BSD": x, "cos_BSF": cos, "sin_BSF": sin}
        written: list[Layer] = []
        for step, weights, layer in zip(self._layer_steps(), self.weights[1:-1], caches, strict=True):
            if last is not None and len(written) + 1 == len(caches):
                layer = self._layer(step, FILL, {**weights, **values}, layer)
                values = {name: _rows_at(value, last) for name, value in values.items()}
                phase = "decode"
            values["x_BSD"], *new = self._layer(step, phase, {**weights, **values}, layer)
            written.append(tuple(new))
        return values["x_BSD"], written

    def _layer(self, step: Step, phase: str, values: Mapping[str, Tensor], layer: Layer) -> tuple[Tensor, ...]:
        """A layer's graph on its weights, its activations and its caches."""
        graph = self.graphs[step.block, phase]
        named = {port.name: tensor for port, tensor in zip(graph.caches(), layer, strict=True)}
        return graph({**values, **named})

    def _head(self, x: Tensor, phase: str) -> Tensor:
        (logits,) = self.graphs[self._schedule[-1].block, phase]({**self.weights[-1], "x_BSD": x.contiguous()})
        return logits

    @property
    def _schedule(self) -> Any:
        return self.artifact.manifest.schedule

    def _layer_steps(self) -> Any:
        return self._schedule[1:-1]

    def _function(self, entry: GraphEntry) -> Callable[..., Any]:
        if self.native and entry.native is not None:
            return load_native(self.artifact.path(entry.native))
        return load_graph(self.artifact.path(entry.source))

    def _capacity(self, needed: int) -> int:
        """The next power of two, so that growing copies each row only a few times."""
        return min(self.max_length, max(SMALLEST_CAPACITY, 1 << (needed - 1).bit_length()))

    def _resize(self, cache: Cache, capacity: int) -> None:
        """Move a cache to buffers of this capacity, where its own have another."""
        if self.record is not None:
            self._move(cache, capacity)
        elif capacity != cache.capacity:
            cache.layers = _larger(cache.layers, capacity)

    def _move(self, cache: Cache, capacity: int) -> None:
        """Move a cache to a slot, one that is idle if there is one, and leave the one it has."""
        batch = len(cache.lengths)
        slot = self.slots.take(batch, capacity)
        if slot is None:
            ids = torch.zeros(batch, 1, dtype=torch.int64, device=self.device)
            slot = Slot(_larger(cache.layers, capacity), cache.lengths.clone(), ids)
        else:
            for old, new in zip(cache.layers, slot.layers, strict=True):
                for rows, buffer in zip(old, new, strict=True):
                    buffer[:, : rows.shape[1]] = rows
            slot.lengths.copy_(cache.lengths)
        cache.layers, cache.lengths, cache.slot = slot.layers, slot.lengths, slot
        cache.release()
        cache.release = weakref.finalize(cache, self.slots.give_back, slot)

    def _checked_ids(self, ids: Tensor) -> Tensor:
        return checked_ids(ids, self.max_batch, self.config["vocab_size"]).to(self.device)

    def _ends(self, eos: int | Sequence[int] | None) -> Tensor:
        """End tokens, int64: the model's own as they are, others checked."""
        own = self.config.get("eos_token_id")
        ends: Iterable[int] = [] if own is None else own if isinstance(own, Iterable) else [own]
        if eos is not None:
            ends = checked_ends(eos, self.config["vocab_size"])
        return torch.tensor(list(ends), dtype=torch.int64, device=self.device)


def _tensors(shard: Path, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a file on a device, one at a time, so that no more than one of them is held on the way."""
    with safe_open(shard, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  not a dictionary
            # Copied to aligned memory: in the mapped file, rounding would depend on where a tensor happens to lie.
            yield name, file.get_tensor(name).to(device, copy=True)


def _rows_at(values: Tensor, positions: Tensor) -> Tensor:
    """[B, S, ...] at positions [B, 1] → [B, 1, ...]."""
    rows = torch.arange(len(values), device=values.device).unsqueeze(1)
    return values[rows, positions]


def _keep(layers: list[Layer], written: list[Layer]) -> None:
    """Let caches stay where they are: graphs that were not lowered return new ones."""
    for old, new in zip(layers, written, strict=True):
        for here, there in zip(old, new, strict=True):
            if here.data_ptr() != there.data_ptr():
                here.copy_(there)


def _larger(layers: list[Layer], capacity: int) -> list[Layer]:
    """The cached tensors at the head of new ones of this capacity."""

    def grown(old: Tensor) -> Tensor:
        new = old.new_zeros(old.shape[0], capacity, *old.shape[2:])
        new[:, : old.shape[1]] = old
        return new

    return [tuple(map(grown, layer)) for layer in layers]
