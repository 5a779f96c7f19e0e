"""nf4.py: a hand example, the derivation of the levels, what must hold for any weight. For the bytes: test_parity_bitsandbytes.py."""

import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from minqlora import nf4
from minqlora.nf4 import FP4, FP4_E2M1, INT4, NF4, dequantize_4bit, quantize_4bit

CODES = {"nf4": NF4, "fp4": FP4, "fp4_e2m1": FP4_E2M1, "int4": INT4}
each_code = pytest.mark.parametrize("code", CODES.values(), ids=CODES.keys())


def unpack(packed, n):
    """The codes of a packed weight, one an element."""
    return torch.stack((packed >> 4, packed & 15), dim=1).flatten()[:n]


def test_the_levels_are_quantiles_of_the_normal_distribution_bit_for_bit():
    offset, quantile = 0.9677083, statistics.NormalDist().inv_cdf
    positive = [quantile(p) for p in torch.linspace(offset, 0.5, 9)[:-1].tolist()]
    negative = [-quantile(p) for p in torch.linspace(offset, 0.5, 8)[:-1].tolist()]
    levels = torch.tensor([*positive, *negative, 0.0]).sort().values
    assert torch.equal(levels / levels.max(), NF4)
    assert [(NF4 < 0).sum(), (NF4 == 0).sum(), (NF4 > 0).sum()] == [7, 1, 8]


@each_code
def test_every_code_has_16_levels_from_minus_1_to_1_with_a_zero(code):
    assert code.shape == (16,) and code.dtype == torch.float32
    assert code.abs().max() == 1 and (code == 0).any()
    if code is not NF4:  # the others are symmetric, with one zero more than they need
        assert torch.equal(code.sort().values, (-code).sort().values)
        assert (code == 0).sum() == 2


def test_a_block_by_hand():
    # The 16 levels times 2, twice: absmax is 2, the codes are 0, 1, ..., 15, and two of them make a byte, the first one high.
    weight = torch.cat([NF4, NF4]) * 2
    packed, absmax = quantize_4bit(weight, blocksize=32)
    assert absmax.tolist() == [2.0]
    assert packed.shape == (16, 1)
    assert packed.flatten().tolist() == [0x01, 0x23, 0x45, 0x67, 0x89, 0xAB, 0xCD, 0xEF] * 2
    assert torch.equal(dequantize_4bit(packed, absmax, (4, 8), blocksize=32), weight.view(4, 8))


