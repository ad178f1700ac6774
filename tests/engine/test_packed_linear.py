import pytest
import torch
from torch import nn

from engine.model.packed_linear import PackedLinear, can_pack, pack_linears

pytestmark = pytest.mark.skipif(
    not can_pack(torch.device("cpu"), torch.bfloat16), reason="this CPU's oneDNN has no bfloat16 kernels"
)


@pytest.mark.parametrize("rows", [1, 7, 300])
@pytest.mark.parametrize("bias", [True, False])
def test_computes_what_the_linear_did(rows: int, bias: bool) -> None:
    linear = nn.Linear(96, 200, bias=bias, dtype=torch.bfloat16)
    states = torch.randn(1, rows, 96, dtype=torch.bfloat16)
    with torch.inference_mode():
        packed = PackedLinear(linear)
        torch.testing.assert_close(packed(states), linear(states), rtol=2e-2, atol=2e-2)
        assert torch.equal(packed.weight, linear.weight)
        assert packed(states[:, :0]).shape == (1, 0, 200)


def test_replaces_plain_linears_wherever_they_are_and_nothing_else() -> None:
    class Special(nn.Linear):
        """A subclass may compute something else."""

    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), Special(4, 4)), nn.LayerNorm(4)).to(
        torch.bfloat16
    )
    pack_linears(model)
    assert isinstance(model[0], PackedLinear)
    assert isinstance(model[1][0], PackedLinear)
    assert type(model[1][1]) is Special
    assert type(model[2]) is nn.LayerNorm


@pytest.mark.parametrize(
    ("device", "dtype"), [("cpu", torch.float32), ("cpu", torch.float16), ("cuda", torch.bfloat16)]
)
def test_only_bfloat16_on_cpu(device: str, dtype: torch.dtype) -> None:
    assert not can_pack(torch.device(device), dtype)
