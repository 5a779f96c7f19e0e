"""Ask a fine-tuned Falcon, or merge it into a plain 16-bit model.

    python examples/ask.py --adapter runs/finance "What is a bond?"     # one answer, as it comes
    python examples/ask.py --adapter runs/finance                       # a prompt: Ctrl-C stops an answer, Ctrl-D leaves
    python examples/ask.py --adapter runs/finance --merge merged        # a model that transformers opens

The question is put as in training: by the prompt template that was saved beside the adapter. An adapter from elsewhere (PEFT's files)
has none, and is asked by the default one. The base is the one that the adapter names, in 4 bits if it was trained so; `--model` names
another place for it. With `--model` and no adapter the base itself answers.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

# A CPU's threads sleep while they wait for each other: spinning is slow where another program wants a core.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from tokenizers import Tokenizer
from torch import Tensor

from minqlora.data import TEMPLATE_FILE, Template, tokenize
from minqlora.falcon import Falcon
from minqlora.generate import generate_steps
from minqlora.load import eos_token_id, fetch, load_falcon, load_tokenizer, read_json, save_falcon
from minqlora.lora import CONFIG, load_adapter
from minqlora.qlora import merge_lora

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# What goes along with the weights into a merged model.
BESIDE = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Ask a fine-tuned Falcon.", allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag = parser.add_argument
    flag("question", nargs="?", help="without one, a prompt asks for them")
    flag("--adapter", metavar="DIR", help="what finetune_falcon.py or PEFT saved")
    flag("--model", help="the base, where it is not the one that the adapter names")
    flag("--merge", metavar="DIR", help="write base and adapter as one 16-bit model in Hugging Face's layout")
    flag("--merge-dtype", choices=DTYPES, default="bfloat16", help="of the merged model")
    flag("--chat", action="store_true", help="at the prompt, keep what was said before; for models tuned on conversations")
    flag("--max-new-tokens", type=int, help="of an answer; as many as fit into the model's positions, 512 at most, where not given")
    flag("--temperature", type=float, default=0.7, help="0: the likeliest word each time; the default is the paper's")
    flag("--top-p", type=float, default=0.9, help="draw among the likeliest words of this probability together; the default is the paper's")
    flag("--seed", type=int, default=0, help="of the drawing")
    flag("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, ...")
    flag("--dtype", choices=DTYPES, help="what is computed in; bfloat16 where it is fast, else float32")
    args = parser.parse_args(argv)
    if not args.adapter and not args.model:
        raise ValueError("--adapter DIR (or --model for the base alone): whom shall the question go to?")
    if args.temperature < 0:
        raise ValueError(f"--temperature {args.temperature}: it must be at least 0")
    if not 0 < args.top_p <= 1:
        raise ValueError(f"--top-p {args.top_p}: it must be more than 0 and at most 1")
    if args.max_new_tokens is not None and args.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens {args.max_new_tokens}: it must be at least 1")
    if args.merge:
        place = Path(args.merge)
        # Beside an adapter transformers would open that too, and put it on top of what holds it already.
        found = {"a file": place.is_file(), "a model": (place / "config.json").exists(), "an adapter": (place / CONFIG).exists()}
        for what, there in found.items():
            if there:
                raise ValueError(f"--merge {args.merge}: {what} is there already; choose another place")
    if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {args.device}: there is no CUDA device here")
    return args


def load(args: argparse.Namespace) -> tuple[Falcon, Path, Template]:
    """The model with its adapter, the directory of its base, and the template to ask it by."""
    name, how, template = args.model, {}, Template()
    if args.adapter:
        adapter = Path(args.adapter)
        if not (adapter / CONFIG).is_file():
            raise FileNotFoundError(f"--adapter {adapter}: no {CONFIG} is there, so it holds no adapter")
        name = name or read_json(adapter / CONFIG).get("base_model_name_or_path")
        if not name:
            raise ValueError(f"{adapter / CONFIG} does not name its base: give it with --model")
        if (adapter / "run.json").exists():
            how = read_json(adapter / "run.json")["arguments"]
        if (adapter / TEMPLATE_FILE).exists():
            template = Template.load(adapter / TEMPLATE_FILE)
    base = fetch(name)
    dtype = DTYPES[args.dtype] if args.dtype else None
    model = load_falcon(base, how.get("quantize", True), double_quant=how.get("double_quant", True), device=args.device, dtype=dtype)
    if args.adapter:
        load_adapter(model, args.adapter)
    return model.eval(), base, template


def merge(model: Falcon, base: Path, template: Template, args: argparse.Namespace) -> None:
    """Write base + adapter as a plain model. The sum goes onto the dequantized weights, beside which the adapter was trained."""
    directory = Path(args.merge)
    save_falcon(merge_lora(model, DTYPES[args.merge_dtype]), directory)
    for name in BESIDE:
        if (base / name).exists():
            shutil.copyfile(base / name, directory / name)
    template.save(directory)
    size = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    print(f"Merged into {directory}: {size / 1e6:,.1f} MB of {args.merge_dtype} safetensors, with config and tokenizer. Opens with\n\n"
          f"    transformers.AutoModelForCausalLM.from_pretrained({str(directory)!r})\n")


def pieces(steps: Iterable[Tensor], tokenizer: Tokenizer, eos: int) -> Iterator[str]:
    """Text as it grows. A character may need several tokens: until it is whole, it decodes to a replacement character."""
    ids, shown = [], 0
    for step in steps:
        if step.item() == eos:
            break
        ids.append(step.item())
        text = tokenizer.decode(ids).lstrip()
        if not text.endswith("\ufffd"):
            yield text[shown:]
            shown = len(text)
    yield tokenizer.decode(ids).lstrip()[shown:]


class Asker:
    """A model, its tokenizer and its template, and what was said so far."""

    def __init__(self, model: Falcon, base: Path, template: Template, args: argparse.Namespace):
        self.model, self.template, self.args = model, template, args
        self.tokenizer, self.eos = load_tokenizer(base), eos_token_id(base)
        device = torch.device(args.device)
        # One token of a narrow model is too little work for two cores: where another program wants one of them, the other waits for it.
        torch.set_num_threads(1 if model.config.hidden_size < 1024 else torch.get_num_threads())
        self.generator = torch.Generator(device).manual_seed(args.seed)
        self.said: tuple[tuple[str, str], ...] = ()

    def answer(self, question: str) -> None:
        """Print the answer to a question as it comes."""
        messages = (*self.said, ("user", question.strip()))
        limit, wanted = self.model.config.max_position_embeddings, self.args.max_new_tokens
        prompt, _ = tokenize(messages, self.tokenizer, self.template, self.eos)
        # A conversation that outgrows the model loses its oldest turns.
        while len(messages) > 1 and len(prompt) + (wanted or 64) > limit:
            messages = messages[2:]
            prompt, _ = tokenize(messages, self.tokenizer, self.template, self.eos)
        room = wanted or min(512, limit - len(prompt))
        if len(prompt) + room > limit or room < 1:
            raise ValueError(f"the question has {len(prompt)} tokens and the model {limit} positions: {max(room, 1)} more do not fit")
        ids = torch.tensor([prompt], device=self.args.device)                         # (1, tokens)
        steps = generate_steps(self.model, ids, None, room, self.args.temperature, self.args.top_p, self.eos, self.generator)
        text = ""
        try:
            for piece in pieces(steps, self.tokenizer, self.eos):
                print(piece, end="", flush=True)
                text += piece
        finally:
            print()
            if self.args.chat and text:
                self.said = (*messages, ("assistant", text))

    def loop(self) -> None:
        """Questions from the keyboard, with the line editing and history that readline gives."""
        if sys.platform != "win32":
            import readline  # noqa: F401 (its import is its effect on `input`)
        print("Ask a question. Ctrl-C stops an answer, Ctrl-D leaves.", file=sys.stderr)
        while True:
            try:
                question = input("> ")
                if question.strip():
                    self.answer(question)
            except ValueError as error:
                print(f"error: {error}", file=sys.stderr)
            except KeyboardInterrupt:
                print()
            except EOFError:
                print()
                return


def run(args: argparse.Namespace) -> None:
    model, base, template = load(args)
    if args.merge:
        merge(model, base, template, args)
    asker = Asker(model, base, template, args)
    if args.question is not None:
        if not args.question.strip():
            raise ValueError("the question is empty")
        asker.answer(args.question)
    elif not args.merge:
        asker.loop()


def main(argv: list[str] | None = None) -> int:
    try:
        run(parse(argv))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
