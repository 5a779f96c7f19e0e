"""Records, prompts, loss masks, batches: from a file of questions and answers to what the model is given.

**Records.** A file of JSON lines, in any of the shapes people have:

    {"instruction": "What is a bond?", "input": "", "output": "A loan that ..."}        Alpaca; "input" may be absent
    {"input": "What is a bond?", "output": "A loan that ..."}                           also prompt/completion, question/answer
    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}          chat, any number of turns
    {"text": "Bonds rose on Monday ..."}                                                plain text

All become one thing, a list of (role, content). An Alpaca record is a chat of two messages; a plain text is one message of
the role "text".

**Prompt.** A template says how a message of each role is written. It is saved beside the adapter, so that whoever asks the tuned
model asks as it was taught:

    Question: What is a bond?\nAnswer: A loan that ...<eos>
    `------- user ------------------´`----- assistant -----´

**Loss mask.** Only the answers are learned: the tokens of the roles "assistant" and "text", and the eos that closes them. The eos
is the whole lesson in when to stop, and a model tuned without it never does. Two things make the mask exact:

* Each message is tokenized alone. Tokenizing the whole conversation and looking for the boundary afterwards goes wrong
  where the tokenizer merges across it ("Answer:" + " A" is not always what "Answer: A" gives). The template ends the prompt on a
  visible character and begins the answer with the space, as byte-level BPE wants it. The prompt of a question asked later has
  the same tokens as in training, because the same lines make it.
* Padding is recognised by length, never by its id. Falcon has no padding token, so eos is used for it, and masking by id would
  take the closing eos out of the loss too.

**Batches.** Records of about the same length go together, so that little is padding: the order is shuffled, cut into stretches of 50
batches, each stretch sorted by length and cut into batches, and the batches shuffled. The order is a function of (seed, epoch)
alone; a resumed run finds its place by counting.

Padding stands on the right. Under causal attention no token sees what follows it, so a batch of whole records needs no mask.

**Packing** puts several records in one row, so that nearly nothing is padding. Attention stays within each record: the batch
then carries `attention_mask` with 1 for the tokens of a row's first record, 2 for its second, ... and 0 for padding, and a token
sees those of its own number. Rotary and ALiBi positions enter attention as differences, so they need not begin anew.
"""

import bisect
import hashlib
import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

LEARNED = ("assistant", "text")
# Question and answer, under the names people give them. Alpaca's "input" joins its question.
PAIRS = (("instruction", "output"), ("input", "output"), ("prompt", "completion"), ("question", "answer"))
SHAPES = "instruction (input) output | input output | prompt completion | question answer | messages | text"
IGNORE = -100
TEMPLATE_FILE = "prompt_template.json"


@dataclass(frozen=True)
class Record:
    """One line of a data file: what was said, by whom, and the line's own fields for whoever groups records by them."""

    messages: tuple[tuple[str, str], ...]                          # ((role, content), ...)
    fields: dict
    where: str                                                     # "finance.jsonl, line 12"

    def answers(self) -> list[int]:
        """Positions of the messages that are learned."""
        return [i for i, (role, _) in enumerate(self.messages) if role in LEARNED]

    def question(self) -> tuple[tuple[str, str], ...]:
        """The messages before the first answer; of a plain text, the text."""
        return self.messages[: self.answers()[0]] or self.messages


