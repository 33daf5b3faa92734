"""The artifact: a folder that holds a compiled model and runs without the compiler.

    manifest.json      what is in the folder, how it fits together, and the SHA-256 of every other file
    manifest.sha256    the SHA-256 of manifest.json, in the format of `sha256sum --check`
    graphs/            one Python file per block and phase
    native/            the same graphs compiled for this machine's CPU (AOTInductor), where asked for
    kernels/           Triton kernels of a GPU target: source, binaries, launch metadata
    weights/           bound weights, safetensors
    tokenizer/         copied from the checkpoint
    report/            what every pass did

Graphs and kernels are code: loading an artifact executes it, so load only what you trust. Nothing is unpickled.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SCHEMA = 2
MANIFEST = "manifest.json"
DIGEST = "manifest.sha256"

FILL = "fill"
"""A third graph of the last layer's block: the part of its prefill that writes the caches. Of a prompt of which only
the last position goes on, that layer computes no more than this and a decode step."""


class ArtifactError(ValueError):
    """A folder that is not an intact artifact. One line: which file, and what is wrong with it."""


@dataclass(frozen=True)
class Port:
    """An input or output of a graph. Sizes are numbers or letters (B batch, S queries, T context)."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    role: str = "activation"


@dataclass(frozen=True)
class GraphEntry:
    """One block in one phase, or as FILL says."""

    source: str  # path in the folder
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    native: str | None = None  # path of the compiled graph


@dataclass(frozen=True)
class Step:
    """One step of the schedule: a block, and the bound tensor behind each of its weight inputs."""

    block: str
    layer: int | None
    weights: Mapping[str, str]


@dataclass(frozen=True)
class Manifest:
    """Everything about an artifact that is not a tensor or code."""

    versions: Mapping[str, str]  # of dsv3_compile, torch, triton
    target: str
    dtype: str
    config: Mapping[str, Any]
    max_batch: int
    max_length: int
    passes: tuple[str, ...]  # specs in the order they ran
    graphs: Mapping[str, Mapping[str, GraphEntry]]  # block → phase → graph
    schedule: tuple[Step, ...]
    weights: str  # "bound" or "none"
    checkpoint: str = ""  # folder that the weights came from; only `dsv3c verify` looks there
    origin: str = "definition"  # whose layers were compiled: ours, or transformers' own code
    native_cpu: str = ""  # identity of the processor that native/ was compiled for
    files: Mapping[str, str] = field(default_factory=dict)  # path → SHA-256
    schema: int = SCHEMA

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    @classmethod
    def from_document(cls, document: dict[str, Any]) -> Manifest:
        """Raises KeyError or TypeError for fields that are missing, unknown or of the wrong kind."""
        graphs = {
            block: {phase: _graph_entry(entry) for phase, entry in phases.items()}
            for block, phases in document["graphs"].items()
        }
        schedule = tuple(Step(**step) for step in document["schedule"])
        return cls(**{**document, "graphs": graphs, "schedule": schedule, "passes": tuple(document["passes"])})


def _graph_entry(document: dict[str, Any]) -> GraphEntry:
    ports = {key: tuple(_port(p) for p in document[key]) for key in ("inputs", "outputs")}
    return GraphEntry(**{**document, **ports})


def _port(document: dict[str, Any]) -> Port:
    return Port(**{**document, "shape": tuple(document["shape"])})