def test_a_value_on_a_midpoint_takes_the_lower_level():
    for code in CODES.values():
        levels, order = code.sort(stable=True)
        midpoints = (levels[1:] + levels[:-1]) / 2
        weight = torch.cat([torch.ones(1), midpoints, torch.zeros(16)])            # absmax 1: nothing is rounded on the way
        codes = unpack(quantize_4bit(weight, code, blocksize=32)[0], 16)[1:]
        assert torch.equal(codes, order[:15].to(torch.uint8))
        above = weight.clone()
        above[1:16] = torch.nextafter(midpoints, torch.tensor(2.0))
        codes = unpack(quantize_4bit(above, code, blocksize=32)[0], 16)[1:]
        assert torch.equal(codes, order[1:].to(torch.uint8))


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 23), max_size=3),
    name=st.sampled_from(list(CODES)),
    blocksize=st.sampled_from([32, 64, 256, 4096]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    scale=st.sampled_from([1e-6, 1e-2, 1.0, 1e3]),
    seed=st.integers(0, 2**31),
)
def test_no_other_level_is_nearer(shape, name, blocksize, dtype, scale, seed):
    code = CODES[name]
    weight = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)
    n = weight.numel()
    packed, absmax = quantize_4bit(weight, code, blocksize)
    assert packed.shape == ((n + 1) // 2, 1) and packed.dtype == torch.uint8
    assert absmax.shape == (-(-n // blocksize),) and absmax.dtype == torch.float32

    spread = absmax.double().repeat_interleave(blocksize)[:n]
    values = weight.double().flatten()
    restored = dequantize_4bit(packed, absmax, weight.shape, code, blocksize)
    assert restored.shape == weight.shape
    error = (values - restored.double().flatten()).abs()
    nearest = (values[:, None] - spread[:, None] * code.double()).abs().amin(dim=1)
    # The comparison is made on w * (1 / absmax), two roundings of 2^-24 each, against midpoints with one or two more, and code * absmax
    # rounds once: less than 6 of them in all, of numbers no larger than absmax.
    assert (error <= nearest + 6 * 2**-24 * spread).all()


@each_code
def test_the_error_is_at_most_half_the_widest_gap(code):
    weight = torch.randn(300, 64, generator=torch.Generator().manual_seed(0))
    packed, absmax = quantize_4bit(weight, code)
    error = (weight - dequantize_4bit(packed, absmax, weight.shape, code)).abs()
    # NF4: 0.152 absmax, between -1 and -0.696. The factor is for the roundings, as above.
    bound = code.sort().values.diff().max() / 2 * absmax[:, None]
    assert (error <= bound * (1 + 1e-5)).all()
    assert error.max() > 0.5 * bound.min()                                         # and the bound is not idle


@each_code
def test_quantizing_what_was_dequantized_changes_nothing(code):
    weight = torch.randn(5000, generator=torch.Generator().manual_seed(1))
    first = dequantize_4bit(*quantize_4bit(weight, code), weight.shape, code)
    packed, absmax = quantize_4bit(first, code)
    # By value: of two zeros, the second round takes the other.
    assert torch.equal(dequantize_4bit(packed, absmax, weight.shape, code), first)


@each_code
def test_zeros_stay_exactly_zero(code):
    weight = torch.zeros(3 * 64 + 7)
    weight[64:128] = torch.linspace(-1, 1, 64)
    weight[70] = 0
    restored = dequantize_4bit(*quantize_4bit(weight, code), weight.shape, code)
    assert (restored[weight == 0] == 0).all()
    assert quantize_4bit(torch.zeros(64))[0].unique().tolist() == [0x77]           # NF4's zero is code 7
    assert quantize_4bit(torch.zeros(64))[1].tolist() == [0.0]


def test_an_odd_tail_is_padded_with_the_code_of_zero():
    packed, absmax = quantize_4bit(torch.ones(65))
    assert packed.shape == (33, 1) and absmax.shape == (2,)
    assert packed[-1].item() == 0xF7


def test_a_nan_spoils_its_own_block_and_no_other():
    weight = torch.linspace(-1, 1, 3 * 64)
    clean = quantize_4bit(weight)
    weight[70] = float("nan")
    packed, absmax = quantize_4bit(weight)
    assert absmax.isnan().tolist() == [False, True, False]
    assert packed[32:64].unique().tolist() == [0xFF]
    for block in (slice(0, 32), slice(64, 96)):
        assert torch.equal(packed[block], clean[0][block])


def test_dequantizing_rounds_one_float32_product():
    weight = torch.randn(10_000, generator=torch.Generator().manual_seed(2))
    packed, absmax = quantize_4bit(weight, blocksize=128)
    product = NF4[unpack(packed, 10_000).int()] * absmax.repeat_interleave(128)[:10_000]
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        restored = dequantize_4bit(packed, absmax, (100, 100), blocksize=128, dtype=dtype)
        assert restored.dtype == dtype
        assert torch.equal(restored.flatten(), product.to(dtype))


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0), (7,), (5, 96), (3, 5, 7), (2, 4096)], ids=str)
def test_any_shape_comes_back(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    assert dequantize_4bit(*quantize_4bit(weight), shape).shape == shape


def test_a_transposed_weight_is_read_row_by_row():
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(4))
    for ours, plain in zip(quantize_4bit(weight.T), quantize_4bit(weight.T.contiguous()), strict=True):
        assert torch.equal(ours, plain)


def test_steps_do_not_change_a_byte(monkeypatch):
    weight = torch.randn(3 * 4096 + 101, generator=torch.Generator().manual_seed(5)).bfloat16()
    for blocksize in (32, 4096):
        whole = quantize_4bit(weight, blocksize=blocksize)
        restored = dequantize_4bit(*whole, weight.shape, blocksize=blocksize)
        with monkeypatch.context() as patch:
            patch.setattr(nf4, "STEP", 4096)                                       # four steps, the last one ragged
            stepped = quantize_4bit(weight, blocksize=blocksize)
            assert torch.equal(stepped[0], whole[0]) and torch.equal(stepped[1], whole[1])
            assert torch.equal(dequantize_4bit(*stepped, weight.shape, blocksize=blocksize), restored)


def test_a_large_weight_is_never_whole_in_float32(monkeypatch):
    class Largest(TorchDispatchMode):
        values = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dtype in (torch.float32, torch.int32, torch.int64):
                self.values = max(self.values, out.numel())
            return out

    monkeypatch.setattr(nf4, "STEP", 4096)
    weight = torch.randn(20 * 4096).bfloat16()
    with Largest() as largest:
        packed, absmax = quantize_4bit(weight)
        dequantize_4bit(packed, absmax, weight.shape, dtype=torch.bfloat16)
    # A step, or the absmaxes of all: 20 * 64 of them.
    assert largest.values == 4096


def test_what_cannot_be_quantized_is_said():
    weight = torch.randn(64)
    with pytest.raises(ValueError, match="blocksize is 48"):
        quantize_4bit(weight, blocksize=48)
    with pytest.raises(ValueError, match=r"code is torch.float32 of shape \(15,\)"):
        quantize_4bit(weight, NF4[:15])
    with pytest.raises(ValueError, match=r"torch.float64"):
        quantize_4bit(weight, NF4.double())
    with pytest.raises(ValueError, match=r"weight has dtype torch.int64"):
        quantize_4bit(torch.arange(64))
    packed, absmax = quantize_4bit(weight)
    with pytest.raises(ValueError, match=r"packed holds 32 bytes; shape \(64, 2\) needs 64"):
        dequantize_4bit(packed, absmax, (64, 2))
    with pytest.raises(ValueError, match=r"absmax holds 1 blocks; shape \(64,\) has 2 of 32"):
        dequantize_4bit(packed, absmax, (64,), blocksize=32)