def read_records(path: str | Path) -> list[Record]:
    """Read a file of JSON lines. What is wrong with a line is said with its file, number and reason."""
    path = Path(path)
    records = []
    # "utf-8-sig" also takes the mark that some editors put first. Bytes, so that a wrong encoding is reported with its line.
    for number, raw in enumerate(path.read_bytes().split(b"\n"), start=1):
        where = f"{path}, line {number}"
        if not raw.strip():
            continue
        try:
            fields = json.loads(raw.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{where}: not UTF-8 text ({error.reason} at byte {error.start})") from error
        except json.JSONDecodeError as error:
            hint = ". One JSON object a line is wanted, not one array or object over many lines" if raw.strip() in (b"[", b"{") else ""
            raise ValueError(f"{where}: not JSON ({error.msg} at column {error.colno}){hint}") from error
        except RecursionError as error:
            raise ValueError(f"{where}: nested too deeply") from error
        if not isinstance(fields, dict):
            raise ValueError(f"{where}: a JSON object is wanted, this is a {type(fields).__name__}")
        try:
            records.append(Record(_messages(fields), fields, where))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    if not records:
        raise ValueError(f"{path}: no records; the file is empty")
    return records


def _messages(fields: dict) -> tuple[tuple[str, str], ...]:
    """The messages of a record in any of the shapes."""
    if "messages" in fields:
        return _chat(fields["messages"])
    for question, answer in PAIRS:
        if question in fields and answer in fields:
            asked = _text(fields, question)
            if question == "instruction" and fields.get("input") is not None:
                asked = f"{asked}\n\n{_text(fields, 'input')}".strip()
            if not asked:
                raise ValueError(f'"{question}" is empty: a record without a question')
            answered = _text(fields, answer)
            if not answered:
                raise ValueError(f'"{answer}" is empty: a record without an answer')
            return ("user", asked), ("assistant", answered)
    if "text" in fields:
        text = _text(fields, "text")
        if not text:
            raise ValueError('"text" is empty')
        return (("text", text),)
    found = ", ".join(fields) or "no key at all"
    if any(question in fields for question, _ in PAIRS):
        raise ValueError(f"a record without an answer: it has {found}; known shapes are {SHAPES}")
    raise ValueError(f"no known shape: it has {found}; known shapes are {SHAPES}")


def _chat(messages: object) -> tuple[tuple[str, str], ...]:
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError('"messages" must be a list of {"role", "content"}')
    turns = []
    for message in messages:
        role = message.get("role")
        if role not in ("system", "user", "assistant"):
            raise ValueError(f'the role of a message is {role!r}; known are "system", "user" and "assistant"')
        content = _text(message, "content")
        if not content:
            raise ValueError(f'the "content" of a message of role "{role}" is empty')
        turns.append((role, content))
    if not any(role == "assistant" for role, _ in turns):
        raise ValueError("a record without an answer: no message has the role \"assistant\"")
    return tuple(turns)


def _text(fields: dict, key: str) -> str:
    """A field's text without the white space around it, which the template provides."""
    value = fields.get(key)
    if not isinstance(value, str):
        raise ValueError(f'"{key}" must be text, it is {"absent" if key not in fields else type(value).__name__}')
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f'"{key}" holds half a surrogate pair, which no encoding can write') from error
    return value.strip()


def split_records(records: list[Record], fraction: float, seed: int) -> tuple[list[Record], list[Record]]:
    """Set a fraction of the questions aside: (train, held out). Records with the same question go to the same side."""
    if not 0 < fraction < 1:
        raise ValueError(f"the held-out fraction is {fraction}; it must lie between 0 and 1")
    questions = {record.question() for record in records}
    if len(questions) < 2:
        raise ValueError(f"{len(records)} records ask {len(questions)} question: nothing can be held out of them")
    # By a hash and not by a shuffle: the side of a question does not depend on where in the file it stands.
    order = sorted(questions, key=lambda question: hashlib.sha256(f"{seed} {question}".encode()).digest())
    held_out = set(order[:min(max(1, round(fraction * len(order))), len(order) - 1)])
    sides = ([], [])
    for record in records:
        sides[record.question() in held_out].append(record)
    return sides


