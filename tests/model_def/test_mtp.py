"""The drafting layer against transformers', and the switches that transformers does not have."""

import pytest
import torch

from model_def import Decoder, MultiTokenPrediction
from tests.model_def.builders import SMALL, decoder, from_folder, randomise, token_ids


def draft(mtp: MultiTokenPrediction, model: Decoder, ids: torch.Tensor) -> torch.Tensor:
    """Logits of the token after next at every position but the last."""
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    dtype = mtp.eh_proj.weight.dtype
    with torch.no_grad():
        x, _ = model.trunk(ids, positions, model.empty_caches(*ids.shape, dtype))
        widths = mtp.block.cache_widths().values()
        caches = [torch.full((*ids[:, 1:].shape, *width), 1e3, dtype=dtype) for width in widths]
        logits, _, _ = mtp(ids[:, 1:], x[:, :-1], positions[:, :-1], *caches)
    return logits


def module(normed: bool = True) -> MultiTokenPrediction:
    found = randomise(MultiTokenPrediction(SMALL, normed, torch.float64), seed=2)
    assert isinstance(found, MultiTokenPrediction)
    return found


def test_embedding_comes_first() -> None:
    mtp, model, ids = module(), decoder(SMALL), token_ids(SMALL, 2, 6)
    before = draft(mtp, model, ids)
    mtp.eh_proj.weight[:, : SMALL.hidden_size] = 0  # the columns that the embedding meets
    changed = ids.clone()
    changed[:, -1] = (ids[:, -1] + 1) % SMALL.vocab_size
    assert (draft(mtp, model, ids) - before).abs().max() > 1e-3
    torch.testing.assert_close(draft(mtp, model, changed), draft(mtp, model, ids))


def test_final_norm_is_a_switch() -> None:
    model, ids = decoder(SMALL), token_ids(SMALL, 2, 6)
    normed, plain = module(), module(normed=False)
    plain.load_state_dict({k: v for k, v in normed.state_dict().items() if k != "norm.weight"})
    before = draft(plain, model, ids)
    assert (draft(normed, model, ids) - before).abs().max() > 1e-3
    # hnorm cancels the first norm's rescaling, so that only its weights remain to be told apart
    normed.norm.weight.fill_(1.0)
    torch.testing.assert_close(draft(normed, model, ids), before, atol=1e-4, rtol=0)


def test_its_layer_has_experts() -> None:
    assert SMALL.mtp_layer() == SMALL.layer(SMALL.num_hidden_layers - 1)
    assert SMALL.mtp_layer() != SMALL.layer(0)


def test_transformers_drafts_the_same(tmp_path) -> None:  # type: ignore[no-untyped-def]
    pytest.importorskip("transformers")
    from transformers.cache_utils import MtpCache
    from transformers.modeling_layers import MtpModel

    from tests import oracle

    reference = oracle.save("v3", tmp_path)
    theirs = MtpModel(reference, 1).eval()
    randomise(theirs.layers)
    ours = MultiTokenPrediction(from_folder(tmp_path).config).eval()
    state = {
        "embed_tokens.weight": reference.model.embed_tokens.weight,
        "norm.weight": reference.model.norm.weight,
        "shared_head.head.weight": reference.lm_head.weight,
    }
    for name, tensor in theirs.layers[0].state_dict().items():
        name = name.replace("mtp_block.", "block.").replace("post_norm", "shared_head.norm")
        if name.endswith("experts.gate_up_proj"):
            gate, up = tensor.chunk(2, 1)
            prefix = name.removesuffix("gate_up_proj")
            state |= {f"{prefix}gate_proj": gate, f"{prefix}up_proj": up}
        else:
            state[name] = tensor
    ours.load_state_dict(state)

    ids = torch.randint(oracle.VOCABULARY, (1, 30), generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        hidden = reference(ids, output_hidden_states=True, use_cache=False).hidden_states[-1]
        drafted = theirs.forward_layer(0, hidden[:, :-1], torch.arange(1, 30)[None], MtpCache(), input_ids=ids[:, 1:])
        expected = reference.lm_head(drafted)
    found = draft(ours, from_folder(tmp_path), ids)
    assert 0.5 < expected.square().mean().sqrt() < 2
    assert (found - expected).abs().max() <= 2e-5
