"""12a. What a training step keeps in memory besides weights, adapters and optimizer: tensor by tensor, from the config alone.

Three moments can be the fullest of a step:

    loss       the forward is done: what the backward will read of every block, and the logits, several times over
    backward   a block's own tensors and their gradients, while what waits for earlier blocks shrinks and adapter gradients add up
    step       the gradients are complete, and the optimizer computes

With checkpointing a block leaves its input alone, and is computed again when its turn comes. Within a block there are again three
moments. The end of its forward, when all that it keeps is there, and what its code has not let go. Then, since autograd runs from the end,
attention's backward, and the MLP's, whose tensors are the widest. In a parallel block attention is done and gone by then; in a
sequential one the MLP comes first.

Every function returns bytes by name. M below is the number of tokens, batch * length; e the bytes of the computing type. Left out is
what is thinner than a rank, such as labels. A test compares kept tensors with autograd's own list, exactly, and moments with
the CPU's allocator. On a GPU three things differ, and `Flags.device` says so where they are counted: a norm's statistics are float32, a
dropout's mask has a byte a value, and attention's backward sums in float32.

falcon.py and lora.py are counted as they are written; fast.py and fast_loss.py at the end.
"""

from dataclasses import dataclass, replace

import torch

from minqlora.falcon import FalconConfig

OPTIMIZERS = ("adamw", "adamw8bit", "paged")
BUCKET = 2**22                                   # parameters that optim.py updates at once on a GPU
BLOCKSIZE_8BIT = 256                             # parameters that share a scale there
MIN_8BIT_SIZE = 4096                             # smaller tensors keep 32 bits there
CHUNK = 2048                                     # tokens whose logits fast_loss.py makes at once


@dataclass(frozen=True)
class Flags:
    """The flags that decide the memory. The defaults are those of the command line for a model of billions of parameters."""

    batch_size: int = 4
    length: int = 512
    accumulate: int = 4
    rank: int = 64
    targets: str | tuple[str, ...] = "all"
    dropout: float = 0.1
    adapter_dtype: torch.dtype = torch.float32
    optimizer: str = "adamw"
    checkpointing: bool = True
    quantize: bool = True
    double_quant: bool = True
    blocksize: int = 64
    dtype: torch.dtype = torch.bfloat16
    packing: bool = False
    fused: bool = False                          # train by fast.py: its blocks always checkpoint, but for what keep_bytes allows
    keep_bytes: int = 0
    recorded: bool = False                       # fused, and replayed as a CUDA graph by fast_loss.py
    device: str = "cuda"

    def __post_init__(self):
        for name in ("batch_size", "length", "accumulate", "rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must be at least 0 and less than 1")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer {self.optimizer!r} is not one of {', '.join(OPTIMIZERS)}")
        if self.optimizer == "adamw" and self.adapter_dtype != torch.float32:
            raise ValueError("optimizer 'adamw' needs float32 adapters; 'adamw8bit' and 'paged' take others")

    @property
    def tokens(self) -> int:
        return self.batch_size * self.length

    def rows(self, width: float) -> int:
        """Bytes of a tensor (M, width) of the computing type."""
        return int(self.tokens * width * self.dtype.itemsize)


@dataclass(frozen=True)
class Linear:
    name: str
    out_features: int
    in_features: int
    adapted: bool

    @property
    def numel(self) -> int:
        return self.out_features * self.in_features


def block_linears(config: FalconConfig, targets: str | tuple[str, ...] = "all") -> tuple[Linear, Linear, Linear, Linear]:
    """query_key_value, dense, up and down of a block; targets as add_lora takes them."""
    hidden, ffn = config.hidden_size, config.ffn_hidden_size
    qkv = (config.num_attention_heads + 2 * config.num_kv_heads) * config.head_dim
    shapes = {"self_attention.query_key_value": (qkv, hidden), "self_attention.dense": (hidden, hidden),
              "mlp.dense_h_to_4h": (ffn, hidden), "mlp.dense_4h_to_h": (hidden, ffn)}
    wanted = (targets,) if isinstance(targets, str) else tuple(targets)
    linears = tuple(Linear(name, *shape, wanted == ("all",) or any(f".{name}".endswith(f".{target}") for target in wanted))
                    for name, shape in shapes.items())
    if not any(linear.adapted for linear in linears):
        raise ValueError(f"targets {', '.join(wanted)} match no linear of a block; the model has {', '.join(shapes)}")
    return linears


