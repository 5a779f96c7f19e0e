"""double_quant.py: the map, the error, and the price in bits. The codes themselves: test_parity_bitsandbytes.py."""

import pytest
import torch

from minqlora.double_quant import DYNAMIC_MAP, double_dequantize, double_quantize
from minqlora.nf4 import quantize_4bit


def some_absmax(n, seed=0):
    """As a weight has them: the largest of 64 normal values, times a small standard deviation."""
    return torch.randn(n, 64, generator=torch.Generator().manual_seed(seed)).abs().amax(dim=1) * 0.02


def test_the_map_by_hand():
    assert DYNAMIC_MAP.shape == (256,) and DYNAMIC_MAP.dtype == torch.float32
    assert (DYNAMIC_MAP.diff() > 0).all()
    assert [(DYNAMIC_MAP < 0).sum(), (DYNAMIC_MAP == 0).sum(), (DYNAMIC_MAP > 0).sum()] == [127, 1, 128]
    assert DYNAMIC_MAP[-1] == 1
    # The smallest level is alone in its decade, the middle of 1e-7 and 1e-6. The largest but one is half a step of 0.9/64 below 1.
    assert torch.isclose(DYNAMIC_MAP[128], torch.tensor(5.5e-7))
    assert torch.isclose(DYNAMIC_MAP[254], torch.tensor(1 - 0.9 / 128))
    # Each sign has 1, 2, 4, ..., 64 levels in its decades.
    positive = DYNAMIC_MAP[128:255]
    assert [((positive > 10.0 ** (i - 7)) & (positive < 10.0 ** (i - 6))).sum() for i in range(7)] == [2**i for i in range(7)]
    assert torch.equal(DYNAMIC_MAP[:127].flip(0), -positive)


def test_the_map_is_computed_in_float32():
    levels = [torch.tensor([0.0, 1.0], dtype=torch.float64)]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float64)
        midpoints = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (i - 6)
        levels += [midpoints, -midpoints]
    assert (torch.cat(levels).sort().values.float() != DYNAMIC_MAP).sum() == 72


def test_a_group_by_hand():
    # Mean 3; differences -2, -1, 0, 1, 2; absmax2 is 2. -1 becomes the lowest level, 1 is the highest. 0 is a level too, but of
    # the 65536 points none is 0: the value goes to point 32768, which is 1.5e-5, and its nearest level is 131, which is 2.1e-5.
    absmax = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    codes, absmax2, offset = double_quantize(absmax)
    assert offset.item() == 3 and offset.shape == ()
    assert absmax2.tolist() == [2.0]
    assert codes[[0, 2, 4]].tolist() == [0, 131, 255]
    restored = double_dequantize(codes, absmax2, offset)
    assert restored[4] == 5
    assert torch.isclose(restored[2] - 3, 2 * DYNAMIC_MAP[131], rtol=0, atol=2**-22)           # 3 has steps of 2^-22
    # -0.993 and not -1, and the halves to the middle of a step of 0.9/64.
    assert torch.isclose(restored[0], torch.tensor(3 - 2 * (1 - 0.9 / 128)))
    assert (restored - absmax).abs().max() <= 2 * 0.9 / 128 * (1 + 1e-5)


@pytest.mark.parametrize("n", [1, 255, 256, 257, 10_007])
def test_the_error_is_at_most_half_the_widest_gap(n):
    absmax = some_absmax(n)
    codes, absmax2, offset = double_quantize(absmax)
    assert codes.shape == (n,) and codes.dtype == torch.uint8
    assert absmax2.shape == (-(-n // 256),) and absmax2.dtype == torch.float32
    error = (double_dequantize(codes, absmax2, offset) - absmax).abs()
    # Inside, levels are 0.9/64 apart; below the lowest one, -0.993, the gap to -1 is half of that: both give 0.9/128. The nearest of
    # 65536 points may be half of 2/65535 off, and may decide for the farther of two levels.
    bound = (0.9 / 128 + 1 / 65535) * absmax2.repeat_interleave(256)[:n] + 4 * 2**-24 * absmax
    assert (error <= bound).all()


def test_absmaxes_that_are_all_equal_come_back_exactly():
    absmax = torch.full((512,), 0.0625)
    codes, absmax2, offset = double_quantize(absmax)
    assert absmax2.tolist() == [0.0, 0.0] and codes.unique().tolist() == [0]
    assert torch.equal(double_dequantize(codes, absmax2, offset), absmax)


def test_the_product_is_rounded_before_the_sum():
    codes, absmax2, offset = double_quantize(some_absmax(100_000))
    spread = absmax2.repeat_interleave(256)[:100_000]
    twice = DYNAMIC_MAP[codes.int()] * spread + offset
    once = (DYNAMIC_MAP[codes.int()].double() * spread + offset).float()           # what a fused multiply-add would give
    restored = double_dequantize(codes, absmax2, offset)
    assert torch.equal(restored, twice)
    assert not torch.equal(restored, once)                                         # so that the distinction is a real one


@pytest.mark.parametrize("shape", [(4096, 4096), (4672, 4544)], ids=["square", "the qkv of falcon-7b, with a ragged group"])
def test_bits_a_parameter_counted_from_the_stored_bytes(shape):
    n = shape[0] * shape[1]
    packed, absmax = quantize_4bit(torch.zeros(shape, dtype=torch.bfloat16))
    codes, absmax2, offset = double_quantize(absmax)

    def bits(*tensors):
        return 8 * sum(tensor.numel() * tensor.element_size() for tensor in tensors) / n

    assert bits(packed) == 4
    assert bits(absmax) == 0.5                                                     # 32 / 64
    # 8/64 + 32/(64 * 256) is 0.12695. The last group may be ragged, and there is one offset: less than 64 bits more in all.
    assert 0 <= bits(codes, absmax2, offset) - (8 / 64 + 32 / (64 * 256)) <= 64 / n
    assert round(bits(packed, codes, absmax2, offset), 3) == 4.127
    if shape[0] == 4672:
        assert absmax.numel() % 256 != 0


def test_what_cannot_be_quantized_is_said():
    absmax = some_absmax(300)
    with pytest.raises(ValueError, match="blocksize is 100"):
        double_quantize(absmax, blocksize=100)
    with pytest.raises(ValueError, match=r"absmax is torch\.float64"):
        double_quantize(absmax.double())
    with pytest.raises(ValueError, match=r"shape \(0,\)"):
        double_quantize(torch.empty(0))
    codes, absmax2, offset = double_quantize(absmax)
    with pytest.raises(ValueError, match="absmax2 holds 1 groups; 300 codes are 2 groups of 256"):
        double_dequantize(codes, absmax2[:1], offset)
    absmax[7], absmax[8] = float("nan"), float("inf")
    with pytest.raises(ValueError, match="absmax holds 2 values that are NaN or infinite"):
        double_quantize(absmax)
