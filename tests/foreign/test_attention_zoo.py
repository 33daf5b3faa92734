"""Hand-written attentions over a latent: those whose decode step is absorbed, and why the others are not."""

import pytest
import torch

from codegen.targets import target
from passes.base import Context, Workload, is_call
from passes.pipeline import FOREIGN_PIPELINE, Pipeline
from passes.verify import Specimen
from tests.foreign import mla_zoo as zoo
from tests.passes.capture import module_graph

ATTENTION = Pipeline(FOREIGN_PIPELINE[: [one.name() for one in FOREIGN_PIPELINE].index("close-attention") + 1])
ANY = Context("any", target("cpu"), Workload(0, 0, 0))  # sizes are those in the graph


def compiled(module, context=ANY, **sizes):
    """The graph behind the attention passes, each certified in float64, and their records by name."""
    graph = module_graph(module.to(sizes.get("dtype", torch.float32)), *zoo.inputs(**sizes))
    records = ATTENTION.run(graph, context, specimen=Specimen.of(graph))
    return graph.graph, {record.name: record for record in records}


def ops(graph):
    """Names of attention ops and softmaxes, in order."""
    names = (torch.ops.dsv3.mla_attention, torch.ops.dsv3.attention, torch.ops.aten.scaled_dot_product_attention)
    softmax = (torch.ops.aten.softmax, torch.ops.aten._softmax, torch.ops.aten._safe_softmax)
    return [str(node.target).split(".")[1] for node in graph.nodes if is_call(node, *names, *softmax)]


def reasons(records, name):
    return "; ".join(refusal.reason for refusal in records[name].refusals)


ABSORBED = [
    zoo.HeadFirst, zoo.FilledBuffers, zoo.SequenceFirst, zoo.SplitUpProjection, zoo.MatrixPerHead,
    zoo.BiasedQueries, zoo.BiasedOutput, zoo.OneDownProjection, zoo.OneCache, zoo.WideValues,
    zoo.ComplexRotation, zoo.HalfSplitRotation, zoo.Eager, zoo.ScaledApart, zoo.NoMask, zoo.RepeatedRopeKey,
    zoo.InterleavedRopeKey, zoo.ScaledLatent, zoo.NormalisedLatent, zoo.ScaledBehindMask, zoo.LowestBehindMask,
    zoo.FarBelowBehindMask, zoo.HeadsInBatch, zoo.RepeatedMask, zoo.ExpandedMask, zoo.HeadsInBatchUnmasked,
    zoo.ScaledByProduct, zoo.ScaledByProductOntoZeros,
]  # fmt: skip


@pytest.mark.parametrize("variant", ABSORBED)
def test_decode_reads_the_latent(variant):
    graph, records = compiled(variant())
    assert len(records["order-contractions"].matches) == 2, reasons(records, "order-contractions")
    assert ops(graph) == ["mla_attention"], reasons(records, "fuse-attention")


@pytest.mark.parametrize("variant", [zoo.NoRope, zoo.GroupedLatents])
def test_without_a_rope_key_the_latent_is_key_and_value(variant):
    graph, records = compiled(variant())
    assert len(records["order-contractions"].matches) == 2
    assert ops(graph) == ["attention"], reasons(records, "fuse-attention")


@pytest.mark.parametrize("variant", [zoo.AlreadyAbsorbed, zoo.OneQuery, zoo.OneQueryUnmasked])
def test_what_is_absorbed_already_needs_no_other_order(variant):
    graph, records = compiled(variant())
    assert not records["order-contractions"].matches
    assert ops(graph) == ["mla_attention"], reasons(records, "fuse-attention")


@pytest.mark.parametrize(
    "variant, softmax, reason",
    [
        (zoo.PaddedMask, "_safe_softmax", "joins several conditions"),
        (zoo.FloatMask, "_safe_softmax", "not a mask of zero and −∞"),
        (zoo.NegativeBehindMask, "softmax", "is multiplied by -0.2"),
        (zoo.HiddenByLittle, "softmax", "before the softmax is not a mask with −∞"),
        (zoo.MasksOfRows, "softmax", "differs between the rows that batch and heads are folded to"),
        (zoo.MasksOfHeads, "softmax", "differs from head to head"),
        (zoo.MasksOfAnotherBatch, "softmax", "has rows for another batch"),
    ],
)
def test_other_masks_are_absorbed_as_products(variant, softmax, reason):
    graph, records = compiled(variant())
    assert len(records["order-contractions"].matches) == 2
    assert ops(graph) == [softmax] and reason in reasons(records, "fuse-attention")


@pytest.mark.parametrize(
    "variant, reason",
    [
        (zoo.BentKeys, "the edge getitem_2 → tanh_1 is not linear"),
        (zoo.BiasedUpProjection, "adds a bias to the keys"),
        (zoo.ExpandedCaches, "come in expanded already: cat_1 caches keys, not latents"),
    ],
)
def test_near_misses_stay_closed(variant, reason):
    graph, records = compiled(variant())
    assert not records["open-attention"].matches and reason in reasons(records, "open-attention")
    assert ops(graph) == ["scaled_dot_product_attention"]


LONG = Context("decode", target("sm_90"), Workload(1, 1, 4096))


@pytest.mark.parametrize(
    "variant", [zoo.HeadFirst, zoo.SequenceFirst, zoo.HeadsInBatch, zoo.RepeatedMask, zoo.OneQuery]
)
def test_free_sizes_are_no_obstacle(variant):
    graph, records = compiled(variant(), LONG, batch="B", cached="T")
    assert len(records["order-contractions"].matches) == (0 if variant is zoo.OneQuery else 2)
    assert ops(graph) == ["mla_attention"], reasons(records, "fuse-attention")


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("variant", [zoo.HeadsInBatch, zoo.RepeatedMask, zoo.ExpandedMask])
def test_heads_are_found_in_a_batch_of_any_size(variant, queries, batch):
    graph, records = compiled(variant(), queries=queries, batch=batch)
    assert ops(graph) == ["mla_attention"], reasons(records, "fuse-attention")


def test_keys_that_fill_a_cache_are_computed_anyway():
    graph, records = compiled(zoo.KeysReturned(), queries=33)
    assert "used by output as well and must be computed anyway" in reasons(records, "order-contractions")
    assert ops(graph) == ["scaled_dot_product_attention"]


def test_prefill_of_a_fresh_prompt_stays_expanded():
    graph, records = compiled(zoo.NoMask(), queries=33)
    assert not records["order-contractions"].matches
    assert ops(graph) == ["scaled_dot_product_attention"]


@pytest.mark.parametrize("variant", [zoo.TriangularMask, zoo.TriangularMaskOfFourDims])
def test_a_triangular_mask_is_a_comparison_of_positions(variant):
    few, records = compiled(variant(), queries=3)
    assert ops(few) == ["mla_attention"], reasons(records, "fuse-attention")


def test_half_precision_is_absorbed_too():
    graph, records = compiled(zoo.Eager(), dtype=torch.bfloat16)
    assert ops(graph) == ["mla_attention"], reasons(records, "fuse-attention")
