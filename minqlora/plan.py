"""12. The memory ledger: what a fine-tune will take on the device, before anything is loaded.

A config says every shape, the flags say what is kept, so the memory of a run is arithmetic. What lies there from start to end is exact to
the byte:

    weights in 4 bits      (n + 1) // 2 a matrix of n
    absmax                 ceil(n / 64) bytes and, in groups of 256 of which the last may be ragged, a float32 each, and one a matrix;
                           without double quantization ceil(n / 64) float32
    embeddings, norms      in the computing type, the head counted once where it is the embedding
    adapters, gradients    rank * (in + out) each an adapted linear
    optimizer              8 bytes a trained parameter; in 8 bits 2.03; paged, two windows

What comes and goes (activations.py) is counted tensor by tensor, for the moments at which a step can be fullest: the loss, the backward
of the last block, when all others still wait, that of the first, when all gradients are there, and the optimizer's update. The ledger is
that of the fullest moment, so its parts add up to the peak; the others are named below it. Loading is never the peak: it holds one
tensor beside the finished base, and a backward holds as large a one in 16 bits, and more.

Two things are no arithmetic, and stand apart: what the driver and the libraries take before the first tensor (`context`), and what the
caching allocator holds beyond the tensors in it (`SLACK`). Both depend on the machine and the release, and both can be given.

GB is 10^9 bytes, as on a data sheet; GiB is 2^30, as a "24 GiB" card and nvidia-smi (MiB) count.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch

import minqlora.activations as activations
from minqlora.activations import Flags, block_linears
from minqlora.falcon import FalconConfig

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
NESTED_BLOCKSIZE = 256                           # scales that share a scale, with double quantization
CONTEXT = 860 * 2**20                            # a CUDA context with the kernels loaded: 0.80 to 0.89 GB on an H100 and an H200
LIBRARIES = 2 * 32 * 2**20                       # cuBLAS's workspaces on Hopper, the forward's thread and the backward's; torch counts them
SLACK = 64 * 2**20                               # freed pieces that fit nothing else: 0.05 GB under a cap that is just enough, else more


# The parts that stay --------------------------------------------------------------------------------------------------------------------

def parameter_count(config: FalconConfig) -> int:
    """All parameters of the base. A head of its own counts; where the config leaves open whether there is one, there is none."""
    heads = 2 if config.tie_word_embeddings is False else 1
    return heads * config.vocab_size * config.hidden_size + config.num_hidden_layers * (
        sum(linear.numel for linear in block_linears(config))) + norms_and_biases(config)


def norms_and_biases(config: FalconConfig) -> int:
    norms = config.num_ln_in_parallel_attn if config.parallel_attn else 2
    biases = sum(linear.out_features for linear in block_linears(config)) * config.bias
    return config.num_hidden_layers * (norms * 2 * config.hidden_size + biases) + 2 * config.hidden_size


def packed_bytes(n: int) -> int:
    return (n + 1) // 2


def absmax_bytes(n: int, blocksize: int, double_quant: bool) -> int:
    blocks = -(-n // blocksize)
    return blocks + 4 * -(-blocks // NESTED_BLOCKSIZE) + 4 if double_quant else 4 * blocks


def adapter_numels(config: FalconConfig, flags: Flags) -> list[int]:
    """The sizes of all A and B."""
    one = [flags.rank * features for linear in block_linears(config, flags.targets) if linear.adapted
           for features in (linear.in_features, linear.out_features)]
    return one * config.num_hidden_layers


def optimizer_bytes(numels: list[int], optimizer: str) -> int:
    """What an optimizer keeps on the device between two steps."""
    if optimizer == "adamw8bit":
        return sum(8 * n if n < activations.MIN_8BIT_SIZE else 2 * n + 2 * 4 * -(-n // activations.BLOCKSIZE_8BIT) for n in numels)
    if optimizer == "paged":
        # Two windows, each with room for both moments of the largest page. A parameter is not cut, and its room a multiple of 256.
        pages = [(0, 0)]                                       # (values, room)
        for n in numels:
            values, room = pages[-1] if pages[-1][0] + n <= activations.BUCKET else (0, 0)
            page = (values + n, room + -(-n // activations.BLOCKSIZE_8BIT) * activations.BLOCKSIZE_8BIT)
            pages = [*pages[:-1], page] if values else [*pages, page]
        return 2 * 2 * 4 * max(room for _, room in pages)
    return 8 * sum(numels)


def resident(config: FalconConfig, flags: Flags) -> dict[str, int]:
    """What lies on the device from the first step to the last, by part."""
    linears, layers, e = block_linears(config, flags.targets), config.num_hidden_layers, flags.dtype.itemsize
    numels = adapter_numels(config, flags)
    if flags.quantize:
        weights = {"weights in 4 bits": layers * sum(packed_bytes(linear.numel) for linear in linears),
                   "absmax": layers * sum(absmax_bytes(linear.numel, flags.blocksize, flags.double_quant) for linear in linears)}
    else:
        weights = {"weights": layers * sum(linear.numel for linear in linears) * e}
    heads = 2 if config.tie_word_embeddings is False else 1
    if flags.fused and (kept := activations.fused_weights_kept(config, flags)):
        weights |= {"weights kept dequantized": kept}
    return weights | {"embeddings": heads * config.vocab_size * config.hidden_size * e, "norms, biases": norms_and_biases(config) * e,
                      "adapters": sum(numels) * flags.adapter_dtype.itemsize, "optimizer states": optimizer_bytes(numels, flags.optimizer)}


# The moments ----------------------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Ledger:
    config: FalconConfig
    flags: Flags
    resident: dict[str, int]                     # by part
    moments: dict[str, dict[str, int]]           # what comes and goes, by moment and part
    blocks: dict[str, dict[str, int]]            # of those of them that are a block's backward: tensor by tensor
    context: int
    slack: int

    @property
    def peak(self) -> str:
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def allocated(self) -> int:
        """The allocator's maximum."""
        return sum(self.resident.values()) + sum(self.moments[self.peak].values())

    @property
    def total(self) -> int:
        """What the device reports in use."""
        return self.allocated + self.slack + self.context


