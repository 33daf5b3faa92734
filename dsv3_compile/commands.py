"""What each `dsv3c` command does: one function per command, taking the parsed arguments, giving the exit status."""

from __future__ import annotations

import inspect as introspection
import json
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dsv3_compile import driver
from dsv3_compile.artifact import ArtifactError, is_artifact, read_manifest
from dsv3_compile.benchmark import measure
from dsv3_compile.inspection import inspect as inspected
from dsv3_compile.inspection import short, table
from dsv3_compile.native import NativeError
from dsv3_compile.options import OptionError
from dsv3_compile.progress import Display
from dsv3_compile.report.terminal import show
from dsv3_compile.runtime import load
from dsv3_compile.tokenizer import TokenizerError, open_tokenizer
from dsv3_compile.tracing import CaptureError
from dsv3_compile.verification import verify as verified
from model_def import accounting
from model_def.checkpoint import CheckpointError
from model_def.config import ModelConfig
from model_def.presets import PRESETS
from model_def.validate import ConfigError
from passes.pipeline import DEFAULT_PIPELINE, RequirementError
from passes.plan import NoSuchForm
from passes.settings import PassError
from passes.verify import CertificateError

DONE, FAILED = 0, 1


class UsageError(ValueError):
    """Arguments that do not fit together."""


def at_fault() -> tuple[type[Exception], ...]:
    """Errors that mean that the input is wrong."""
    from codegen.mlir import MlirError
    from codegen.onnx import ExportError
    from dsv3_compile.transformers_layers import TransformersError

    own = (ArtifactError, CaptureError, ExportError, MlirError, OptionError, TokenizerError, UsageError)
    return (*own, CheckpointError, ConfigError, NoSuchForm, PassError, TransformersError, OSError)


def failures() -> tuple[type[Exception], ...]:
    """Errors that mean that the work failed."""
    return (CertificateError, RequirementError, NativeError)


def info(options: Namespace) -> int:
    config = _config(options.model)
    cache = accounting.kv_cache(config)
    flops = accounting.flops_per_token(config)
    document = {
        "model": options.model,
        "model_type": config.model_type,
        "parameters": asdict(accounting.parameters(config)),
        "mtp_parameters": asdict(accounting.mtp_parameters(config)),
        "kv_cache": {**asdict(cache), "ratio": cache.ratio},
        "flops_per_token": flops.weights,
        "flops_per_token_and_cached_token": flops.per_cached_token,
    }
    if options.json:
        return _print_json(document)
    parameters = document["parameters"]
    rows = [
        ("parameters", f"{parameters['total']:,}"),
        ("active per token", f"{parameters['active']:,}"),
        ("multi-token prediction", f"{document['mtp_parameters']['total']:,}"),
        ("cache per token", f"{cache.bytes_per_token:,} bytes, {cache.ratio:.3%} of multi-head attention"),
        ("  multi-head", f"{cache.mha_bytes_per_token:,} bytes"),
        ("  grouped-query", f"{cache.gqa_bytes_per_token:,} bytes"),
        ("  multi-query", f"{cache.mqa_bytes_per_token:,} bytes"),
        ("FLOPs per token", f"{short(flops.weights)} + {short(flops.per_cached_token)} per cached token"),
    ]
    for name, value in rows:
        print(f"{name:<24}{value}")
    return DONE


def compile(options: Namespace) -> int:
    settings: dict[str, Any] = {
        "target": options.target,
        "origin": options.origin,
        "dtype": options.dtype,
        "set": options.set,
        "disable": options.disable,
        "require": options.require,
        "until": options.until,
        "repeat": options.repeat,
        "verify": not options.no_verify,
        "no_weights": options.no_weights,
        "aot": options.aot,
    }
    limits = {"max_batch": options.max_batch, "max_length": options.max_length}
    settings |= {name: value for name, value in limits.items() if value is not None}
    start = time.perf_counter()
    with Display() as display:
        artifact = driver.compile(options.model, options.output, progress=display, **settings)
    seconds = time.perf_counter() - start
    report = inspected(artifact.folder)
    if options.json:
        return _print_json({"artifact": str(artifact.folder), "seconds": seconds, "report": report})
    print(table(report))
    print(f"{artifact.folder}: {len(artifact.manifest.files)} files, {seconds:.1f} s")
    return DONE


def generate(options: Namespace) -> int:
    if options.max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens is {options.max_new_tokens}; expected a number from 1")
    if not options.prompt:
        raise UsageError("--prompt is empty")
    model = load(options.artifact)
    tokenizer = open_tokenizer(model.artifact.path("tokenizer"))
    ids = tokenizer.encode(options.prompt)
    known = model.config["vocab_size"]
    if max(ids, default=0) >= known:
        raise UsageError(f"the tokenizer gives token id {max(ids)}; the model's vocabulary has {known} tokens")
    prompt = torch.tensor([ids], dtype=torch.int64)
    start = time.perf_counter()
    tokens: list[int] = []
    shown = ""
    try:
        steps = model.stream(
            prompt,
            options.max_new_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            seed=options.seed,
        )
        for step in steps:
            tokens.append(int(step[0]))
            text = tokenizer.decode(tokens)
            # A character may be spread over several tokens; it is shown once it is whole.
            if not options.json and not text.endswith("\N{REPLACEMENT CHARACTER}"):
                print(text[len(shown) :], end="", flush=True)
                shown = text
    except ValueError as error:
        raise UsageError(error) from error
    text = tokenizer.decode(tokens)
    if options.json:
        seconds = time.perf_counter() - start
        return _print_json({"prompt": options.prompt, "text": text, "tokens": tokens, "seconds": seconds})
    print(text[len(shown) :])
    return DONE