# What autograd keeps of a block ---------------------------------------------------------------------------------------------------------

def kept_by_norms(config: FalconConfig, flags: Flags) -> dict[str, int]:
    """A norm keeps its input, which is the block's, and two statistics a token. Its output stays only where an adapter reads it."""
    qkv, _, up, _ = block_linears(config, flags.targets)
    norms = 1 if config.parallel_attn and config.num_ln_in_parallel_attn == 1 else 2
    readers = [[qkv, up]] if norms == 1 else [[qkv], [up]]
    read = sum(any(linear.adapted for linear in some) for some in readers) if not flags.dropout else 0
    statistic = 4 if flags.device == "cuda" else flags.dtype.itemsize
    return {"norm, mean and deviation": norms * 2 * flags.tokens * statistic, "norm": flags.rows(read * config.hidden_size)}


def kept_by_attention(config: FalconConfig, flags: Flags) -> dict[str, int]:
    """Query, key and value of every head as attention reads them, its result, and a float32 log-sum a head."""
    heads, kv_heads, head_dim = config.num_attention_heads, config.num_kv_heads, config.head_dim
    if 1 < kv_heads < heads:
        # The heads of a group lie between keys and values, and keys are to be repeated for each: all three are copied.
        read = {"query": flags.rows(heads * head_dim), "key, repeated": flags.rows(heads * head_dim),
                "value, repeated": flags.rows(heads * head_dim)}
    else:
        # One key for all, or one each, is a view. But the view of the values keeps the whole output of query_key_value.
        read = {"query_key_value": flags.rows((heads + 2 * kv_heads) * head_dim)}
        if not config.alibi:
            read["query and key, turned"] = flags.rows((heads + kv_heads) * head_dim)
    mask = flags.batch_size * flags.length**2 * flags.dtype.itemsize if flags.packing and not config.alibi else 0
    return read | {"mixed values": flags.rows(config.hidden_size), "log-sums": flags.tokens * heads * 4, "mask, as added": mask}


def kept_by_mlp(config: FalconConfig, flags: Flags) -> dict[str, int]:
    """GELU keeps its input. Its output stays where the adapter of the next linear reads it."""
    *_, down = block_linears(config, flags.targets)
    read = down.adapted and not flags.dropout
    between = 0 if config.parallel_attn else flags.rows(config.hidden_size)
    return {"up": flags.rows(config.ffn_hidden_size), "gelu(up)": flags.rows(config.ffn_hidden_size) * read, "x after attention": between}


def kept_by_adapter(linear: Linear, flags: Flags) -> dict[str, int]:
    """x A^T for B's gradient, and both matrices in the computing type. With dropout, A's gradient wants the dropped input and its mask."""
    if not linear.adapted:
        return {}
    cast = flags.adapter_dtype != flags.dtype
    kept = {"x A^T": flags.rows(flags.rank),
            "A, B cast": flags.rank * (linear.out_features + linear.in_features) * flags.dtype.itemsize * cast}
    if flags.dropout:
        mask = 1 if flags.device == "cuda" else flags.dtype.itemsize
        kept |= {"dropped input": flags.rows(linear.in_features), "dropout's mask": flags.tokens * linear.in_features * mask}
    return {f"{linear.name.rpartition('.')[2]}: {name}": size for name, size in kept.items()}


def kept_by_block(config: FalconConfig, flags: Flags) -> dict[str, int]:
    """All that autograd keeps of a block that is not checkpointed, besides its input."""
    kept = kept_by_norms(config, flags) | kept_by_attention(config, flags) | kept_by_mlp(config, flags)
    for linear in block_linears(config, flags.targets):
        kept |= kept_by_adapter(linear, flags)
    return kept


# A block's backward ---------------------------------------------------------------------------------------------------------------------

