"""Fine-tune a Falcon in 4 bits on questions and answers.

    python examples/finetune_falcon.py                                        # the embedded example, on whatever machine this is
    python examples/finetune_falcon.py --model tiiuae/falcon-7b --data my.jsonl --output runs/mine      # the real thing
    python examples/finetune_falcon.py --model tiiuae/falcon-7b --plan --memory 16GiB                   # what that takes, part by part

What it does, in the order of `run` below: reads and tokenizes the records; loads the base tensor by tensor, each linear of a block
going to NF4 with double quantization; adds LoRA to them; answers three held-out questions; trains; answers them again, and
prints the held-out loss and perplexity before and after. On a GPU the blocks and the loss are those of fast.py and fast_loss.py.

`--data` takes JSON lines: instruction/input/output, input/output, chat messages or plain text. Held out are the records of
`--eval-data`, or those with "split": "held_out", or else a share of the questions (`--held-out`). Where records say their "kind", each
kind is evaluated on its own.

What a run writes into `--output`:

    adapter_config.json, adapter_model.safetensors    the adapter, in PEFT's format
    prompt_template.json                              how a question is put to the model; ask.py asks by it
    run.json                                          the arguments
    metrics.jsonl                                     loss, gradient norm, rate, tokens, seconds of every step; every evaluation
    checkpoint.pt                                     what `--resume` goes on from
"""

import argparse
import json
import os
import shlex
import shutil
import sys
import textwrap
import time
from pathlib import Path

# A CPU's threads sleep while they wait for each other. That costs 4 % where nothing else runs; spinning costs half the speed where
# another program wants a core.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from huggingface_hub import hf_hub_download
from tokenizers import Tokenizer

from minqlora.activations import Flags
from minqlora.data import TEMPLATE_FILE, Example, Record, Template, encode, pack, read_records, split_records, tokenize
from minqlora.falcon import Falcon, FalconConfig
from minqlora.fast import fuse
from minqlora.fast_loss import GraphedLoss, fused_loss
from minqlora.generate import generate
from minqlora.linear4bit import Linear4bit
from minqlora.load import eos_token_id, fast_dtype, fetch, load_falcon, load_tokenizer, read_json
from minqlora.lora import LoRALinear, save_adapter
from minqlora.optim import OPTIMIZERS, make_optimizer
from minqlora.plan import parse_memory, plan
from minqlora.plan import report as report_plan
from minqlora.progress import peak_memory
from minqlora.qlora import add_lora, block_linears, count_parameters
from minqlora.train import CHECKPOINT_FILE, METRICS_FILE, SCHEDULES, TrainConfig, answer_loss, train, write_atomically

HERE = Path(__file__).resolve().parent
TINY = HERE / "tiny_falcon"
RUN_FILE = "run.json"
RUN_FILES = ("adapter_config.json", "adapter_model.safetensors", TEMPLATE_FILE, RUN_FILE, METRICS_FILE, CHECKPOINT_FILE)

# The paper's (Guanaco): 16 rows a step, here 4 at a time. They are right for models of billions of parameters.
PAPER = {"rank": 64, "alpha": 16.0, "dropout": 0.1, "lr": 2e-4, "clip": 0.3, "length": 512, "batch_size": 4, "accumulate": 4, "steps": 1875,
         "eval_every": 200, "save_every": 200, "checkpointing": True, "answer_tokens": 128}
# The embedded base has four million parameters, a thousandth of the smallest model that the paper tunes, and its layers are narrow: they
# want a rate twenty times as large, and a cosine that takes it back. 600 steps of 8 records, one round and a third, end at a held-out loss
# of 3.024 on explained records (2e-3: 3.028, 7e-3: 3.052), and take two CPU cores two and a half minutes. Memory is no concern.
EMBEDDED = PAPER | {"lr": 4e-3, "schedule": "cosine", "warmup": 0.05, "length": 256, "batch_size": 8, "accumulate": 1, "steps": 600,
                    "eval_every": 150, "save_every": 150, "checkpointing": False, "answer_tokens": 80}
