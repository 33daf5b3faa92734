"""ONNX models in ONNX Runtime against the definition: numbers, names, work, weights."""

from __future__ import annotations

import json
import math
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import shape_inference
from torch import Tensor

import dsv3_compile.driver as driver
from dsv3_compile.export import ExportError, export_onnx, write_onnx
from dsv3_compile.options import Options
from dsv3_compile.program import Program
from model_def import accounting
from model_def.config import ModelConfig
from model_def.decoder import Decoder
from model_def.presets import PRESETS
from tests.codegen.onnx.run import session
from tests.dsv3_compile import tiny
from tests.dsv3_compile.tiny import TINY, checkpoint_of, trained_looking

FUNCTIONAL = replace(tiny.OPTIONS, verify=False, disable=("lower",))
SMALL = dict(
    hidden_size=30,
    num_hidden_layers=2,
    num_attention_heads=3,
    num_key_value_heads=3,
    kv_lora_rank=22,
    qk_nope_head_dim=10,
    qk_rope_head_dim=8,
    v_head_dim=6,
    intermediate_size=34,
    moe_intermediate_size=14,
    vocab_size=61,
    max_position_embeddings=64,
    bos_token_id=None,
    eos_token_id=None,
    torch_dtype="float32",
)
V2_GROUPED = replace(PRESETS["deepseek-v2"], **SMALL, q_lora_rank=26, n_routed_experts=24, num_experts_per_tok=4)
CASES = {
    "v3": TINY,
    "v2-greedy, queries not compressed": replace(PRESETS["deepseek-v2-lite"], **SMALL, n_routed_experts=11),
    "v2-group-limited": V2_GROUPED,
    "kimi-like, one rotary pair": replace(
        TINY,
        num_hidden_layers=2,
        n_group=1,
        topk_group=1,
        n_routed_experts=64,
        num_experts_per_tok=4,
        qk_rope_head_dim=2,
    ),
    "experts of V4": tiny.EXPERTS_OF_V4,
}


def compiled(config: ModelConfig, options: Options = FUNCTIONAL) -> Program:
    with patch.object(driver, "capture", tiny.captured_before):
        return driver.build(config, options)


class Case:
    """A definition with random weights, and its export."""

    def __init__(self, config: ModelConfig, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.definition = trained_looking(config).requires_grad_(False)
        self.program = compiled(config)
        write_onnx(self.program, folder, checkpoint_of(self.definition).__getitem__)

    def proto(self, phase: str) -> onnx.ModelProto:
        return onnx.load(self.folder / f"{phase}.onnx", load_external_data=False)


@pytest.fixture(scope="module")
def case_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    known: dict[str, Case] = {}

    def get(name: str) -> Case:
        if name not in known:
            known[name] = Case(CASES[name], tmp_path_factory.mktemp("export") / "model")
        return known[name]

    return get


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, case_of: Callable[[str], Case]) -> Case:
    return case_of(request.param)


Past = dict[str, np.ndarray]


def run(
    running: onnxruntime.InferenceSession, ids: np.ndarray, positions: np.ndarray, past: Past | None
) -> tuple[np.ndarray, Past]:
    """One call; without a past, its length is 0."""
    feeds = {"input_ids": ids, "position_ids": positions}
    for one in running.get_inputs()[2:]:
        kind = np.float16 if "float16" in one.type else np.float32
        feeds[one.name] = np.zeros((len(ids), 0, *one.shape[2:]), kind) if past is None else past[one.name]
    logits, *presents = running.run(None, feeds)
    names = [one.name.replace("present", "past_key_values") for one in running.get_outputs()[1:]]
    return logits, dict(zip(names, presents, strict=True))


def expected(definition: Decoder, ids: np.ndarray) -> np.ndarray:
    tokens = torch.from_numpy(ids)
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    return definition(tokens, positions, definition.empty_caches(*tokens.shape))[0].numpy()


@pytest.mark.parametrize("lengths", [[9], [5, 9, 2]], ids=["one row", "ragged"])
def test_prompt_chunk_and_32_steps_agree_with_the_definition(case: Case, lengths: list[int]) -> None:
    prefill, decode = (session(str(case.folder / f"{phase}.onnx")) for phase in ("prefill", "decode"))
    rows, longest, chunk = len(lengths), max(lengths), 3
    ids = np.random.default_rng(0).integers(0, case.config.vocab_size, (rows, longest + chunk + 32))
    truth = expected(case.definition, ids)
    ends = np.array(lengths)

    positions = np.tile(np.arange(longest), (rows, 1))
    logits, past = run(prefill, ids[:, :longest].copy(), positions, None)
    errors = [np.abs(logits[b, :end] - truth[b, :end]).max() for b, end in enumerate(ends)]
    for phase, count in [(prefill, chunk), *[(decode, 1)] * 32]:
        positions = ends[:, None] + np.arange(count)
        logits, past = run(phase, np.take_along_axis(ids, positions, 1), positions, past)
        errors.append(np.abs(logits - np.take_along_axis(truth, positions[..., None], 1)).max())
        ends = ends + count
    assert max(errors) <= 1e-4
    assert all(cache.shape[1] == longest + chunk + 32 for cache in past.values())


