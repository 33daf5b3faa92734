"""The folder: intact or refused, whole or not there."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dsv3_compile.artifact import (
    SCHEMA,
    Artifact,
    ArtifactError,
    check_output,
    new_folder,
    read_manifest,
    write_whole,
    writing,
)
from dsv3_compile.packaging import write_artifact
from model_def.decoder import Decoder
from tests.dsv3_compile import tiny


@pytest.fixture
def copy(artifact_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(artifact_folder, tmp_path / "copy"))


def flip_bit(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position % len(content)] ^= 1
    path.write_bytes(content)


def test_an_intact_artifact_opens(artifact_folder: Path) -> None:
    manifest = Artifact.open(artifact_folder).manifest
    assert [step.block for step in manifest.schedule] == ["embed", "dense", "moe", "moe", "moe", "head"]
    assert manifest.config["kv_lora_rank"] == tiny.TINY.kv_lora_rank


def test_every_file_is_guarded_against_one_flipped_bit(copy: Path) -> None:
    names = sorted(str(path.relative_to(copy)) for path in copy.rglob("*") if path.is_file())
    assert {"manifest.json", "manifest.sha256", "report/passes.json"} < set(names)
    generator = random.Random(0)
    for name in names:
        before = (copy / name).read_bytes()
        flip_bit(copy / name, generator.randrange(len(before)))
        with pytest.raises(ArtifactError, match=r"SHA-256|JSON|schema"):
            Artifact.open(copy)
        (copy / name).write_bytes(before)
    Artifact.open(copy)


def test_a_missing_file_is_named(copy: Path) -> None:
    (copy / "graphs" / "moe_decode.py").unlink()
    with pytest.raises(ArtifactError, match=r"graphs/moe_decode\.py: file is missing"):
        Artifact.open(copy)


@pytest.mark.parametrize("name", ["graphs/__init__.py", "extra", "weights/.hidden"])
def test_an_extra_file_is_named(copy: Path, name: str) -> None:
    (copy / name).touch()
    with pytest.raises(ArtifactError, match=f"{name}: .*does not list"):
        Artifact.open(copy)


def test_a_link_in_place_of_a_folder_is_an_extra_file(copy: Path, tmp_path: Path) -> None:
    (copy / "linked").symlink_to(tmp_path)
    with pytest.raises(ArtifactError, match="linked"):
        Artifact.open(copy)


def test_a_newer_schema_is_refused_before_anything_else(copy: Path) -> None:
    document = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**document, "schema": SCHEMA + 1, "unheard": "of"}))
    with pytest.raises(ArtifactError, match=f"schema {SCHEMA + 1} is newer than {SCHEMA}"):
        Artifact.open(copy)


def test_an_older_schema_says_what_to_do(copy: Path) -> None:
    document = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**document, "schema": SCHEMA - 1}))
    with pytest.raises(ArtifactError, match=f"schema {SCHEMA - 1} is older than {SCHEMA}, .*: compile again"):
        Artifact.open(copy)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"schema": "1"}', '{"schema": 0}'])
def test_a_manifest_that_is_none_is_refused(copy: Path, text: str) -> None:
    (copy / "manifest.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"manifest\.json: (is not JSON|schema is)"):
        read_manifest(copy)


def test_a_folder_that_is_no_artifact_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="expected an artifact folder"):
        Artifact.open(tmp_path)


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), writing(tmp_path / "out") as folder:
        (folder / "half").touch()
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_no_folder_that_was_made_for_it(tmp_path: Path) -> None:
    for others in ([], ["theirs"]):
        with pytest.raises(RuntimeError), writing(tmp_path / "far" / "below" / "out"):
            for name in others:
                (tmp_path / "far" / name).touch()
            raise RuntimeError
        assert [path.name for path in tmp_path.rglob("*")] == (["far", *others] if others else [])


def test_writes_to_one_place_at_a_time_keep_apart(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with writing(out) as first, pytest.raises(RuntimeError), writing(out) as second:
        assert first != second
        (first / "manifest.json").touch()
        raise RuntimeError
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "manifest.json"]


def test_nothing_is_written_into_an_artifact(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(copy / "report")
    for inside in (copy / "new", copy / "graphs" / "new" / "below", tmp_path / "link" / "page.html"):
        for write in (check_output, new_folder, lambda place: write_whole(place, "text")):
            with pytest.raises(ArtifactError, match=f"{inside}: lies inside of the artifact {copy}"):
                write(inside)
    Artifact.open(copy)


def test_a_file_that_cannot_be_written_is_named_as_it_was_asked_for(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder, error in (("missing", FileNotFoundError), ("file", NotADirectoryError)):
        with pytest.raises(error) as caught:
            write_whole(tmp_path / folder / "page.html", "text")
        assert caught.value.filename == str(tmp_path / folder / "page.html")


def test_weights_that_find_no_room_are_one_line_and_leave_nothing(tmp_path: Path, definition: Decoder) -> None:
    program, read = tiny.program(), tiny.checkpoint_of(definition).__getitem__
    with tiny.no_room(50_000), pytest.raises(ArtifactError, match=r"model-00000\.safetensors: cannot be written"):
        write_artifact(program, tmp_path / "out", passes=[], max_batch=3, max_length=32, read=read)
    assert list(tmp_path.iterdir()) == []


def test_a_write_replaces_an_artifact(copy: Path) -> None:
    with writing(copy) as folder:
        (folder / "new").touch()
    assert [path.name for path in copy.iterdir()] == ["new"]
    assert [path.name for path in copy.parent.iterdir()] == ["copy"]


def test_a_failed_write_keeps_the_artifact_that_was_there(copy: Path) -> None:
    with pytest.raises(RuntimeError), writing(copy):
        raise RuntimeError
    Artifact.open(copy)


def test_a_write_refuses_to_replace_anything_else(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="exists and is not an artifact"):
        check_output(tmp_path)
    with pytest.raises(ArtifactError, match="exists and is not an artifact"):
        check_output(tmp_path / "notes.txt")


def test_the_check_of_an_output_leaves_nothing(copy: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    for output in (copy, tmp_path / "new", tmp_path / "far" / "below"):
        check_output(output)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_write_through_a_link_replaces_the_artifact_behind_it(copy: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(copy)
    with writing(link) as folder:
        (folder / "new").touch()
    assert link.readlink() == copy
    assert [path.name for path in copy.iterdir()] == ["new"]


def test_a_write_refuses_to_replace_the_folder_one_stands_in(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(copy / "graphs")
    for output in ("..", copy):
        with pytest.raises(ArtifactError, match="holds the current folder"), writing(output):
            pass
    Artifact.open(copy)


def test_leftovers_of_a_killed_process_are_removed_and_those_of_a_living_one_kept(tmp_path: Path) -> None:
    dead = multiprocessing.get_context("fork").Process(target=int)
    dead.start()
    dead.join()
    gone, kept = tmp_path / f".out.{dead.pid}-0a.partial", tmp_path / f".out.{os.getppid()}-0a.partial"
    longer, file = tmp_path / f".out.bf16.{dead.pid}-0a.partial", tmp_path / f".out.{dead.pid}-0a.old"
    for folder in (gone, kept, longer):
        folder.mkdir()
    file.touch()
    with writing(tmp_path / "out"):
        pass
    assert not gone.exists() and not file.exists() and kept.exists() and longer.exists()


def test_the_older_artifact_comes_back_where_a_new_one_cannot_take_its_place(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="no"), writing(copy):
        pass
    Artifact.open(copy)
    assert [path for path in copy.parent.iterdir() if path.name.startswith(f".{copy.name}")] == []


@pytest.mark.parametrize("replaced", [False, True], ids=["new", "over an older one"])
def test_a_process_killed_at_any_moment_leaves_a_whole_artifact_or_none(
    tmp_path: Path, definition: Decoder, replaced: bool
) -> None:
    program, read = tiny.program(), tiny.checkpoint_of(definition).__getitem__
    older, output = tmp_path / "older", tmp_path / "out"

    def write() -> None:
        write_artifact(program, output, passes=[], max_batch=3, max_length=32, read=read)

    write()
    output.rename(older)
    found = []
    for moment in range(1, 1000):
        if replaced:
            shutil.copytree(older, output)
        killed = dies_at(moment, write)
        found.append(output.exists())
        if output.exists():
            Artifact.open(output)
            shutil.rmtree(output)
        if not killed:
            break
    assert not killed and found[-1], "the write never came to its end"
    assert len(found) > 10 and False in found, "no kill fell into the write"


def dies_at(moment: int, work: Callable[[], None]) -> bool:
    """Do the work in a process that kills itself before its `moment`-th use of the file system; did it come to that?"""

    def doomed() -> None:
        left = moment

        def count(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal left
            left -= event == "open" or event.startswith(("os.", "shutil."))
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        work()

    process = multiprocessing.get_context("fork").Process(target=doomed)
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0