# What may change when a run is resumed: nothing here alters the steps that follow.
FREE = {"output", "resume", "overwrite", "steps", "epochs", "eval_every", "save_every", "device", "questions", "answer_tokens", "plan",
        "memory"}
YES_NO = argparse.BooleanOptionalAction
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Fine-tune a Falcon in 4 bits.", allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag = parser.add_argument_group("model").add_argument
    flag("--model", default=str(TINY), help="directory with safetensors, or a name on the hub")
    flag("--quantize", action=YES_NO, default=True, help="put the base's linears into NF4; without it, LoRA over 16 or 32 bits")
    flag("--double-quant", action=YES_NO, default=True, help="quantize the scales too")
    flag("--dtype", choices=DTYPES, help="what is computed in; bfloat16 where it is fast, else float32")
    flag("--device", help="cpu, cuda, cuda:1, ...; the GPU where there is one")

    flag = parser.add_argument_group("adapter").add_argument
    flag("--rank", type=int, help="columns of A and B")
    flag("--alpha", type=float, help="the adapter's product is scaled by alpha / rank")
    flag("--dropout", type=float, help="on the adapter's input")
    flag("--targets", nargs="+", default=["all"], metavar="NAME", help="linears of a block, such as query_key_value dense")
    flag("--adapter-dtype", choices=("float32", "bfloat16"), default="float32", help="what the adapter is kept in")

    flag = parser.add_argument_group("data").add_argument
    flag("--data", default=str(HERE / "data" / "finance.jsonl"), help="JSON lines")
    flag("--eval-data", help="JSON lines to hold out")
    flag("--held-out", type=float, default=0.05, metavar="SHARE", help="of the questions, where nothing else says which; 0: none")
    flag("--template", help="prompt template, a JSON file of system, user, assistant and text")
    flag("--length", type=int, help="tokens of a record at most")
    flag("--overlong", choices=("cut", "drop"), default="cut", help="what becomes of a longer record")
    flag("--packing", action="store_true", help="several records in a row; attention stays within each")
    flag("--group-by-length", action=YES_NO, default=True, help="batches of records of about the same length")
    flag("--train-on-inputs", action="store_true", help="put the questions in the loss too")

    flag = parser.add_argument_group("training").add_argument
    flag("--batch-size", type=int, help="rows in memory at a time")
    flag("--accumulate", type=int, help="batches that make up a step")
    flag("--steps", type=int, help="of the optimizer")
    flag("--epochs", type=float, help="times through the records, instead of --steps")
    flag("--lr", type=float, help="learning rate")
    flag("--schedule", choices=SCHEDULES, default="constant", help="of the rate")
    flag("--warmup", type=float, default=0, help="steps in which the rate climbs; below 1, a share of all")
    flag("--clip", type=float, help="largest norm of the gradient; 0: any")
    flag("--weight-decay", type=float, default=0.0, help="of the adapters")
    flag("--optimizer", choices=OPTIMIZERS, default="adamw", help="adamw8bit and paged keep its states small or on the host")
    flag("--checkpointing", action=YES_NO, help="recompute activations: less memory, a third more time")
    flag("--fused", action=YES_NO, help="train by the fused blocks of fast.py; on a GPU, where they know the model, the default")
    flag("--keep-bytes", type=size, default=0, metavar="SIZE", help="memory for what the fused blocks need not compute again, as 8GiB")
    flag("--recorded", action=YES_NO, default=True, help="replay fused batches of up to 4096 tokens as CUDA graphs")
    flag("--seed", type=int, default=0, help="of adapters, order and dropout")

    flag = parser.add_argument_group("run").add_argument
    flag("--output", default="runs/finance", metavar="DIR", help="where everything is written")
    flag("--resume", action="store_true", help="go on with the run in --output, with its arguments")
    flag("--overwrite", action="store_true", help="delete the run in --output first; other files there stay")
    flag("--eval-every", type=int, help="steps between evaluations; 0: at the start and the end")
    flag("--save-every", type=int, help="steps between checkpoints; 0: at the end")
    flag("--questions", type=int, default=3, help="held-out questions to answer before and after")
    flag("--answer-tokens", type=int, help="tokens of such an answer at most")
    flag("--plan", action="store_true", help="print what the run would take in memory (on a GPU, unless --device says cpu), and do nothing")
    flag("--memory", type=size, metavar="SIZE", help="as 24GiB: with --plan, what makes it fit; without, do not start what does not")
    return parser


