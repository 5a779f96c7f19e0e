"""Pretrain the tiny Falcon of `examples/tiny_falcon` from text files: tokenizer, baselines, training, model directory.

The problem. QLoRA tunes a model that already knows a language. A fresh clone has none, and a model with random weights
teaches nothing. So this script trains one, small enough to travel with the code: falcon-7b's architecture (one key/value
head, attention and MLP side by side, rotary positions, tied head, no biases) in at most 8 MB of bfloat16.

    text files -> cleaned documents -> held-out split -> byte-level BPE -> one stream of tokens a source
               -> train on a weighted mixture -> bfloat16 safetensors, tokenizer, configs, results.json

How good is it? A loss per token cannot be compared across vocabularies, so everything is reported in *bits per byte*: what
a coder driven by the model would spend on the held-out documents, over their size in UTF-8. Two baselines stand beside it on
the same bytes: `xz -9`, and a bigram model with Kneser-Ney smoothing over the same tokens. Each of the three also pays for
where documents end: an `<|endoftext|>` token, or a line feed for xz.

Choices that are not obvious:

- Digits are tokens of their own. "1250" is then always the same four tokens, which is what arithmetic in an answer needs.
- A batch is drawn, not swept: source by weight, offset at random, so a small good source can be read more often than a large
  remote one. There is a limit: four million parameters learn a small source by heart while the learning rate falls, and
  what is held out of it then costs more, not less. The line of held-out bits, ten times on the way, shows it.
  `--last-weights` are other weights for that last stretch.
- Documents are packed: a window may hold the end of one and the start of the next, with <|endoftext|> between them.
- Weights and optimizer states are float32; a GPU computes in bfloat16 (autocast), through torch.compile.
- The matrices of the blocks are trained by Muon (momentum, then the nearest orthogonal matrix as the step), everything else
  by AdamW. `--optimizer adamw` trains all by AdamW; the model card says what the difference was.

    python examples/pretrain_tiny_falcon.py A.txt B.txt.xz --output DIR            # documents joined by <|endoftext|>
"""

import argparse
import dataclasses
import json
import lzma
import math
import re
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

from minqlora.falcon import Falcon, FalconConfig
from minqlora.generate import generate
from minqlora.load import save_falcon

EOS = "<|endoftext|>"
PROMPTS = ("Inflation is", "A bond is", "When the central bank raises interest rates,", "A budget deficit occurs when")


# ---------------------------------------------------------------------------------------------------------------- text

# Curly quotes, dashes, odd spaces and Windows' own control codes, in plain ASCII; soft hyphens and marks without width vanish.
TYPOGRAPHY = str.maketrans(
    {
        **dict.fromkeys("\u2018\u2019\x91\x92", "'"), **dict.fromkeys("\u201c\u201d\x93\x94", '"'),
        **dict.fromkeys("\u2010\u2011\u2012\u2013\u2212\x96", "-"), **dict.fromkeys("\u2014\u2015\x97", "--"),
        **dict.fromkeys("\t\xa0\u2009\u202f", " "), **dict.fromkeys("\r\xad\u200b\u200d\u200e\ufeff", ""), "\u2026": "...",
    }
)  # fmt: skip


def undo_mojibake(match: re.Match) -> str:
    """Read back UTF-8 that was once decoded as Windows-1252; what is beyond that becomes a quotation mark."""
    try:
        return match.group().encode("cp1252").decode("utf-8")
    except UnicodeError:
        return '"'


def clean(document: str) -> str:
    """Plain typography and one line a paragraph: what an answer should look like."""
    text = re.sub(r"â€.|Â[\xa0-\xbf]", undo_mojibake, document.strip()).replace("Â", "").translate(TYPOGRAPHY)
    text = re.sub(r"([a-z])- {2,}([a-z])", r"\1\2", text)  # a word cut at the end of a printed line
    text = re.sub(r"([a-z])- (?!and |or |to |nor |but )([a-z])", r"\1-\2", text)  # a compound cut there
    lines = [re.sub(" {2,}", " ", line).strip() for line in text.split("\n")]
    lines = [line for line in map(without_sources, lines) if line is not None]
    full = [line for line in lines if line]
    if not full:
        return ""
    if np.percentile([len(line) for line in full], 95) <= 80 and len(full) > 20:
        # Wrapped by hand: a line goes on in the next one unless a blank line follows or it stops early.
        text = ""
        for previous, line in zip(["", *lines], lines, strict=False):
            text += (" " if len(previous) > 40 else "\n") + line
        lines = text.split("\n")
    elif "" not in lines and sum(line[-1] in ".?!\"':)" for line in full) > 0.97 * len(full):
        lines = [" ".join(full)]  # one sentence a line
    return "\n".join(line.strip() for line in lines if line.strip())


