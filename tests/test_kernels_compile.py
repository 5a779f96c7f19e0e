"""Every kernel compiles for the GPUs it is for, on a machine that has none.

The interpreter runs a kernel as Python, and Python forgives what the compiler does not: a variable of two shapes, a launch that wants more
shared memory than there is. Triton brings the whole compiler along, so a process of its own (the interpreter is on in this one) asks
for the machine code and launches nothing. Tensors on the CPU stand for those on a GPU.
"""

import os
import subprocess
import sys

import pytest

SCRIPT = '''
import sys
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

class Driver:
    """A GPU, as far as the compiler asks."""
    def get_current_target(self): return GPUTarget("cuda", int(sys.argv[2]), 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device=None): return 0

triton.runtime.driver.set_active(Driver())
compiled = []
def compile_only(self, grid):
    def launch(*args, **options):
        kernel = self.run(*args, grid=grid, warmup=True, **options)
        compiled.append((self.fn.__name__, kernel.metadata.shared))
    return launch
JITFunction.__getitem__ = compile_only

from types import SimpleNamespace
torch.cuda.get_device_properties = lambda device: SimpleNamespace(multi_processor_count=132)
torch.cuda.get_device_capability = lambda device=None: divmod(int(sys.argv[2]), 10)
from minqlora.kernels import (
    copy_columns, cross_entropy, decode, decode_attention, dequantize_4bit, double_quant, dropout, few_rows, few_rows_mma,
    few_rows_wgmma, gelu, layer_norm, quantize_4bit, rotary,
)
from minqlora.double_quant import DYNAMIC_MAP
from minqlora.nf4 import NF4
few_rows.has_table = lambda x: x.dtype != torch.float32
for module in (few_rows, few_rows_mma, few_rows_wgmma, decode, decode_attention):
    module.overlaps = lambda x: sys.argv[2] == "90"

dtype = getattr(torch, sys.argv[1])
def some(*shape, dtype=dtype): return torch.zeros(shape, dtype=dtype)
'''


# Bytes of shared memory: what a launch gets without asking, what there is on Hopper, and what the pair table takes.
WITHOUT_ASKING, ALL_THERE_IS, TABLE = 48 * 1024, 227 * 1024, 32 * 1024


def compiled(dtype: str, calls: str, capability: int = 90) -> dict[str, list[int]]:
    """Shared memory of every compilation, by kernel, after `calls`. 90 is Hopper."""
    script = SCRIPT + calls + "\nfor name, shared in compiled: print('kernel', name, shared)\n"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", script, dtype, str(capability)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("kernel")]
    assert lines, "nothing was compiled"
    return {name: [int(shared) for _, other, shared in lines if other == name] for _, name, _ in lines}


def test_what_stands_between_the_products_of_a_training_step():
    names = compiled("bfloat16", '''
x, wide, weight = some(32, 4544), some(32, 22848), some(4544)
layer_norm.norm_into(x, weight, weight, 1e-5, wide[:, :4544])
layer_norm.norm_backward(x, weight, 1e-5, wide[:, :4544], x)
gelu.gelu_into(wide[:, :18176], some(32, 18304)[:, :18176])
gelu.gelu_backward_(wide[:, :18176], some(32, 18176), some(32, 64), some(64, 18176))
gelu.gelu_backward_(wide[:, :18176], some(32, 18176))
dropout.drop(wide[:, :4544], 0.1, torch.tensor(1))
cross_entropy.cross_entropy_(some(8, 65024), torch.zeros(8, dtype=torch.int64), torch.zeros(8), -100)
angles = some(1, 16, 64), some(1, 16, 64)
for kv_heads, turned in ((1, angles), (8, None)):
    rows = (64 + 2 * kv_heads) * 64
    copy_columns.copy_columns(wide[:, :rows], some(32, rows))
    rotary.turn(wide[:, :rows], turned, kv_heads, 64)
    rotary.turn_back(*[some(2, 64, 16, 64)] * 3, turned, kv_heads, wide[:, :rows])
''')  # fmt: skip
    assert set(names) >= {"turn_kernel", "turn_back_kernel", "drop_kernel", "cross_entropy_kernel"}
    assert max(map(max, names.values())) <= WITHOUT_ASKING


