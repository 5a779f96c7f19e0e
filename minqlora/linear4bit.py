"""3. Linear4bit: a linear layer that stores 4 bits and computes in 16 (QLoRA Eq. 5, left term, and Eq. 6).

    Y  = X · dequant(dequant(absmax2, codes), packed)^T        dequantize, multiply, forget
    dX = dY · dequant(dequant(absmax2, codes), packed)         dequantize again
    dW is never computed: the weight is frozen

Storage and computation have different types. The weight rests as 4-bit codes; for each product it becomes a full matrix in the type
of X (bfloat16 where it is fast, float32 elsewhere) and is dropped at once. The gradient has to pass through the product on its way to
the adapters below, so the backward pass needs the same matrix once more. Autograd would keep it from the forward pass, of all layers
at once: 14 GB for 7 billion parameters in bfloat16, the very memory that 4 bits are there to save. The function below keeps the packed
bytes, which lie in the model anyway, and dequantizes a second time.

    what is stored            type and shape                                  bits a parameter
    weight                    uint8 ((n + 1) // 2, 1)                         4
    absmax                    uint8 (ceil(n / 64),), or float32 without       0.125 (0.5)
                              double quantization
    nested_absmax             float32 (ceil(n / 64 / 256),)                   0.002
    nested_offset             float32 (1,)

They are parameters without a gradient, and not buffers: FSDP, which spreads a model over several GPUs, leaves buffers whole. (It takes no
parameter without a dimension either: hence the offset's.)

They keep their types too: `model.to(torch.bfloat16)` is a common line, and an absmax rounded to 8 bits of mantissa would change every
weight without a word.

**In a state dict** the names and shapes are those of bitsandbytes, dots included, so that either can read what the other wrote:
`weight`, `weight.absmax`, `weight.quant_map` (the 16 levels), `weight.nested_absmax`, `weight.nested_quant_map` (the 256), and
`weight.quant_state.bitsandbytes__nf4`: a JSON object as bytes, with the block sizes, the shape and the offset.

**On a GPU** `kernels/matmul_4bit.py` computes the same product, and dequantizes inside it.
"""

import json
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minqlora.double_quant import DYNAMIC_MAP, double_dequantize, double_quantize
from minqlora.nf4 import FP4, FP4_E2M1, INT4, NF4, check_code, dequantize_4bit, quantize_4bit

NESTED_BLOCKSIZE = 256
# What files call the codes (the first two names are bitsandbytes' own, the others it does not have) and our parameters.
NAMES = {"nf4": NF4, "fp4": FP4, "fp4_e2m1": FP4_E2M1, "int4": INT4}
STORED_AS = {"absmax": "weight.absmax", "nested_absmax": "weight.nested_absmax"}


class Product4bit(torch.autograd.Function):
    """Y = X W^T with W in 4 bits. `stored` is (weight, absmax, nested_absmax, nested_offset, code); the third and fourth may be None."""

    @staticmethod
    def forward(ctx, x, shape, blocksize, *stored):
        ctx.shape, ctx.blocksize = shape, blocksize
        # Keep the 4-bit weight and dequantize it again: 0.5 byte a parameter that is there anyway, not 2 more.
        ctx.save_for_backward(*stored)
        return F.linear(x, dequantize(*stored, shape, blocksize, x.dtype))     # (..., out_features)

    @staticmethod
    def backward(ctx, grad_y):
        # Read once: under activation checkpointing the saved tensors are gone after the first look.
        stored = ctx.saved_tensors
        weight = dequantize(*stored, ctx.shape, ctx.blocksize, grad_y.dtype)   # (out_features, in_features)
        return grad_y @ weight, *[None] * (2 + len(stored))                    # (..., in_features)


def dequantize(weight, absmax, nested_absmax, nested_offset, code, shape, blocksize, dtype) -> Tensor:
    """W = dequant(dequant(absmax2, codes), packed): (out_features, in_features) (Eq. 6)."""
    if nested_absmax is not None:
        absmax = double_dequantize(absmax, nested_absmax, nested_offset, NESTED_BLOCKSIZE)
    return dequantize_4bit(weight, absmax, shape, code, blocksize, dtype)


