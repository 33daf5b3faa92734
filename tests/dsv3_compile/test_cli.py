"""The command line: what it prints, its exit status, and one line for everything that is wrong with the input."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import dsv3_compile.driver as driver
from codegen.mlir import MlirError
from dsv3_compile.artifact import Artifact
from dsv3_compile.cli import main
from dsv3_compile.commands import at_fault
from dsv3_compile.native import NativeError
from dsv3_compile.program import BlockGraph
from dsv3_compile.recertify import recertify
from model_def.toy_task import tokenizer_json
from passes.pipeline import DEFAULT_PIPELINE, Pipeline, RequirementError
from passes.verify import CertificateError
from tests.dsv3_compile import tiny

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def checkpoint(checkpoint_folder: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(checkpoint_folder, tmp_path / "checkpoint"))


@pytest.fixture
def artifact(artifact_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(artifact_folder, tmp_path / "artifact"))


@pytest.fixture
def compiled_before() -> Iterator[None]:
    """The compiler's work is done already; what is left is reading the weights and writing."""
    program = tiny.program()
    with patch.object(driver, "build", lambda *_: program):
        yield


NEEDS_TORCH_MLIR = pytest.mark.skipif(find_spec("torch_mlir") is None, reason="torch-mlir has no wheel for this Python")


def error_of(capsys: Capture, *arguments: object, status: int = 2) -> str:
    """The one line that a command says when it fails."""
    assert main([str(argument) for argument in arguments]) == status
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert line.startswith("dsv3c: error: ")
    return line.removeprefix("dsv3c: error: ")


def compile_error(capsys: Capture, model: object, tmp_path: Path, *more: object, status: int = 2) -> str:
    """The same, and nothing may have been written, half-written or left over."""
    before = sorted(tmp_path.iterdir())
    line = error_of(capsys, "compile", model, "-o", tmp_path / "output", *more, status=status)
    assert sorted(tmp_path.iterdir()) == before
    return line


WEIGHTS = "model.safetensors"
Q_A = "model.layers.1.self_attn.q_a_proj.weight"
O_PROJ = "model.layers.1.self_attn.o_proj.weight"