def without_sources(line: str) -> str | None:
    """Drop picture credits and references: lines of them, and the sentences with a web address inside a paragraph."""
    if re.match(r"\(?(Source|Credit|Attribution)", line):
        return None
    if "://" not in line:
        return line
    sentences = re.split(r'(?<=[.?!"])\s+(?=[A-Z"(])', line)
    return " ".join(sentence for sentence in sentences if "://" not in sentence) or None


def read_documents(path: Path) -> list[str]:
    """The cleaned documents of a .txt or .txt.xz file, without empty ones and exact repeats."""
    if not path.name.endswith((".txt", ".txt.xz")):
        raise ValueError(f"{path}: a text file must end in .txt or .txt.xz")
    data = path.read_bytes()
    text = (lzma.decompress(data) if path.suffix == ".xz" else data).decode("utf-8")
    documents = list(dict.fromkeys(filter(None, map(clean, text.split(EOS)))))
    if len(documents) < 2:
        raise ValueError(f"{path}: {len(documents)} documents, but at least 2 joined by {EOS} are needed to hold one out")
    return documents


def hold_out(documents: list[str], share: float, seed: int) -> tuple[list[str], list[str]]:
    """Split by whole documents: in a random order, hold out the first ones until they make up `share` of the characters."""
    order = np.random.default_rng(seed).permutation(len(documents))
    sizes = np.array([len(documents[i]) for i in order])
    count = 1 + int((sizes.cumsum() < share * sizes.sum()).sum())
    count = min(count, len(documents) - 1)
    return [documents[i] for i in order[count:]], [documents[i] for i in order[:count]]


# ----------------------------------------------------------------------------------------------------------- tokenizer