def size(text: str) -> int:
    """Bytes, of a number or of "24GiB"."""
    try:
        return int(text) if text.isdigit() else parse_memory(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Flags as given; the rest from the run that is resumed, or from the table that belongs to the base."""
    flags, first = parser(), argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--model", "--output"):
        first.add_argument(name, default=flags.get_default(name[2:]))
    for name in ("--resume", "--overwrite", "--plan"):
        first.add_argument(name, action="store_true")
    first, _ = first.parse_known_args(argv)
    saved, output = {}, Path(first.output)
    if first.resume:
        if not (output / RUN_FILE).exists():
            raise FileNotFoundError(f"{output}: no run to resume; {RUN_FILE} is missing")
        saved = read_json(output / RUN_FILE)["arguments"]
    embedded = Path(first.model).expanduser().resolve() == TINY
    flags.set_defaults(**saved or (EMBEDDED if embedded else PAPER))
    args = flags.parse_args(argv)

    if args.resume and args.overwrite:
        raise ValueError("--resume goes on with a run, --overwrite deletes it: choose one")
    changed = [name for name in saved if name not in FREE and getattr(args, name) != saved[name]]
    if changed:
        raise ValueError("a resumed run keeps its arguments, and these are others: " + ", ".join(
            f"--{name.replace('_', '-')} {getattr(args, name)} (it was {saved[name]})" for name in changed))
    found = [name for name in RUN_FILES if (output / name).exists()]
    if found and not (args.resume or args.overwrite or args.plan):
        raise ValueError(f"--output {output} already holds a run ({', '.join(found)}): --resume goes on with it, --overwrite deletes it, "
                         "or choose another place")
    return args


def check(args: argparse.Namespace, config: FalconConfig, device: torch.device) -> None:
    """Refuse what cannot work before anything is loaded: on a model without memory, the adapters' own checks run too."""
    train_config(args)
    if not 2 <= args.length <= config.max_position_embeddings:
        raise ValueError(f"--length {args.length}: it must lie between 2 and the model's {config.max_position_embeddings} positions")
    if not 0 <= args.held_out < 1:
        raise ValueError(f"--held-out {args.held_out}: a share of the questions, at least 0 and less than 1")
    if args.epochs is not None and not args.epochs > 0:
        raise ValueError(f"--epochs {args.epochs}: it must be more than 0")
    for name in ("questions", "weight_decay", "answer_tokens"):
        if getattr(args, name) < (name == "answer_tokens"):
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: it must be at least {int(name == 'answer_tokens')}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {args.device}: there is no CUDA device here")
    with torch.device("meta"):
        model = Falcon(config)
    adapt(model, args)
    ledger = plan(config, memory_flags(args, config, device))
    if args.memory and ledger.total > args.memory:
        raise ValueError(f"--memory: the run would take {ledger.total / 2**30:.2f} GiB, and {args.memory / 2**30:.2f} are given; "
                         "--plan says what would fit")


def train_config(args: argparse.Namespace) -> TrainConfig:
    warmup = int(args.warmup * args.steps if 0 < args.warmup < 1 else args.warmup)
    return TrainConfig(steps=args.steps, batch_size=args.batch_size, accumulate=args.accumulate, lr=args.lr, schedule=args.schedule,
                       warmup=warmup, clip=args.clip, eval_every=args.eval_every, save_every=args.save_every, seed=args.seed,
                       grouped=args.group_by_length)


def adapt(model: Falcon, args: argparse.Namespace) -> None:
    targets = "all" if args.targets == ["all"] else args.targets
    add_lora(model, args.rank, args.alpha, args.dropout, targets, DTYPES[args.adapter_dtype])


def uses_fast(args: argparse.Namespace, config: FalconConfig, device: torch.device) -> tuple[bool, bool]:
    """(blocks of fast.py, replayed as CUDA graphs): fused as the flag says, else on a GPU wherever they can; replayed where they fit."""
    dropout = config.hidden_dropout or (config.alibi and config.attention_dropout)
    can = config.parallel_attn and not config.bias and not dropout and args.targets == ["all"]
    fused = args.fused if args.fused is not None else device.type == "cuda" and can
    small = not args.packing and args.batch_size * args.length <= 4096
    return fused, fused and device.type == "cuda" and args.recorded and small


def memory_flags(args: argparse.Namespace, config: FalconConfig, device: torch.device) -> Flags:
    """The flags that decide the memory, for plan.py."""
    fused, recorded = uses_fast(args, config, device)
    dtype = DTYPES[args.dtype] if args.dtype else torch.bfloat16 if device.type == "cuda" else torch.float32
    return Flags(batch_size=args.batch_size, length=args.length, accumulate=args.accumulate, rank=args.rank, dropout=args.dropout,
                 targets="all" if args.targets == ["all"] else tuple(args.targets), adapter_dtype=DTYPES[args.adapter_dtype],
                 optimizer=args.optimizer, checkpointing=args.checkpointing and not fused, quantize=args.quantize,
                 double_quant=args.double_quant, dtype=dtype, packing=args.packing, fused=fused, keep_bytes=args.keep_bytes,
                 recorded=recorded, device=device.type)


def show_plan(args: argparse.Namespace) -> int:
    """The memory of the run, from config.json alone."""
    directory = Path(args.model).expanduser()
    path = directory / "config.json" if directory.is_dir() else Path(hf_hub_download(args.model, "config.json"))
    config = FalconConfig.from_json(read_json(path))
    flags = memory_flags(args, config, torch.device(args.device or "cuda"))
    print(report_plan(plan(config, flags), short(args.model), args.memory))
    return 0


def split(args: argparse.Namespace) -> tuple[list[Record], dict[str, list[Record]]]:
    """The records to train on, and the held-out ones by kind."""
    records = read_records(args.data)
    if args.eval_data:
        learned, held_out = records, read_records(args.eval_data)
    elif any("split" in record.fields for record in records):
        sides = {"train": [], "held_out": []}
        for record in records:
            side = record.fields.get("split")
            if side not in sides:
                raise ValueError(f'{record.where}: "split" is {side!r}; it must be "train" or "held_out", in every record or in none')
            sides[side].append(record)
        learned, held_out = sides["train"], sides["held_out"]
        if not learned:
            raise ValueError(f'{args.data}: every record has "split": "held_out", so nothing is left to train on')
    elif args.held_out:
        try:
            learned, held_out = split_records(records, args.held_out, args.seed)
        except ValueError as error:
            raise ValueError(f"{args.data}: {error}; --held-out 0 holds nothing out") from error
    else:
        learned, held_out = records, []
    kinds = {}
    for record in held_out:
        kinds.setdefault(str(record.fields.get("kind", "held out")), []).append(record)
    return learned, kinds


def answer(model: Falcon, tokenizer: Tokenizer, template: Template, eos: int, records: list[Record], tokens: int) -> list[str]:
    """The model's own answers to the records' questions, drawn as the paper draws (top-p 0.9, temperature 0.7), each from seed 0."""
    device, answers, threads = next(model.parameters()).device, [], torch.get_num_threads()
    # One token of a narrow model is too little work for two cores: where another program wants one of them, the other waits for it.
    torch.set_num_threads(1 if model.config.hidden_size < 1024 else threads)
    for record in records:
        prompt, _ = tokenize(record.question(), tokenizer, template, eos)
        room = min(tokens, model.config.max_position_embeddings - len(prompt))
        if room < 1:
            answers.append("(the question fills the model's positions)")
            continue
        ids = generate(model, torch.tensor([prompt], device=device), max_new_tokens=room, temperature=0.7, top_p=0.9, eos_token_id=eos,
                       generator=torch.Generator(device).manual_seed(0))[0, len(prompt):].tolist()
        answers.append(tokenizer.decode(ids).strip() + ("" if eos in ids else " ..."))
    torch.set_num_threads(threads)
    return answers


def run(args: argparse.Namespace) -> int:
    began, output = time.perf_counter(), Path(args.output)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    directory = fetch(args.model)
    config = FalconConfig.from_json(read_json(directory / "config.json"))
    check(args, config, device)
    output.mkdir(parents=True, exist_ok=True)

    # Records before weights: a slip in the data shows at once.
    tokenizer, eos = load_tokenizer(directory), eos_token_id(directory)
    template = Template.load(output / TEMPLATE_FILE if args.resume else args.template) if args.resume or args.template else Template()
    learned, kinds = split(args)
    encoded = encode(learned, tokenizer, eos, args.length, template, args.train_on_inputs, args.overlong)
    rows = pack(encoded.examples, args.length) if args.packing else encoded.examples
    print(f"train       {encoded}" + (f"; packed into {len(rows):,} rows" if args.packing else ""))
    held_out = {}
    for kind, records in kinds.items():
        held = encode(records, tokenizer, eos, args.length, template)
        held_out[kind] = held.examples
        print(f"held out    {kind}: {held}")
    if args.epochs:
        args.steps, args.epochs = max(1, round(args.epochs * len(rows) / (args.batch_size * args.accumulate))), None
        check(args, config, device)

    dtype = DTYPES[args.dtype] if args.dtype else fast_dtype(device)
    model = load_falcon(directory, args.quantize, double_quant=args.double_quant, device=device, dtype=dtype)
    torch.manual_seed(args.seed)
    adapt(model, args)
    model.train()                                                          # asked then, it keeps no memory for the next question
    model.checkpointing = args.checkpointing
    describe(model, args, device, dtype)

    # Of all kinds together, evenly spread.
    every = [record for records in kinds.values() for record in records if record.messages[0][0] != "text"]
    shown = [every[(2 * i + 1) * len(every) // (2 * args.questions)] for i in range(min(args.questions, len(every)))]
    if args.resume:
        before = read_json(output / RUN_FILE)["answers"]
    else:
        before = answer(model, tokenizer, template, eos, shown, args.answer_tokens)
        start_run(output, args, template, before)

    def save() -> None:
        save_adapter(model, output, base=args.model)

    loss, (fused, recorded) = answer_loss, uses_fast(args, model.config, device)
    if fused:
        blocks = fuse(model, args.keep_bytes, args.batch_size * args.length)
        loss = GraphedLoss(model, blocks) if recorded else fused_loss
    optimizer = make_optimizer(model.parameters(), args.optimizer, args.lr, weight_decay=args.weight_decay)
    outcome = train(model, optimizer, rows, train_config(args), output, eos, held_out, args.resume, save, loss)
    if outcome.interrupted:
        print(f"\nStopped after step {outcome.step} of {args.steps}; everything is saved in {output}. Go on with\n\n"
              f"    {command('finetune_falcon.py', '--output', output, '--resume')}\n")
        return 130
    report(output, held_out, shown, before, answer(model, tokenizer, template, eos, shown, args.answer_tokens))
    print(f"\n{time.perf_counter() - began:.0f} s in all, {outcome.seconds:.0f} s of training for {outcome.step} steps; "
          f"peak memory {peak_memory(device) / 2**20:,.0f} MiB")
    question = shown[0].question()[-1][1] if shown else "What is a bond?"
    print(f"Saved in {output}: the adapter in PEFT's format, the prompt template, metrics.jsonl, and checkpoint.pt for --resume.\n"
          f"Ask it a question:\n\n    {command('ask.py', '--adapter', output, question)}\n")
    return 0


def describe(model: Falcon, args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> None:
    """What was loaded and what is trained, counted from the tensors."""
    trainable, total = count_parameters(model)
    layers = [layer.base for layer in block_linears(model).values() if isinstance(layer, LoRALinear)]
    four_bit = [layer for layer in model.modules() if isinstance(layer, Linear4bit)]
    stored = sum(p.nbytes for layer in four_bit for name, p in layer.named_parameters() if name != "bias")
    values = sum(layer.out_features * layer.in_features for layer in four_bit)
    form = f"NF4{' with double quantization' * args.double_quant}, {8 * stored / values:.3f} bits each" if four_bit else "not quantized"
    print(f"base        {short(args.model)}: {total - trainable:,} parameters, {values:,} of them in {len(four_bit)} linears in {form}")
    settings = f"rank {args.rank}, alpha {args.alpha:g}, dropout {args.dropout:g}"
    print(f"adapter     {trainable:,} parameters: {settings} on {len(layers)} linears")
    name = f"{torch.get_num_threads()} threads" if device.type == "cpu" else torch.cuda.get_device_name(device)
    way = ["torch's own functions", "fused blocks", "fused blocks, replayed"][sum(uses_fast(args, model.config, device))]
    print(f"device      {device}, {name}; {str(dtype).removeprefix('torch.')}, {way}")


def start_run(output: Path, args: argparse.Namespace, template: Template, answers: list[str]) -> None:
    """Write what describes the run; with --overwrite, in the place of the one before. Files of others stay."""
    if args.overwrite:
        for name in RUN_FILES:
            (output / name).unlink(missing_ok=True)
    template.save(output)
    arguments = {name: value for name, value in vars(args).items() if name not in ("output", "resume", "overwrite", "plan", "memory")}
    text = json.dumps({"arguments": arguments, "answers": answers}, indent=2, ensure_ascii=False) + "\n"
    write_atomically(output / RUN_FILE, lambda file: file.write(text.encode()))


def report(output: Path, held_out: dict[str, list[Example]], shown: list[Record], before: list[str], after: list[str]) -> None:
    """The questions with their answers, and the held-out losses, of the first and of the last evaluation."""
    width = min(shutil.get_terminal_size().columns, 120)
    for record, *answers in zip(shown, before, after, strict=False):
        print("\n" + textwrap.fill(record.question()[-1][1], width, initial_indent="Question    ", subsequent_indent=" " * 12))
        expected = record.messages[record.answers()[0]][1]
        for name, text in zip(("  before    ", "  after     ", "  expected  "), (*answers, expected), strict=True):
            print(textwrap.fill(text or "(nothing)", width, initial_indent=name, subsequent_indent=" " * 12))
    lines = map(json.loads, (output / METRICS_FILE).read_text(encoding="utf-8").splitlines())
    evaluations = [line for line in lines if "set" in line]
    if evaluations:
        steps = f"step {evaluations[0]['step']} -> {evaluations[-1]['step']}"
        print(f"\n{'held out':<14}{'records':>8}{'loss':>18}{'perplexity':>20}    {steps}")
    for kind, examples in held_out.items():
        first, *_, last = 2 * [line for line in evaluations if line["set"] == kind]
        print(f"{kind:<14}{len(examples):>8}{first['loss']:>9.3f} -> {last['loss']:<6.3f}"
              f"{first['perplexity']:>11.2f} -> {last['perplexity']:<8.2f}")


def short(model: str) -> str:
    """A hub's name as it is; a directory as it is called from here."""
    return os.path.relpath(model) if Path(model).is_dir() else model


def command(script: str, *arguments: object) -> str:
    """A command line for this directory, to be copied."""
    return shlex.join(["python", os.path.relpath(HERE / script), *map(str, arguments)])


def main(argv: list[str] | None = None) -> int:
    try:
        args = parse(argv)
        return show_plan(args) if args.plan else run(args)
    except torch.OutOfMemoryError as error:
        print(f"error: {error}\nLess memory: --checkpointing, a smaller --batch-size with a larger --accumulate, a smaller --length, "
              "--optimizer adamw8bit or paged, --adapter-dtype bfloat16.", file=sys.stderr)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return 130
    return 1


if __name__ == "__main__":
    sys.exit(main())
