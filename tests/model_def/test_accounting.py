"""Published numbers, and formulas against modules that are really built."""

import math

import pytest
import torch

from model_def import PRESETS, Decoder, ModelConfig, MultiTokenPrediction
from model_def.accounting import Parameters, flops_per_token, kv_cache, mtp_parameters, parameters
from tests.model_def.builders import GQA, RANKS, SMALL

PUBLISHED = {
    "deepseek-v2-lite": (15_706_484_224, 2.661, 31_104, 0.1406),
    "deepseek-v2": (235_741_434_880, 21.376, 69_120, 0.01758),
    "deepseek-v3": (671_026_419_200, 37.552, 70_272, 0.01758),
    "deepseek-v3.1": (671_026_419_200, 37.552, 70_272, 0.01758),
    "kimi-k2": (1_026_408_232_448, 32.862, 70_272, 0.03516),
    "moonlight": (15_960_110_208, 2.915, 31_104, 0.1406),
    "glm-4.7-flash": (29_943_393_920, 3.897, 54_144, 0.06429),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str) -> None:
    total, active_billions, cache_bytes, ratio = PUBLISHED[name]
    count, cache = parameters(PRESETS[name]), kv_cache(PRESETS[name])
    assert count.total == total
    assert count.active / 1e9 == pytest.approx(active_billions, abs=5e-4)
    assert cache.bytes_per_token == cache_bytes
    assert cache.ratio == pytest.approx(ratio, rel=4e-4)


def test_active_parameters_of_v3() -> None:
    assert parameters(PRESETS["deepseek-v3"]).active == 37_552_297_472


def test_mtp_of_v3() -> None:
    assert mtp_parameters(PRESETS["deepseek-v3"]).total == 11_610_068_224
    assert mtp_parameters(PRESETS["moonlight"]) == Parameters(0, 0)


def test_cache_of_other_attentions() -> None:
    cache = kv_cache(PRESETS["deepseek-v3"], bytes_per_number=1)
    assert (cache.mha_bytes_per_token, cache.gqa_bytes_per_token, cache.mqa_bytes_per_token) == (
        1_998_848,
        124_928,
        15_616,
    )


def test_grouped_queries_of_fewer_than_eight_heads_are_multi_head() -> None:
    cache = kv_cache(SMALL)
    assert cache.gqa_bytes_per_token == cache.mha_bytes_per_token


def test_gqa_models_are_counted_too() -> None:
    assert kv_cache(GQA).ratio == pytest.approx(2 / 6)


def built(module: torch.nn.Module) -> int:
    return sum(math.prod(tensor.shape) for tensor in module.state_dict().values())


@pytest.mark.parametrize(
    "config",
    [SMALL, RANKS, GQA, *(PRESETS[name] for name in ("deepseek-v2-lite", "deepseek-v3", "moonlight", "toy"))],
    ids=["small", "ranks", "gqa", "v2-lite", "v3", "moonlight", "toy"],
)
def test_formula_counts_what_the_modules_hold(config: ModelConfig) -> None:
    assert parameters(config).total == built(Decoder(config, device="meta"))


def test_tied_embeddings_count_once() -> None:
    tied = ModelConfig.from_dict(SMALL.to_dict() | {"tie_word_embeddings": True})
    assert parameters(SMALL).total - parameters(tied).total == SMALL.vocab_size * SMALL.hidden_size


@pytest.mark.parametrize("name", ["deepseek-v3", "toy"])
def test_mtp_formula_counts_what_the_module_adds(name: str) -> None:
    config = PRESETS[name]
    module = MultiTokenPrediction(config, device="meta")
    shared = sum(built(m) for m in (module.embed_tokens, module.norm, module.shared_head.head))  # type: ignore[arg-type]
    assert mtp_parameters(config).total == built(module) - shared


def test_operations_of_v3() -> None:
    flops = flops_per_token(PRESETS["deepseek-v3"])
    assert flops.weights / 1e9 == pytest.approx(73.25, abs=0.01)
    # One layer at 4096 cached tokens, kv_b_proj included: 1.174 GFLOP.
    layer = (flops.at(4096) - flops.weights) / 61 + 2 * 128 * 256 * 512
    assert layer / 1e9 == pytest.approx(1.174, abs=1e-3)


def test_operations_of_a_small_model_are_those_torch_counts() -> None:
    """Without experts, whose dense sum in the definition is not what is counted."""
    from torch.utils.flop_counter import FlopCounterMode

    config = ModelConfig.from_dict(GQA.to_dict() | {"n_routed_experts": None})
    model = Decoder(config)
    caches = model.empty_caches(1, 11)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 1, dtype=torch.int64), torch.full((1, 1), 10), caches)
    assert counter.get_total_flops() == flops_per_token(config).at(11)