class Linear4bit(nn.Module):
    """A frozen linear layer of (out_features, in_features) weights in 4 bits; make one with `Linear4bit.from_weight`.

    The constructor leaves the values undefined, for a loader to fill in. dtype is what the weight was before, and what the bias is.
    """

    def __init__(self, in_features, out_features, bias=False, code=NF4, blocksize=64, double_quant=True, device=None, dtype=torch.float32):
        super().__init__()
        check_code(code, blocksize)
        self.in_features, self.out_features, self.blocksize, self.dtype = in_features, out_features, blocksize, dtype
        n = in_features * out_features
        n_blocks = math.ceil(n / blocksize)

        def empty(*shape, dtype):
            return frozen(torch.empty(shape, dtype=dtype, device=device))

        self.weight = empty((n + 1) // 2, 1, dtype=torch.uint8)
        self.absmax = empty(n_blocks, dtype=torch.uint8 if double_quant else torch.float32)
        self.nested_absmax = empty(math.ceil(n_blocks / NESTED_BLOCKSIZE), dtype=torch.float32) if double_quant else None
        self.nested_offset = empty(1, dtype=torch.float32) if double_quant else None
        self.bias = empty(out_features, dtype=dtype) if bias else None
        # Constants, neither parameters nor buffers: they follow the weight to its device, and are never cast, sharded or left on meta.
        self.code, self.code2 = code, DYNAMIC_MAP if double_quant else None
        self._move_levels()

    @classmethod
    def from_weight(cls, weight, bias=None, code=NF4, blocksize=64, double_quant=True) -> "Linear4bit":
        """Quantize a weight (out_features, in_features), finite and of any float type. The bias, (out_features,), stays as it is.

        ValueError for another shape, for a code or blocksize that nf4.py refuses and, with double_quant, for a NaN or infinity.
        """
        if weight.ndim != 2:
            raise ValueError(f"weight has shape {tuple(weight.shape)}; a linear layer's is (out_features, in_features)")
        out_features, in_features = weight.shape
        layer = cls(in_features, out_features, bias is not None, code, blocksize, double_quant, "meta", weight.dtype)
        packed, absmax = quantize_4bit(weight, code, blocksize)
        if double_quant:
            absmax, nested_absmax, nested_offset = double_quantize(absmax, NESTED_BLOCKSIZE)
            layer.nested_absmax, layer.nested_offset = frozen(nested_absmax), frozen(nested_offset.reshape(1))
        layer.weight, layer.absmax = frozen(packed), frozen(absmax)
        layer.bias = None if bias is None else frozen(bias.detach())
        layer._move_levels()
        return layer

    def forward(self, x: Tensor, lora_xa: Tensor | None = None, lora_B: Tensor | None = None) -> Tensor:
        """x W^T + bias; with lora_xa (..., rank) and lora_B (out_features, rank), which come together, + lora_xa lora_B^T."""
        if x.is_cuda:
            from minqlora.kernels.matmul_4bit import matmul_4bit

            return matmul_4bit(
                x, self.weight, self.absmax, self.code, self.out_features, self.in_features, self.blocksize, self._nested(), self.bias,
                lora_xa, lora_B,
            )  # fmt: skip
        y = Product4bit.apply(x, (self.out_features, self.in_features), self.blocksize, *self._stored())
        y = y if self.bias is None else y + self.bias.to(y.dtype)              # (..., out_features)
        return y if lora_xa is None else y + F.linear(lora_xa, lora_B)

    def dequantize(self, dtype: torch.dtype = torch.float32, out: Tensor | None = None) -> Tensor:
        """W, (out_features, in_features), in dtype: a new tensor, or out, which may be some columns of a wider one."""
        shape = (self.out_features, self.in_features)
        if out is not None and self.in_features % self.blocksize and not out.is_contiguous():
            # Blocks cross the ends of rows here, and the kernel places whole blocks.
            return out.copy_(self.dequantize(dtype))
        if self.weight.is_cuda:
            from minqlora.kernels.dequantize_4bit import dequantize_4bit as kernel

            return kernel(self.weight, self.absmax, shape, self.code, self.blocksize, dtype, self._nested(), out)
        weight = dequantize(*self._stored(), shape, self.blocksize, dtype)
        return weight if out is None else out.copy_(weight)

    def extra_repr(self) -> str:
        stored = sum(p.numel() * p.element_size() for name, p in self.named_parameters() if name != "bias")
        bits = f"{8 * stored / (self.in_features * self.out_features):.3f} bits a parameter"
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {bits}"

    def _nested(self):
        """What the kernels take of double quantization."""
        return None if self.code2 is None else (self.nested_absmax, self.nested_offset, self.code2, NESTED_BLOCKSIZE)

    def _stored(self):
        return self.weight, self.absmax, self.nested_absmax, self.nested_offset, self.code

    def _move_levels(self):
        if not self.weight.is_meta:
            self.code = self.code.to(self.weight.device)
            self.code2 = None if self.code2 is None else self.code2.to(self.weight.device)

    def _apply(self, fn, recurse=True):
        """What .to(), .half(), .cuda() and their like run on every parameter: devices change, the types of what is packed do not."""
        packed = [p for name, p in self.named_parameters() if name != "bias"]

        def keeping_types(tensor):
            moved = fn(tensor)
            if moved.dtype != tensor.dtype and any(tensor is p for p in packed):
                return tensor.to(moved.device)
            return moved

        super()._apply(keeping_types, recurse)
        self._move_levels()
        return self

    def _quant_state(self) -> tuple[str, dict]:
        """The key and the content of what bitsandbytes stores beside the tensors, all but the offset."""
        name = next((name for name, code in NAMES.items() if torch.equal(code, self.code.cpu())), "custom")
        shape = [self.out_features, self.in_features]
        state = {"quant_type": name, "blocksize": self.blocksize, "dtype": str(self.dtype).removeprefix("torch."), "shape": shape}
        if self.code2 is not None:
            state |= {"nested_blocksize": NESTED_BLOCKSIZE, "nested_dtype": "float32"}
        return f"weight.quant_state.bitsandbytes__{name}", state

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        own = {}
        super()._save_to_state_dict(own, "", keep_vars)
        offset = own.pop("nested_offset", None)
        for name, tensor in own.items():
            destination[prefix + STORED_AS.get(name, name)] = tensor
        destination[prefix + "weight.quant_map"] = self.code
        key, state = self._quant_state()
        if offset is not None:
            destination[prefix + "weight.nested_quant_map"] = self.code2
            # On the meta device there is no number to write yet.
            state["nested_offset"] = None if offset.is_meta else offset.item()
        destination[prefix + key] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs):
        # Back to our names, for PyTorch's own loading to do the rest.
        for name, stored in STORED_AS.items():
            if prefix + stored in state_dict and getattr(self, name) is not None:
                state_dict[prefix + name] = state_dict.pop(prefix + stored)

        # What describes the layer must describe this one.
        key, ours = self._quant_state()
        described = prefix + key in state_dict
        if described:
            theirs = json.loads(bytes(state_dict.pop(prefix + key).tolist()))
            for field in ("blocksize", "shape", "nested_blocksize"):
                if theirs.get(field) != ours.get(field):
                    error_msgs.append(f"{prefix}weight: {field} is {theirs.get(field)}, and this layer's is {ours.get(field)}")
            self.dtype = getattr(torch, theirs["dtype"])
            if self.code2 is not None and theirs.get("nested_offset") is not None:
                device = self.nested_offset.device if prefix + "absmax" not in state_dict else state_dict[prefix + "absmax"].device
                state_dict[prefix + "nested_offset"] = torch.tensor([theirs["nested_offset"]], device=device)
        elif strict:
            missing_keys.append(prefix + key)
        for name, levels in (("weight.quant_map", self.code), ("weight.nested_quant_map", self.code2)):
            stored = None if levels is None else state_dict.pop(prefix + name, None)
            if stored is not None and not torch.equal(stored.cpu(), levels.cpu()):
                error_msgs.append(f"{prefix}{name} holds other levels than this layer's")
            elif stored is None and levels is not None and strict:
                missing_keys.append(prefix + name)

        # PyTorch would cast an absmax in float32 to the uint8 of its code, or back, and say nothing.
        for name, parameter in self.named_parameters():
            stored = state_dict.get(prefix + name)
            if name != "bias" and stored is not None and stored.dtype != parameter.dtype:
                error_msgs.append(f"{prefix}{STORED_AS.get(name, name)} is {stored.dtype}, and this layer's is {parameter.dtype}")
                state_dict[prefix + name] = parameter.detach()

        missing = []
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs)
        names = [name.removeprefix(prefix) for name in missing]
        missing_keys += [prefix + STORED_AS.get(name, name) for name in names if name != "nested_offset" or described]
        self._move_levels()


def frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