def inspect(options: Namespace) -> int:
    return show(options)


def verify(options: Namespace) -> int:
    with Display() as display:
        report = verified(options.artifact, options.checkpoint, display, not options.no_certificates)
    if options.json:
        _print_json(report)
    else:
        for row in report["blocks"]:
            where = row["block"] if row["layer"] is None else f"layer {row['layer']} ({row['block']})"
            print(f"{where:<24}{row['phase']:<9}cosine {row['cosine']:.9f}  error {row['relative_error']:.1e}")
        print(f"{report['files']} files intact; largest error {report['largest']:.1e}, bound {report['bound']:.0e}")
        print("\n".join(_repeated(report["certificates"])))
    if not report["passed"]:
        print("dsv3c: error: the artifact differs from the reference definition", file=sys.stderr)
        return FAILED
    return DONE


def _repeated(certificates: dict[str, Any] | None) -> Iterator[str]:
    if certificates is None:
        yield "certificates of the passes: not repeated"
        return
    yield f"{certificates['certificates']} certificates repeated; largest error {certificates['largest']:.1e}"
    for block in certificates["changed"]:
        yield f"{block}: this version of the compiler makes another graph of it than the artifact holds"


def export(options: Namespace) -> int:
    from dsv3_compile.export import export_onnx
    from dsv3_compile.export_mlir import export_mlir

    for other in {"mlir": ("contrib",), "onnx": ("inline", "dialect", "sizes")}[options.format]:
        if getattr(options, other):
            raise UsageError(f"--{other} is not an option of --format {options.format}")
    settings: dict[str, Any] = {"dtype": options.dtype, "verify": not options.no_verify}
    with Display() as display:
        if options.format == "mlir":
            settings |= {"dialect": options.dialect or "linalg", "inline": options.inline}
            settings["sizes"] = _sizes(options.sizes)
            done = export_mlir(options.model, options.output, progress=display, **settings)
        else:
            settings["contrib"] = options.contrib
            done = export_onnx(options.model, options.output, progress=display, **settings)
    files = {path.name: path.stat().st_size for path in sorted(done.folder.iterdir())}
    if options.json:
        return _print_json({"folder": str(done.folder), "converted": done.converted, "files": files})
    for name, size in files.items():
        print(f"{name:<24}{size:>16,} bytes")
    if done.converted:
        print(done.converted)
    return DONE


def _sizes(text: str | None) -> Any:
    from dsv3_compile.export_mlir import Sizes

    if text is None:
        return None
    numbers = text.split(",")
    if len(numbers) != 3 or not all(number.strip().isdigit() for number in numbers):
        raise UsageError(f"--sizes is {text!r}; expected BATCH,TOKENS,SLOTS such as 1,32,256")
    return Sizes(*map(int, numbers))


def bench(options: Namespace) -> int:
    report = measure(load(options.artifact))
    if options.json:
        return _print_json(report)
    print(f"memory {short(report['machine']['bytes_per_second'])}B/s, ", end="")
    print(
        f"matrix products {short(report['machine']['flops_per_second'])}FLOP/s, {report['machine']['threads']} threads"
    )
    for row in report["runs"]:
        size = f"B={row['batch']} S={row['queries']} T={row['context']}"
        share = row["floor_seconds"] / row["seconds"]
        print(
            f"{row['phase']:<8} {size:<20} {row['seconds'] * 1e3:9.2f} ms  "
            f"{short(row['tokens_per_second']):>7} tokens/s  floor {row['floor_seconds'] * 1e3:8.2f} ms ({share:.0%})"
        )
    return DONE


def passes(options: Namespace) -> int:
    if options.json:
        return _print_json([{"name": p.name(), "spec": repr(p), "options": p.options()} for p in DEFAULT_PIPELINE])
    for one in DEFAULT_PIPELINE:
        print(f"{one.name()}\n{_indented(introspection.getdoc(type(one)) or '')}")
        for field, value in one.options().items():
            print(f"    --set {one.name()}.{field}={value}")
        print()
    return DONE


def _config(model: str) -> ModelConfig:
    if is_artifact(model):
        return ModelConfig.from_dict(dict(read_manifest(Path(model)).config))
    if model in PRESETS and not Path(model).exists():
        return PRESETS[model]
    if not Path(model).exists():
        raise UsageError(f"{model}: no such folder; accepted: a folder, an artifact, or {', '.join(PRESETS)}")
    return ModelConfig.from_file(model)


def _indented(text: str) -> str:
    return "\n".join(f"    {line}".rstrip() for line in text.splitlines())


def _print_json(document: Any) -> int:
    print(json.dumps(document, indent=2))
    return DONE