@pytest.fixture(scope="module")
def half_program() -> Program:
    return compiled(TINY, replace(FUNCTIONAL, dtype="float16"))


@pytest.mark.parametrize("contrib", [False, True], ids=["standard", "contrib"])
def test_half_precision_stays_near_the_definition(
    contrib: bool, tmp_path: Path, case_of: Callable[[str], Case], half_program: Program
) -> None:
    definition = case_of("v3").definition
    write_onnx(half_program, tmp_path / "half", checkpoint_of(definition).__getitem__, contrib=contrib)
    prefill, decode = (session(str(tmp_path / "half" / f"{phase}.onnx")) for phase in ("prefill", "decode"))
    ids = np.random.default_rng(0).integers(0, TINY.vocab_size, (2, 8))
    positions = np.tile(np.arange(8), (2, 1))
    truth = expected(definition, ids)
    logits, past = run(prefill, ids[:, :7].copy(), positions[:, :7].copy(), None)
    last, past = run(decode, ids[:, 7:].copy(), positions[:, 7:].copy(), past)
    assert {cache.dtype for cache in past.values()} == {np.dtype(np.float16)}
    found = np.concatenate([logits, last], 1)
    # A token may choose another expert in 16 bits, so the mean is what must be small.
    assert np.abs(found - truth).mean() / np.abs(truth).mean() < 2e-2


def test_only_standard_operators_of_one_opset(case: Case) -> None:
    for phase in ("prefill", "decode"):
        model = case.proto(phase)
        assert [(one.domain, one.version) for one in model.opset_import] == [("", 23)]
        assert {node.domain for node in model.graph.node} == {""}
        onnx.checker.check_model(str(case.folder / f"{phase}.onnx"), full_check=True)


def test_every_node_carries_its_module_path(case: Case) -> None:
    modules = {name for name, _ in case.definition.named_modules()} | {""}
    for phase in ("prefill", "decode"):
        nodes = case.proto(phase).graph.node
        assert len({node.name for node in nodes}) == len(nodes)
        for node in nodes:
            path = {entry.key: entry.value for entry in node.metadata_props}["module"]
            assert node.name.startswith(f"{path}/")
            inner = path.removeprefix("model").removeprefix(".")
            assert inner in modules | {f"embed.{m}" for m in modules} or any(m.endswith(inner) for m in modules), path


def test_metadata_tells_the_cache_layout(case: Case) -> None:
    model = case.proto("decode")
    properties = {entry.key: entry.value for entry in model.metadata_props}
    config = case.config
    assert properties["dsv3.family"] == config.model_type and properties["dsv3.opset"] == "23"
    assert ModelConfig.from_dict(json.loads(properties["dsv3.config"])) == config
    layout = json.loads(properties["dsv3.cache_layout"])
    assert layout["past_key_values.1.latent"] == ["batch", "past_sequence", config.kv_lora_rank]
    assert layout["past_key_values.1.rope_key"] == ["batch", "past_sequence", config.qk_rope_head_dim]
    assert [one.name for one in model.graph.input] == ["input_ids", "position_ids", *layout]
    assert [one.name for one in model.graph.output][1:] == [
        name.replace("past_key_values", "present") for name in layout
    ]


@pytest.mark.parametrize("name", ["v3", "v2-group-limited", "experts of V4"])
def test_the_runtimes_own_operators_compute_the_same(name: str, tmp_path: Path, case_of: Callable[[str], Case]) -> None:
    case = case_of(name)
    write_onnx(case.program, tmp_path / "own", checkpoint_of(case.definition).__getitem__, contrib=True)
    ids = np.random.default_rng(0).integers(0, case.config.vocab_size, (3, 8))
    positions = np.tile(np.arange(8), (3, 1))
    truth = expected(case.definition, ids)
    past = None
    for phase, part in (("prefill", slice(0, 7)), ("decode", slice(7, 8))):
        path = tmp_path / "own" / f"{phase}.onnx"
        kinds = [node.op_type for node in onnx.load(path, load_external_data=False).graph.node]
        layers = sum(case.config.is_moe(i) for i in range(case.config.num_hidden_layers))
        assert kinds.count("MoE") == layers
        assert kinds.count("MoEGroupRouter") == (layers if name == "v3" else 0)
        logits, past = run(session(str(path)), ids[:, part].copy(), positions[:, part].copy(), past)
        assert np.abs(logits - truth[:, part]).max() <= 1e-4