def train_tokenizer(documents: list[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE: any text can be written, digits stay single, id 0 ends a document."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, documents: list[str]) -> Tensor:
    """One stream: <|endoftext|>, document, <|endoftext|>, document, ..., <|endoftext|>."""
    eos = tokenizer.token_to_id(EOS)
    # The library splits a batch over the cores, not a document: cut books into pieces at line ends, between tokens.
    pieces, last = [], []
    for document in documents:
        parts = re.findall(r"(?s).{1,20000}(?:\n|\Z)|.{1,20000}", document)
        pieces += parts
        last += [False] * (len(parts) - 1) + [True]
    ids = [np.array([eos], dtype=np.int32)]
    for encoding, is_last in zip(tokenizer.encode_batch(pieces, add_special_tokens=False), last, strict=True):
        ids.append(np.array(encoding.ids + [eos] * is_last, dtype=np.int32))
    return torch.from_numpy(np.concatenate(ids))


# ----------------------------------------------------------------------------------------------------------- baselines


def xz_bits(documents: list[str]) -> float:
    """Bits that `xz -9` spends on the documents, joined by line feeds."""
    return 8.0 * len(lzma.compress("".join(text + "\n" for text in documents).encode(), preset=9))


def bigram_bits(train: list[Tensor], held_out: list[Tensor], vocab_size: int) -> tuple[list[float], float]:
    """Bits of an interpolated Kneser-Ney bigram model on each held-out stream, and its discount D.

        P(w | v) = max(c(v w) - D, 0) / c(v) + D N(v .) / c(v) P1(w)
        P1(w)    = max(N(. w) - D, 0) / N(. .) + D |{w: N(. w) > 0}| / N(. .) 1 / V

    c counts pairs, N counts different neighbours. D is the best of a grid on the held-out streams themselves: an advantage
    that the language model does not get.
    """
    counts = torch.zeros(vocab_size * vocab_size, dtype=torch.int32)
    for stream in train:
        for pair in (stream[:-1].long() * vocab_size + stream[1:]).split(1 << 22):
            counts += torch.bincount(pair, minlength=vocab_size * vocab_size).int()
    counts = counts.view(vocab_size, vocab_size)               # (V, V): c(v w)
    totals, after = counts.sum(1).double(), (counts > 0).sum(1).double()       # (V,): c(v), N(v .)
    before = (counts > 0).sum(0).double()                      # (V,): N(. w)
    best = None
    for discount in (0.5, 0.6, 0.7, 0.8, 0.9, 0.95):
        unigram = (before - discount).clamp_min(0) / before.sum()
        unigram += discount * (before > 0).double().sum() / before.sum() / vocab_size
        bits = []
        for stream in held_out:
            v, w = stream[:-1].long(), stream[1:].long()
            # A context never seen leaves everything to the unigram.
            seen = totals[v].clamp_min(1)
            backoff = torch.where(totals[v] > 0, discount * after[v] / seen, torch.ones_like(seen))
            p = (counts[v, w].double() - discount).clamp_min(0) / seen + backoff * unigram[w]
            bits.append(-p.log2().sum().item())
        if best is None or sum(bits) < sum(best[0]):
            best = (bits, discount)
    return best


# --------------------------------------------------------------------------------------------------------------- model


def tiny_config(args: argparse.Namespace) -> FalconConfig:
    """falcon-7b's config.json with smaller numbers."""
    return FalconConfig.from_json(
        {
            "model_type": "falcon", "architectures": ["FalconForCausalLM"], "vocab_size": args.vocab_size,
            "hidden_size": args.hidden, "num_hidden_layers": args.layers, "num_attention_heads": args.hidden // args.head_dim,
            "multi_query": True, "parallel_attn": True, "new_decoder_architecture": False, "alibi": False, "bias": False,
            "layer_norm_epsilon": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": args.context,
            "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 0, "hidden_dropout": args.dropout,
        }
    )  # fmt: skip


def initialize(model: Falcon, layers: int, seed: int) -> None:
    """Normal with deviation 0.02; what writes to the residual stream is scaled down by the number of writers."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            writes = name.endswith(("dense.weight", "dense_4h_to_h.weight"))
            std = 0.02 / math.sqrt(2 * layers) if writes else 0.02
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * std)


def nats(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    logits = model(inputs)                                     # (batch, context, vocab)
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)


def draw(corpus: Tensor, sizes: Tensor, weights: Tensor, batch: int, context: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Windows of context + 1 tokens: the source by weight, the offset at random. `corpus` is all streams in a row."""
    which = torch.multinomial(weights, batch, replacement=True, generator=generator)
    offset = torch.rand(batch, generator=generator, dtype=torch.float64) * (sizes[which] - context)
    # Only `batch` numbers travel to the device, so the copy waits for nothing.
    start = (sizes.cumsum(0)[which] - sizes[which] + offset.long()).to(corpus.device)
    windows = corpus[start[:, None] + torch.arange(context + 1, device=corpus.device)].long()      # (batch, context + 1)
    return windows[:, :-1], windows[:, 1:]


@torch.no_grad()
def held_out_bits(model: nn.Module, stream: Tensor, context: int, batch: int = 64) -> float:
    """Bits on a stream, each token with at least half a window of the past where there is one.

    Windows step by half a context and only their second half counts, except in the first one.
    """
    inputs, targets = stream[:-1].long(), stream[1:].long()
    length = min(context, len(targets))
    starts = [*range(0, len(targets) - length, max(1, length // 2)), len(targets) - length]
    losses = torch.zeros(len(targets), dtype=torch.float64, device=stream.device)
    for first in range(0, len(starts), batch):
        chunk = torch.tensor(starts[first : first + batch], device=stream.device)[:, None] + torch.arange(length, device=stream.device)
        loss = nats(model, inputs[chunk], targets[chunk]).double()
        if first == 0:
            losses[chunk[0]] = loss[0]
        half = length // 2
        losses[chunk[:, half:].flatten()] = loss[:, half:].flatten()
    return losses.sum().item() / math.log(2)


# ------------------------------------------------------------------------------------------------------------ training


class Muon:
    """Momentum, then the nearest (semi-)orthogonal matrix as the step, for matrices alone; equal shapes go together.

    A gradient's few large singular values would otherwise drown the rest. Five Newton-Schulz steps of an odd polynomial push
    all of them near 1 with products alone; its coefficients are the published ones (Jordan et al., 2024), steep at 0.
    """

    def __init__(self, matrices: list[nn.Parameter], lr: float, weight_decay: float, momentum: float = 0.95):
        self.lr, self.weight_decay, self.momentum = lr, weight_decay, momentum
        self.groups = [[p for p in matrices if p.shape == shape] for shape in sorted({p.shape for p in matrices})]
        self.buffers = [torch.zeros(len(group), *group[0].shape, device=group[0].device) for group in self.groups]

    @torch.no_grad()
    def step(self, scale: float) -> None:
        """One step at `scale` times the learning rate."""
        for group, buffer in zip(self.groups, self.buffers, strict=True):
            gradient = torch.stack([p.grad for p in group])    # (matrices, rows, columns)
            buffer.lerp_(gradient, 1 - self.momentum)
            update = self.orthogonalize(gradient.lerp(buffer, self.momentum)).float()
            rows, columns = group[0].shape
            lr = scale * self.lr
            torch._foreach_mul_(group, 1 - lr * self.weight_decay)
            torch._foreach_add_(group, list(update.unbind()), alpha=-lr * max(1, rows / columns) ** 0.5)

    @staticmethod
    def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
        x = matrices.bfloat16() if matrices.is_cuda else matrices
        if tall := x.shape[1] > x.shape[2]:
            x = x.mT
        x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)      # singular values at most 1
        for _ in range(steps):
            gram = x @ x.mT
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        return x.mT if tall else x


def schedule(step: int, steps: int, warmup: int, decay: float) -> float:
    """Warm up, stay, then fall linearly to zero over the last `decay` of the steps."""
    return min((step + 1) / warmup, 1.0, (steps - step) / max(1.0, decay * steps))


def train(model: Falcon, streams: list[Tensor], args: argparse.Namespace, evaluate=None) -> float:
    """Train in place; returns the seconds it took. `evaluate(step)` is called ten times on the way."""
    device = next(model.parameters()).device
    corpus, sizes = torch.cat(streams).to(device), torch.tensor([len(stream) for stream in streams])
    weights, last_weights = torch.tensor(args.weights), torch.tensor(args.last_weights)
    blocks = [p for name, p in model.named_parameters() if p.dim() == 2 and ".h." in name]
    others = [p for name, p in model.named_parameters() if not (p.dim() == 2 and ".h." in name)]
    adamw = torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    muon = None
    if args.optimizer == "muon":
        muon = Muon(blocks, args.muon_lr, args.weight_decay)
    else:
        adamw.add_param_group({"params": blocks, "weight_decay": args.weight_decay})
    loss_of = torch.compile(nats, dynamic=False) if device.type == "cuda" else nats
    generator = torch.Generator().manual_seed(args.seed)
    warmup, start = max(1, min(200, args.steps // 10)), time.perf_counter()
    seen, since, running = 0, start, torch.zeros((), device=device)
    every = max(1, args.steps // 40)
    for step in range(args.steps):
        falling = step >= (1 - args.decay) * args.steps
        scale = schedule(step, args.steps, warmup, args.decay)
        mixture = last_weights if falling else weights
        inputs, targets = draw(corpus, sizes, mixture, args.batch_size, args.context, generator)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = loss_of(model, inputs, targets).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(others if muon else model.parameters(), 1.0)
        for group in adamw.param_groups:
            group["lr"] = scale * args.lr
        adamw.step()
        if muon:
            muon.step(scale)
        model.zero_grad(set_to_none=True)
        running += loss.detach()
        seen += inputs.numel()
        if (step + 1) % every == 0 or step + 1 == args.steps:
            mean, now = running.item() / ((step % every) + 1), time.perf_counter()
            left = (args.steps - step - 1) * (now - start) / (step + 1)
            rate = ((step % every) + 1) * inputs.numel() / (now - since)
            print(f"step {step + 1:>6}/{args.steps}  loss {mean:.4f}  {rate / 1e3:.0f}k tokens/s  "
                  f"{seen / 1e6:.0f}M tokens  {left:.0f} s left", flush=True)  # fmt: skip
            running.zero_()
            since = now
        if evaluate and (step + 1) % max(1, args.steps // 10) == 0:
            evaluate(step + 1)
            since = time.perf_counter()
    return time.perf_counter() - start


# ---------------------------------------------------------------------------------------------------------------- main


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="+", type=Path, help="one source a file, .txt or .txt.xz, documents joined by <|endoftext|>")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--overwrite", action="store_true", help="write into a directory that holds a model already")
    parser.add_argument("--weights", type=float, nargs="+", help="share of each file in a batch, in the files' order (default: its size)")
    parser.add_argument("--last-weights", type=float, nargs="+", help="the same while the learning rate falls (default: as --weights)")
    parser.add_argument("--tokenizer-share", type=float, nargs="+", help="part of each file that the tokenizer learns from (default: all)")
    parser.add_argument("--held-out", type=float, default=0.02, help="share of each file held out")
    parser.add_argument("--vocab-size", type=int, default=6400)
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument("--layers", type=int, default=7)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=128, help="windows a step")
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--optimizer", choices=("muon", "adamw"), default="muon")
    parser.add_argument("--lr", type=float, default=3e-3, help="of AdamW")
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--weight-decay", type=float, default=0.1, help="of the blocks' matrices")
    parser.add_argument("--dropout", type=float, default=0.0, help="on what a block adds to its input")
    parser.add_argument("--decay", type=float, default=0.5, help="share of the steps in which the learning rate falls to zero")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    for name in ("weights", "last_weights", "tokenizer_share"):
        given = getattr(args, name)
        if given is not None and (len(given) != len(args.files) or min(given) < 0 or max(given) == 0):
            raise ValueError(f"--{name.replace('_', '-')} {given}: one number of at least 0 a file, {len(args.files)} in all, not all 0")
    if args.hidden % args.head_dim:
        raise ValueError(f"--hidden {args.hidden}: must be a multiple of --head-dim {args.head_dim}")
    if args.vocab_size < 257:
        raise ValueError(f"--vocab-size {args.vocab_size}: the 256 bytes and {EOS} need at least 257")
    if (args.output / "model.safetensors").exists() and not args.overwrite:
        raise ValueError(f"--output {args.output}: holds a model already; choose another directory or add --overwrite")
    return args


def prepare(args: argparse.Namespace) -> tuple[Tokenizer, list[Tensor], list[Tensor], list[list[str]]]:
    """Tokenizer, training streams, held-out streams, held-out documents."""
    split = [hold_out(read_documents(path), args.held_out, args.seed) for path in args.files]
    shares = args.tokenizer_share or [1.0] * len(args.files)
    lessons = [text for (kept, _), share in zip(split, shares, strict=True) for text in kept[: math.ceil(share * len(kept))]]
    tokenizer = train_tokenizer(lessons, args.vocab_size)
    args.vocab_size = tokenizer.get_vocab_size()               # a small corpus has fewer pairs to merge than asked for
    streams = [encode(tokenizer, kept) for kept, _ in split]
    held_out = [encode(tokenizer, held) for _, held in split]
    for path, stream in zip(args.files, streams, strict=True):
        if len(stream) <= args.context + 1:
            raise ValueError(f"{path}: {len(stream)} tokens to train on, but a window of --context {args.context} needs one more than it")
    return tokenizer, streams, held_out, [held for _, held in split]


def save(model: Falcon, tokenizer: Tokenizer, args: argparse.Namespace) -> None:
    """A directory as Hugging Face lays it out, weights in bfloat16."""
    args.output.mkdir(parents=True, exist_ok=True)
    saved = Falcon(dataclasses.replace(model.config, hidden_dropout=0.0)).bfloat16()     # whoever tunes it chooses a dropout of their own
    saved.load_state_dict(model.state_dict())
    save_falcon(saved, args.output)
    tokenizer.save(str(args.output / "tokenizer.json"))
    fast = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS, "model_max_length": args.context,
            "clean_up_tokenization_spaces": False}  # fmt: skip
    (args.output / "tokenizer_config.json").write_text(json.dumps(fast, indent=2) + "\n")
    (args.output / "generation_config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": 0}, indent=2) + "\n")


def stem(path: Path) -> str:
    return path.name.removesuffix(".xz").removesuffix(".txt")


def main(argv: list[str] | None = None) -> dict:
    args, begin = arguments(argv), time.perf_counter()
    torch.manual_seed(args.seed)
    tokenizer, streams, held_out, documents = prepare(args)
    sizes = torch.tensor([float(len(stream)) for stream in streams])
    args.weights = ((torch.tensor(args.weights) if args.weights else sizes) / (sum(args.weights) if args.weights else sizes.sum())).tolist()
    args.last_weights = (torch.tensor(args.last_weights) / sum(args.last_weights)).tolist() if args.last_weights else args.weights
    names = [stem(path) for path in args.files]
    held_bytes = [sum(len(text.encode()) for text in texts) for texts in documents]
    for i, name in enumerate(names):
        print(f"{name}: {len(streams[i]):,} tokens to train on, {len(held_out[i]):,} held out ({held_bytes[i]:,} bytes), "
              f"weight {args.weights[i]:.3f}, then {args.last_weights[i]:.3f}")  # fmt: skip
    print(f"vocabulary {args.vocab_size}, prepared in {time.perf_counter() - begin:.0f} s", flush=True)

    config = tiny_config(args)
    model = Falcon(config)
    initialize(model, args.layers, args.seed)
    model.to(args.device)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters, {2 * parameters:,} bytes in bfloat16", flush=True)

    def bits() -> list[float]:
        model.eval()
        counted = [held_out_bits(model, stream.to(args.device), args.context) for stream in held_out]
        model.train()
        return counted

    def evaluate(step: int) -> None:
        now = bits()
        row = "  ".join(f"{name} {b / size:.3f}" for name, b, size in zip(names, now, held_bytes, strict=True))
        print(f"step {step}: held-out bits per byte {sum(now) / sum(held_bytes):.4f}  ({row})", flush=True)
        save(model, tokenizer, args)

    seconds = train(model, streams, args, evaluate)
    # What is saved is what is measured: weights rounded to bfloat16, computed with in float32.
    model.to(torch.bfloat16).float()
    save(model, tokenizer, args)
    ours, xz = bits(), [xz_bits(texts) for texts in documents]
    bigram, discount = bigram_bits(streams, held_out, args.vocab_size)
    table = {}
    for i, (name, size) in enumerate(zip(names, held_bytes, strict=True)):
        table[name] = {"tiny_falcon": ours[i] / size, "bigram": bigram[i] / size, "xz_9": xz[i] / size, "held_out_bytes": size,
                       "held_out_tokens": len(held_out[i]), "training_tokens": len(streams[i])}  # fmt: skip
    size, tokens = sum(held_bytes), sum(len(stream) - 1 for stream in held_out)
    results = {
        "bits_per_byte": {"tiny_falcon": sum(ours) / size, "xz_9": sum(xz) / size, "bigram": sum(bigram) / size},
        "held_out_loss": sum(ours) * math.log(2) / tokens, "held_out_bytes": size, "held_out_tokens": tokens,
        "sources": table, "bigram_discount": discount, "parameters": parameters,
        "tokens_seen": args.steps * args.batch_size * args.context, "training_seconds": seconds,
        "seconds": time.perf_counter() - begin, "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if args.device.startswith("cuda") else args.device,
        "arguments": {key: value for key, value in vars(args).items() if key not in ("files", "output", "overwrite")},
        "samples": samples(model, tokenizer, args),
    }  # fmt: skip
    (args.output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(f"\n{'held-out bits per byte':<24}{'this model':>12}{'bigram':>12}{'xz -9':>12}")
    for name, row in [*table.items(), ("all", results["bits_per_byte"])]:
        print(f"{name:<24}{row['tiny_falcon']:>12.3f}{row['bigram']:>12.3f}{row['xz_9']:>12.3f}")
    for text in results["samples"]:
        print("\n" + text)
    print(f"\nsaved {args.output} after {results['seconds']:.0f} s ({seconds:.0f} s of training)")
    return results


def samples(model: Falcon, tokenizer: Tokenizer, args: argparse.Namespace, length: int = 80) -> list[str]:
    """What the model writes after each prompt that leaves it room, at temperature 0.7."""
    generator = torch.Generator(args.device).manual_seed(args.seed)
    texts = []
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer.encode(EOS + prompt).ids], device=args.device)
        room = args.context - ids.shape[1]
        if room < 1:
            continue
        ids = generate(model, ids, max_new_tokens=min(length, room), temperature=0.7, eos_token_id=0, generator=generator)
        texts.append(tokenizer.decode(ids[0].tolist()))
    return texts


if __name__ == "__main__":
    main()