@dataclass(frozen=True)
class Artifact:
    """An artifact on disk whose files have been checked against its manifest."""

    folder: Path
    manifest: Manifest

    @classmethod
    def open(cls, folder: str | Path) -> Artifact:
        """Check everything and read the manifest. Raises ArtifactError for the first thing that is wrong."""
        folder = Path(folder)
        manifest = read_manifest(folder)
        present = {str(path.relative_to(folder)) for path in _files(folder)} - {MANIFEST, DIGEST}
        for name in sorted(manifest.files.keys() - present):
            raise ArtifactError(f"{folder / name}: file is missing, {MANIFEST} lists it")
        for name in sorted(present - manifest.files.keys()):
            raise ArtifactError(f"{folder / name}: {MANIFEST} does not list this file; remove it")
        for name, digest in manifest.files.items():
            if sha256(folder / name) != digest:
                raise ArtifactError(f"{folder / name}: content differs from its SHA-256 in {MANIFEST}")
        return cls(folder, manifest)

    def path(self, name: str) -> Path:
        return self.folder / name

    def listed(self, prefix: str) -> list[Path]:
        """Files of one subfolder, by name."""
        return [self.folder / name for name in sorted(self.manifest.files) if name.startswith(f"{prefix}/")]


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder, itself checked; the other files are not looked at."""
    path = folder / MANIFEST
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror}); expected an artifact folder") from error
    try:
        document = json.loads(text)
    except ValueError as error:
        raise ArtifactError(f"{path}: is not JSON ({error})") from error
    schema = document.get("schema") if isinstance(document, dict) else None
    if not isinstance(schema, int) or schema < 1:
        raise ArtifactError(f"{path}: schema is {schema!r}; expected a number, {SCHEMA} of this release")
    if schema > SCHEMA:
        raise ArtifactError(f"{path}: schema {schema} is newer than {SCHEMA}, which this release reads")
    if schema < SCHEMA:
        raise ArtifactError(f"{path}: schema {schema} is older than {SCHEMA}, which this release reads: compile again")
    digest = folder / DIGEST
    try:
        expected = digest.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{digest}: cannot be read ({error.strerror})") from error
    if expected != _digest_line(text):
        raise ArtifactError(f"{path}: content differs from its SHA-256 in {DIGEST}")
    try:
        return Manifest.from_document(document)
    except (KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path}: not a manifest of schema {schema} ({error})") from error


def is_artifact(folder: str | Path) -> bool:
    return (Path(folder) / MANIFEST).is_file()


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def writing(output: str | Path) -> Iterator[Path]:
    """A folder to fill that becomes `output` at once when the block ends, or vanishes if it fails.

    A process killed in between leaves a hidden sibling, which the next write to `output` removes. An artifact
    that is already there is replaced, behind a link too. Raises ArtifactError when something else is in the way.
    """
    check_output(output)
    output = Path(output).resolve()
    made = [folder for folder in output.parents if not folder.exists()]
    partial = _sibling(output, "partial")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(output)
        partial.mkdir()
        yield partial
        if output.exists():
            old = _sibling(output, "old")
            output.rename(old)
            try:
                partial.rename(output)
            except BaseException:
                old.rename(output)
                raise
            shutil.rmtree(old)
        else:
            partial.rename(output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        with suppress(OSError):  # something of somebody else's may lie in them by now
            for folder in made:
                folder.rmdir()
        raise


def write_whole(file: str | Path, text: str) -> None:
    """Write a file at once or not at all, behind a link too; a pipe or a device is simply written to.

    Raises ArtifactError for a place inside of an artifact, OSError with the name of the file for one that cannot be.
    """
    file = Path(file)
    if file.exists() and not file.is_file():
        file.write_text(text, encoding="utf-8")
        return
    _outside(file)
    target = file.resolve()
    partial = _sibling(target, "partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(target)
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(file)) from error
    finally:
        with suppress(OSError):
            partial.unlink()


def check_output(output: str | Path) -> None:
    """Raises ArtifactError when something that is not an artifact is in the way, or no folder can be made there; also
    inside of another artifact, which would no longer be intact."""
    output = Path(output)
    _outside(output)
    if output.is_dir() and (is_artifact(output) or not any(output.iterdir())):
        if Path.cwd().is_relative_to(output.resolve()):
            raise ArtifactError(f"{output}: holds the current folder; expected one that can be put in its place")
    elif output.exists() or output.is_symlink():
        raise ArtifactError(f"{output}: exists and is not an artifact; expected a new folder or an artifact")
    _try_folder(output)


def new_folder(output: str | Path) -> None:
    """Raises ArtifactError unless an export may write there: nothing is replaced, not even an artifact."""
    output = Path(output)
    taken = any(output.iterdir()) if output.is_dir() else output.exists() or output.is_symlink()
    if taken:
        raise ArtifactError(f"{output}: exists, and an export replaces nothing; expected a new folder")
    check_output(output)


def _outside(output: Path) -> None:
    """Raises ArtifactError for a place inside of an artifact: its manifest lists every file."""
    for folder in output.resolve().parents:
        if is_artifact(folder):
            raise ArtifactError(f"{output}: lies inside of the artifact {folder}; expected a place outside")


def _try_folder(output: Path) -> None:
    """Raises ArtifactError where no folder can be made. Permissions would not tell: root has all of them in /proc."""
    target = output.resolve()
    there = next(folder for folder in target.parents if folder.exists())
    trial = _sibling(there / target.name, "trial")
    try:
        trial.mkdir()
        trial.rmdir()
    except OSError as error:
        raise ArtifactError(f"{output}: no folder can be made in {there} ({error.strerror})") from error


def seal(folder: Path, manifest: Manifest) -> Manifest:
    """Write the manifest of a filled folder, with the SHA-256 of every file in it."""
    files = {str(path.relative_to(folder)): sha256(path) for path in sorted(_files(folder))}
    manifest = dataclasses.replace(manifest, files=files)
    text = manifest.to_json().encode()
    (folder / MANIFEST).write_bytes(text)
    (folder / DIGEST).write_bytes(_digest_line(text))
    return manifest


def _digest_line(manifest: bytes) -> bytes:
    return f"{hashlib.sha256(manifest).hexdigest()}  {MANIFEST}\n".encode()


def _files(folder: Path) -> list[Path]:
    """Everything in a folder that is not a plain folder: links and devices count as files."""
    return [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]


def _sibling(output: Path, kind: str) -> Path:
    """A hidden name beside `output` that nobody else has, not even another thread."""
    return output.parent / f".{output.name}.{os.getpid()}-{secrets.token_hex(4)}.{kind}"


def _remove_leftovers(output: Path) -> None:
    name = re.compile(rf"\.{re.escape(output.name)}\.(\d+)-[0-9a-f]+\.(trial|partial|old)")
    for path in output.parent.iterdir():
        found = name.fullmatch(path.name)
        if found and not _alive(int(found[1])):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # somebody else's
    return True


Progress = Callable[[str], None]
"""Told what is being done, one short line at a time."""
