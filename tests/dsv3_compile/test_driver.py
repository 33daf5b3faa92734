"""The whole compile: what it builds, what it computes, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import dsv3_compile.driver as driver
from dsv3_compile.driver import Event, build, open_model, schedule, workload
from dsv3_compile.options import OptionError, Options
from dsv3_compile.program import Program, bind
from model_def.checkpoint import CheckpointError, write
from model_def.decoder import Decoder
from model_def.presets import PRESETS
from passes.base import Outcome, Workload
from passes.canonicalise import Canonicalise
from passes.pipeline import Pipeline, RequirementError
from passes.settings import PassError
from passes.verify import CertificateError
from tests.dsv3_compile import tiny
from tests.dsv3_compile.tiny import OPTIONS, TINY


def run(program: Program, phase: str, weights: dict[str, Tensor], tokens: Tensor, positions: Tensor, caches: list):
    """The schedule in plain Python, as an artifact's runtime goes through it; caches are updated."""
    x = cos = sin = None
    for step in program.schedule:
        graph = program.blocks[step.block, phase]
        values = {node.name: weights.get(step.key(node.name)) for node in graph.inputs()}
        values |= {"input_ids_BS": tokens, "positions_BS": positions, "x_BSD": x, "cos_BSF": cos, "sin_BSF": sin}
        if step.layer is not None:
            values |= dict(zip(("latent_BTC", "rope_key_BTR"), caches[step.layer], strict=True))
        outputs = graph.module(*(values[node.name] for node in graph.inputs()))
        if step.layer is not None:
            caches[step.layer] = outputs[1:]
        x = outputs[0]
        if step.block == "embed":
            cos, sin = outputs[1:]
    return x


def poisoned_caches(model: Decoder, batch: int, length: int) -> list:
    """Rows that nothing has written must not be read: they hold large numbers."""
    return [(latent + 1e3, rope_key - 1e3) for latent, rope_key in model.empty_caches(batch, length)]


@torch.no_grad()
def test_the_compiled_program_computes_what_the_definition_says():
    model = tiny.trained_looking(TINY)
    program = tiny.program()
    weights = dict(bind(program, tiny.checkpoint_of(model).__getitem__))
    lengths = torch.tensor([7, 3, 5])
    tokens = torch.randint(0, TINY.vocab_size, (3, 9))

    # A ragged prompt, padded on the right, then two tokens per row, each row at its own position.
    positions = torch.arange(7).expand(3, 7)
    caches = poisoned_caches(model, 3, 12)
    rows = [(latent[:, :7], rope_key[:, :7]) for latent, rope_key in caches]
    logits = run(program, "prefill", weights, tokens[:, :7], positions, rows)
    found = [logits[torch.arange(3), lengths - 1]]
    caches = [
        tuple(torch.cat([written, cache[:, 7:]], 1) for written, cache in zip(new, old, strict=True))
        for new, old in zip(rows, caches, strict=True)
    ]
    for step in range(2):
        here = (lengths + step)[:, None]
        found.append(run(program, "decode", weights, tokens.gather(1, here.clamp(max=8)), here, caches)[:, 0])

    for row, length in enumerate(lengths.tolist()):
        text = torch.cat([tokens[row, :length], tokens[row].gather(0, torch.arange(length, length + 2).clamp(max=8))])
        expected, _ = model(text[None], torch.arange(length + 2)[None], model.empty_caches(1, length + 2))
        for step, logits in enumerate(found):
            torch.testing.assert_close(logits[row], expected[0, length - 1 + step], atol=5e-5, rtol=0)


def test_decode_is_absorbed_and_prefill_expanded():
    records = {record.name: record for record in tiny.program().records["moe", "decode"]}
    assert len(records["order-contractions"].matches) == 2
    assert all("absorbed" in match for match in records["order-contractions"].matches)
    prefill = {record.name: record for record in tiny.program().records["moe", "prefill"]}
    assert not prefill["order-contractions"].matches


def test_every_pass_of_every_block_is_certified():
    for records in tiny.program().records.values():
        for record in records:
            assert record.certificate is not None and record.certificate.max_rel_error <= 1e-10


def test_the_schedule_names_a_block_and_tensors_for_every_step():
    steps = schedule(TINY)
    assert [step.block for step in steps] == ["embed", "dense", "moe", "moe", "moe", "head"]
    assert [step.layer for step in steps] == [None, 0, 1, 2, 3, None]
    assert steps[2].sources["self_attn_kv_b_proj_weight"] == ("model.layers.1.self_attn.kv_b_proj.weight",)
    assert steps[2].sources["mlp_experts_up_proj"][11] == "model.layers.1.mlp.experts.11.up_proj.weight"


