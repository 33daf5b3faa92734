"""Where an artifact runs."""

from __future__ import annotations

import os

import torch

from codegen.targets import Target, target
from dsv3_compile.artifact import Artifact, ArtifactError


def device_for(artifact: Artifact, wanted: str | None, native: bool) -> torch.device:
    """The device that was asked for, or else the one of the target; `native`: with the artifact's compiled graphs.

    Raises ArtifactError when the artifact, or this machine, cannot run there.
    """
    manifest = artifact.manifest
    made_for = target(manifest.target)
    usual = "cpu" if made_for.backend == "cpu" else "cuda"
    said = f"{artifact.folder}: {f'made for {made_for.name}' if wanted is None else f'device is {wanted}'}"
    try:
        device = torch.device(usual if wanted is None else wanted)
    except (RuntimeError, TypeError):
        raise ArtifactError(f"{said}; expected cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise ArtifactError(f"{said}; expected cpu, cuda or cuda:N")
    if device.type == "cpu":
        if artifact.listed("kernels") and os.environ.get("TRITON_INTERPRET", "0") == "0":
            raise ArtifactError(f"{said}; its kernels are for {made_for.name} (TRITON_INTERPRET=1 interprets them)")
        return device
    if native and manifest.native_cpu:
        raise ArtifactError(f"{said}; its native code is for the CPU (native=False runs the graphs as Python source)")
    if not torch.cuda.is_available():
        raise ArtifactError(f"{said}; this machine has no GPU that torch can use")
    if (device.index or 0) >= torch.cuda.device_count():
        raise ArtifactError(f"{said}; this machine has GPUs 0 to {torch.cuda.device_count() - 1}")
    if made_for.backend != "cpu":
        _check_gpu(artifact, made_for, device)
    return device


def _check_gpu(artifact: Artifact, made_for: Target, device: torch.device) -> None:
    """Raises ArtifactError for a GPU of another kind than an artifact was made for."""
    major, minor = torch.cuda.get_device_capability(device)
    found = "AMD's" if torch.version.hip else f"sm_{major}{minor}"
    same = bool(torch.version.hip) == (made_for.backend == "hip")
    if not same or (made_for.backend == "cuda" and major != int(made_for.arch) // 10):
        raise ArtifactError(f"{artifact.folder}: made for {made_for.name}; this GPU is {found}")