def plan(config: FalconConfig, flags: Flags, context: int = CONTEXT) -> Ledger:
    """The ledger of a fine-tune of a Falcon with these flags."""
    if flags.length > config.max_position_embeddings:
        raise ValueError(f"length is {flags.length}; the model has {config.max_position_embeddings} positions")
    adapted = all(linear.adapted for linear in block_linears(config, flags.targets))
    if flags.fused and not (config.parallel_attn and not config.bias and adapted):
        raise ValueError("fused blocks are for Falcons with parallel attention, no biases and adapters on all linears")
    cuda, layers, numels = flags.device != "cpu", config.num_hidden_layers, adapter_numels(config, flags)
    stays = resident(config, flags)
    gradients = sum(numels) * flags.adapter_dtype.itemsize
    # From the second batch of a step on, the first one's gradients are there all the time.
    before = gradients if flags.accumulate > 1 else 0

    entry = flags.rows(config.hidden_size)                                             # the input of a block, or of the last norm
    thin, kept, blocks_kept = activations.left_by_block(config, flags)
    # The last block always keeps its products.
    at_work = {"backward of the last block": activations.block_at_work(config, flags, True),
               "backward of the first block": activations.block_at_work(config, flags, blocks_kept == layers)}
    left, shared = entry + thin, sum(activations.shared_by_blocks(config, flags).values())
    waiting = {
        "loss": layers * left + blocks_kept * kept + entry + shared,
        "backward of the last block": layers * left + max(0, blocks_kept - 1) * kept + shared,
        "backward of the first block": left + shared,
    }
    moments = {
        "loss": {"gradients": before, "logits and loss": sum(activations.loss_at_work(config, flags).values())},
        "backward of the last block": {"gradients": before},
        "backward of the first block": {"gradients": max(before, gradients - gradients // layers)},
        "optimizer's step": {"gradients": gradients, "optimizer at work": activations.optimizer_at_work(numels, flags)},
    }
    for name, parts in moments.items():
        if name in waiting:
            parts["kept for the backward"] = waiting[name]
        if name in at_work:
            block, workspace = at_work[name]
            parts |= {"block at work": sum(block.values()), "weight, dequantized": workspace}
        parts["cuBLAS"] = LIBRARIES * cuda
    if flags.recorded:
        # A recording keeps what one batch needs at its fullest, and nothing else may live there. It copies its gradients to where the
        # parameters have theirs; from the second batch of a step on their sum lies beside these.
        one = plan(config, replace(flags, recorded=False, accumulate=1)).moments
        held = max(sum(one[name].values()) for name in waiting) - LIBRARIES * cuda
        stays_too = {"gradients": gradients + before, "held by the recording": held, "cuBLAS": LIBRARIES * cuda}
        moments = {"replay": stays_too, "optimizer's step": moments["optimizer's step"] | stays_too}
    blocks = {name: block for name, (block, _) in at_work.items()}
    return Ledger(config, flags, stays, moments, blocks, context * cuda, SLACK * cuda)


# What would make it fit -----------------------------------------------------------------------------------------------------------------

def _smaller_batch(flags: Flags) -> Flags | None:
    """The same rows a step in more, smaller pieces."""
    if flags.batch_size == 1:
        return None
    pieces = next(k for k in range(2, flags.batch_size + 1) if flags.batch_size % k == 0)
    return replace(flags, batch_size=flags.batch_size // pieces, accumulate=flags.accumulate * pieces)


def _sixteen_bit_adapters(flags: Flags) -> Flags | None:
    """Not with adamw, which would keep its moments in 16 bits too."""
    if flags.adapter_dtype != torch.float32 or flags.optimizer == "adamw":
        return None
    return replace(flags, adapter_dtype=torch.bfloat16)


# In the order in which one would give things up: first what changes nothing that is learned and costs little, then time, then precision,
# then capacity, and last what the model gets to see. Each is tried again until it has nothing left to give.
MEASURES: tuple[tuple[tuple[str, ...], Callable[[Flags], Flags | None]], ...] = (
    (("quantize",), lambda f: None if f.quantize else replace(f, quantize=True)),
    (("double_quant",), lambda f: None if f.double_quant else replace(f, double_quant=True)),
    (("keep_bytes",), lambda f: replace(f, keep_bytes=f.keep_bytes // 2) if f.keep_bytes else None),
    (("recorded",), lambda f: replace(f, recorded=False) if f.recorded else None),
    (("optimizer",), lambda f: replace(f, optimizer="adamw8bit") if f.optimizer == "adamw" else None),
    (("checkpointing",), lambda f: None if f.checkpointing else replace(f, checkpointing=True)),
    (("batch_size", "accumulate"), _smaller_batch),
    (("optimizer",), lambda f: None if f.optimizer == "paged" else replace(f, optimizer="paged")),
    (("fused", "checkpointing"), lambda f: replace(f, fused=False, checkpointing=True) if f.fused else None),
    (("adapter_dtype",), _sixteen_bit_adapters),
    (("rank",), lambda f: replace(f, rank=f.rank // 2) if f.rank >= 16 else None),
    (("length",), lambda f: replace(f, length=f.length // 2) if f.length >= 256 else None),
)


def advise(config: FalconConfig, flags: Flags, memory: int, context: int = CONTEXT) -> list[Flags]:
    """The flags after each measure, until they fit into memory; if the last ones do not, nothing does."""
    def total(some: Flags) -> int:
        return plan(config, some, context).total

    def with_fields_of(some: Flags, other: Flags, names: tuple[str, ...]) -> Flags:
        return replace(some, **{name: getattr(other, name) for name in names})

    last, before = flags, None
    # Round after round: a shorter length, say, can make a measure pay that did not in the round before.
    while last != before:
        before = last
        for _, measure in MEASURES:
            # A measure may also cost memory: without the fused loss, a large batch takes more.
            while total(last) > memory and (changed := measure(last)) and total(changed) < total(last):
                last = changed
    # What a later measure made unnecessary is given back, the dearest first.
    for names, _ in reversed(MEASURES):
        if names == ("optimizer",) and last.adapter_dtype != torch.float32:
            continue
        less = with_fields_of(last, flags, names)
        last = less if total(less) <= memory else last
    steps = [flags]
    for names, _ in MEASURES:
        step = with_fields_of(steps[-1], last, names)
        steps += [step] if step != steps[-1] else []
    return steps[1:]


def largest_batch(config: FalconConfig, flags: Flags, memory: int, context: int = CONTEXT) -> int:
    """The largest batch_size that fits, where one row does."""
    low, high = 1, 2
    while plan(config, replace(flags, batch_size=high), context).total <= memory:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if plan(config, replace(flags, batch_size=middle), context).total <= memory else (low, middle)
    return low


# What a person reads --------------------------------------------------------------------------------------------------------------------

def parse_memory(text: str) -> int:
    """"24GiB", "141 GB", "24576MiB" -> bytes."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?i?B)\s*", text)
    if not match or match[2] not in UNITS or float(match[1]) == 0:
        raise ValueError(f"memory {text!r} is not a number with a unit: 24GiB (2^30 bytes each), 141GB (10^9 each), 24576MiB, ...")
    return int(float(match[1]) * UNITS[match[2]])


def changed_flags(before: Flags, after: Flags) -> str:
    """What to add to the command line: "--batch-size 1 --accumulate 16"."""
    words = []
    for field in fields(Flags):
        value = getattr(after, field.name)
        if value != getattr(before, field.name):
            name = field.name.replace("_", "-")
            words += [f"--{'' if value else 'no-'}{name}"] if isinstance(value, bool) else [f"--{name} {str(value).removeprefix('torch.')}"]
    return " ".join(words)


def notes(ledger: Ledger) -> dict[str, str]:
    """One line on each part."""
    config, flags = ledger.config, ledger.flags
    linears, layers = block_linears(config, flags.targets), config.num_hidden_layers
    weights, tied = layers * sum(linear.numel for linear in linears), config.tie_word_embeddings is not False
    two = sorted(ledger.blocks.get(ledger.peak, {}).items(), key=lambda item: -item[1])[:2]
    beside = f", {4 * flags.rank} values a token" if flags.fused else "" if flags.checkpointing else ", and what autograd keeps"
    return {
        "weights in 4 bits": f"{weights / 1e9:.3f} billion, half a byte each",
        "weights": f"{weights / 1e9:.3f} billion in {short(flags.dtype)}",
        "weights kept dequantized": "what keep_bytes has left over",
        "absmax": f"a block of {flags.blocksize}: " + (f"8 bits; {NESTED_BLOCKSIZE} blocks: a float" if flags.double_quant else "a float"),
        "embeddings": f"{config.vocab_size} x {config.hidden_size} in {short(flags.dtype)}, {'also' if tied else 'twice: and'} the head",
        "adapters": f"{sum(adapter_numels(config, flags)) / 1e6:.1f} million in {short(flags.adapter_dtype)}",
        "optimizer states": {"adamw": "two float32 moments", "adamw8bit": "two moments in 8 bits",
                             "paged": "two windows on moments in host memory"}[flags.optimizer],
        "gradients": f"of the adapters, in {short(flags.adapter_dtype)}",
        "kept for the backward": f"{layers} inputs of {flags.batch_size} x {flags.length} x {config.hidden_size}{beside}",
        "block at work": ", ".join(f"{name} {size / 1e9:.2f}" for name, size in two) + ", ...",
        "weight, dequantized": f"in {short(flags.dtype)}{', merged' if flags.fused else ''}",
        "logits and loss": f"{flags.tokens} x {config.vocab_size}" + (", in chunks" if flags.fused else ", three times in float32"),
        "optimizer at work": f"{activations.BUCKET / 1e6:.1f} million parameters at once",
        "held by the recording": "what one batch needs at its fullest",
        "cuBLAS": "its workspaces",
    }


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def row(name: str, size: float, note: str = "") -> str:
    return f"  {name:<22}{size / 1e9:>10.3f}{size / 2**30:>10.3f}   {note}".rstrip()


def report(ledger: Ledger, name: str = "falcon", memory: int | None = None) -> str:
    """The ledger as a table and, with a memory to fit into, the verdict."""
    config, flags, told = ledger.config, ledger.flags, notes(ledger)
    stored = f"NF4{' with double quantization' * flags.double_quant}" if flags.quantize else short(flags.dtype)
    way = "fused blocks" if flags.fused else "checkpointing" if flags.checkpointing else "no checkpointing"
    names = "all linears" if all(linear.adapted for linear in block_linears(config, flags.targets)) else ", ".join(flags.targets)
    rule, base = "  " + "-" * 42, sum(ledger.resident.values())
    others = {moment: base + sum(parts.values()) for moment, parts in ledger.moments.items() if moment != ledger.peak}
    lines = [
        f"{name}: {parameter_count(config):,} parameters, blocks in {stored}",
        f"rank {flags.rank} on {names}; {flags.optimizer}; {way}; "
        f"a step of {flags.accumulate} x {flags.batch_size} x {flags.length} tokens",
        "", f"{'':<24}{'GB':>10}{'GiB':>10}", f"{'':<24}{'10^9':>10}{'2^30':>10}",
        *[row(part, size, told.get(part, "")) for part, size in ledger.resident.items()],
        rule,
        *[row(part, size, told[part]) for part, size in ledger.moments[ledger.peak].items() if size],
        rule,
        row("allocated, at the peak", ledger.allocated, f"in the {ledger.peak}"),
        *[row("allocator's gaps", ledger.slack, "freed pieces that fit nothing else"),
          row("CUDA context", ledger.context, "driver and kernels; depends on the machine"),
          row("in use on the device", ledger.total)] * (flags.device != "cpu"),
        "",
        "  Allocated at other moments, in GB: " + ", ".join(f"{moment} {size / 1e9:.2f}" for moment, size in others.items()) + ".",
    ]
    if flags.optimizer == "paged" and flags.device != "cpu":
        lines.append(f"  Host memory, pinned: {8 * sum(adapter_numels(config, flags)) / 1e9:.2f} GB for the moments.")
    return "\n".join(lines + (["", *verdict(ledger, memory)] if memory else []))


def verdict(ledger: Ledger, memory: int) -> list[str]:
    """Whether it fits; if so, how large a batch would, else what would make it fit."""
    config, flags = ledger.config, ledger.flags
    size, gap = f"{memory / 2**30:.2f} GiB ({memory / 1e9:.2f} GB)", abs(memory - ledger.total) / 2**30
    if ledger.total <= memory:
        batch = largest_batch(config, flags, memory, ledger.context)
        return [f"Fits into {size}, with {gap:.2f} GiB to spare. The largest batch that does is --batch-size {batch}."]
    lines, before = [f"Does NOT fit into {size}: {gap:.2f} GiB too much."], flags
    steps = advise(config, flags, memory, ledger.context)
    totals = [plan(config, step, ledger.context).total for step in steps]
    if not steps or totals[-1] > memory:
        return [*lines, f"No flags make it fit: with all of them it is still {(totals or [ledger.total])[-1] / 2**30:.2f} GiB."]
    lines.append(f"  {'What makes it fit':<38}{'GiB then':>10}")
    for step, total in zip(steps, totals, strict=True):
        lines.append(f"  {changed_flags(before, step):<38}{total / 2**30:>10.2f}")
        before = step
    return [*lines, *([f"All at once: {changed_flags(flags, before)}"] if len(steps) > 1 else [])]
