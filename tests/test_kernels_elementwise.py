"""The kernels between the products of a training step against PyTorch's own functions and their autograd, in float64.

Without a GPU they run in Triton's interpreter; the widths are ragged, and the rows those of wider matrices.
"""

import pytest
import torch
import torch.nn.functional as F

from minqlora.falcon import rotary_angles, rotate

# The interpreter has to be on before these are imported: conftest.py sees to it.
from minqlora.kernels.copy_columns import copy_columns  # isort: skip
from minqlora.kernels.cross_entropy import cross_entropy_  # isort: skip
from minqlora.kernels.dropout import drop  # isort: skip
from minqlora.kernels.gelu import gelu_backward_, gelu_into  # isort: skip
from minqlora.kernels.layer_norm import norm_backward, norm_into  # isort: skip
from minqlora.kernels.rotary import turn, turn_back  # isort: skip

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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kv_heads, group, head_dim", [(1, 3, 8), (2, 17, 12), (3, 1, 64)])    # one key, groups, a key for each query
@pytest.mark.parametrize("positions", ["one row", "each row", "none"])
def test_turned_queries_and_keys_and_the_way_back(kv_heads, group, head_dim, positions, dtype):
    torch.manual_seed(0)
    batch, tokens = 2, 3
    rows, heads = kv_heads * (group + 2) * head_dim, kv_heads * group
    (wide, qkv), (out_wide, out) = (columns_of_a_wider_matrix(batch * tokens, rows, dtype) for _ in range(2))
    places = torch.tensor([[5, 6, 7]]) if positions == "one row" else torch.tensor([[5, 6, 7], [1, 2, 9]])
    rotary = None if positions == "none" else [table.to(DEVICE) for table in rotary_angles(places, head_dim, 10000.0, torch.float32)]

    def definition(qkv):
        """What attention reads: queries, and for every head its key and its value; each (batch, heads, tokens, head_dim)."""
        query_key, value = qkv.view(batch, tokens, kv_heads, group + 2, head_dim).split((group + 1, 1), dim=3)
        if rotary is not None:
            query_key = rotate(query_key, *(table.double() for table in rotary))
        query, key = query_key.split((group, 1), dim=3)
        return [x.expand(-1, -1, -1, group, -1).flatten(2, 3).transpose(1, 2) for x in (query, key, value)]

    query, key = turn(qkv, rotary, kv_heads, head_dim)
    exact = qkv.double().requires_grad_()
    read = definition(exact)
    assert close(query.view(batch, tokens, heads, head_dim).transpose(1, 2), read[0].detach(), dtype)
    assert close(key.view(batch, tokens, kv_heads, head_dim), read[1].detach().transpose(1, 2)[:, :, ::group], dtype)

    # Gradients in the layouts that attention may give them.
    grads = [torch.randn_like(read[0]).to(dtype), torch.randn(batch, tokens, heads, head_dim, device=DEVICE).to(dtype).transpose(1, 2),
             torch.randn(batch, heads, head_dim, tokens, device=DEVICE).to(dtype).transpose(2, 3)]
    turn_back(*grads, rotary, kv_heads, out)
    (expected,) = torch.autograd.grad(read, exact, [grad.double() for grad in grads])
    assert close(out, expected, dtype)
    assert margin_is_untouched(wide) and margin_is_untouched(out_wide)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [50, 4096, 9001])               # less than a block of the kernel, one, and ragged ones
def test_cross_entropies_and_their_gradient(vocab_size, dtype):
    torch.manual_seed(0)
    wide, logits = columns_of_a_wider_matrix(5, vocab_size, dtype)
    logits *= 10
    logits[4] -= 300                                                   # far from zero, no power may overflow
    logits[2, :40] = -float("inf")
    labels = torch.tensor([0, vocab_size - 1, 45, -100, 7], device=DEVICE)
    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(exact, labels, reduction="none")
    losses = torch.full((5,), float("nan"), device=DEVICE)
    cross_entropy_(logits, labels, losses, ignored=-100)
    # A loss is a float32 difference of a logit and a sum, both below 512 here.
    assert (losses.double() - expected).abs().max() <= 512 * 4 * torch.finfo(torch.float32).eps
    (gradient,) = torch.autograd.grad(expected.sum(), exact)
    # e^(z - total) turns an error of z - total, a rounding of numbers below 512, into a relative one.
    assert ((logits.double() - gradient).abs() <= (torch.finfo(dtype).eps + 512 * 4 * torch.finfo(torch.float32).eps)).all()
    assert (logits[3] == 0).all() and losses[3] == 0 and margin_is_untouched(wide)


def test_dropout_drops_the_share_it_was_asked_for_and_the_same_values_again():
    _, x = columns_of_a_wider_matrix(100, 1500, torch.float32)
    seed = torch.tensor(12345, device=DEVICE)
    dropped = drop(x, 0.1, seed)
    kept = dropped != 0
    # 150 000 draws: the share's deviation is sqrt(0.1 * 0.9 / 1.5e5) = 0.00077; five of them.
    assert abs((~kept).float().mean().item() - 0.1) < 5 * 0.00077
    torch.testing.assert_close(dropped[kept], (x / 0.9)[kept], rtol=2e-7, atol=0)
    assert torch.equal(drop(torch.ones_like(x), 0.1, seed) != 0, kept)
    assert not torch.equal(drop(x, 0.1, seed + 1) != 0, kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("m, n", [(3, 70), (2, 9000), (0, 5)])
def test_columns_are_copied_and_their_neighbours_stay(m, n, dtype):
    wide = torch.zeros(m, n + 9, dtype=dtype, device=DEVICE)
    source = torch.randn(m, n, device=DEVICE).to(dtype)
    copy_columns(source, wide[:, 4 : 4 + n])
    assert torch.equal(wide[:, 4 : 4 + n], source) and not wide[:, :4].any() and not wide[:, 4 + n :].any()
    back = torch.empty_like(source)
    copy_columns(wide[:, 4 : 4 + n], back)
    assert torch.equal(back, source)