def rewritten(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


DAMAGES: dict[str, tuple[Callable[[dict[str, Tensor]], None], str]] = {
    "missing": (lambda tensors: tensors.pop(Q_A), f"tensor {Q_A} [26, 30] is missing"),
    "extra": (lambda tensors: tensors.update({"model.extra": torch.ones(2)}), "tensor model.extra is not part"),
    "shape": (lambda tensors: tensors.update({Q_A: torch.ones(3, 4)}), f"{Q_A} has shape [3, 4]; expected [26, 30]"),
    "dtype": (lambda tensors: tensors.update({Q_A: torch.ones(26, 30, dtype=torch.int32)}), f"{Q_A} has dtype"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused(damage: str, checkpoint: Path, tmp_path: Path, capsys: Capture) -> None:
    change, message = DAMAGES[damage]
    rewritten(checkpoint, change)
    assert message in compile_error(capsys, checkpoint, tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(
    value: float, checkpoint: Path, tmp_path: Path, capsys: Capture, compiled_before: None
) -> None:
    rewritten(checkpoint, lambda tensors: tensors[Q_A].view(-1)[17:18].fill_(value))
    line = compile_error(capsys, checkpoint, tmp_path)
    assert Q_A in line and "NaN or infinity" in line


@pytest.mark.parametrize("keep", [0, 5, 200, 0.5, 0.999])
def test_a_truncated_file_is_refused(keep: float, checkpoint: Path, tmp_path: Path, capsys: Capture) -> None:
    content = (checkpoint / WEIGHTS).read_bytes()
    (checkpoint / WEIGHTS).write_bytes(content[: int(keep * len(content)) if 0 < keep < 1 else int(keep)])
    assert WEIGHTS in compile_error(capsys, checkpoint, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": {"type": "longrope", "factor": 4}}, "longrope"),
        ({"kv_lora_rank": 0}, "kv_lora_rank"),
        ({"kv_lora_rank": "512"}, "kv_lora_rank"),
        ({"num_experts_per_tok": 99}, "num_experts_per_tok"),
        ({"n_group": 5}, "n_group"),
        ({"qk_rope_head_dim": 7}, "qk_rope_head_dim"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"model_type": "llama"}, "model_type"),
        ({"hidden_size": None}, "hidden_size"),
    ],
    ids=str,
)
def test_an_impossible_config_is_refused(
    changes: dict, message: str, checkpoint: Path, tmp_path: Path, capsys: Capture
) -> None:
    document = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**document, **changes}))
    assert message in compile_error(capsys, checkpoint, tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00"])
def test_a_config_that_is_none_is_refused(text: str, checkpoint: Path, tmp_path: Path, capsys: Capture) -> None:
    (checkpoint / "config.json").write_text(text)
    assert "config.json" in compile_error(capsys, checkpoint, tmp_path)


def test_a_folder_without_a_model_is_refused(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "empty").mkdir()
    assert "config.json is missing" in compile_error(capsys, tmp_path / "empty", tmp_path)
    assert "no such folder" in compile_error(capsys, tmp_path / "nowhere", tmp_path)
    (tmp_path / "file").touch()
    assert "file" in compile_error(capsys, tmp_path / "file", tmp_path)


@pytest.mark.parametrize("text", ["", "{", "{}", json.dumps(tokenizer_json()).replace('"!"', '"\u0416"')])
def test_a_broken_tokenizer_is_refused(text: str, checkpoint: Path, tmp_path: Path, capsys: Capture) -> None:
    (checkpoint / "tokenizer.json").write_text(text)
    assert "tokenizer.json: " in compile_error(capsys, checkpoint, tmp_path)
    assert "tokenizer.json: " in error_of(capsys, "export", checkpoint, "--format", "onnx", "-o", tmp_path / "output")


def test_a_checkpoint_without_weights_is_refused(checkpoint: Path, tmp_path: Path, capsys: Capture) -> None:
    (checkpoint / WEIGHTS).unlink()
    assert WEIGHTS in compile_error(capsys, checkpoint, tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target", "sm_75"], "choose from 'cpu'"),
        (["--dtype", "int8"], "accepted: float32"),
        (["--max-batch", "0"], "max_batch is 0"),
        (["--max-length", "0"], "max_length is 0"),
        (["--max-length", "65"], "the model has 64 positions"),
        (["--max-length", "many"], "--max-length"),
        (["--disable", "fuse-everything"], "unknown pass 'fuse-everything'"),
        (["--require", "fuse-everything"], "unknown pass 'fuse-everything'"),
        (["--require", "lower", "--disable", "lower"], "required pass 'lower' is left out"),
        (["--require", "lower", "--until", "fuse-norm", "--repeat", "fuse-norm"], "required pass 'lower' is left out"),
        (["--set", "fuse-everything.x=1"], "unknown pass 'fuse-everything'"),
        (["--set", "order-contractions.colour=red"], "colour"),
        (["--set", "nonsense"], "nonsense"),
        (["--frobnicate"], "--frobnicate"),
        (["--aot", "--target", "sm_90"], "aot is for target cpu"),
    ],
    ids=" ".join,
)
def test_impossible_options_are_refused(
    options: list[str], message: str, checkpoint_folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert message in compile_error(capsys, checkpoint_folder, tmp_path, *options)


def test_a_preset_has_no_weights_to_compile(tmp_path: Path, capsys: Capture) -> None:
    line = compile_error(capsys, "deepseek-v3", tmp_path)
    assert line == "deepseek-v3 is a preset, which has no weights; name a folder: only compile --no-weights needs none"


def test_an_output_that_is_in_the_way_is_left_alone(checkpoint_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "diary.txt").write_text("dear diary")
    assert "is not an artifact" in compile_error(capsys, checkpoint_folder, tmp_path)
    assert (tmp_path / "output" / "diary.txt").read_text() == "dear diary"


@pytest.mark.parametrize("command", [["compile"], ["export", "--format", "onnx"]], ids=lambda command: command[0])
def test_an_output_that_cannot_be_made_is_found_before_the_work(
    command: list[str], checkpoint_folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "file").touch()
    for output in (tmp_path / "file" / "below" / "it", Path("/proc/output"), tmp_path / ("x" * 300)):
        with patch("model_def.checkpoint.Checkpoint.open", side_effect=AssertionError("begun")):
            line = error_of(capsys, *command, checkpoint_folder, "-o", output)
        assert line.startswith(f"{output}: no folder can be made in ") or "name too long" in line
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("error", [CertificateError, RequirementError, NativeError])
def test_work_that_failed_has_status_1(
    error: type[Exception], checkpoint_folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    with patch.object(driver, "build", side_effect=error("absorb went wrong")):
        assert "absorb went wrong" in compile_error(capsys, checkpoint_folder, tmp_path, status=1)


def test_a_mistake_of_ours_is_not_blamed_on_the_input(checkpoint_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    with patch.object(driver, "build", side_effect=KeyError("k")):
        line = compile_error(capsys, checkpoint_folder, tmp_path, status=1)
    assert "unexpected KeyError" in line and "--debug" in line


def test_debug_adds_the_traceback(tmp_path: Path, capsys: Capture) -> None:
    assert main(["info", str(tmp_path / "nowhere"), "--debug"]) == 2
    said = capsys.readouterr().err
    assert "Traceback" in said and said.splitlines()[-1].startswith("dsv3c: error: ")


def test_compile_writes_an_artifact_and_says_nothing_on_a_silent_stderr(
    checkpoint_folder: Path, tmp_path: Path, capsys: Capture, compiled_before: None
) -> None:
    assert main(["compile", str(checkpoint_folder), "-o", str(tmp_path / "output"), "--json"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert json.loads(said.out)["report"]["blocks"]
    assert (tmp_path / "output" / "tokenizer" / "tokenizer.json").is_file()


# Artifacts


@pytest.mark.parametrize(
    "command",
    [["inspect"], ["generate", "--prompt", "1"], ["verify"], ["bench"]],
    ids=lambda command: command[0],
)
@pytest.mark.parametrize("damage", ["flipped", "missing", "extra", "newer", "absent"])
def test_a_damaged_artifact_is_refused(command: list[str], damage: str, artifact: Path, capsys: Capture) -> None:
    victim = artifact / "graphs" / "moe_decode.py"
    if damage == "flipped":
        victim.write_bytes(victim.read_bytes().replace(b"=", b"-", 1))
    elif damage == "missing":
        victim.unlink()
    elif damage == "extra":
        victim.with_suffix(".pyc").touch()
    elif damage == "newer":
        manifest = artifact / "manifest.json"
        manifest.write_text(manifest.read_text().replace('"schema": 2', '"schema": 3'))
    else:
        shutil.rmtree(artifact)
    expected = {"newer": "schema 3 is newer", "absent": "manifest.json"}.get(damage, "graphs/moe_decode.py")
    expected = expected.replace(".py", ".pyc") if damage == "extra" else expected
    assert expected in error_of(capsys, command[0], artifact, *command[1:])


def test_generate_prints_what_follows_the_prompt(artifact_folder: Path, capsys: Capture) -> None:
    arguments = ["generate", str(artifact_folder), "--prompt", "", "--max-new-tokens", "3"]
    assert main(arguments) == 2
    capsys.readouterr()
    arguments[3] = "\x01\x02"
    with patch("dsv3_compile.commands.open_tokenizer") as tokenizer:
        tokenizer.return_value.encode = lambda text: list(text.encode())
        tokenizer.return_value.decode = lambda ids: "".join(f"<{token}>" for token in ids)
        assert main(arguments) == 0
        text = capsys.readouterr().out
        assert main([*arguments, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert text == document["text"] + "\n" and len(document["tokens"]) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--temperature", "-1"], "temperature"),
        (["--top-p", "0"], "top_p"),
        (["--max-new-tokens", "0"], "--max-new-tokens"),
    ],
    ids=str,
)
def test_impossible_generation_is_refused(
    options: list[str], message: str, artifact_folder: Path, capsys: Capture
) -> None:
    with patch("dsv3_compile.commands.open_tokenizer") as tokenizer:
        tokenizer.return_value.encode = lambda text: [1]
        assert message in error_of(capsys, "generate", artifact_folder, "--prompt", "1", *options)


def test_a_tokenizer_of_more_tokens_than_the_model_is_named(artifact_folder: Path, capsys: Capture) -> None:
    line = error_of(capsys, "generate", artifact_folder, "--prompt", "1")
    assert line == "the tokenizer gives token id 256; the model's vocabulary has 61 tokens"


def test_generate_without_a_tokenizer_is_refused(
    tmp_path: Path, capsys: Capture, checkpoint: Path, compiled_before: None
) -> None:
    (checkpoint / "tokenizer.json").unlink()
    assert main(["compile", str(checkpoint), "-o", str(tmp_path / "output"), "--json"]) == 0
    capsys.readouterr()
    assert "tokenizer" in error_of(capsys, "generate", tmp_path / "output", "--prompt", "1")


def test_info_counts_the_published_model(capsys: Capture) -> None:
    assert main(["info", "deepseek-v3", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["parameters"]["total"] == 671_026_419_200
    assert document["kv_cache"]["bytes_per_token"] == 70_272
    assert document["kv_cache"]["ratio"] == pytest.approx(0.01758, abs=5e-6)
    assert document["flops_per_token"] > 0


@pytest.mark.parametrize("kind", ["checkpoint_folder", "artifact_folder"])
def test_info_reads_folders_and_artifacts(kind: str, request: pytest.FixtureRequest, capsys: Capture) -> None:
    assert main(["info", str(request.getfixturevalue(kind)), "--json"]) == 0
    expected = sum(tensor.numel() for tensor in tiny.trained_looking(tiny.TINY).state_dict().values())
    assert json.loads(capsys.readouterr().out)["parameters"]["total"] == expected


def test_passes_lists_every_option(capsys: Capture) -> None:
    assert main(["passes"]) == 0
    text = capsys.readouterr().out
    assert main(["passes", "--json"]) == 0
    for one in json.loads(capsys.readouterr().out):
        assert one["name"] in text
        assert all(f"--set {one['name']}.{field}=" in text for field in one["options"])


def test_inspect_shows_one_pass(artifact_folder: Path, capsys: Capture) -> None:
    assert main(["inspect", str(artifact_folder), "--pass", "lower", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {row["name"] for block in report["blocks"] for row in block["passes"]} == {"lower"}
    assert "accepted: " in error_of(capsys, "inspect", artifact_folder, "--pass", "lowest")


def test_export_names_the_dtypes_it_takes(tmp_path: Path, capsys: Capture) -> None:
    line = error_of(capsys, "export", "toy", "--format", "onnx", "-o", tmp_path / "model", "--dtype", "bfloat16")
    assert "bfloat16" in line and "accepted: float32, float16" in line and not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("form", "flag"),
    [("onnx", "--inline"), ("onnx", "--dialect=linalg"), ("onnx", "--sizes=1,2,3"), ("mlir", "--contrib")],
)
def test_export_refuses_options_of_the_other_format(form: str, flag: str, tmp_path: Path, capsys: Capture) -> None:
    line = error_of(capsys, "export", "toy", "--format", form, flag, "-o", tmp_path / "model")
    option = flag.partition("=")[0]
    assert f"{option} is not an option of --format {form}" in line and not (tmp_path / "model").exists()


@pytest.mark.parametrize("sizes", ["1,2", "1,2,x", "1,5,4", "0,1,4"])
def test_export_refuses_sizes_it_cannot_read(sizes: str, tmp_path: Path, capsys: Capture) -> None:
    line = error_of(capsys, "export", "toy", "--format", "mlir", "--sizes", sizes, "-o", tmp_path / "model")
    assert "sizes" in line and sizes in line and "expected" in line


@NEEDS_TORCH_MLIR
def test_export_refuses_more_slots_than_the_model_has_positions(
    checkpoint_folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    arguments = ("export", checkpoint_folder, "--format", "mlir", "-o", tmp_path / "model")
    with patch("dsv3_compile.exporting.build", side_effect=MlirError("compiled")):
        line = error_of(capsys, *arguments, "--sizes", "1,8,65")
        assert line == "sizes ask for 65 slots; the model has 64 positions"
        assert error_of(capsys, *arguments, "--sizes", "1,8,64") == "compiled"


@pytest.mark.parametrize("form", ["onnx", pytest.param("mlir", marks=NEEDS_TORCH_MLIR)])
def test_export_replaces_nothing_and_says_so_before_it_compiles(
    form: str, artifact_folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with patch("dsv3_compile.exporting.build", side_effect=AssertionError("compiled")):
        for output in (tmp_path, tmp_path / "notes.txt", artifact_folder):
            before = sorted(output.rglob("*"))
            line = error_of(capsys, "export", "toy", "--format", form, "-o", output)
            assert line == f"{output}: exists, and an export replaces nothing; expected a new folder"
            assert sorted(output.rglob("*")) == before


def test_export_of_an_artifact_whose_checkpoint_moved_says_where_it_was(
    artifact_folder: Path, checkpoint_folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    moved = checkpoint_folder.rename(tmp_path / "moved")
    try:
        line = error_of(capsys, "export", artifact_folder, "--format", "onnx", "-o", tmp_path / "model")
    finally:
        moved.rename(checkpoint_folder)
    assert f"{checkpoint_folder} is not there; name the checkpoint's folder" in line


def test_export_of_an_artifact_whose_checkpoint_is_another_now_is_refused(
    artifact_folder: Path, checkpoint_folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    file = checkpoint_folder / "config.json"
    before = file.read_text()
    file.write_text(json.dumps(json.loads(before) | {"routed_scaling_factor": 3.5}))
    try:
        line = error_of(capsys, "export", artifact_folder, "--format", "onnx", "-o", tmp_path / "model")
    finally:
        file.write_text(before)
    assert f"{checkpoint_folder}: its config is no longer the one that {artifact_folder} was compiled from" in line
    assert not (tmp_path / "model").exists()


def test_verify_passes_on_what_was_compiled(artifact_folder: Path, capsys: Capture) -> None:
    with patch.object(driver, "capture", tiny.captured_before):
        assert main(["verify", str(artifact_folder), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["passed"] and len(report["blocks"]) == 2 * (tiny.TINY.num_hidden_layers + 2)
    assert all(row["cosine"] > 1 - 1e-9 and row["relative_error"] < 1e-5 for row in report["blocks"])
    repeated = report["certificates"]
    assert repeated["certificates"] == 8 * len(DEFAULT_PIPELINE) and 0 < repeated["largest"] <= 1e-10
    assert not repeated["changed"]


def test_verify_says_of_a_checkpoint_that_was_named_what_is_wrong_with_it(
    artifact_folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    line = error_of(capsys, "verify", artifact_folder, "--checkpoint", tmp_path / "nope")
    assert line.startswith(f"{tmp_path / 'nope'}: not a folder; expected one with config.json")


def test_verify_names_graphs_that_another_compiler_made(artifact_folder: Path, capsys: Capture) -> None:
    def without_norms(*given: Any) -> dict[tuple[str, str], BlockGraph]:
        return {key: block for key, block in tiny.captured_before(*given).items() if key[0] in ("embed", "dense")}

    shorter = Pipeline(tuple(one for one in DEFAULT_PIPELINE if one.name() != "fuse-norm"))
    with patch.object(driver, "capture", without_norms), patch.object(driver, "_pipeline", lambda options: shorter):
        repeated = recertify(Artifact.open(artifact_folder), driver.silent)
    assert repeated.changed == ("dense prefill", "dense decode")


def test_verify_fails_on_weights_that_are_not_the_checkpoints(
    artifact_folder: Path, checkpoint: Path, capsys: Capture
) -> None:
    rewritten(checkpoint, lambda tensors: tensors[O_PROJ].mul_(1.01))
    assert main(["verify", str(artifact_folder), "--checkpoint", str(checkpoint), "--json", "--no-certificates"]) == 1
    rows = json.loads(capsys.readouterr().out)["blocks"]
    wrong = {row["layer"] for row in rows if row["relative_error"] > 1e-4}
    assert wrong == {1}, "an error is seen in the layer where it arises, and only there"


def test_every_error_of_the_input_is_one_line(tmp_path: Path) -> None:
    assert all(issubclass(error, (ValueError, OSError)) for error in at_fault())


def test_bench_sets_times_beside_the_floor(artifact_folder: Path, capsys: Capture) -> None:
    with patch("dsv3_compile.benchmark.COPY_BYTES", 1 << 16), patch.dict("dsv3_compile.benchmark.PRODUCT", cpu=64):
        assert main(["bench", str(artifact_folder), "--json"]) == 0
    runs = json.loads(capsys.readouterr().out)["runs"]
    assert {row["phase"] for row in runs} == {"prefill", "decode"}
    assert all(0 < row["floor_seconds"] and 0 < row["seconds"] for row in runs)
