"""The questions a reader brings to a report, answered in a sentence or two from its numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import ceil
from typing import Any

from dsv3_compile.inspection import short

ABSORPTION = "order-contractions"


@dataclass(frozen=True)
class Answer:
    """A question, its answer, further lines, and the place in the report (block, phase, pass) that shows it."""

    question: str
    answer: str
    lines: tuple[str, ...] = ()
    place: tuple[str, str, str] | None = None
    tone: str = "plain"  # "good", "bad" or "plain"


def answers(report: dict[str, Any]) -> list[dict[str, Any]]:
    found = [equality(report), gain(report), removed(report), price(report), silent(report)]
    return [asdict(answer) for answer in found if answer is not None]


def equality(report: dict[str, Any]) -> Answer:
    """Is it still the same model?"""
    question = "Is the result still the same model?"
    rows = [(block, row) for block in report["blocks"] for row in block["passes"]]
    checked = [(block, row) for block, row in rows if row["certificate"]]
    if not checked:
        return Answer(question, "Nobody checked: the certificates were switched off for this compile.", tone="bad")
    block, row = max(checked, key=lambda pair: pair[1]["certificate"]["max_rel_error"])
    worst = row["certificate"]
    wholes = [block["certificate"]["max_rel_error"] for block in report["blocks"] if block["certificate"]]
    together = f" All passes together change no block by more than {_exponent(max(wholes))}." if wholes else ""
    twin = " Blocks too large to run are certified on a twin of the same structure with small sizes."
    return Answer(
        question,
        f"Yes. Each of {len(checked)} steps was run before and after on the same inputs in {worst['dtype']}; the "
        f"largest relative difference is {_exponent(worst['max_rel_error'])}, and {_exponent(worst['bound'])} would "
        f"have stopped the compile.{together}" + (twin if any(r["certificate"]["proxy"] for _, r in checked) else ""),
        place=(block["name"], block["phase"], row["name"]),
        tone="good",
    )


def _exponent(number: float) -> str:
    """8e-16 with a hyphen at which no line breaks."""
    return f"{number:.0e}".replace("-", "\N{NON-BREAKING HYPHEN}")


def gain(report: dict[str, Any]) -> Answer | None:
    """What does all of it buy?"""
    lines, best = [], ""
    for phase in ("prefill", "decode"):
        blocks = [block for block in report["blocks"] if block["phase"] == phase]
        before, after = (sum(_seconds(block, end) for block in blocks) for end in ("cost_before", "cost_after"))
        size = blocks[0]["workload"]
        lines.append(
            f"{phase}: {duration(before)} → {duration(after)}, "
            f"{before / after:.1f} times less (B={size['batch']} S={size['queries']} T={size['context']})"
        )
        best = f"{before / after:.1f}" if phase == "decode" else best
    return Answer(
        "What do the passes buy?",
        f"The least time that {report['target']} needs for a step of the whole model, from operations, bytes and "
        f"launches, falls {best} times in decode.",
        tuple(lines),
    )


def _seconds(block: dict[str, Any], end: str) -> float:
    row = block["passes"][0 if end == "cost_before" else -1]
    return row[end]["at"]["seconds"] * max(1, len(block["layers"]))


def removed(report: dict[str, Any]) -> Answer | None:
    """What did absorption remove?"""
    changed = [(block, row) for block, row in _rows(report, ABSORPTION) if row["matches"]]
    if not changed:
        return None
    block, row = max(changed, key=lambda pair: (_saved(pair[1]), len(pair[0]["layers"])))
    before, after = _flops(row, "cost_before"), _flops(row, "cost_after")
    size = block["workload"]
    return Answer(
        "What did absorption remove?",
        f"Rebuilding keys and values from the latent at every cached position: {short(before - after)}FLOP of "
        f"{short(before)}FLOP in each {block['name']} layer of a {block['phase']} step "
        f"(B={size['batch']}, T={size['context']}). The scores are taken against the latent itself.",
        tuple(row["matches"]),
        (block["name"], block["phase"], ABSORPTION),
    )


def price(report: dict[str, Any]) -> Answer | None:
    """What did it cost?"""
    if not report["phase_plans"]:
        return None
    plan = report["phase_plans"][0]
    forms = {form["form"]: form for form in plan["forms"]}
    extra = forms["absorbed"]["weight_bytes"] - forms["expanded"]["weight_bytes"]
    priced = [f"{name}: {forms[name]['flops']} FLOPs" for name in ("expanded", "absorbed")]
    if "folded" in forms:  # with a single head there is nothing to fold
        folded = forms["folded"]["weight_bytes"] - forms["expanded"]["weight_bytes"]
        priced.append(f"folded: {forms['folded']['flops']} FLOPs, and {short(folded)}B more weights per layer")
    storage = "No stored bytes" if extra <= 0 else f"{short(extra)}B of weights per layer"
    words = crossover_words(plan)
    return Answer(
        "What does absorption cost?",
        f"{storage}, but wider dot products for every pair of query and cached position, so it pays only while few "
        f"queries share a context. {words}",
        tuple(priced),
        (plan["blocks"][0], "prefill", ABSORPTION),
    )


def crossover_words(plan: dict[str, Any]) -> str:
    """Where absorbing stops to pay, in words."""
    (pair,) = [c for c in plan["crossovers"] if set(c["forms"]) == {"absorbed", "expanded"}]
    if pair["far"] is None:
        return "One of the two forms needs fewer operations for any number of queries."
    return f"Absorbing takes fewer operations below {ceil(pair['far'])} queries per expansion of a long context."


def decode_words(plan: dict[str, Any], target: str) -> str:
    """Which form is the fastest in decode, from which context on and up to which batch, in words."""
    wins = [pair["faster"] for pair in plan["decode"]]
    best = max(dict.fromkeys(wins), key=wins.count)
    parts = []
    for pair in plan["decode"]:
        if best not in pair["forms"]:
            continue
        (other,) = set(pair["forms"]) - {best}
        contexts = "any context" if pair["context"] is None else f"a context of {pair['context']:,} positions or more"
        rows = "any batch" if pair["batch"] is None else f"a batch below {pair['batch']:,} rows"
        parts.append(f"than {other} at {contexts} and {rows}")
    return f"In decode on {target}, {best} is faster {', and '.join(parts)}."


def silent(report: dict[str, Any]) -> Answer:
    """Which passes did not fire, and why?"""
    quiet, lines = [], []
    for name in dict.fromkeys(row["name"] for block in report["blocks"] for row in block["passes"]):
        rows = _rows(report, name)
        if not any(row["matches"] for _, row in rows):
            quiet.append(name)
            if not any(row["refusals"] for _, row in rows):
                lines.append(f"{name}: nothing in the model looks like it")
        lines += list(_refused(name, rows))
    fired = f"{', '.join(quiet)} never fired. " if quiet else "Every pass fired somewhere. "
    left = sum(len(row["refusals"]) for block in report["blocks"] for row in block["passes"])
    refused = f"{left} candidate{'s were' if left != 1 else ' was'} looked at and left." if left else ""
    return Answer("Which pass did not fire, and why?", (fired + refused).strip(), tuple(lines))


def _refused(name: str, rows: list[tuple[dict[str, Any], dict[str, Any]]]) -> Iterator[str]:
    seen: dict[str, list[str]] = {}
    for block, row in rows:
        for refusal in row["refusals"]:
            seen.setdefault(refusal["reason"], []).append(f"{block['name']} {block['phase']}")
    for reason, places in seen.items():
        yield f"{name} in {', '.join(dict.fromkeys(places))}: {reason}"


def _rows(report: dict[str, Any], name: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    return [(block, row) for block in report["blocks"] for row in block["passes"] if row["name"] == name]


def _flops(row: dict[str, Any], end: str) -> int:
    return row[end]["at"]["flops"]


def _saved(row: dict[str, Any]) -> int:
    return _flops(row, "cost_before") - _flops(row, "cost_after")


def duration(seconds: float) -> str:
    """Three digits and a unit: 1.23 ms."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"