def test_what_stands_between_the_products_of_a_decode_step():
    names = compiled("bfloat16", '''
x, weight, positions = some(2, 4544), some(4544), torch.zeros(2, 512, dtype=torch.int32)
decode.add_norm(x, [x, x, x], weight, weight, 1e-5)
decode.gelu(some(2, 18176), some(2, 64), some(18176, 64))
decode.gelu(some(200, 18176))
decode.outer([(some(2, 64), some(4544, 64)), (some(2, 16), some(4544, 16))])
decode.inner(some(2, 4544), some(128, 4544), [64, 64])
decode.inner(some(1, 18176), some(64, 18176), [64])
cache, filled = some(2, 1, 512, 64), torch.zeros((), dtype=torch.int64)
decode_attention.decode_attention(some(2, 73 * 64), cache, cache, positions, filled, [some(512, 32), some(512, 32)], None)
''')
    assert set(names) >= {"stretch_kernel", "combine_kernel", "add_norm_kernel", "outer_kernel", "inner_kernel"}


# A weight of 4 bits as the kernels get it, with double quantization or without.
STORED = '''
def stored(out_features, in_features, nested=True, blocksize=64):
    n = out_features * in_features
    blocks = -(-n // blocksize)
    packed = torch.zeros((n + 1) // 2, 1, dtype=torch.uint8)
    if nested:
        return packed, torch.zeros(blocks, dtype=torch.uint8), (torch.zeros(-(-blocks // 256)), torch.zeros(()), DYNAMIC_MAP, 256)
    return packed, torch.zeros(blocks), None
'''


@pytest.mark.parametrize("dtype, capability", [("bfloat16", 80), ("bfloat16", 90), ("float16", 100)])
def test_products_of_few_rows_leave_room_for_the_pair_table_which_triton_does_not_count(dtype, capability):
    names = compiled(dtype, STORED + '''
for nested, blocksize in ((True, 64), (False, 64), (True, 32)):
    packed, absmax, double = stored(4544, 4544, nested, blocksize)
    few_rows.product(some(3, 4544), packed, absmax, NF4, 4544, blocksize, double, None, some(3, 256), some(4544, 256), 0.5)
    few_rows.grad(some(3, 4544), packed, absmax, NF4, 4544, blocksize, double)
''', capability)  # fmt: skip
    # A launch gets 48 KiB without asking, and Triton asks only for what it counts itself.
    assert max(names["product_kernel"] + names["grad_kernel"]) + TABLE <= WITHOUT_ASKING


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_products_of_few_rows_for_rows_that_are_no_whole_blocks(dtype):
    compiled(dtype, STORED + '''
packed, absmax, double = stored(70, 90)
few_rows.product(some(3, 90), packed, absmax, NF4, 70, 64, double, some(70), some(3, 4), some(70, 4), 0.5)
few_rows.grad(some(3, 70), packed, absmax, NF4, 90, 64, double)
''')


def test_products_in_gluon():
    names = compiled("bfloat16", STORED + '''
packed, absmax, double = stored(4544, 4544)
for kernel, rows in ((few_rows_mma, 1), *[(few_rows_wgmma, m) for m in few_rows_wgmma.TILES]):
    kernel.product(some(rows, 4544), packed, absmax, NF4, 4544, 64, double, some(4544), some(rows, 64), some(4544, 64), 0.5)
''')
    mma, *wgmma = names["product_kernel"]
    # Triton asks for all there is, or it need not ask.
    assert mma + TABLE <= WITHOUT_ASKING
    assert len(wgmma) == 4 and min(wgmma) > WITHOUT_ASKING and max(wgmma) + TABLE <= ALL_THERE_IS


def test_quantization_and_back():
    names = compiled("bfloat16", STORED + '''
weight = some(4544, 4544)
quantize_4bit.quantize_4bit(weight, NF4, 64)
double_quant.double_quantize(torch.zeros(322_624), DYNAMIC_MAP, 256)
packed, absmax, double = stored(4544, 4544)
dequantize_4bit.dequantize_4bit(packed, absmax, (4544, 4544), NF4, 64, dtype, double)
double_quant.double_dequantize(absmax, *double)
''')
    assert set(names) >= {"quantize_kernel", "dequantize_kernel", "double_quantize_kernel", "double_dequantize_kernel"}
