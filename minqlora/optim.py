"""9. AdamW for the adapters, and the two ways to keep its states from filling the GPU: in 8 bits, or in pages on the host.

    m = beta1 m + (1 - beta1) g            first moment: where the gradient points
    v = beta2 v + (1 - beta2) g^2          second moment: how large it is
    p = (1 - lr decay) p - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)

m and v take 8 bytes a trained parameter in float32. At rank 64 on every linear, Falcon-40B has 444 million of them: 3.6 GB of a GPU whose
4-bit base already fills 21.

adamw      torch.optim.AdamW. Both moments in float32, one fused launch on a GPU.

adamw8bit  Both moments in 8 bits, 2.03 bytes a parameter. A block of 256 values shares one float32 scale, its largest magnitude; a value
           becomes the nearest of 256 levels. The levels are the *dynamic map*: seven decades, each with twice as many levels as the one
           below it, because the moments of one block span orders of magnitude while the large ones still want precision. The second
           moment is never negative, so its map spends the sign's bit on twice the levels. Every step undoes the 8 bits, computes in
           float32, and quantizes again, in buckets of some million values: a few launches for many parameters, and never a full-size
           copy. Tensors below 4096 values keep 32 bits. The bytes are those that bitsandbytes writes on a CPU, its rounding included:

               i = int((x / absmax + 1) * 32767.5 + 0.5)         a grid of 65536 points in [-1, 1] ...
               code = nearest level to i / 65535 * 2 - 1         ... so that one table look-up finds the level

           The grid has no zero: in a block that is not all zero, v = 0 becomes 1.6e-5 absmax. That is a floor under sqrt(v) of 0.4 % of
           the block's largest, and it protects: a v rounded to zero would divide by eps alone. On a GPU bitsandbytes searches the
           levels instead, without the grid; here a GPU does the same as a CPU.

paged      Both moments in float32 in pinned host memory, in pages of some million values. Each page travels to one of two windows on the
           GPU, is updated there by the same fused launch, and travels back. A window has its own stream, so that one page is on its way
           in while another is on its way out, and the host queues all of it while the backward pass still runs. The GPU holds two
           windows, 64 MiB, whatever the model. Why not managed memory, which the paper uses: PyTorch has no such tensors, not every
           platform migrates it on demand, every first touch is a page fault that stalls the kernel, and how much of it stays on the GPU
           is the driver's decision: no ledger can bound it. On a CPU there is nothing to page: the states are where they are used, and
           the update is torch.optim.AdamW's own.

16-bit adapters: both read a bfloat16 parameter and its gradient exactly, keep moments and arithmetic in float32, and round the new
parameter once, to nearest even. A change below half the spacing of bfloat16 (2^-9 of the value) is lost; the moments are not. torch's AdamW
stores the moments in the parameter's type, and there beta2 = 0.999 cannot work: 0.999 v lies within half a spacing of v and rounds back
to v, so the second moment never falls. `make_optimizer` refuses that pair.
"""

import math
from collections.abc import Iterable, Iterator
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.adamw import adamw as torch_adamw

BLOCKSIZE = 256                                                # values that share one scale in 8 bits
# Values updated at once: bounds every temporary. On a GPU few launches count, on a CPU its cache.
GPU_BUCKET, CPU_BUCKET = 2**22, 2**17

OPTIMIZERS = ("adamw", "adamw8bit", "paged")


def make_optimizer(parameters: Iterable[nn.Parameter], name: str = "adamw", lr: float = 2e-4,
                   betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
                   weight_decay: float = 0.0) -> torch.optim.Optimizer:
    """The optimizer of that name over the parameters that require a gradient. The defaults are the paper's."""
    parameters = [p for p in parameters if p.requires_grad]
    if not parameters:
        raise ValueError("parameters: none requires a gradient, so there is nothing to train (add_lora comes first)")
    if name == "adamw":
        if any(p.element_size() < 4 for p in parameters):
            raise ValueError("optimizer 'adamw' keeps its moments in the parameters' type, and 16 bits cannot hold the second "
                             "moment: train float32 adapters, or take 'adamw8bit' or 'paged'")
        # One launch for all parameters on a GPU; torch's plain loop elsewhere.
        fused = all(p.is_cuda for p in parameters)
        return torch.optim.AdamW(parameters, lr, betas, eps, weight_decay, fused=fused)
    if name == "adamw8bit":
        return AdamW8bit(parameters, lr, betas, eps, weight_decay)
    if name == "paged":
        return PagedAdamW(parameters, lr, betas, eps, weight_decay)
    raise ValueError(f"optimizer {name!r} is not one of {', '.join(OPTIMIZERS)}")


