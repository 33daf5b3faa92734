"""Code that widens some of its products to float32: what the passes make of it has its dtypes and loses nothing."""

import pytest
import torch
from torch import nn

from dsv3_compile.backend import reports

HEADS, NOPE, LATENT, WIDTH = 4, 16, 32, 48


class WideRotation(nn.Module):
    """MLA whose rotated parts are float32, and so, once they stand beside the others, all scores."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(WIDTH, HEADS * 2 * NOPE, bias=False)
        self.kv_b = nn.Linear(LATENT, HEADS * 2 * NOPE, bias=False)
        self.o = nn.Linear(HEADS * NOPE, WIDTH, bias=False)

    def forward(self, x, latent, rope_key):
        q, k, v = self.heads(x, latent)
        q = torch.cat([q[..., :NOPE], q[..., NOPE:].float().sin()], -1)
        k = torch.cat([k, rope_key.float().sin().unsqueeze(1).expand(-1, HEADS, -1, -1)], -1)
        shares = (q @ k.transpose(-1, -2) * 0.25).softmax(-1)
        return self.o((shares.to(v.dtype) @ v).transpose(1, 2).flatten(2))

    def heads(self, x, latent):
        q = self.q(x).unflatten(-1, (HEADS, 2 * NOPE)).transpose(1, 2)
        heads = self.kv_b(latent).unflatten(-1, (HEADS, 2 * NOPE)).transpose(1, 2)
        return q, *heads.split([NOPE, NOPE], -1)


class WideValues(WideRotation):
    """MLA whose shares are multiplied with the values in float32."""

    def forward(self, x, latent, rope_key):
        q, k, v = self.heads(x, latent)
        shares = (q[..., :NOPE] @ k.transpose(-1, -2) * 0.25).softmax(-1, dtype=torch.float32)
        return self.o((shares @ v.float()).to(x.dtype).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("build", [WideRotation, WideValues])
def test_products_of_mixed_dtypes_keep_theirs(build, dtype):
    torch.manual_seed(0)
    module, exact = build().to(dtype), build().double()
    exact.load_state_dict(module.state_dict())
    inputs = [torch.randn(2, *shape, dtype=dtype) for shape in ((1, WIDTH), (40, LATENT), (40, NOPE))]
    torch._dynamo.reset()
    with torch.no_grad():
        eager, found = module(*inputs), torch.compile(module, backend="dsv3")(*inputs)
        expected = exact(*[one.double() for one in inputs])
    assert found.dtype == eager.dtype
    assert error(found, expected) < 1.5 * error(eager, expected)
    report = reports()[-1]
    matches = {one["name"]: len(one["matches"]) for block in report["blocks"] for one in block["passes"]}
    reasons = [one["reason"] for block in report["blocks"] for each in block["passes"] for one in each["refusals"]]
    assert report["fallback"] == "" and matches["order-contractions"] == (2 if build is WideRotation else 0)
    assert "queries, keys, values and result are of different dtypes" in " ".join(reasons)


def error(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()