def test_costs_are_compared_at_a_whole_prompt_and_at_a_full_batch():
    options = Options(max_batch=5, max_length=40)
    assert workload(TINY, options, "prefill") == Workload(1, 40, 40)
    assert workload(TINY, options, "decode") == Workload(5, 1, 40)


def test_large_blocks_are_certified_at_small_sizes(captured, monkeypatch):
    monkeypatch.setattr("dsv3_compile.proxy.LARGEST_REAL", 1000)
    events: list[Event] = []
    program = build(TINY, OPTIONS, events.append)
    assert {event.stage for event in events} == {"capture at small sizes", "passes"}
    certificates = [record.certificate for record in program.records["moe", "decode"]]
    assert all(certificate is not None and certificate.proxy for certificate in certificates)


class Broken(Canonicalise):
    """A pass that halves every product."""

    def run(self, graph_module, context):
        for node in graph_module.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default):
            with graph_module.graph.inserting_after(node):
                half = graph_module.graph.call_function(torch.ops.aten.mul.Tensor, (node, 0.5))
                half.meta["val"] = node.meta["val"]
                node.replace_all_uses_with(half)
                half.args = (node, 0.5)
        return Outcome(matches=["all"])


def compiled(**settings) -> Program:
    return build(TINY, replace(OPTIONS, **settings))


@pytest.fixture
def captured(monkeypatch):
    monkeypatch.setattr(driver, "capture", tiny.captured_before)


def test_a_wrong_pass_stops_the_compile(captured, monkeypatch):
    monkeypatch.setattr(driver, "_pipeline", lambda options: Pipeline((Broken(),)))
    with pytest.raises(
        CertificateError, match=r"broken on dense prefill: output 0 differs .*first at mul\w*, in place of linear "
    ):
        compiled()


def test_a_required_pass_must_fire_somewhere(captured):
    compiled(require=("fuse-attention",), verify=False)
    with pytest.raises(RequirementError, match="required pass fuse-experts did not fire"):
        compiled(require=("fuse-experts",), disable=("sparsify-experts",), verify=False)


def test_a_disabled_pass_leaves_no_record(captured):
    program = compiled(disable=("fuse-routing",), verify=False)
    assert "fuse-routing" not in {record.name for record in program.records["moe", "decode"]}


def test_settings_reach_the_passes(captured):
    program = compiled(set=("order-contractions.decode=expanded",), verify=False)
    record = program.records["moe", "decode"][1]
    assert "decode='expanded'" in record.spec and not any("absorbed" in match for match in record.matches)


def test_forms_by_chain_go_to_the_blocks_with_as_many_chains(captured):
    program = compiled(set=("order-contractions.decode=absorbed+expanded",), verify=False)
    decisions = {name: program.records[name, "decode"][1].decision["decode"] for name in ("embed", "moe", "head")}
    assert decisions == {"embed": "auto", "moe": "absorbed+expanded", "head": "auto"}
    with pytest.raises(PassError, match=r"decode names 3 forms; the blocks have 0 or 2 chains"):
        compiled(set=("order-contractions.decode=absorbed+auto+auto",), verify=False)


def test_an_unknown_setting_is_refused_before_any_work():
    with pytest.raises(PassError, match="unknown pass 'fuse-everything'"):
        build(TINY, replace(OPTIONS, disable=("fuse-everything",)))


def test_a_preset_needs_no_weights():
    assert open_model("deepseek-v3", Options(no_weights=True)).checkpoint is None
    with pytest.raises(OptionError, match="deepseek-v3 is a preset, which has no weights"):
        open_model("deepseek-v3", Options())


def test_an_unknown_model_names_the_presets(tmp_path):
    with pytest.raises(OptionError, match=f"no such folder; accepted: a folder, or {next(iter(PRESETS))}"):
        open_model(tmp_path / "nothing", Options())


def test_a_checkpoint_is_compared_with_its_config(tmp_path):
    tensors = tiny.checkpoint_of(tiny.trained_looking(TINY))
    write(tmp_path / "whole", TINY, tensors.items())
    assert open_model(tmp_path / "whole", Options()).config == TINY
    del tensors["model.norm.weight"]
    write(tmp_path / "partial", TINY, tensors.items())
    with pytest.raises(CheckpointError, match="model.norm.weight .*is missing"):
        open_model(tmp_path / "partial", Options())