# 8 bits ---------------------------------------------------------------------------------------------------------------------------------

def dynamic_map(signed: bool) -> Tensor:
    """The 256 levels, ascending: seven decades below 1, each with twice the levels of the one below it, then 0 and 1.

    Decade i, of 10^(i-7) .. 10^(i-6), is cut into 2^i equal parts, or 2^(i+1) without a sign; the levels are their midpoints.
    """
    levels = [torch.tensor([0.0, 1.0])]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (i if signed else i + 1) + 1)
        middle = 10.0 ** (i - 6) * ((edges[1:] + edges[:-1]) / 2)
        levels += [middle, -middle] if signed else [middle]
    return torch.cat(levels).sort().values                     # (256,) float32


def grid_table(levels: Tensor) -> Tensor:
    """The index of the level nearest to each of 65536 points that divide [-1, 1] evenly. No point is a midpoint of two levels."""
    grid = torch.arange(65536, dtype=torch.float32) / 65535 * 2 - 1
    middle = (levels[1:] + levels[:-1]) / 2
    return torch.bucketize(grid, middle).to(torch.uint8)       # (65536,)


def quantize_8bit(values: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """float32 (n,), n a multiple of 256 -> codes uint8 (n,) and absmax float32 (n / 256,)."""
    blocks = values.view(-1, BLOCKSIZE)                        # (n_blocks, 256)
    absmax = torch.linalg.vector_norm(blocks, float("inf"), dim=1)
    scaled = (blocks * (1 / absmax)[:, None]).clamp_(-1, 1)
    index = scaled.add_(1).mul_(32767.5).add_(0.5).int()
    # A block of zeros has scaled 0 * inf. NaN has no index; its absmax is NaN as well, and stays so.
    index.clamp_(0, 65535)
    return table.index_select(0, index.view(-1)), absmax


def dequantize_8bit(codes: Tensor, absmax: Tensor, levels: Tensor) -> Tensor:
    """levels[codes] * absmax of the block: float32 (n,)."""
    return levels.index_select(0, codes.int()).view(-1, BLOCKSIZE).mul_(absmax[:, None]).view(-1)


class AdamW8bit(torch.optim.Optimizer):
    """AdamW with both moments in 8 bits: bitsandbytes' AdamW8bit, byte for byte, and its names for the states.

    state1, state2    codes of m and v, in the parameter's shape; float32 values where it has fewer than min_8bit_size
    absmax1, absmax2  one float32 a block of 256; a parameter's last block may be ragged
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float = 2e-4, betas: tuple[float, float] = (0.9, 0.999),
                 eps: float = 1e-8, weight_decay: float = 0.0, min_8bit_size: int = 4096):
        _check(lr, betas, eps, weight_decay)
        self.tables: dict[torch.device, tuple[Tensor, ...]] = {}
        super().__init__(parameters, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay,
                                      "min_8bit_size": min_8bit_size})

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            state = self.state[p]
            state["step"] = 0
            small = p.numel() < self.param_groups[-1]["min_8bit_size"]
            for moment in "12":
                state[f"state{moment}"] = torch.zeros(p.shape, dtype=torch.float32 if small else torch.uint8, device=p.device)
                if not small:
                    state[f"absmax{moment}"] = torch.zeros(-(-p.numel() // BLOCKSIZE), device=p.device)

    @torch.no_grad()
    def step(self, closure=None):
        loss = _evaluate(closure)
        for group in self.param_groups:
            live = [p for p in group["params"] if p.grad is not None]
            # Neighbours share a bucket where one scalar does for all: the same step, device and kind of state.
            for (_, device, _), alike in groupby(live, key=lambda p: (self.state[p]["step"], p.device, "absmax1" in self.state[p])):
                for parameters in buckets(alike, GPU_BUCKET if device.type == "cuda" else CPU_BUCKET):
                    self._update(parameters, group)
        return loss

    def _update(self, parameters: list[nn.Parameter], group: dict) -> None:
        states = [self.state[p] for p in parameters]
        eight = "absmax1" in states[0]
        if eight:
            levels1, table1, levels2, table2 = self._maps(parameters[0].device)
            # Codes are padded with the code of zero: in the signed map code 0 is -0.993, and would set the scale of a ragged block.
            m = dequantize_8bit(gather([s["state1"] for s in states], 127), torch.cat([s["absmax1"] for s in states]), levels1)
            v = dequantize_8bit(gather([s["state2"] for s in states], 0), torch.cat([s["absmax2"] for s in states]), levels2)
        else:
            m, v = gather([s["state1"] for s in states]), gather([s["state2"] for s in states])
        g = gather([p.grad for p in parameters]).float()       # (n,) each: all parameters, padded to whole blocks
        p = gather(parameters).float()

        t = states[0]["step"] + 1
        lr, (beta1, beta2) = group["lr"], group["betas"]
        m.mul_(beta1).add_(g, alpha=1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        if group["weight_decay"] > 0:
            p.mul_(1 - lr * group["weight_decay"])
        p.addcdiv_(m, v.sqrt().div_(math.sqrt(1 - beta2**t)).add_(group["eps"]), value=-lr / (1 - beta1**t))
        scatter(p, parameters)
        del p, g                                               # quantizing needs their room: 20 bytes a value at most, not 25

        for moment, values in (("1", m), ("2", v)):
            if eight:
                values, absmax = quantize_8bit(values, table1 if moment == "1" else table2)
                blocks = [s[f"absmax{moment}"] for s in states]
                torch._foreach_copy_(blocks, list(absmax.split([b.numel() for b in blocks])))
            scatter(values, [s[f"state{moment}"] for s in states])
        for state in states:
            state["step"] = t

    def _maps(self, device: torch.device) -> tuple[Tensor, ...]:
        if device not in self.tables:
            m, v = dynamic_map(signed=True), dynamic_map(signed=False)
            self.tables[device] = tuple(x.to(device) for x in (m, grid_table(m), v, grid_table(v)))
        return self.tables[device]

    def load_state_dict(self, state_dict: dict) -> None:
        _load(self, state_dict)


def buckets(parameters: Iterable[Tensor], limit: int) -> Iterator[list[Tensor]]:
    """Neighbours together until they exceed the limit. A parameter is never cut: a larger one is a bucket of its own."""
    bucket, size = [], 0
    for p in parameters:
        if bucket and size + p.numel() > limit:
            yield bucket
            bucket, size = [], 0
        bucket.append(p)
        size += p.numel()
    if bucket:
        yield bucket


def padded(n: int) -> int:
    return -(-n // BLOCKSIZE) * BLOCKSIZE


def gather(tensors: list[Tensor], padding: int = 0) -> Tensor:
    """All tensors in one row, each padded to whole blocks, so that no block holds values of two parameters."""
    rows = [t.reshape(-1) for t in tensors]
    rows = [r if r.numel() % BLOCKSIZE == 0 else F.pad(r, (0, -r.numel() % BLOCKSIZE), value=padding) for r in rows]
    return torch.cat(rows)                                     # a copy, even of one


def scatter(row: Tensor, tensors: list[Tensor]) -> None:
    """gather's inverse, into the tensors: padding dropped, rounded to each one's type."""
    pieces = row.split([padded(t.numel()) for t in tensors])
    torch._foreach_copy_(tensors, [piece[: t.numel()].view(t.shape) for piece, t in zip(pieces, tensors, strict=True)])


# Pages ----------------------------------------------------------------------------------------------------------------------------------

class PagedAdamW(torch.optim.Optimizer):
    """AdamW with float32 moments in host memory, brought to the GPU page by page. The state's names are those of torch.optim.AdamW."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float = 2e-4, betas: tuple[float, float] = (0.9, 0.999),
                 eps: float = 1e-8, weight_decay: float = 0.0, page: int = GPU_BUCKET):
        _check(lr, betas, eps, weight_decay)
        self.page = page
        self.pages: list[tuple[dict, list[nn.Parameter], Tensor]] = []     # (group, its parameters, both moments on the host)
        self.windows: list[tuple[torch.cuda.Stream, Tensor]] = []          # (its stream, room for any page on the GPU)
        super().__init__(parameters, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        devices = {p.device for g in self.param_groups for p in g["params"]}
        if len(devices) > 1:
            raise ValueError(f"parameters: paged states need all of them on one device, and they are on {sorted(map(str, devices))}")
        (device,) = devices
        for parameters in buckets(group["params"], self.page):
            size = sum(padded(p.numel()) for p in parameters)
            host = torch.zeros(2, size, pin_memory=device.type == "cuda")
            self.pages.append((group, parameters, host))
            for p, m, v in zip(parameters, *_moments(host, parameters), strict=True):
                self.state[p] = {"step": torch.zeros((), device=device), "exp_avg": m, "exp_avg_sq": v}
        if device.type == "cuda":
            size = max(host.numel() for _, _, host in self.pages)
            self.synchronize()
            self.windows = []
            for _ in range(2):
                stream = torch.cuda.Stream(device)
                # Allocated on its own stream, so that the memory's last user is known to be done before the first page comes in.
                with torch.cuda.stream(stream):
                    self.windows.append((stream, torch.empty(size, device=device)))

    @torch.no_grad()
    def step(self, closure=None):
        loss = _evaluate(closure)
        if not self.windows:
            for group, parameters, host in self.pages:
                self._update(group, parameters, host)
            return loss
        compute = torch.cuda.current_stream(self.windows[0][1].device)
        for i, (group, parameters, host) in enumerate(self.pages):
            stream, window = self.windows[i % 2]
            window = window[: host.numel()].view(host.shape)   # (2, size) contiguous: one copy each way
            # Queued now, run early: a window waits only for its own last page to have left, two pages or one step ago.
            with torch.cuda.stream(stream):
                window.copy_(host, non_blocking=True)
            compute.wait_stream(stream)
            self._update(group, parameters, window)
            stream.wait_stream(compute)
            with torch.cuda.stream(stream):
                host.copy_(window, non_blocking=True)
        return loss

    def _update(self, group: dict, parameters: list[nn.Parameter], moments: Tensor) -> None:
        live = [(p, m, v) for p, m, v in zip(parameters, *_moments(moments, parameters), strict=True) if p.grad is not None]
        if not live:
            return
        trained, m, v = map(list, zip(*live, strict=True))
        # .float() returns a float32 tensor itself: then torch updates the parameter in place.
        p, g = [x.float() for x in trained], [x.grad.float() for x in trained]
        beta1, beta2 = group["betas"]
        torch_adamw(p, g, m, v, [], [self.state[x]["step"] for x in trained], fused=moments.is_cuda, amsgrad=False, beta1=beta1,
                    beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"], maximize=False)
        if any(x.dtype != torch.float32 for x in trained):
            torch._foreach_copy_(trained, p)

    def synchronize(self) -> None:
        """Wait until every page is back on the host. Before that, the moments there may be a step old, or half written."""
        for stream, _ in self.windows:
            stream.synchronize()

    def state_dict(self) -> dict:
        self.synchronize()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict) -> None:
        self.synchronize()
        _load(self, state_dict)


def _moments(both: Tensor, parameters: list[nn.Parameter]) -> list[list[Tensor]]:
    """Views of a page (2, size) as the m and v of each parameter. Starts are multiples of 1 KiB: fused kernels read 16 bytes at once."""
    sizes = [padded(p.numel()) for p in parameters]
    return [[piece[: p.numel()].view(p.shape) for piece, p in zip(row.split(sizes), parameters, strict=True)] for row in both]


# What the two share ---------------------------------------------------------------------------------------------------------------------

def _check(lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        if not value >= 0:
            raise ValueError(f"{name} {value} must not be negative")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas {tuple(betas)} must be two numbers in [0, 1)")


def _evaluate(closure):
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def _load(optimizer: torch.optim.Optimizer, state_dict: dict) -> None:
    """Copy a saved state into the one that is there: torch's own method would cast it to the parameters' type and move it to the GPU."""
    here = [p for group in optimizer.param_groups for p in group["params"]]
    saved = [i for group in state_dict["param_groups"] for i in group["params"]]
    if [len(g["params"]) for g in optimizer.param_groups] != [len(g["params"]) for g in state_dict["param_groups"]]:
        raise ValueError(f"the saved optimizer has {len(saved)} parameters in {len(state_dict['param_groups'])} groups, this one "
                         f"{len(here)} in {len(optimizer.param_groups)}")
    pairs = [(optimizer.state[p], state_dict["state"].get(i, {})) for p, i in zip(here, saved, strict=True)]
    for i, (mine, theirs) in enumerate(pairs):
        if _layout(mine) != _layout(theirs):
            raise ValueError(f"the saved state of parameter {i} is {_layout(theirs)}, this optimizer's is {_layout(mine)}: resume with the "
                             f"optimizer and the adapters that the run began with")
    for mine, theirs in pairs:
        for key, value in theirs.items():
            if isinstance(mine[key], Tensor):
                mine[key].copy_(value)
            else:
                mine[key] = value
    for group, old in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        group.update({key: value for key, value in old.items() if key != "params"})


def _layout(state: dict) -> dict:
    return {key: (str(value.dtype), tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__
            for key, value in sorted(state.items())}
