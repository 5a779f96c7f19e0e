"""kernels/gelu.py and kernels/layer_norm.py against PyTorch's own functions and their autograd, in float64.

Without a GPU they run in Triton's interpreter; the widths are ragged, and the rows those of wider matrices.
"""

import pytest
import torch
import torch.nn.functional as F

# The interpreter has to be on before these are imported: conftest.py sees to it.
from minqlora.kernels.gelu import gelu_backward_, gelu_into  # isort: skip
from minqlora.kernels.layer_norm import norm_backward, norm_into  # isort: skip

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")


def columns_of_a_wider_matrix(m, n, dtype):
    wide = torch.full((m, n + 24), 7.0, dtype=dtype, device=DEVICE)
    wide[:, 8 : 8 + n] = torch.randn(m, n, device=DEVICE)
    return wide, wide[:, 8 : 8 + n]


def margin_is_untouched(wide):
    return bool((wide[:, :8] == 7).all() and (wide[:, -16:] == 7).all())


def close(actual, exact, dtype, roundings=1):
    """Within `roundings` roundings to dtype of the largest value, and as many of float32 in the sums before."""
    unit = torch.finfo(dtype).eps + 64 * torch.finfo(torch.float32).eps
    return (actual.double() - exact).abs().max() <= roundings * unit * exact.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m, n", [(3, 40), (5, 2100)])
def test_gelu_into_columns_is_gelu(m, n, dtype):
    torch.manual_seed(0)
    (_, u), (wide, out) = columns_of_a_wider_matrix(m, n, dtype), columns_of_a_wider_matrix(m, n, dtype)
    gelu_into(u, out)
    assert close(out, F.gelu(u.double()), dtype)
    assert margin_is_untouched(wide)


@pytest.mark.parametrize("rank", [0, 4, 64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu_backward_adds_the_lora_part_and_leaves_gelu_and_its_gradient(dtype, rank):
    torch.manual_seed(0)
    m, n = 70, 200
    (u_wide, u), (grad_wide, grad) = columns_of_a_wider_matrix(m, n, dtype), columns_of_a_wider_matrix(m, n, dtype)
    inner = A = None
    exact = u.double().requires_grad_()
    total = grad.double()
    if rank:
        inner, A = torch.randn(m, rank, device=DEVICE).to(dtype), torch.randn(rank, n, device=DEVICE).to(dtype)
        total = total + inner.double() @ A.double()
    (expected,) = torch.autograd.grad(F.gelu(exact), exact, total)
    gelu_backward_(u, grad, inner, A)
    assert close(u, F.gelu(exact.detach()), dtype)
    assert close(grad, expected, dtype)
    assert margin_is_untouched(u_wide) and margin_is_untouched(grad_wide)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m, n", [(3, 40), (2, 4544)])
def test_layer_norm_and_its_backward(m, n, dtype):
    torch.manual_seed(0)
    weight, bias = torch.randn(n, device=DEVICE).to(dtype), torch.randn(n, device=DEVICE).to(dtype)
    (_, x), (wide, out), (_, grad) = (columns_of_a_wider_matrix(m, n, dtype) for _ in range(3))
    onto = torch.randn(m, n, device=DEVICE).to(dtype)
    exact = x.double().requires_grad_()
    y = F.layer_norm(exact, (n,), weight.double(), bias.double(), 1e-5)
    norm_into(x, weight, bias, 1e-5, out)
    assert close(out, y.detach(), dtype)
    assert margin_is_untouched(wide)
    (expected,) = torch.autograd.grad(y, exact, grad.double())
    assert close(norm_backward(x, weight, 1e-5, grad, onto), onto.double() + expected, dtype)
