"""Code that widens some of its products to float32: what the passes make of it has its dtypes and loses nothing."""

import pytest
import torch
from torch import nn

from codegen.targets import target
from dsv3_compile.backend import reports
from dsv3_compile.functional import callable_again
from passes.base import Context, Workload
from passes.canonicalise import Canonicalise
from passes.certify import RegionalSpecimen
from passes.concatenate_slices import ConcatenateSlices
from passes.order_contractions import OrderContractions
from passes.pipeline import Pipeline
from tests.foreign.tracing import graphs_of

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


class Beside(nn.Module):
    """Queries of which a part is float32, against keys that are: the other part takes part in float32 as well."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(12, NOPE) * 0.1)

    def forward(self, x, rotated, keys):
        return (torch.cat([x @ self.weight, rotated], -1) @ keys.transpose(-1, -2)).softmax(-1)


def test_the_last_product_is_of_the_dtype_that_the_graph_had():
    torch.manual_seed(0)
    module, keys = Beside().bfloat16(), torch.randn(2, 40, 2 * NOPE)
    inputs = torch.randn(2, 3, 12).bfloat16(), torch.randn(2, 3, NOPE), keys
    (found,) = graphs_of(module, lambda run: run(*inputs))
    specimen = RegionalSpecimen(found.module)
    passes = Pipeline((Canonicalise(), ConcatenateSlices(), OrderContractions(decode="expanded")))
    *_, record = passes.run(found.module, Context("decode", target("cpu"), Workload(0, 0, 0)), "beside", specimen)
    assert record.matches
    with torch.no_grad():
        (result,) = callable_again(found)(module.weight, *inputs)
        expected = module(*inputs)
    assert result.dtype == torch.float32 and error(result, expected) < 5e-3
