"""torch.compile(model, backend="dsv3") on families that no pass was written for: what it finds, and equal numbers."""

from pathlib import Path

import pytest
import torch

from dsv3_compile import backend
from dsv3_compile.backend import reports
from passes import certify
from tests.foreign.families import FAMILIES, build

FAST = {"glm4_moe_lite", "hy_v4"}
DOCUMENT = Path(__file__).parents[2] / "docs" / "torch_compile.md"


EVERY = pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)


def last_values(found):
    return found.logits if hasattr(found, "logits") else found.last_hidden_state


def steps(call, prompt, token):
    """What a model says behind a prompt and behind one more token."""
    with torch.no_grad():
        first = call(input_ids=prompt, use_cache=True)
        second = call(input_ids=token, past_key_values=first.past_key_values, use_cache=True)
    return last_values(first), last_values(second)


@EVERY
def test_a_family_is_found_and_gives_the_same_numbers(name):
    model, family = build(name), FAMILIES[name]
    torch.manual_seed(1)
    prompt, token = torch.randint(3, 97, (2, 9)), torch.randint(3, 97, (2, 1))
    expected = steps(model, prompt, token)
    torch._dynamo.reset()
    found = steps(torch.compile(model, backend="dsv3"), prompt, token)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    report = reports()[-1]
    assert report["fallback"] == "" and report["uncertified"] == []
    matches = {one["name"]: len(one["matches"]) for block in report["blocks"] for one in block["passes"]}
    assert matches["order-contractions"] >= 2 * family.latent  # scores and outputs
    assert family.latent or not matches["order-contractions"]
    wanted = {
        "fuse-attention": family.streamed,
        "fuse-routing": family.routed,
        "fuse-experts": family.grouped,
    }
    assert {name: matches[name] for name in wanted} == wanted


@EVERY
def test_no_graph_of_a_family_is_left_alone_where_only_parts_of_it_can_be_certified(name, monkeypatch):
    monkeypatch.setattr(certify, "MOST_NUMBERS", 30_000)  # less than a layer holds, and much less than a model
    monkeypatch.setattr(backend, "inductor", lambda module, *_: module.forward)
    torch._dynamo.reset()
    backend._reports.clear()
    prompt, token = torch.full((2, 9), 3), torch.full((2, 1), 5)
    steps(torch.compile(build(name), backend="dsv3"), prompt, token)
    assert reports() and not [report["fallback"] for report in reports() if report["fallback"]]


def test_the_documentation_lists_what_is_tested():
    shown = [
        [family.shown, f"`{name}`", *cells(family.latent, family.streamed, family.routed, family.grouped)]
        for name, family in FAMILIES.items()
    ]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in DOCUMENT.read_text().splitlines()]
    assert [row for row in rows if len(row) == 6][2:] == shown  # behind a heading and a rule


def cells(latent, streamed, *others):
    return ["yes" if latent else "", "some" if 0 < streamed < latent else "yes" if streamed else "", *map(yes, others)]


def yes(count):
    return "yes" if count else ""