def end_of_forward(config: FalconConfig, flags: Flags) -> dict[str, int]:
    """A block at the end of its forward: beside what it keeps, what its code still has in its hands.

    In a parallel block dense is the last to run, in a sequential one down. A forward that is only there for the backward ends with the
    product of the base, since nothing after it is kept; the first gradient is there already, scaled for B.
    """
    qkv, dense, up, down = block_linears(config, flags.targets)
    last, hidden = dense if config.parallel_attn else down, flags.rows(config.hidden_size)
    held = {"output of the last linear": hidden}
    if last.adapted:
        held |= {"gradient, scaled for B": hidden} if flags.checkpointing else {"adapter's output, and the sum": 2 * hidden}
    if flags.checkpointing:
        held |= {"gradient of the output": hidden}
    if not config.parallel_attn:
        return held | {"output of attention": hidden, "norm, not kept": 0 if up.adapted and not flags.dropout else hidden,
                       "gelu(up), not kept": 0 if down.adapted and not flags.dropout else flags.rows(config.ffn_hidden_size)}
    norms = config.num_ln_in_parallel_attn * hidden - kept_by_norms(config, flags)["norm"]
    held |= {"norms, not kept": norms, "output of down": hidden}
    if 1 < config.num_kv_heads < config.num_attention_heads:
        # Attention itself, before the tensors that it copied from are let go, and before dense comes.
        copied_from = flags.rows(qkv.out_features + (config.num_attention_heads + config.num_kv_heads) * config.head_dim)
        of_dense = sum(kept_by_adapter(dense, flags).values()) + hidden * (1 if flags.checkpointing or not dense.adapted else 3)
        held |= {"query_key_value, and turned": max(0, copied_from - of_dense)}
    return held


def backward_of_attention(config: FalconConfig, flags: Flags) -> dict[str, int]:
    """The gradients that attention reads and writes, while all that the block keeps is there."""
    hidden = flags.rows(config.hidden_size)
    return {"gradient of the mixed values": hidden,
            "gradients of query, key, value": 3 * hidden,
            # Thread blocks of flash attention's backward add up the query's gradient in float32.
            "gradient of query in float32": flags.tokens * config.hidden_size * 4 if flags.device == "cuda" else 0}


def backward_of_mlp(config: FalconConfig, flags: Flags) -> tuple[dict[str, int], int]:
    """The gradients of width ffn, or two of them and the dequantized weight of `down`. Returns the gradients, and that weight."""
    *_, down = block_linears(config, flags.targets)
    wide, weight = flags.rows(config.ffn_hidden_size), down.numel * flags.dtype.itemsize * flags.quantize
    waiting = {"gradient that waits at the norm": flags.rows(config.hidden_size) * config.parallel_attn}
    # The gradient through the adapter waits for the one through the base, which needs the weight; then their sum is a third tensor.
    # Without an adapter there is one, and then that of up beside it.
    one, other = (2 * wide, 3 * wide) if down.adapted else (wide, 2 * wide)
    return (waiting | {"gradients of gelu(up)": one}, weight) if one + weight > other else (waiting | {"gradients of width ffn": other}, 0)


def kept_until_mlp(config: FalconConfig, flags: Flags) -> dict[str, int]:
    """What is left of a block's tensors at that moment: in a parallel block attention is done, and A's gradient has read gelu(up)."""
    qkv, dense, up, _ = block_linears(config, flags.targets)
    kept = kept_by_norms(config, flags) | kept_by_mlp(config, flags) | kept_by_adapter(up, flags) | {"gelu(up)": 0}
    if config.parallel_attn:
        return kept | {"norm": flags.rows(config.hidden_size) * (up.adapted and not flags.dropout)}
    return kept | kept_by_attention(config, flags) | kept_by_adapter(qkv, flags) | kept_by_adapter(dense, flags)


def left_by_block(config: FalconConfig, flags: Flags) -> tuple[int, int, int]:
    """What a block leaves to its backward beside its input: bytes in every block, bytes in some, and in how many."""
    if flags.fused:
        return left_by_fused_block(config, flags)
    return 0, sum(kept_by_block(config, flags).values()), 0 if flags.checkpointing else config.num_hidden_layers


def own_gradients(flags: Flags, *done: Linear) -> dict[str, int]:
    """Gradients of a block's adapters as far as they are there. From the second batch of a step on, they were there before."""
    features = sum(linear.in_features + linear.out_features for linear in done if linear.adapted)
    return {"its adapters' gradients": flags.rank * features * flags.adapter_dtype.itemsize * (flags.accumulate == 1)}


