"""Expanded, absorbed, folded: forced from outside, the model stays the same; ranks may differ in every layer."""

import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import dsv3_compile as dsv3
import dsv3_compile.driver as driver
from dsv3_compile.capture import capture
from dsv3_compile.driver import build
from dsv3_compile.program import BlockGraph
from model_def.checkpoint import write
from model_def.config import ModelConfig
from passes.verify import clone
from tests.dsv3_compile import tiny

RANKS = replace(tiny.TINY, model_type="custom", num_hidden_layers=2, kv_lora_rank=(24, 7))
PLAIN_QUERIES = replace(RANKS, q_lora_rank=None)


@functools.cache  # capture takes most of a small compile
def once(config: ModelConfig, dtype: torch.dtype) -> dict[tuple[str, str], BlockGraph]:
    return capture(config, dtype)


@pytest.fixture(autouse=True)
def captured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def copies(config: ModelConfig, dtype: torch.dtype, *_: object) -> dict[tuple[str, str], BlockGraph]:
        return {key: BlockGraph(b.name, b.phase, clone(b.module)) for key, b in once(config, dtype).items()}

    monkeypatch.setattr(driver, "capture", copies)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("forms") / "checkpoint"
    write(folder, RANKS, tiny.checkpoint_of(tiny.trained_looking(RANKS)).items())
    return folder


def logits(checkpoint: Path, output: Path, form: str) -> torch.Tensor:
    """Prefill, then four steps, of an artifact with both phases in one form."""
    settings = (f"order-contractions.prefill={form}", f"order-contractions.decode={form}")
    dsv3.compile(checkpoint, target="cpu", output=output, set=settings, max_length=32, aot=False, verify=False)
    model = dsv3.load(output)
    ids = torch.arange(3 * 11).view(3, 11) % tiny.TINY.vocab_size
    found, cache = model.prefill(ids[:, :7], lengths=[7, 2, 5])
    steps = [found[torch.arange(3), torch.tensor([6, 1, 4])]]
    for step in range(7, 11):
        one, cache = model.decode(ids[:, step : step + 1], cache)
        steps.append(one[:, 0])
    return torch.stack(steps)


def test_scores_and_limits_of_v4(tmp_path: Path) -> None:
    config = tiny.EXPERTS_OF_V4
    definition = tiny.trained_looking(config).requires_grad_(False)
    write(tmp_path / "checkpoint", config, tiny.checkpoint_of(definition).items())
    assert ModelConfig.from_file(tmp_path / "checkpoint") == config
    ids = torch.arange(3 * 9).view(3, 9) % config.vocab_size
    positions = torch.arange(9).expand(3, -1)
    expected = definition(ids, positions, definition.empty_caches(3, 9))[0]
    dsv3.compile(tmp_path / "checkpoint", target="cpu", output=tmp_path / "model", max_length=32, aot=False)
    found, _ = dsv3.load(tmp_path / "model").prefill(ids)
    torch.testing.assert_close(found, expected, atol=5e-5, rtol=0)
    unlimited = tiny.trained_looking(replace(config, swiglu_limit=None)).requires_grad_(False)
    unlimited.load_state_dict(definition.state_dict())
    assert (unlimited(ids, positions, unlimited.empty_caches(3, 9))[0] - expected).abs().mean() > 1e-2
    program = build(replace(config, torch_dtype="bfloat16"), replace(tiny.OPTIONS, target="sm_90"))
    calls = [n for block in program.blocks.values() for n in block.module.graph.nodes if n.op == "call_function"]
    experts = [n.args for n in calls if n.target is torch.ops.dsv3.routed_swiglu.default]
    assert [args[6:] for args in experts] == 2 * [(1, None, 0.2)]  # prefill and decode
    assert {n.args[2] for n in calls if n.target is torch.ops.dsv3.route.default} == {"sqrtsoftplus"}


def test_every_form_gives_the_same_logits(checkpoint: Path, tmp_path: Path) -> None:
    chosen = logits(checkpoint, tmp_path / "auto", "auto")
    assert chosen.square().mean().sqrt() > 0.3
    for form in ("expanded", "absorbed", "folded"):
        torch.testing.assert_close(logits(checkpoint, tmp_path / form, form), chosen, atol=5e-5, rtol=0)


@pytest.mark.parametrize("config", [RANKS, PLAIN_QUERIES])
def test_decode_absorbs_in_every_layer_whatever_its_rank(config) -> None:
    program = build(config, tiny.OPTIONS)
    layers = [name for name, phase in program.blocks if phase == "decode" and name not in ("embed", "head")]
    assert len(layers) == config.num_hidden_layers
    for name in layers:
        (record,) = [r for r in program.records[name, "decode"] if r.name == "order-contractions"]
        assert len(record.matches) == 2 and all("absorbed" in match for match in record.matches)
        assert all(r.certificate.max_rel_error <= 1e-10 for r in program.records[name, "decode"])
