"""Reading and writing Hugging Face folders, and every way they can be wrong."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model_def import fp8
from model_def.checkpoint import DERIVED, INDEX, SCALE, SINGLE, Checkpoint, CheckpointError, expected_shapes, write
from model_def.config import BlockQuantization, ModelConfig
from tests.model_def.builders import all_logits, from_folder

CONFIG = ModelConfig(
    hidden_size=20,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=12,
    vocab_size=11,
    kv_lora_rank=7,
    qk_nope_head_dim=5,
    qk_rope_head_dim=4,
    v_head_dim=6,
    moe_intermediate_size=8,
    n_routed_experts=3,
    n_shared_experts=2,
    num_experts_per_tok=2,
    first_k_dense_replace=1,
    num_nextn_predict_layers=1,
    torch_dtype="float32",
)
DOWN = "model.layers.0.mlp.down_proj.weight"
NORM = "model.norm.weight"
HEAD = "lm_head.weight"
MTP = "model.layers.2.enorm.weight"
SHAPES = expected_shapes(CONFIG)


def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def quantise(weight_NK: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """float8_e4m3fn and the scales to multiply by, from the largest element of each block."""
    largest = torch.stack(
        [torch.stack([part.abs().max() for part in rows.split(block[1], dim=1)]) for rows in weight_NK.split(block[0])]
    )
    scales = largest / 448.0
    spread = scales.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    scaled = weight_NK / spread[: weight_NK.shape[0], : weight_NK.shape[1]]
    return scaled.to(torch.float8_e4m3fn), scales


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "single", CONFIG, weights().items())
    return tmp_path / "single"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    write(tmp_path / "sharded", CONFIG, weights().items(), shard_bytes=9000)
    return tmp_path / "sharded"


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / SINGLE).items()}
    change(tensors)
    save_file(tensors, folder / SINGLE)


def error_of(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder).validate()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_single_file_round_trip_keeps_every_tensor_and_the_config(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    checkpoint.validate()
    assert checkpoint.config == CONFIG
    assert sorted(checkpoint.names()) == sorted(SHAPES)
    for name, tensor in weights().items():
        assert checkpoint.shape(name) == SHAPES[name]
        assert checkpoint.dtype(name) == torch.float32
        assert torch.equal(checkpoint.tensor(name), tensor)


def test_a_sharded_round_trip_keeps_every_tensor(sharded: Path) -> None:
    shards = sorted(sharded.glob("*.safetensors"))
    assert [path.name for path in shards] == [f"model-0000{i}-of-000003.safetensors" for i in (1, 2, 3)]
    assert all(sum(t.nbytes for t in load_file(path).values()) <= 9000 for path in shards)
    checkpoint = Checkpoint.open(sharded)
    checkpoint.validate()
    for name, tensor in weights().items():
        assert torch.equal(checkpoint.tensor(name), tensor)


def test_views_of_one_buffer_are_written_with_their_own_values(tmp_path: Path) -> None:
    buffer = torch.arange(24.0)

    def reused():
        yield "first", buffer.view(4, 6).t()
        buffer.neg_()
        yield "second", buffer[3:9]

    write(tmp_path / "views", CONFIG, reused())
    stored = load_file(tmp_path / "views" / SINGLE)
    assert torch.equal(stored["first"], torch.arange(24.0).view(4, 6).t())
    assert torch.equal(stored["second"], -torch.arange(3.0, 9.0))


@pytest.mark.parametrize("block", [(128, 128), (64, 32)])
@pytest.mark.parametrize("shape", [(300, 130), (128, 256), (1, 1)])
def test_fp8_is_multiplied_by_the_scale_of_its_block_also_at_partial_edges(shape, block) -> None:
    torch.manual_seed(5)
    weight_NK = torch.randn(shape) * torch.logspace(-3, 3, shape[0])[:, None]
    stored, scales = quantise(weight_NK, block)
    assert scales.shape == fp8.scale_shape(shape, block)
    restored = fp8.dequantise(stored, scales, block)
    assert restored.dtype == torch.float32
    for row, column in {(0, 0), (shape[0] - 1, shape[1] - 1), (shape[0] // 2, shape[1] // 2)}:
        scale = scales[row // block[0], column // block[1]]
        assert restored[row, column] == stored[row, column].float() * scale
    # Half a step of e4m3 (3 mantissa bits) relative, or of its smallest number for the small ones.
    spread = scales.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[: shape[0], : shape[1]]
    assert ((restored - weight_NK).abs() <= weight_NK.abs() / 16 + spread * 2.0**-10).all()


def test_an_fp8_checkpoint_is_read_with_its_scales_from_another_file(tmp_path: Path) -> None:
    stored, scales = quantise(weights()[DOWN], (128, 128))
    given = weights() | {DOWN: stored, DOWN + SCALE: scales}
    write(tmp_path / "fp8", CONFIG, sorted(given.items(), reverse=True), shard_bytes=1)
    checkpoint = Checkpoint.open(tmp_path / "fp8")
    checkpoint.validate()
    assert checkpoint.dtype(DOWN) == torch.float8_e4m3fn
    assert torch.equal(checkpoint.tensor(DOWN), stored.float() * scales)


def test_a_model_read_from_fp8_computes_with_the_dequantised_weights(tmp_path: Path) -> None:
    block = (16, 6)
    config = replace(CONFIG, quantization=BlockQuantization(block))
    stored, plain = {}, {}
    for name, tensor in weights().items():
        stored[name] = plain[name] = tensor
        if tensor.dim() == 2 and not any(part in name for part in ("embed_tokens", "lm_head", "mlp.gate.")):
            stored[name], stored[name + SCALE] = quantise(tensor, block)
            plain[name] = fp8.dequantise(stored[name], stored[name + SCALE], block)
    write(tmp_path / "fp8", config, stored.items())
    write(tmp_path / "plain", CONFIG, plain.items())
    ids = torch.randint(CONFIG.vocab_size, (1, 9), generator=torch.Generator().manual_seed(2))
    found, expected = (all_logits(from_folder(tmp_path / name), ids) for name in ("fp8", "plain"))
    assert expected.std() > 0.1
    assert torch.equal(found, expected)


def test_rotary_frequencies_and_unwanted_layers_are_passed_over(folder: Path) -> None:
    frequencies = "model.layers.0.self_attn" + DERIVED
    rewrite(folder, lambda t: t.update({MTP: torch.ones(20), frequencies: torch.ones(2)}))
    assert sorted(Checkpoint.open(folder).names()) == sorted(SHAPES)
    assert sorted(Checkpoint.open(folder, mtp=True).names()) == sorted([*SHAPES, MTP])


def test_the_prediction_layer_is_checked_when_it_is_asked_for(folder: Path) -> None:
    extra = {n: torch.ones(s) for n, s in expected_shapes(CONFIG, mtp=True).items() if n not in SHAPES}
    copies = {f"model.layers.2.{n}.weight": torch.ones(11, 20) for n in ("embed_tokens", "shared_head.head")}
    rewrite(folder, lambda t: t.update(extra | copies))
    checkpoint = Checkpoint.open(folder, mtp=True)
    checkpoint.validate()
    assert set(checkpoint.names()) == {*SHAPES, *extra}
    rewrite(folder, lambda t: t.pop(MTP))
    Checkpoint.open(folder).validate()
    with pytest.raises(CheckpointError, match="enorm.weight .* is missing"):
        Checkpoint.open(folder, mtp=True).validate()


def test_a_model_without_a_prediction_layer_cannot_be_asked_for_it(tmp_path: Path) -> None:
    write(tmp_path / "plain", replace(CONFIG, num_nextn_predict_layers=0), weights().items())
    with pytest.raises(CheckpointError, match="no multi-token-prediction layer"):
        Checkpoint.open(tmp_path / "plain", mtp=True)


@pytest.mark.parametrize("stored", [True, False])
def test_tied_embeddings_need_no_output_matrix(tmp_path: Path, stored: bool) -> None:
    given = {name: tensor for name, tensor in weights().items() if stored or name != HEAD}
    write(tmp_path / "tied", replace(CONFIG, tie_word_embeddings=True), given.items())
    checkpoint = Checkpoint.open(tmp_path / "tied")
    checkpoint.validate()
    assert HEAD not in checkpoint.names()


def test_a_layer_behind_the_predicted_ones_is_not_passed_over(folder: Path) -> None:
    name = "model.layers.3.enorm.weight"
    rewrite(folder, lambda t: t.update({name: torch.ones(20)}))
    assert f"tensor {name} is not part of this model" in error_of(folder)


def test_reading_never_loads_a_whole_shard(tmp_path: Path) -> None:
    megabyte = 1 << 18
    write(tmp_path / "large", CONFIG, ((f"t{i}", torch.full((megabyte,), float(i))) for i in range(64)))
    checkpoint = Checkpoint.open(tmp_path / "large")

    def anonymous_kib() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

    before = anonymous_kib()
    for i in range(64):
        tensor = checkpoint.tensor(f"t{i}")
        assert tensor[-1] == i
        assert anonymous_kib() - before < 8 * 1024


def truncate(folder: Path, keep: float) -> None:
    data = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(data[: int(len(data) * keep)])


WRONG = {
    "missing tensor": (lambda t: t.pop(NORM), f"tensor {NORM} [20] is missing"),
    "extra tensor": (lambda t: t.update(extra=torch.ones(1)), "tensor extra is not part of this model"),
    "wrong shape": (
        lambda t: t.update({NORM: torch.ones(21)}),
        f"tensor {NORM} has shape [21]; expected [20]",
    ),
    "transposed": (
        lambda t: t.update({DOWN: t[DOWN].t().contiguous()}),
        f"tensor {DOWN} has shape [12, 20]; expected [20, 12]",
    ),
    "integers": (
        lambda t: t.update({NORM: torch.ones(20, dtype=torch.int32)}),
        "has dtype I32; accepted: F64",
    ),
    "fp8 without scale": (
        lambda t: t.update({DOWN: t[DOWN].to(torch.float8_e4m3fn)}),
        f"is F8_E4M3, but {DOWN}{SCALE} is missing",
    ),
    "wrong scale shape": (
        lambda t: t.update({DOWN: t[DOWN].to(torch.float8_e4m3fn), DOWN + SCALE: torch.ones(2, 1)}),
        f"tensor {DOWN}{SCALE} has shape [2, 1]; expected [1, 1]",
    ),
    "wrong scale dtype": (
        lambda t: t.update({DOWN: t[DOWN].to(torch.float8_e4m3fn), DOWN + SCALE: torch.ones(1, 1).bfloat16()}),
        "expected F32",
    ),
    "scale of a float32 tensor": (
        lambda t: t.update({DOWN + SCALE: torch.ones(1, 1)}),
        f"{DOWN} is not F8_E4M3 and takes no scale",
    ),
    "scale of nothing": (
        lambda t: t.update({"model.gone.weight_scale_inv": torch.ones(1, 1)}),
        "tensor model.gone.weight_scale_inv is not part of this model",
    ),
    "fp8 vector": (
        lambda t: t.update({NORM: torch.ones(20).to(torch.float8_e4m3fn), NORM + SCALE: torch.ones(1, 1)}),
        "expected a matrix",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_contents_are_named(folder: Path, case: str) -> None:
    change, message = WRONG[case]
    rewrite(folder, change)
    assert message in error_of(folder)


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_named(folder: Path, keep: float) -> None:
    truncate(folder, keep)
    assert f"{folder / SINGLE}: not a whole safetensors file" in error_of(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite_are_found_on_reading(folder: Path, value: float) -> None:
    def poison(tensors: dict[str, Tensor]) -> None:
        tensors[DOWN][7, 3] = value

    rewrite(folder, poison)
    checkpoint = Checkpoint.open(folder)
    checkpoint.validate()
    checkpoint.tensor(NORM)
    with pytest.raises(CheckpointError, match=f"tensor {DOWN} holds NaN or infinity"):
        checkpoint.tensor(DOWN)


def test_an_fp8_scale_that_is_not_finite_is_found_on_reading(folder: Path) -> None:
    scale = torch.full((1, 1), float("inf"))
    rewrite(folder, lambda t: t.update({DOWN: t[DOWN].to(torch.float8_e4m3fn), DOWN + SCALE: scale}))
    with pytest.raises(CheckpointError, match="holds NaN or infinity"):
        Checkpoint.open(folder).tensor(DOWN)


def edit_index(sharded: Path, change: Callable[[dict], object]) -> None:
    document = json.loads((sharded / INDEX).read_text())
    change(document)
    (sharded / INDEX).write_text(json.dumps(document))


INDEXES = {
    "missing shard": (
        lambda folder: (folder / "model-00002-of-000003.safetensors").unlink(),
        f"model-00002-of-000003.safetensors: file is missing, but {INDEX} lists it",
    ),
    "tensor elsewhere": (
        lambda folder: edit_index(
            folder, lambda d: d["weight_map"].update({NORM: "model-00001-of-000003.safetensors"})
        ),
        f"model-00001-of-000003.safetensors: tensor {NORM} is missing, but {INDEX} says it is here",
    ),
    "dangling tensor": (
        lambda folder: save_file(
            load_file(folder / "model-00002-of-000003.safetensors") | {"stray": torch.ones(1)},
            folder / "model-00002-of-000003.safetensors",
        ),
        f"tensor stray is not listed for it in {INDEX}",
    ),
    "outside the folder": (
        lambda folder: edit_index(folder, lambda d: d["weight_map"].update({NORM: "../other.safetensors"})),
        "expected a file of this folder",
    ),
    "no map": (lambda folder: edit_index(folder, dict.clear), "not an index"),
    "empty map": (
        lambda folder: edit_index(folder, lambda d: d["weight_map"].clear()),
        "weight_map is empty",
    ),
    "not JSON": (lambda folder: (folder / INDEX).write_text("{"), "not an index"),
}


@pytest.mark.parametrize("case", INDEXES)
def test_a_wrong_index_is_named(sharded: Path, case: str) -> None:
    change, message = INDEXES[case]
    change(sharded)
    assert message in error_of(sharded)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert "not a folder" in error_of(tmp_path / "nowhere")


def test_a_file_in_place_of_the_folder_is_named(folder: Path) -> None:
    assert "not a folder" in error_of(folder / SINGLE)


@pytest.mark.parametrize("file", ["config.json", SINGLE])
def test_a_missing_file_is_named(folder: Path, file: str) -> None:
    (folder / file).unlink()
    assert file in error_of(folder) and "is missing" in error_of(folder)


def test_asking_for_an_unknown_tensor_names_it(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="tensor nothing is missing"):
        Checkpoint.open(folder).tensor("nothing")


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    def fails():
        yield NORM, torch.ones(20)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "new", CONFIG, fails(), shard_bytes=1)
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_given_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="given twice"):
        write(tmp_path / "new", CONFIG, [(NORM, torch.ones(20)), (NORM, torch.ones(20))])
    assert list(tmp_path.iterdir()) == []


def test_an_existing_checkpoint_is_not_overwritten(folder: Path) -> None:
    before = (folder / SINGLE).read_bytes()
    with pytest.raises(CheckpointError, match="exists already"):
        write(folder, CONFIG, [(NORM, torch.ones(20))])
    assert (folder / SINGLE).read_bytes() == before


def test_a_copied_folder_reads_the_same(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    assert torch.equal(Checkpoint.open(tmp_path / "copy").tensor(HEAD), weights()[HEAD])