@dataclass(frozen=True)
class Template:
    """How a message of each role is written. `{content}` stands for the message."""

    system: str = "{content}\n\n"
    user: str = "Question: {content}\nAnswer:"
    assistant: str = " {content}"
    text: str = "{content}"

    def __post_init__(self):
        for role, form in asdict(self).items():
            if not isinstance(form, str) or form.count("{content}") != 1:
                raise ValueError(f'template: "{role}" must be text with one {{content}} in it, it is {form!r}')

    def write(self, role: str, content: str) -> str:
        # Not str.format: the content has braces of its own.
        before, after = getattr(self, role).split("{content}")
        return before + content + after

    def save(self, directory: str | Path) -> None:
        Path(directory, TEMPLATE_FILE).write_text(json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "Template":
        path = Path(path)
        try:
            forms = json.loads(path.read_text(encoding="utf-8"))
            unknown = set(forms) - {field.name for field in fields(cls)}
            if unknown:
                raise ValueError(f"unknown roles {', '.join(sorted(unknown))}")
            return cls(**forms)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: not a prompt template ({error})") from error


@dataclass(frozen=True)
class Example:
    """A row of tokens to train on: one record, or several packed."""

    ids: Tensor                                                    # (tokens,) int32
    learned: Tensor                                                # (tokens,) bool: the loss asks for this token
    lengths: tuple[int, ...]                                       # of the records in it


def tokenize(messages: tuple[tuple[str, str], ...], tokenizer, template: Template, eos: int) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation, and which of them are learned. Ends on a user's message: the prompt of a question."""
    # A message that quotes "<|endoftext|>" is spelled out: it must not end the record.
    tokenizer.encode_special_tokens = True
    ids, learned = [], []
    for role, content in messages:
        turn = tokenizer.encode(template.write(role, content), add_special_tokens=False).ids
        if role in LEARNED:
            turn = [*turn, eos]
        ids += turn
        learned += [role in LEARNED] * len(turn)
    return ids, learned


class Encoded(NamedTuple):
    """Examples, and what became of the records that were too long: to be said aloud."""

    examples: list[Example]
    cut: int
    dropped: int

    def __str__(self) -> str:
        tokens = sum(len(example.ids) for example in self.examples)
        learned = sum(int(example.learned.sum()) for example in self.examples)
        text = f"{len(self.examples):,} records, {tokens:,} tokens, {learned:,} of them in the loss"
        if self.cut:
            text += f"; {self.cut:,} too long and CUT"
        if self.dropped:
            text += f"; {self.dropped:,} too long and DROPPED"
        return text


def encode(records: list[Record], tokenizer, eos: int, length: int, template: Template | None = None, learn_all: bool = False,
           overlong: str = "cut") -> Encoded:
    """Turn records into examples of at most `length` tokens.

    A longer record is cut there, and so has no closing eos: the text did not end. With overlong="drop" it is left out, and so is,
    in either case, one whose cut leaves nothing to learn. `learn_all` puts the questions in the loss too.
    """
    if length < 2:
        raise ValueError(f"length is {length}; a token and its successor make 2")
    if overlong not in ("cut", "drop"):
        raise ValueError(f'overlong is {overlong!r}; it must be "cut" or "drop"')
    template = template or Template()
    examples, cut, dropped = [], 0, 0
    for record in records:
        # What follows the last answer teaches nothing.
        ids, learned = tokenize(record.messages[: record.answers()[-1] + 1], tokenizer, template, eos)
        too_long = len(ids) > length
        ids, learned = ids[:length], torch.tensor(learned[:length])
        learned |= learn_all
        # Nothing stands before a record's first token, so nothing can predict it.
        learned[0] = False
        if too_long and (overlong == "drop" or not learned.any()):
            dropped += 1
            continue
        cut += too_long
        examples.append(Example(torch.tensor(ids, dtype=torch.int32), learned, (len(ids),)))
    if not any(example.learned.any() for example in examples):
        raise ValueError(f"none of {len(records)} records has an answer within {length} tokens: every label is masked, nothing to learn")
    return Encoded(examples, cut, dropped)


def pack(examples: list[Example], length: int) -> list[Example]:
    """Put examples together into rows of at most `length` tokens: the longest first, each where it leaves the least room."""
    rows, room = [], []                                            # room: sorted (tokens left, row)
    for example in sorted(examples, key=lambda example: -len(example.ids)):
        fit = bisect.bisect_left(room, (len(example.ids), -1))
        left, row = room.pop(fit) if fit < len(room) else (length, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(example)
        bisect.insort(room, (left - len(example.ids), row))
    return [Example(torch.cat([e.ids for e in row]), torch.cat([e.learned for e in row]), tuple(len(e.ids) for e in row)) for row in rows]


class Batch(NamedTuple):
    """What a step is given. A label is its own token's id, -100 where there is no loss; whoever computes the loss shifts."""

    input_ids: Tensor                                              # (batch, tokens) int64
    labels: Tensor                                                 # (batch, tokens) int64
    learned: Tensor                                                # (learned,) int64: where labels.flatten() is not -100
    attention_mask: Tensor | None                                  # (batch, tokens) int64, the number of its record; None: one record a row
    tokens: int                                                    # without padding

    def to(self, device: torch.device | str) -> "Batch":
        return Batch(*(part.to(device, non_blocking=True) if isinstance(part, Tensor) else part for part in self))


def collate(examples: list[Example], pad: int, multiple: int = 1) -> Batch:
    """Stack examples, padded on the right to a common length that is a multiple of `multiple`."""
    length = math.ceil(max(len(example.ids) for example in examples) / multiple) * multiple
    input_ids = torch.full((len(examples), length), pad)           # (batch, tokens)
    labels = torch.full_like(input_ids, IGNORE)
    record = torch.zeros_like(input_ids)
    for row, example in enumerate(examples):
        tokens = len(example.ids)
        input_ids[row, :tokens] = example.ids
        labels[row, :tokens] = torch.where(example.learned, example.ids.long(), IGNORE)
        record[row, :tokens] = torch.arange(1, len(example.lengths) + 1).repeat_interleave(torch.tensor(example.lengths))
    packed = any(len(example.lengths) > 1 for example in examples)
    # Found here, where the labels lie on the CPU: on a GPU the search would wait for the device.
    learned = (labels.flatten() != IGNORE).nonzero().flatten()
    return Batch(input_ids, labels, learned, record if packed else None, sum(len(example.ids) for example in examples))


def order_of_epoch(lengths: list[int], batch_size: int, seed: int, epoch: int, grouped: bool = True) -> list[list[int]]:
    """Which examples make up each batch of an epoch. A function of (seed, epoch): a resumed run finds the same order."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(lengths), generator=generator).tolist()
    if grouped:
        stretch = 50 * batch_size
        stretches = [order[i:i + stretch] for i in range(0, len(order), stretch)]
        order = [i for part in stretches for i in sorted(part, key=lambda i: -lengths[i])]
    chunks = [order[i:i + batch_size] for i in range(0, len(order), batch_size)]
    chunks = [chunks[i] for i in torch.randperm(len(chunks), generator=generator).tolist()]
    if epoch == 0:
        # The longest batch comes first of all: if memory does not suffice, the first step says so.
        longest = max(range(len(chunks)), key=lambda c: max(lengths[i] for i in chunks[c]) * len(chunks[c]))
        chunks[0], chunks[longest] = chunks[longest], chunks[0]
    return chunks


def batches(examples: list[Example], batch_size: int, seed: int, pad: int, start: int = 0, grouped: bool = True,
            multiple: int = 1) -> Iterator[Batch]:
    """Batches without end, epoch after epoch, from the one numbered `start`."""
    lengths = [len(example.ids) for example in examples]
    per_epoch = math.ceil(len(examples) / batch_size)
    for epoch in itertools.count(start // per_epoch):
        for chosen in order_of_epoch(lengths, batch_size, seed, epoch, grouped)[start % per_epoch:]:
            yield collate([examples[i] for i in chosen], pad, multiple)
        start = 0


def batches_in_order(examples: list[Example], batch_size: int, pad: int, multiple: int = 1) -> Iterator[Batch]:
    """Every example once, the longest first: for evaluation."""
    order = sorted(examples, key=lambda example: -len(example.ids))
    for i in range(0, len(order), batch_size):
        yield collate(order[i:i + batch_size], pad, multiple)