def test_both_models_read_one_copy_of_every_weight(case: Case) -> None:
    where: dict[str, set[int]] = {}
    length = 0
    for phase in ("prefill", "decode"):
        for one in case.proto(phase).graph.initializer:
            place = {entry.key: entry.value for entry in one.external_data}
            if place:
                assert place["location"] == "weights.bin"
                where.setdefault(one.name, set()).add(int(place["offset"]))
                length += int(place["length"]) if len(where[one.name]) == 1 and phase == "prefill" else 0
    assert all(len(offsets) == 1 for offsets in where.values())
    assert length == 4 * accounting.parameters(case.config).total


def products(model: onnx.ModelProto, sizes: dict[str, int]) -> dict[str, int]:
    """Multiplications and additions of every MatMul, by node, from ONNX's own shape inference."""
    for one in [*model.graph.input, *model.graph.output]:
        for axis in one.type.tensor_type.shape.dim:
            if axis.dim_param:
                axis.dim_value = sizes[axis.dim_param]
    model = shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    shapes = {one.name: [axis.dim_value for axis in one.type.tensor_type.shape.dim] for one in model.graph.value_info}
    shapes |= {one.name: [axis.dim_value for axis in one.type.tensor_type.shape.dim] for one in model.graph.input}
    shapes |= {one.name: [axis.dim_value for axis in one.type.tensor_type.shape.dim] for one in model.graph.output}
    shapes |= {one.name: list(one.dims) for one in model.graph.initializer}
    matrices = [node for node in model.graph.node if node.op_type in ("MatMul", "Gemm", "Einsum", "Attention")]
    assert {node.op_type for node in matrices} == {"MatMul"}
    found = {node.name: 2 * math.prod(shapes[node.output[0]]) * shapes[node.input[0]][-1] for node in matrices}
    assert all(found.values())
    return found


def test_decode_computes_the_chosen_experts_and_attends_in_the_latent_space(case_of: Callable[[str], Case]) -> None:
    case = case_of("kimi-like, one rotary pair")
    config, context = case.config, 1000
    sizes = dict(batch=1, past_sequence=context - 1, total_sequence=context)
    flops = products(case.proto("decode"), sizes)
    heads, rank = config.num_attention_heads, config.kv_lora_rank
    key, value, rope = config.qk_nope_head_dim, config.v_head_dim, config.qk_rope_head_dim
    expand = 2 * heads * (key + value) * rank * context
    assert max(flops.values()) < expand / 2

    projections = config.q_lora_rank * (config.hidden_size + heads * (key + rope)) + config.hidden_size * (rank + rope)
    projections += heads * rank * (key + value) + heads * value * config.hidden_size
    attention = projections + heads * context * (2 * rank + rope)
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    chosen = config.num_experts_per_tok + config.n_shared_experts
    dense = 3 * config.hidden_size * config.intermediate_size + config.vocab_size * config.hidden_size
    router = config.n_routed_experts * config.hidden_size
    assert sum(flops.values()) <= 1.01 * 2 * (2 * attention + chosen * expert + router + dense)
    experts = sum(count for name, count in flops.items() if "mlp.experts" in name)
    assert experts == 2 * config.num_experts_per_tok * expert


def test_weights_are_written_one_at_a_time(tmp_path: Path, case_of: Callable[[str], Case]) -> None:
    case = case_of("v3")
    tensors = checkpoint_of(case.definition)
    alive = peak = 0

    def read(name: str) -> Tensor:
        nonlocal alive, peak
        tensor = tensors[name].clone()
        alive += tensor.nbytes
        peak = max(peak, alive)
        weakref.finalize(tensor.untyped_storage(), release, tensor.nbytes)
        return tensor

    def release(size: int) -> None:
        nonlocal alive
        alive -= size

    write_onnx(case.program, tmp_path / "again", read)
    largest = max(sum(t.nbytes for name, t in tensors.items() if f"layers.{i}.mlp.experts" in name) for i in range(4))
    assert 0 < peak <= largest
    for name in ("weights.bin", "prefill.onnx", "decode.onnx"):
        assert (tmp_path / "again" / name).read_bytes() == (case.folder / name).read_bytes()


def test_numbers_that_float16_cannot_hold_are_refused(
    tmp_path: Path, case_of: Callable[[str], Case], half_program: Program
) -> None:
    huge = {name: tensor * 1e6 for name, tensor in checkpoint_of(case_of("v3").definition).items()}
    with pytest.raises(ExportError, match=r"model\.embed_tokens\.weight does not fit torch\.float16"):
        write_onnx(half_program, tmp_path / "model", huge.__getitem__)
    assert not (tmp_path / "model").exists()


def test_an_export_needs_weights(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="an export needs weights"):
        export_onnx("deepseek-v3", tmp_path / "model", no_weights=True)


def test_an_unknown_dtype_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="dtype 'bfloat16'; accepted: float32, float16"):
        export_onnx("toy", tmp_path / "model", dtype="bfloat16")
