"""The kernels of a decode step against the definition: PyTorch's norm and GELU in float64, and Falcon's own attention.

Without a GPU they run in Triton's interpreter.
"""

import pytest
import torch
import torch.nn.functional as F

from minqlora.falcon import Falcon, FalconConfig, alibi_bias, rotary_angles

# The interpreter has to be on before these are imported: conftest.py sees to it.
from minqlora.kernels.decode import add_norm, gelu, inner, outer  # isort: skip
from minqlora.kernels.decode_attention import decode_attention, stretch  # isort: skip

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")


def random(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE).to(dtype)


def close(actual, exact, dtype, roundings=1):
    """Within `roundings` roundings to dtype of the largest value, and some of float32 in the sums before."""
    unit = torch.finfo(dtype).eps + 64 * torch.finfo(torch.float32).eps
    return (actual.double() - exact).abs().max() <= roundings * unit * exact.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parts", [0, 1, 2, 3])
def test_the_sum_is_rounded_once_and_its_norm_is_that_of_the_rounded_sum(dtype, parts):
    torch.manual_seed(0)
    x, weight, bias = random(3, 200, dtype=dtype), random(200, dtype=dtype), random(200, dtype=dtype)
    added = [random(3, 200, dtype=dtype) for _ in range(parts)]
    total, out = add_norm(x, added, weight, bias, 1e-5)
    # Half a unit in the last place for the one rounding, and float32's before.
    exact = sum((part.double() for part in added), x.double())
    assert ((total.double() - exact).abs() <= 0.51 * torch.finfo(dtype).eps * exact.abs() + 1e-6).all()
    assert close(out, F.layer_norm(total.double(), (200,), weight.double(), bias.double(), 1e-5), dtype)
    assert parts or total is x


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [0, 5, 64, 200])
@pytest.mark.parametrize("m", [1, 18])
def test_gelu_adds_the_lora_part_from_columns_of_a_wider_matrix(dtype, rank, m):
    torch.manual_seed(0)
    u, wide, B = random(m, 130, dtype=dtype), random(m, rank + 7, dtype=dtype), random(130, rank, dtype=dtype)
    xa = wide[:, 4 : 4 + rank]
    exact = F.gelu(u.double() + xa.double() @ B.double().T)
    actual = gelu(u, xa, B) if rank else gelu(u)
    assert close(actual, exact, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ranks", [(5,), (64,), (5, 64), (24, 3), (200, 5)])
@pytest.mark.parametrize("m", [1, 18])
def test_the_outer_products_of_two_adapters_are_summed_and_rounded_once(dtype, ranks, m):
    torch.manual_seed(0)
    pairs = [(random(m, rank + 7, dtype=dtype)[:, 4 : 4 + rank], random(130, rank, dtype=dtype)) for rank in ranks]
    assert close(outer(pairs), sum(xa.double() @ B.double().T for xa, B in pairs), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ranks", [[5], [3, 2]])
@pytest.mark.parametrize("m", [1, 3, 6])
@pytest.mark.parametrize("k", [200, 9000])
def test_the_inner_product_of_an_adapter(dtype, ranks, m, k):
    torch.manual_seed(0)
    x, A = random(m, k, dtype=dtype), random(5, k, dtype=dtype)
    pieces = inner(x, A, ranks)
    assert [piece.shape for piece in pieces] == [(m, rank) for rank in ranks] and all(piece.is_contiguous() for piece in pieces)
    exact, sizes = x.double() @ A.double().T, x.double().abs() @ A.double().abs().T
    # Rounded to dtype once; in float32 each product goes through at most 9000 / 1024 sums of its lane and the 10 of a tree.
    bound = 0.51 * torch.finfo(dtype).eps * exact.abs() + 20 * 2**-24 * sizes
    assert ((torch.cat(pieces, dim=1).double() - exact).abs() <= bound).all()


VARIANTS = {
    "7b": FalconConfig(50, 6 * 32, 1, 6),
    "many heads": FalconConfig(50, 130 * 4, 1, 130),
    "40b": FalconConfig(50, 6 * 48, 1, 6, num_kv_heads=2, new_decoder_architecture=True),
    "rw-1b": FalconConfig(50, 5 * 16, 1, 5, multi_query=False, parallel_attn=False, alibi=True),
}


@pytest.mark.parametrize("filled, slots_a_split", [(0, None), (9, None), (191, 64), (150, 128)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_token_gets_what_attention_over_the_whole_cache_gives_it(variant, filled, slots_a_split):
    """Two rows, the second with 70 tokens of padding where there is room: the first stretch is then all masked."""
    torch.manual_seed(0)
    config, batch, length = VARIANTS[variant], 2, 192
    model = Falcon(config).to(DEVICE)
    attention = model.transformer["h"][0].self_attention
    cache = model.new_cache(batch, length)
    cache.keys[:, :, :, :filled].normal_()
    cache.values[:, :, :, :filled].normal_()
    cache.present[:, :filled] = True
    cache.present[1, : min(filled, 70)] = False
    cache.filled.fill_(filled)
    cache.empty = False
    qkv = random(batch, (config.num_attention_heads + 2 * config.num_kv_heads) * config.head_dim)

    # What the kernel reads, and slots that it must not: not a number.
    keys, values = cache.keys[0].clone(), cache.values[0].clone()
    keys[:, :, filled:], values[:, :, filled:] = torch.nan, torch.nan
    positions = torch.where(cache.present, cache.present.cumsum(1) - 1, -1).int()
    positions[:, filled] = cache.present.sum(1)
    everywhere = torch.arange(length, device=DEVICE)
    half = config.head_dim // 2
    rotary = None if config.alibi else [t[:, :half].contiguous() for t in rotary_angles(everywhere, config.head_dim, 1e4, torch.float32)]
    bias = alibi_bias(everywhere[None], config.num_attention_heads, config.head_dim, torch.float32)[0, :, 0] if config.alibi else None
    actual = decode_attention(qkv, keys, values, positions, cache.filled, rotary, bias, slots_a_split)

    # In float64, so that one side is beyond doubt: in float32 on an H100 the two differed by 0.6 for 130 heads of 4.
    cache.keys, cache.values, wide = cache.keys.double(), cache.values.double(), qkv[:, None].double()
    with torch.no_grad():
        context = model.context(1, None, cache, wide)
        expected = attention.mix(wide, context)[:, 0].float()
    # A softmax and sums of at most 192 products in float32: some sqrt(192) roundings of 6e-8.
    tolerance = 192**0.5 * 6e-8 * 4
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * expected.abs().max().item())
    theirs = cache.keys[0].float(), cache.values[0].float()
    torch.testing.assert_close(keys[:, :, : filled + 1], theirs[0][:, :, : filled + 1], rtol=0, atol=1e-6)
    assert torch.equal(values[:, :, : filled + 1], theirs[1][:, :, : filled + 1])
    assert keys[:, :, filled + 1 :].isnan().all() and values[:, :, filled + 1 :].isnan().all()


def test_stretches_are_short_for_one_row_and_long_for_many():
    assert stretch(1, 2048) == 128
    assert stretch(64, 2048) == 512
    assert stretch(264, 2048) == 2048
    assert all(stretch(programs, length) % 64 == 0 for programs in (1, 7, 64, 500) for length in (1, 100, 2048, 8192))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch, heads, kv_heads, head_dim, filled", [(1, 71, 1, 64, 2000), (3, 128, 8, 64, 700), (4, 32, 8, 128, 300)])
def test_in_16_bits_attention_is_exact_up_to_the_rounding_of_its_parts(dtype, batch, heads, kv_heads, head_dim, filled):
    torch.manual_seed(0)
    group, length = heads // kv_heads, 2048
    qkv = random(batch, kv_heads * (group + 2) * head_dim, dtype=dtype)
    keys, values = (random(batch, kv_heads, length, head_dim, dtype=dtype) for _ in range(2))
    positions = torch.arange(length, device="cuda", dtype=torch.int32).expand(batch, -1).contiguous()
    rotary = [t[:, : head_dim // 2].contiguous() for t in rotary_angles(positions[0], head_dim, 1e4, dtype)]
    mixed = decode_attention(qkv, keys, values, positions, torch.tensor(filled, device="cuda"), rotary, None)
    query, _, value = qkv.double().view(batch, kv_heads, group + 2, head_dim).split((group, 1, 1), dim=2)
    a, b = query.chunk(2, dim=-1)
    c, s = (table[filled].double() for table in rotary)
    query = torch.cat((a * c - b * s, b * c + a * s), dim=-1).to(dtype).double()
    assert torch.equal(values[:, :, filled].double(), value[:, :, 0])
    scores = query @ keys[:, :, : filled + 1].double().mT / head_dim**0.5
    exact = (scores.softmax(-1) @ values[:, :, : filled + 1].double()).flatten(1)
    # The weights are rounded to dtype before the product with the values, and so is the result: each an error of half a unit
    # of a sum of positive weights that is 1 times the largest value.
    assert (mixed.double() - exact).abs().max() <= 1.5 * torch.finfo(dtype).eps * values.double().abs().max()
