"""A tour of everything that can be seen of the passes, in less than a minute.

python examples/inspect_passes.py                                 the tour, on the toy model
python examples/inspect_passes.py --keep DIR                      leave artifact, dumps, trace and report there
python examples/inspect_passes.py deepseek-v3 --target sm_90 --only order-contractions     one pass on one block
python examples/inspect_passes.py --only fuse-swiglu --phase prefill --whole               with the whole graphs
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from torch import fx

from codegen.targets import TARGETS
from dsv3_compile import cli
from dsv3_compile.capture import capture
from dsv3_compile.driver import workload
from dsv3_compile.inspection import changes, print_graph, short
from dsv3_compile.options import Options
from model_def.presets import PRESETS
from passes.base import Context
from passes.pipeline import PassRecord, Pipeline, RequirementError, check_required
from passes.verify import Specimen, clone

ABSORPTION = "order-contractions"
HOOKS = {"TORCH_LOGS": "+passes", "DSV3_DUMP": "dump", "TORCH_TRACE": "trace"}
SHOWN = 8  # lines of a long listing


def main(arguments: Sequence[str] | None = None) -> list[PassRecord]:
    """Show what the passes do to one block and, unless --only one pass, the tour; returns what each pass did."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="toy", choices=PRESETS, metavar="PRESET")
    parser.add_argument("--block", default="moe", help="embed, head, or a kind of layer")
    parser.add_argument("--phase", default="decode", choices=("prefill", "decode"))
    parser.add_argument("--target", default="cpu", choices=TARGETS)
    parser.add_argument("--only", metavar="PASS", help="print this pass alone; the others run silently")
    parser.add_argument("--whole", action="store_true", help="print whole graphs, not what changed in them")
    parser.add_argument("--keep", metavar="DIR", type=Path, help="folder for what the tour writes")
    chosen = parser.parse_args(arguments)

    options, config = Options(target=chosen.target), PRESETS[chosen.model]
    blocks = capture(config, options.dtype_for(config.dtype))
    if (chosen.block, chosen.phase) not in blocks:
        parser.error(f"--block {chosen.block}: accepted: {', '.join(dict.fromkeys(name for name, _ in blocks))}")
    captured = blocks[chosen.block, chosen.phase].module
    context = Context(chosen.phase, options.machine, workload(config, options, chosen.phase))
    pipeline = Pipeline()
    if chosen.only:
        pipeline.find(chosen.only)

    title(f"What every pass did to the {chosen.block} block in {chosen.phase}, and what it left alone")
    records = pipeline.run(clone(captured), context, printer=print_graph)
    for record in records:
        if chosen.only in (None, record.name):
            print("\n".join(story(record, context)))
        if chosen.only == record.name:
            print("\n".join(graphs(record, chosen.whole)))
    if not chosen.only:
        choose_passes(captured, context)
        with tempfile.TemporaryDirectory() as scratch:
            see_a_compile(chosen.model, chosen.target, chosen.keep or Path(scratch))
    return records


def title(text: str) -> None:
    print(f"\n──── {text} " + "─" * max(0, 100 - len(text)) + "\n")


def story(record: PassRecord, context: Context) -> Iterator[str]:
    """What one pass did, in lines of text."""
    yield record.spec
    for match in record.matches:
        yield f"  matched  {match}"
    for refusal in record.refusals:
        place = f"{refusal.node} ({refusal.source})" if refusal.source else refusal.node
        yield f"  refused  {place}: {refusal.reason}"
    old, new = (cost.at(context.workload) for cost in (record.cost_before, record.cost_after))
    yield (
        f"  {record.nodes_before} → {record.nodes_after} nodes, {short(old.flops)} → {short(new.flops)} FLOPs, "
        f"{short(old.bytes)} → {short(new.bytes)} bytes, {record.seconds * 1e3:.0f} ms"
    )


def graphs(record: PassRecord, whole: bool) -> Iterator[str]:
    """The graph as Python around one pass."""
    if whole:
        yield from ("", "before", record.text_before, "after", record.text_after)
    else:
        yield from changes(record.text_before, record.text_after)


def choose_passes(captured: fx.GraphModule, context: Context) -> None:
    """End early, repeat, set an option, and require what then cannot fire."""
    title("Passes ended early, run twice, certified; and one that was required but did not fire")
    settings = [f"{ABSORPTION}.{context.phase}=expanded"]
    pipeline = Pipeline().configured(settings, until=ABSORPTION, repeat=["canonicalise"])
    module = clone(captured)
    records = pipeline.run(module, context, specimen=Specimen.of(module))
    for record in records:
        assert record.certificate is not None
        print(f"{record.spec}: {len(record.matches)} matches, certified to {record.certificate.max_rel_error:.0e}")
    try:
        check_required(records, [ABSORPTION])
    except RequirementError as error:
        print(f"--require {ABSORPTION}: {error}")


def see_a_compile(model: str, target: str, folder: Path) -> None:
    """A compile with every hook on, in a process of its own as torch reads its variables when it starts; and all
    that `dsv3c inspect` shows of the artifact."""
    folder.mkdir(parents=True, exist_ok=True)
    artifact, page = folder / "artifact", folder / "report.html"
    hooks = {name: value if value.startswith("+") else str(folder / value) for name, value in HOOKS.items()}
    command = ["compile", model, "-o", str(artifact), "--target", target, "--no-weights", "--require", ABSORPTION]
    title(" ".join([*(f"{name}={value}" for name, value in HOOKS.items()), "dsv3c", *command]))
    logged = in_own_process(command, hooks)
    show_some("TORCH_LOGS", [line.partition("] ")[2] for line in logged])
    show_some("DSV3_DUMP", [str(path.relative_to(folder)) for path in sorted((folder / "dump").glob("moe_decode/*"))])
    trace = "".join(path.read_text(errors="replace") for path in (folder / "trace").iterdir())
    show_some("TORCH_TRACE, for tlparse", re.findall(r'"name": "(dsv3_[^"]+)"', trace))

    absorbed = ["--pass", ABSORPTION, "--block", "moe", "--phase", "decode", "--diff"]
    for shown in ([], absorbed, ["--kernels"], ["--html", str(page)]):
        title(" ".join(["dsv3c inspect", artifact.name, *shown]))
        cli.main(["inspect", str(artifact), *shown])


def in_own_process(command: Sequence[str], hooks: Mapping[str, str]) -> list[str]:
    """Lines of stderr of a `dsv3c` command. Raises CalledProcessError."""
    arguments = [sys.executable, "-m", "dsv3_compile", *command]
    done = subprocess.run(arguments, env={**os.environ, **hooks}, capture_output=True, text=True, check=True)
    return done.stderr.splitlines()


def show_some(name: str, lines: Sequence[str]) -> None:
    print(f"{name}: {len(lines)} lines")
    for line in lines[:SHOWN]:
        print(f"  {line}")


if __name__ == "__main__":
    main()