def block_at_work(config: FalconConfig, flags: Flags, kept: bool) -> tuple[dict[str, int], int]:
    """A block at its fullest, from the end of its forward to that of its backward: its tensors, and the workspace for a weight.

    kept: its products have been there since the forward. It matters where blocks are fused.
    """
    if flags.fused:
        return fused_block_at_work(config, flags, kept)
    qkv, dense, _, down = block_linears(config, flags.targets)
    left, output = kept_by_block(config, flags), {"gradient of the output": flags.rows(config.hidden_size)}
    before_dense = {name: size for name, size in left.items() if name not in kept_by_adapter(dense, flags)}
    gradients, weight = backward_of_mlp(config, flags)
    moments = [
        (left | end_of_forward(config, flags), 0),
        (before_dense | output | backward_of_attention(config, flags) | own_gradients(flags, dense), 0),
        (kept_until_mlp(config, flags) | output | gradients
         | own_gradients(flags, down, *((dense, qkv) if config.parallel_attn else ())), weight),
    ]
    return max(moments, key=lambda moment: sum(moment[0].values()) + moment[1])


# Outside of the blocks ------------------------------------------------------------------------------------------------------------------

def shared_by_blocks(config: FalconConfig, flags: Flags) -> dict[str, int]:
    """What a call computes once: ALiBi's bias for each head, or the angles; with packing, who may see whom."""
    square, rows = flags.length**2, flags.batch_size if flags.packing else 1
    if config.alibi:
        return {"ALiBi's bias and mask": rows * config.num_attention_heads * square * flags.dtype.itemsize}
    angles = 2 * rows * flags.length * config.head_dim * flags.dtype.itemsize
    return {"cosines and sines": angles, "mask": rows * square * flags.packing}


def loss_at_work(config: FalconConfig, flags: Flags) -> dict[str, int]:
    """train.py's answer_loss at its fullest, if every token is learned (an upper bound).

    cross_entropy keeps the float32 log-probabilities; its backward makes the gradient of those and that of the logits, float32 too.
    """
    logits = flags.tokens * config.vocab_size
    if flags.fused:
        hidden = flags.rows(config.hidden_size)
        chunk = min(CHUNK, flags.tokens) * config.vocab_size * flags.dtype.itemsize
        return {"hidden states": hidden, "those before a learned token": hidden, "their gradient": hidden, "logits of a chunk": chunk}
    return {"log-probabilities": 4 * logits, "their gradient": 4 * logits, "gradient of the logits": 4 * logits}


def optimizer_at_work(numels: list[int], flags: Flags) -> int:
    """Temporaries of an update. torch's fused AdamW has none; the others go in buckets of some million parameters."""
    bucket = max([min(sum(numels), BUCKET), *numels])
    if flags.optimizer == "adamw8bit":
        # The gradient, the parameter, both moments and the square root of one, in float32.
        return bucket * 5 * 4
    if flags.optimizer == "paged" and flags.adapter_dtype != torch.float32:
        return bucket * 2 * 4
    return 0


# fast.py --------------------------------------------------------------------------------------------------------------------------------

def fused_widths(config: FalconConfig, rank: int) -> tuple[list[tuple[int, int]], tuple[int, int]]:
    """(rows, width) of the merged weights with their columns for B: of what reads the norm or the two norms, and of what adds into x."""
    qkv, dense, up, down = block_linears(config)
    hidden = config.hidden_size
    if config.num_ln_in_parallel_attn == 2:
        readers = [(up.out_features, hidden + rank), (qkv.out_features, hidden + rank)]
    else:
        readers = [(up.out_features + qkv.out_features, hidden + 2 * rank)]
    return readers, (hidden, down.in_features + dense.in_features + 2 * rank)


def fused_products(config: FalconConfig, flags: Flags) -> dict[str, int]:
    """What a fused block computes on its way, and some blocks keep: up and query_key_value in one, and attention with its inputs."""
    qkv, _, up, _ = block_linears(config)
    attention = {name: size for name, size in kept_by_attention(config, flags).items() if name != "query_key_value"}
    return {"up and query_key_value": flags.rows(up.out_features + qkv.out_features)} | attention


