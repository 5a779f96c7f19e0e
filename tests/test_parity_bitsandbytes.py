"""The same bytes as bitsandbytes' CPU backend: packed, absmax, codes, and the files.

The sizes below compare some 14 MB. MINQLORA_SWEEP_MB=200 in the environment adds that many megabytes of values to the first test.
"""

import itertools
import os

import pytest
import torch
import torch.nn.functional as F

from minqlora import NF4, Linear4bit, dequantize_4bit, double_dequantize, double_quantize, quantize_4bit
from minqlora.double_quant import DYNAMIC_MAP
from minqlora.nf4 import FP4

bnb = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")

CODES = {"nf4": NF4, "fp4": FP4}
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def no_compiler():
    """Some of bitsandbytes' functions compile themselves, which takes a minute and a C++ compiler, and changes no result."""
    with torch.compiler.set_stance("force_eager"):
        yield


def on_the_edge(code, n_blocks, blocksize, seed):
    """Blocks of random absmax, whose other values are as near to a midpoint between two levels as floats come, on either side."""
    generator = torch.Generator().manual_seed(seed)
    levels = code.sort().values
    midpoints = (levels[1:] + levels[:-1]) / 2
    absmax = torch.rand(n_blocks, 1, generator=generator) * 4 + 1e-3
    which = torch.randint(15, (n_blocks, blocksize), generator=generator)
    weight = absmax * midpoints[which]
    nudged = torch.nextafter(weight, torch.where(torch.rand(weight.shape, generator=generator) < 0.5, -9.0, 9.0))
    weight = torch.where(torch.rand(weight.shape, generator=generator) < 0.5, weight, nudged)
    weight[:, 0] = absmax[:, 0]
    return weight.flatten()


def compare(weight, name, blocksize):
    """Assert that every byte is the same; return how many there were."""
    theirs, state = bnb.quantize_4bit(weight, blocksize=blocksize, quant_type=name)
    packed, absmax = quantize_4bit(weight, CODES[name], blocksize)
    where = f"{name}, blocksize {blocksize}, {weight.dtype}, shape {tuple(weight.shape)}"
    assert packed.shape == theirs.shape and absmax.shape == state.absmax.shape, where
    assert torch.equal(packed, theirs), f"{where}: {(packed != theirs).sum()} bytes differ"
    # NaN has many bit patterns, and they mean the same.
    both_nan = absmax.isnan() & state.absmax.isnan()
    assert torch.equal(absmax.masked_fill(both_nan, 0), state.absmax.masked_fill(both_nan, 0)), where
    return packed.numel() + 4 * absmax.numel()


