"""Watch one block go through the passes: its graph before and after each, and why anything was left alone.

python examples/inspect_passes.py                                 the toy model's MoE layer, in decode
python examples/inspect_passes.py deepseek-v3 --phase prefill --target sm_90
python examples/inspect_passes.py --only fuse-swiglu --whole      whole graphs instead of differences
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

from codegen.targets import TARGETS
from dsv3_compile.capture import capture
from dsv3_compile.driver import workload
from dsv3_compile.inspection import changes, print_graph, short
from dsv3_compile.options import Options
from model_def.presets import PRESETS
from passes.base import Context
from passes.pipeline import PassRecord, Pipeline


def main(arguments: Sequence[str] | None = None) -> list[PassRecord]:
    """Print the story of one block; returns what each pass did."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="toy", choices=PRESETS, metavar="PRESET")
    parser.add_argument("--block", default="moe", help="embed, head, or a kind of layer")
    parser.add_argument("--phase", default="decode", choices=("prefill", "decode"))
    parser.add_argument("--target", default="cpu", choices=TARGETS)
    parser.add_argument("--only", metavar="PASS", help="print this pass alone; the others run silently")
    parser.add_argument("--whole", action="store_true", help="print whole graphs, not what changed in them")
    chosen = parser.parse_args(arguments)

    options, config = Options(target=chosen.target), PRESETS[chosen.model]
    blocks = capture(config, options.dtype_for(config.dtype))
    if (chosen.block, chosen.phase) not in blocks:
        parser.error(f"--block {chosen.block}: accepted: {', '.join(dict.fromkeys(name for name, _ in blocks))}")
    module = blocks[chosen.block, chosen.phase].module
    context = Context(chosen.phase, options.machine, workload(config, options, chosen.phase))
    pipeline = Pipeline()
    if chosen.only:
        pipeline.find(chosen.only)

    records = pipeline.run(module, context, printer=print_graph)
    if not chosen.only:
        print(records[0].text_before)
    for record in records:
        if chosen.only in (None, record.name):
            print("\n".join(story(record, context, chosen.whole)))
    return records


def story(record: PassRecord, context: Context, whole: bool) -> Iterator[str]:
    """What one pass did, in lines of text."""
    yield f"──── {record.spec} " + "─" * max(0, 100 - len(record.spec))
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
    if whole:
        yield from ("", "before", record.text_before, "after", record.text_after)
    else:
        yield from changes(record.text_before, record.text_after)
    yield ""


if __name__ == "__main__":
    main()