def fused_kept_bytes(config: FalconConfig, flags: Flags) -> int:
    """What fast.py takes a kept block for. Where several heads share one of several keys, those are repeated for each head."""
    qkv, dense, up, _ = block_linears(config)
    repeated = 1 < config.num_kv_heads < config.num_attention_heads
    read = 3 * config.num_attention_heads * config.head_dim if repeated else qkv.out_features
    return flags.rows(up.out_features + qkv.out_features + dense.in_features + read)


def left_by_fused_block(config: FalconConfig, flags: Flags) -> tuple[int, int, int]:
    """x A^T of its four linears, always; its products in as many blocks as keep_bytes is enough for, as fast.py counts, and in the last."""
    blocks = min(config.num_hidden_layers, max(1, flags.keep_bytes // fused_kept_bytes(config, flags)))
    return flags.rows(4 * flags.rank), sum(fused_products(config, flags).values()), blocks


def fused_weights_kept(config: FalconConfig, flags: Flags) -> int:
    """Bytes of the weights that stay dequantized, because keep_bytes is more than the products of all blocks take; as fast.py counts."""
    readers, (hidden, width) = fused_widths(config, flags.rank)
    each = (sum(rows * wide for rows, wide in readers) + hidden * width) * flags.dtype.itemsize
    left = flags.keep_bytes - config.num_hidden_layers * fused_kept_bytes(config, flags)
    return each * min(config.num_hidden_layers, max(0, left) // each)


def fused_block_at_work(config: FalconConfig, flags: Flags, kept: bool) -> tuple[dict[str, int], int]:
    """A fused block's backward at its fullest, and the weight that it then works with.

    The writer's weight comes first, and is gone when norms and products are there. A single reader's, wanted for the products and again for
    their gradient, stays in between; two readers' take turns, and so do then the writer's two.
    """
    readers, (hidden, width) = fused_widths(config, flags.rank)
    qkv, dense, up, down = block_linears(config)
    writer, *weights = (rows * wide * flags.dtype.itemsize for rows, wide in ((hidden, width), *readers))
    if fused_weights_kept(config, flags) == config.num_hidden_layers * (writer + sum(weights)):
        writer, weights = 0, [0] * len(weights)                      # all of them stay, and are counted there
    elif len(readers) == 2:
        writer = max(down.numel, dense.numel) * flags.dtype.itemsize
    held = weights[0] if len(weights) == 1 else 0
    # One matrix is the gradient of [gelu(up) | mixed values | x A^T] first, and that of [up | query_key_value] then.
    matrix = flags.rows(max(width, sum(rows for rows, _ in readers)))
    there = {"gradient of the output": flags.rows(hidden), "gradients, one matrix": matrix}
    later = there | {"norms and x A^T": sum(flags.rows(wide) for _, wide in readers)}
    products = fused_products(config, flags)
    # When attention's backward comes, `up` is let go; but where it shares a matrix with what attention read, that is held.
    copied = flags.device != "cpu" and 1 < config.num_kv_heads < config.num_attention_heads
    read = 0 if copied else qkv.out_features + up.out_features * (config.num_ln_in_parallel_attn == 1)
    # A block hands out the gradients of its adapters all at once, at its end; those of down and dense are there before attention's.
    done = own_gradients(replace(flags, accumulate=1), dense, down)
    # As they are computed again: of two readers, first up alone with its weight.
    again = [(products["up and query_key_value"], weights[-1])]
    if len(weights) == 2:
        again.append((flags.rows(up.out_features), weights[0]))
    moments = [
        (there | (products if kept else {}), writer),
        *((later | {"up and query_key_value": size}, weight) for size, weight in again if not kept),
        (later | products | {"through A, and dropped": 2 * flags.rows(config.ffn_hidden_size) * (flags.dropout > 0)}, held),
        (later | products | {"up and query_key_value": flags.rows(read)} | done | backward_of_attention(config, flags), held),
        (later | done | {"gradient of a norm": flags.rows(readers[0][1])}, weights[0]),
    ]
    return max(moments, key=lambda moment: sum(moment[0].values()) + moment[1])