def test_packed_and_absmax_are_the_same_bytes(record_property):
    compared = 0
    generator = torch.Generator().manual_seed(0)
    for name, blocksize, dtype in itertools.product(CODES, BLOCKSIZES, DTYPES):
        sizes = [(64, 4096), (3 * blocksize + 1,), (1,), (blocksize - 1,), (0,), (7, 5, 3), (4096 + 38,)]
        for shape in sizes:
            compared += compare((torch.randn(shape, generator=generator) * 0.02).to(dtype), name, blocksize)
        compared += compare(on_the_edge(CODES[name], 2**18 // blocksize, blocksize, seed=blocksize).to(dtype), name, blocksize)
    assert compared > 13_000_000

    sweep = 2**20 * int(os.environ.get("MINQLORA_SWEEP_MB", "0"))
    for turn in itertools.count():
        if sweep <= 0:
            break
        name, blocksize, dtype = list(itertools.product(CODES, BLOCKSIZES, DTYPES))[turn % 48]
        weight = torch.randn(2**21 + turn, generator=generator) * 0.02
        weight = torch.cat([weight, on_the_edge(CODES[name], 2**21 // blocksize, blocksize, seed=turn)]).to(dtype)
        compared += compare(weight, name, blocksize)
        sweep -= weight.numel() * weight.element_size()
    record_property("bytes compared", compared)
    print(f"{compared:,} bytes of packed and absmax compared with bitsandbytes: none differs")


def test_the_reciprocal_is_what_decides():
    """The values above tell a multiplication by the reciprocal from a division: with a division, bytes differ."""
    weight = on_the_edge(NF4, 4096, 64, seed=1)
    blocks = weight.view(-1, 64)
    levels = torch.bucketize(blocks / blocks.abs().amax(dim=1, keepdim=True), (NF4[1:] + NF4[:-1]) / 2)
    codes = levels.view(-1, 2).to(torch.uint8)
    divided = codes[:, 0] << 4 | codes[:, 1]
    assert (divided != quantize_4bit(weight)[0].flatten()).any()


@pytest.mark.parametrize("name", CODES)
def test_strange_values_give_the_same_bytes(name):
    nan, inf = float("nan"), float("inf")
    strange = {
        "zeros": [0.0] * 64,
        "ragged zeros": [0.0] * 67,
        "negative zeros": [1.0] + [-0.0] * 63,
        "a NaN": [1.0, nan] + [0.5] * 62,
        "a NaN in an odd ragged block": [1.0] * 64 + [1.0, nan, 0.3],
        "infinities": [1.0, inf, -inf] + [0.5] * 61,
        "subnormal": [1e-39] * 64 + [1e-40] * 63,
        "the smallest": [1e-45] * 64,
        "the largest": [3.4e38, -3.4e38, 1e38] + [1.0] * 61,
        "around the two zeros of FP4": [1.0, 0.0, -0.0, 0.0026, 0.00261, -0.0026, -0.00261, 1e-9, -1e-9] + [0.0] * 55,
    }
    for values in strange.values():
        for blocksize in (32, 64):
            compare(torch.tensor(values), name, blocksize)


@pytest.mark.parametrize("name", CODES)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_dequantized_values_are_the_same_in_three_dtypes(name, blocksize):
    # Several rows, each of whole blocks: there bitsandbytes is right on every CPU.
    weight = torch.randn(3, 2 * blocksize, generator=torch.Generator().manual_seed(blocksize))
    packed, state = bnb.quantize_4bit(weight, blocksize=blocksize, quant_type=name)
    for dtype in DTYPES:
        state.dtype = dtype
        ours = dequantize_4bit(packed, state.absmax, weight.shape, CODES[name], blocksize, dtype)
        assert ours.dtype == dtype
        assert torch.equal(ours, bnb.dequantize_4bit(packed, state))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_where_a_block_spans_two_rows_the_formula_is_the_definition(dtype, record_property):
    """bitsandbytes 0.50 on a CPU with AVX512 takes the absmax of another block there; on other CPUs it follows the formula, as we do.

    A row of 96 values has one block of 64 and half of another. The AVX512 code counts 96 // 64 = 1 block a row, and starts row r at
    block r, where it starts at value 96 r, in block 3 r // 2.
    """
    # Each block is ten times as large as the one before: with another block's absmax, nothing is even near.
    size = 10.0 ** torch.arange(8).repeat_interleave(64)[: 5 * 96].view(5, 96)
    weight = torch.rand(5, 96, generator=torch.Generator().manual_seed(0)) * size * 1e-3
    packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    levels = NF4[torch.cat([packed >> 4, packed & 15], dim=1).int()].view(5, 96)
    absmax = state.absmax.repeat_interleave(64)[: 5 * 96].view(5, 96)
    of_another_block = state.absmax[torch.arange(5)[:, None] * (96 // 64) + torch.arange(96) // 64]

    ours = dequantize_4bit(packed, state.absmax, (5, 96), dtype=dtype)
    assert torch.equal(ours, (levels * absmax).to(dtype))
    state.dtype = dtype
    theirs = bnb.dequantize_4bit(packed, state)
    assert torch.equal(theirs, ours) or torch.equal(theirs, (levels * of_another_block).to(dtype))

    # Half of NF4's widest gap, and a step of the dtype on top: nothing that is right is farther from the weight.
    bound = (NF4.diff().max() / 2 + torch.finfo(dtype).eps) * absmax
    assert ((ours.float() - weight).abs() <= bound).all()
    assert ((levels * of_another_block - weight).abs() > bound).any()
    differing = int((theirs != ours).sum())
    record_property("values that bitsandbytes dequantizes otherwise", differing)
    print(f"{torch.backends.cpu.get_cpu_capability()}: bitsandbytes dequantizes {differing} of 480 values by another block's absmax")


def test_double_quantization_gives_the_same_codes_and_absmaxes():
    assert torch.equal(DYNAMIC_MAP, bnb.create_dynamic_map())
    compared = 0
    for n in (1, 255, 256, 257, 331_712, 1_000_003):               # 331 712 blocks: falcon-7b's qkv, with a ragged group
        absmax = torch.randn(n, 8, generator=torch.Generator().manual_seed(n)).abs().amax(dim=1) * 0.02
        codes, absmax2, offset = double_quantize(absmax)
        assert torch.equal(offset, absmax.mean())
        theirs, state = bnb.quantize_blockwise(absmax - absmax.mean(), blocksize=256)
        assert torch.equal(codes, theirs)
        assert torch.equal(absmax2, state.absmax)
        assert torch.equal(double_dequantize(codes, absmax2, offset), bnb.dequantize_blockwise(theirs, state) + absmax.mean())
        compared += n
    assert compared > 1_000_000
    # A group of zeros, and a group of one value.
    for group in (torch.zeros(300), torch.full((300,), 1e-39), torch.cat([torch.zeros(256), torch.linspace(-1, 1, 44)])):
        centred = group - group.mean()
        codes, absmax2, _ = double_quantize(group)
        theirs, state = bnb.quantize_blockwise(centred, blocksize=256)
        assert torch.equal(codes, theirs) and torch.equal(absmax2, state.absmax)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("name", CODES)
def test_a_layer_is_the_same_layer(name, double_quant):
    generator = torch.Generator().manual_seed(3)
    weight, bias, x = (torch.randn(shape, generator=generator) for shape in ((48, 128), (48,), (5, 128)))
    packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type=name, compress_statistics=double_quant)
    layer = Linear4bit.from_weight(weight, bias, CODES[name], double_quant=double_quant)
    assert torch.equal(layer.dequantize(), bnb.dequantize_4bit(packed, state))
    assert torch.equal(layer(x), F.linear(x, bnb.dequantize_4bit(packed, state)) + bias)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("name", CODES)
def test_either_reads_what_the_other_saved(name, double_quant):
    weight = torch.randn(48, 96, generator=torch.Generator().manual_seed(4)).bfloat16()
    packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type=name, compress_statistics=double_quant)
    theirs = {"weight": packed} | {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    layer = Linear4bit.from_weight(weight, None, CODES[name], double_quant=double_quant)
    ours = layer.state_dict()

    assert {key: (value.shape, value.dtype) for key, value in ours.items()} == {
        key: (value.shape, value.dtype) for key, value in theirs.items()
    }
    for key, value in theirs.items():
        assert torch.equal(ours[key], value), key

    read = bnb.QuantState.from_dict({key: value for key, value in ours.items() if key != "weight"}, device=torch.device("cpu"))
    assert torch.equal(read.absmax, state.absmax) and read.shape == weight.shape and read.dtype == torch.bfloat16
    fresh = Linear4bit(96, 48, code=CODES[name], double_quant=double_quant)
    fresh.load_state_dict(theirs)
    assert torch.equal(fresh.dequantize(), layer.dequantize())
