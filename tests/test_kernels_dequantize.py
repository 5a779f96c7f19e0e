"""kernels/dequantize_4bit.py and the dequantizing half of kernels/double_quant.py, against the definitions, and bitsandbytes on a GPU.

Where there is no GPU, the kernels run in Triton's interpreter, which cannot round to bfloat16.
"""

import pytest
import torch

from minqlora import double_quant, nf4
from minqlora.double_quant import DYNAMIC_MAP
from minqlora.nf4 import FP4, INT4, NF4

# The interpreter has to be on before these are imported: conftest.py sees to it.
from minqlora.kernels.dequantize_4bit import dequantize_4bit  # isort: skip
from minqlora.kernels.double_quant import double_dequantize  # isort: skip

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")
CODE2 = DYNAMIC_MAP.to(DEVICE)


def random_bytes(n, seed=0):
    return torch.randint(0, 256, ((n + 1) // 2, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def doubly_quantized(n_blocks, blocksize2, seed=0):
    """Random codes of absmaxes with the scales of their groups and the offset; and what they stand for."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (n_blocks,), dtype=torch.uint8, generator=generator)
    absmax2 = torch.rand(-(-n_blocks // blocksize2), generator=generator)
    offset = torch.rand((), generator=generator)
    return codes, absmax2, offset, double_quant.double_dequantize(codes, absmax2, offset, blocksize2)


def test_hand_example():
    # 0x0F: code 0, -1, then code 15, +1. 0x87: 0.0796 and 0. Two blocks of 64 with absmax 2 and 3.
    packed = torch.tensor([0x0F] * 32 + [0x87] * 32, dtype=torch.uint8, device=DEVICE)
    weight = dequantize_4bit(packed, torch.tensor([2.0, 3.0], device=DEVICE), (2, 64), NF4.to(DEVICE), 64, torch.float32)
    assert weight[0].tolist() == [-2, 2] * 32
    assert weight[1].tolist() == [torch.tensor(0.07958029955625534).mul(3).item(), 0] * 32


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (63,), (5, 13), (1, 64), (7, 96), (3, 4, 200), (2048,), (8195,)])
def test_every_bit_is_the_reference_s(shape, dtype):
    n = torch.Size(shape).numel()
    packed = random_bytes(n)
    for blocksize in (32, 64, 256, 4096):
        absmax = torch.rand(-(-n // blocksize), generator=torch.Generator().manual_seed(n))
        for code in (NF4, FP4, INT4):
            wanted = nf4.dequantize_4bit(packed, absmax, shape, code, blocksize, dtype)
            weight = dequantize_4bit(packed.to(DEVICE), absmax.to(DEVICE), shape, code.to(DEVICE), blocksize, dtype)
            assert torch.equal(weight.cpu(), wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("blocksize", "blocksize2"), [(64, 256), (32, 32), (64, 32), (256, 64), (4096, 256)])
def test_one_launch_undoes_both_quantizations_in_every_bit(blocksize, blocksize2, dtype):
    for n in (1, 64, 5000, 16384 + 64, 70001):
        packed = random_bytes(n, seed=n)
        codes, absmax2, offset, absmax = doubly_quantized(-(-n // blocksize), blocksize2, seed=n)
        nested = (absmax2.to(DEVICE), offset.to(DEVICE), CODE2, blocksize2)
        weight = dequantize_4bit(packed.to(DEVICE), codes.to(DEVICE), (n,), NF4.to(DEVICE), blocksize, dtype, nested)
        assert torch.equal(weight.cpu(), nf4.dequantize_4bit(packed, absmax, (n,), NF4, blocksize, dtype))


@pytest.mark.parametrize(("n", "blocksize"), [(1, 256), (255, 256), (1025, 64), (5000, 256), (5000, 4096)])
def test_absmax_comes_back_in_every_bit(n, blocksize):
    codes, absmax2, offset, absmax = doubly_quantized(n, blocksize)
    # A fused multiply-add would round once, which differs from two roundings in about one of these values in ten.
    assert torch.equal(double_dequantize(codes.to(DEVICE), absmax2.to(DEVICE), offset.to(DEVICE), CODE2, blocksize).cpu(), absmax)


def test_every_value_is_written_and_nothing_beyond():
    n = 2048 + 65
    packed, absmax = random_bytes(n).to(DEVICE), torch.ones(-(-n // 64), device=DEVICE)
    memory = torch.full((n + 100,), 7.0, device=DEVICE)            # 7 is no level
    out = memory[:n]
    assert dequantize_4bit(packed, absmax, (n,), NF4.to(DEVICE), 64, torch.float32, out=out) is out
    assert (out.abs() <= 1).all() and (memory[n:] == 7).all()


def test_an_out_that_does_not_fit_is_refused():
    packed, absmax, code = random_bytes(128).to(DEVICE), torch.ones(2, device=DEVICE), NF4.to(DEVICE)
    for out in (torch.empty(127), torch.empty(2, 64), torch.empty(128, dtype=torch.float64), torch.empty(256, device=DEVICE)[::2]):
        with pytest.raises(ValueError, match="out is"):
            dequantize_4bit(packed, absmax, (128,), code, 64, torch.float32, out=out.to(DEVICE))


def test_an_empty_weight():
    empty = torch.empty(0, 1, dtype=torch.uint8, device=DEVICE)
    assert dequantize_4bit(empty, torch.empty(0, device=DEVICE), (0, 64), NF4.to(DEVICE), 64, torch.float32).shape == (0, 64)


def test_the_operators_are_registered_and_compile_without_a_break():
    codes, absmax2, offset, _ = (x.to(DEVICE) for x in doubly_quantized(4, 256))
    packed, code = random_bytes(200).to(DEVICE), NF4.to(DEVICE)
    inputs = (packed, codes, absmax2, offset, CODE2, 256, code, 64)
    torch.library.opcheck(torch.ops.minqlora.dequantize_4bit.default, (*inputs, (2, 100), torch.float16))
    torch.library.opcheck(torch.ops.minqlora.dequantize_4bit.out, inputs, {"out": torch.empty(2, 100, device=DEVICE)})
    torch.library.opcheck(torch.ops.minqlora.double_dequantize.default, (codes, absmax2, offset, CODE2, 256))

    def both(packed, codes):
        out = torch.empty(2, 100, device=DEVICE)
        dequantize_4bit(packed, codes, (2, 100), code, 64, torch.float32, (absmax2, offset, CODE2, 256), out)
        absmax = double_dequantize(codes, absmax2, offset, CODE2, 256)
        return out + dequantize_4bit(packed, absmax, (2, 100), code, 64, torch.float32)

    assert torch.equal(torch.compile(both, backend="aot_eager", fullgraph=True)(packed, codes), both(packed, codes))


# --- On a GPU -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("blocksize", [32, 64, 128, 256, 512, 1024, 2048, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_bit_is_bitsandbytes_on_cuda(dtype, blocksize):
    functional = pytest.importorskip("bitsandbytes.functional")
    generator = torch.Generator("cuda").manual_seed(blocksize)
    for size in (1, 0.02, 1e-38):                                  # the last has subnormal products, which count as zero
        for n in (2**22, 2**20 + 37):
            weight = (torch.randn(n, generator=generator, device="cuda") * size).to(dtype)
            for double in (False, True):
                packed, state = functional.quantize_4bit(weight, blocksize=blocksize, compress_statistics=double, quant_type="nf4")
                nested = (state.state2.absmax, state.offset, state.state2.code, 256) if double else None
                ours = dequantize_4bit(packed, state.absmax, (n,), state.code, blocksize, dtype, nested)
                wanted = functional.dequantize_4bit(packed, state).view(-1)
                assert torch.equal(ours.view(torch.uint8), wanted.view(torch.uint8))           # bits: the sign of zero too


@pytest.mark.gpu
@pytest.mark.parametrize("n", [1, 100, 256 * 1000, 1290515])
def test_absmax_comes_back_as_bitsandbytes_has_it(n):
    functional = pytest.importorskip("bitsandbytes.functional")
    absmax = torch.randn(n, 64, device="cuda").abs().amax(1)
    offset = absmax.mean()
    codes, state = functional.quantize_blockwise(absmax - offset, blocksize=256)
    wanted = functional.dequantize_blockwise(codes, state) + offset
    assert torch.equal(double_dequantize(codes, state.absmax, offset, CODE2, 256), wanted)


@pytest.mark.gpu
def test_more_than_2_to_the_31_values():
    n = 2**31 + 64 * 1000 + 17                                     # 4.3 GB in bfloat16
    n_blocks = -(-n // 64)
    packed = torch.empty((n + 1) // 2, dtype=torch.uint8, device="cuda").random_()
    absmax = torch.rand(n_blocks, device="cuda")
    weight = dequantize_4bit(packed, absmax, (n,), NF4.cuda(), 64, torch.bfloat16)
    start = 2**31 - 64 * 1000
    wanted = dequantize_4bit(packed[start // 2 :], absmax[start // 64 :], (n - start,), NF4.cuda(), 64, torch.bfloat16)
    assert torch.equal(weight[start:], wanted)


@pytest.mark.gpu
def test_it_runs_on_the_stream_and_in_the_graph_it_is_called_in():
    n = 4096 * 640
    packed, absmax, code = random_bytes(n).cuda(), torch.rand(n // 64, device="cuda"), NF4.cuda()
    wanted = dequantize_4bit(packed, absmax, (n,), code, 64, torch.bfloat16)
    still = torch.zeros_like(packed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        weight = dequantize_4bit(still, absmax, (n,), code, 64, torch.bfloat16)
    still.copy_(packed)
    graph.replay()
    assert torch.equal(weight, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weight_lands_in_some_columns_of_a_wider_matrix_and_nowhere_else(dtype):
    codes, absmax2, offset, absmax = doubly_quantized(33 * 2, 256)
    packed = random_bytes(33 * 128)
    wide = torch.full((33, 228), 7.0, dtype=dtype, device=DEVICE)
    inputs = (tensor.to(DEVICE) for tensor in (absmax2, offset))
    nested = (*inputs, CODE2, 256)
    dequantize_4bit(packed.to(DEVICE), codes.to(DEVICE), (33, 128), NF4.to(DEVICE), 64, dtype, nested, out=wide[:, 50:178])
    assert torch.equal(wide[:, 50:178].cpu(), nf4.dequantize_4bit(packed, absmax, (33, 128), dtype=dtype))
    assert (wide[:, :50] == 7).all() and (wide[:, 178:] == 7).all()


def test_columns_that_do_not_hold_whole_blocks_are_refused():
    wide, packed, absmax = torch.empty(4, 200, device=DEVICE), random_bytes(4 * 96).to(DEVICE), torch.ones(6, device=DEVICE)
    with pytest.raises(ValueError, match="whole blocks of 64"):
        dequantize_4bit(packed, absmax, (4, 96), NF4.to(DEVICE), 64, torch.float32, out=wide[:, :96])
