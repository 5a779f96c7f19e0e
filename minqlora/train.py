"""The training loop: accumulation, clipping, schedule, evaluation, checkpoints, and a run that can be stopped at any time.

**One step** is the gradient of one large batch, taken in `accumulate` pieces that fit into memory:

    L = - sum over the step's learned tokens of log p(token | those before it) / (number of them)

The number counts the whole step. Dividing each piece by its own number instead, as a mean over a batch does, would give a
token in a piece of short answers more weight than one in a piece of long ones, and the step would depend on how it was cut.

**As if never stopped.** Everything random in a step is a function of (seed, step): the order of the batches (data.py) and the dropout,
for which the generator is seeded anew each step. So a checkpoint holds the trained parameters, the optimizer's state
and the number of steps, and no generator's state; a run resumed from it takes the same steps, bit for bit on a CPU.

**Nothing is lost.** A file is written beside its predecessor, forced to disk, and only then renamed over it: a disk that fills
up, or a power cut, leaves the old one whole. Ctrl-C (or SIGTERM, as clusters send it) ends the run after the step it is in and
saves; a second Ctrl-C does not wait. A loss that is not finite ends it too, before anything is saved over.

The loss stands in one function, `answer_loss`. Whoever has a faster one (fast.py) passes it to `train` and `evaluate`.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minqlora.data import Batch, Example, batches, batches_in_order
from minqlora.progress import Display, Interrupt

CHECKPOINT_FILE, METRICS_FILE = "checkpoint.pt", "metrics.jsonl"
SCHEDULES = ("constant", "cosine")
Loss = Callable[[nn.Module, Batch], Tensor]


@dataclass(frozen=True)
class TrainConfig:
    """What a run does. The defaults are the paper's (Guanaco)."""

    steps: int
    batch_size: int = 16                         # rows that are in memory at a time
    accumulate: int = 1                          # batches that make up a step
    lr: float = 2e-4
    schedule: str = "constant"                   # or "cosine", to zero
    warmup: int = 0                              # steps in which the rate climbs to lr
    clip: float = 0.3                            # the gradient's largest norm; 0: any
    eval_every: int = 0                          # steps; 0: before the first and after the last alone
    save_every: int = 0                          # steps; 0: at the end alone
    seed: int = 0
    grouped: bool = True                         # batches of records of about the same length

    def __post_init__(self):
        for name, least in (("steps", 1), ("batch_size", 1), ("accumulate", 1), ("warmup", 0), ("eval_every", 0), ("save_every", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr is {self.lr}; it must be positive")
        if not self.clip >= 0:
            raise ValueError(f"clip is {self.clip}; it must be at least 0, which clips nothing")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule is {self.schedule!r}; it must be one of {', '.join(SCHEDULES)}")
        if self.warmup >= self.steps and self.warmup > 0:
            raise ValueError(f"warmup is {self.warmup} steps; it must end before the run does, which has {self.steps}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}; it must lie between 0 and 2**32 - 1")


def lr_at(step: int, config: TrainConfig) -> float:
    """Learning rate of a step (1, 2, ...): up to lr in `warmup` steps, then constant or half a cosine, whose zero lies one step beyond."""
    if step <= config.warmup:
        return config.lr * step / config.warmup
    if config.schedule == "constant":
        return config.lr
    return config.lr * (1 + math.cos(math.pi * (step - 1 - config.warmup) / (config.steps - config.warmup))) / 2


def answer_loss(model: nn.Module, batch: Batch) -> Tensor:
    """- sum over the learned tokens of log p(token | those before it), in float32."""
    hidden = model.hidden_states(batch.input_ids, batch.attention_mask).flatten(0, 1)      # (batch * tokens, hidden_size)
    # Only a token before a learned one meets the head: logits of questions and padding would be computed for nothing.
    logits = model.lm_head(hidden.index_select(0, batch.learned - 1))                      # (learned, vocab)
    return F.cross_entropy(logits.float(), batch.labels.flatten()[batch.learned], reduction="sum")


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


class Evaluation(NamedTuple):
    loss: float                                  # nats a token
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf


@torch.no_grad()
def evaluate(model: nn.Module, examples: list[Example], batch_size: int, pad: int, loss: Loss = answer_loss) -> Evaluation:
    """Mean loss over the learned tokens of all examples, without dropout."""
    training, device = model.training, device_of(model)
    model.eval()
    total, tokens = torch.zeros((), device=device), 0
    for batch in batches_in_order(examples, batch_size, pad, length_multiple(model)):
        total += loss(model, batch.to(device))
        tokens += len(batch.learned)
    model.train(training)
    return Evaluation(total.item() / tokens, tokens)


def length_multiple(model: nn.Module) -> int:
    """What the lengths of batches are rounded up to.

    On a GPU 64: attention's library plans anew for each length that it meets, a tenth of a second each time, and 64 leaves few lengths.
    Elsewhere 1, since more padding is only more work.
    """
    positions = model.config.max_position_embeddings
    return 64 if device_of(model).type == "cuda" and positions % 64 == 0 else 1


class Outcome(NamedTuple):
    step: int                                    # the last one taken
    tokens: int                                  # seen, without padding
    seconds: float                               # in steps: evaluating and saving not counted
    interrupted: bool


def train(model: nn.Module, optimizer: torch.optim.Optimizer, examples: list[Example], config: TrainConfig, output: str | Path, pad: int,
          held_out: dict[str, list[Example]] | None = None, resume: bool = False, on_save: Callable[[], None] | None = None,
          loss: Loss = answer_loss, show: bool = True) -> Outcome:
    """Train what requires a gradient, from the start or, with `resume`, from the checkpoint in `output`.

    Writes checkpoint.pt and metrics.jsonl there; `on_save` is called after each checkpoint, for what else belongs to it.
    `held_out` names sets of examples that are evaluated at the start, every `eval_every` steps and at the end.
    """
    output, device = Path(output), device_of(model)
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    state = {"step": 0, "tokens": 0, "seconds": 0.0, "run": describe(config, examples, optimizer)}
    if resume:
        state = load_checkpoint(output / CHECKPOINT_FILE, parameters, optimizer, state["run"])
    output.mkdir(parents=True, exist_ok=True)
    keep_metrics(output / METRICS_FILE, state["step"])

    def save():
        with display.pause():
            save_checkpoint(output / CHECKPOINT_FILE, parameters, optimizer, state)
            if on_save:
                on_save()

    def evaluate_all():
        with display.pause():
            for name, rows in (held_out or {}).items():
                display.evaluated(name, evaluate(model, rows, config.batch_size, pad, loss))

    stream = batches(examples, config.batch_size, config.seed, pad, start=state["step"] * config.accumulate, grouped=config.grouped,
                     multiple=length_multiple(model))
    with Interrupt() as interrupt, Display(output / METRICS_FILE, config.steps, state, device, show) as display:
        if state["step"] == 0:
            evaluate_all()
        model.train()
        for step in range(state["step"] + 1, config.steps + 1):
            pieces = list(islice(stream, config.accumulate))
            mean, norm = take_step(model, optimizer, list(parameters.values()), pieces, step, config, loss)
            state |= {"step": step, "tokens": state["tokens"] + sum(piece.tokens for piece in pieces)}
            display.add(mean, norm, lr_at(step, config))
            stopped = bool(interrupt.signal)
            if stopped or step == config.steps or (config.save_every and step % config.save_every == 0):
                save()
            if step == config.steps or (config.eval_every and step % config.eval_every == 0 and not stopped):
                evaluate_all()
            if stopped:
                break
    return Outcome(state["step"], state["tokens"], state["seconds"], state["step"] < config.steps)


def take_step(model: nn.Module, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], pieces: list[Batch], step: int,
              config: TrainConfig, loss: Loss = answer_loss) -> tuple[Tensor, Tensor]:
    """One step of the optimizer. Returns the mean loss over all pieces and the gradient's norm before clipping, both on the device."""
    torch.manual_seed(config.seed * 1_000_003 + step)
    device, learned = parameters[0].device, sum(len(piece.learned) for piece in pieces)
    mean = torch.zeros((), device=device)
    for piece in pieces:
        part = loss(model, piece.to(device)) / learned
        part.backward()
        mean += part.detach()
    norm = nn.utils.clip_grad_norm_(parameters, config.clip or math.inf)
    for group in optimizer.param_groups:
        group["lr"] = lr_at(step, config)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return mean, norm


# Checkpoints

def write_atomically(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Write a file beside `path` and rename it over `path` when it is whole and on the disk."""
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        # torch.save reports a full disk as a RuntimeError of its own; the system's reason is in its context.
        if isinstance(error, (OSError, RuntimeError)):
            reason = error if isinstance(error, OSError) else error.__context__ or error
            whole = "the one written before it is whole" if path.exists() else "none was written before"
            raise OSError(f"{path} could not be saved ({reason}); {whole}") from error
        raise


def save_checkpoint(path: Path, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, state: dict) -> None:
    tensors = {name: parameter.detach() for name, parameter in parameters.items()}
    write_atomically(path, lambda file: torch.save({"parameters": tensors, "optimizer": optimizer.state_dict(), **state}, file))


def load_checkpoint(path: Path, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, run: dict) -> dict:
    """Put a checkpoint's parameters and optimizer state in place; returns the rest of it. `run` must be what the checkpoint's run was."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no checkpoint to resume from")
    try:
        # weights_only: tensors and plain values, never code.
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        tensors, states, before = (checkpoint.pop(key) for key in ("parameters", "optimizer", "run"))
    except Exception as error:
        raise ValueError(f"{path}: not a whole checkpoint ({error})") from error
    if changed := [f"{key}: {before.get(key)} then, {run.get(key)} now" for key in before | run if before.get(key) != run.get(key)]:
        raise ValueError(f"{path}: the run it belongs to was another one, so it cannot go on ({'; '.join(changed)})")
    if {n: t.shape for n, t in tensors.items()} != {n: p.shape for n, p in parameters.items()}:
        raise ValueError(f"{path}: the parameters it holds are not those of this model: another rank, other targets or another base")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
    optimizer.load_state_dict(states)
    return checkpoint | {"run": run}


def describe(config: TrainConfig, examples: list[Example], optimizer: torch.optim.Optimizer) -> dict:
    """What must be the same for a run to go on as if never stopped. A constant rate may be followed for longer, a cosine may not."""
    free = {"eval_every", "save_every"} | ({"steps"} if config.schedule == "constant" else set())
    digest = hashlib.sha256()
    for example in examples:
        digest.update(example.ids.numpy().tobytes() + example.learned.numpy().tobytes())
    return {key: value for key, value in asdict(config).items() if key not in free} | {
        "optimizer": type(optimizer).__name__, "examples": digest.hexdigest()[:16]}


def keep_metrics(path: Path, step: int) -> None:
    """Leave the metrics of the steps up to `step`: what a resumed run takes again, it writes again."""
    kept = []
    if step and path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            # The last line may be torn, if the machine went down while it was written.
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                continue
    write_atomically(path, lambda file: file.write("".join(kept).encode()))
