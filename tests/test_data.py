"""data.py: shapes of records, exact loss masks, batches that can be found again, packing, and what is said about bad files."""

import itertools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from minqlora.data import (
    IGNORE,
    Example,
    Template,
    batches,
    batches_in_order,
    collate,
    encode,
    order_of_epoch,
    pack,
    read_records,
    split_records,
    tokenize,
)

EOS = 0


@pytest.fixture(scope="module")
def tokenizer():
    """A byte-level BPE like Falcon's: no bos, no padding token, one special token that ends a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=["<|endoftext|>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(["Question: What is a bond?\nAnswer: A bond is a loan. A stock is a share."] * 9, trainer)
    return tokenizer


def write(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n", encoding="utf-8")
    return path


def rows(*lengths):
    return [Example(torch.arange(n, dtype=torch.int32) + 10 * i, torch.arange(n) > 0, (n,)) for i, n in enumerate(lengths)]


# Records

@pytest.mark.parametrize("line", [
    {"instruction": "What is a bond?", "input": "", "output": "A loan."},
    {"instruction": "What is a bond?", "output": " A loan.\n"},
    {"instruction": "What is a bond?", "input": None, "output": "A loan."},
    {"input": "What is a bond?", "output": "A loan."},
    {"prompt": "What is a bond?", "completion": "A loan."},
    {"question": "What is a bond?", "answer": "A loan."},
    {"messages": [{"role": "user", "content": "What is a bond?"}, {"role": "assistant", "content": "A loan."}]},
], ids=lambda line: "+".join(line))
def test_every_shape_becomes_the_same_conversation(line, tmp_path):
    record, = read_records(write(tmp_path / "data.jsonl", line))
    assert record.messages == (("user", "What is a bond?"), ("assistant", "A loan."))
    assert record.fields == line


def test_alpacas_input_joins_its_question_and_a_plain_text_is_learned_whole(tmp_path):
    question, text = read_records(write(tmp_path / "data.jsonl", {"instruction": "Sum up.", "input": "Bonds fell.", "output": "Down."},
                                        "", {"text": "Bonds rose."}))
    assert question.messages == (("user", "Sum up.\n\nBonds fell."), ("assistant", "Down."))
    assert text.messages == (("text", "Bonds rose."),) and text.where.endswith("data.jsonl, line 3")


@pytest.mark.parametrize("line, reason", [
    ('{"text": "a"', "not JSON"),
    ("[", "One JSON object a line"),
    ("[1]", "a list"),
    ("[" * 100_000, "nested too deeply"),
    ({}, "no key at all"),
    ({"title": "a"}, "no known shape: it has title"),
    ({"instruction": "a"}, "without an answer"),
    ({"instruction": "a", "output": " "}, "without an answer"),
    ({"instruction": "", "output": "b"}, "without a question"),
    ({"instruction": "a", "output": 3}, '"output" must be text, it is int'),
    ({"instruction": "a", "input": ["b"], "output": "c"}, '"input" must be text, it is list'),
    ({"text": ""}, '"text" is empty'),
    ({"text": "\ud800"}, "surrogate"),
    ({"messages": "hello"}, "must be a list"),
    ({"messages": []}, "without an answer"),
    ({"messages": [{"role": "user", "content": "a"}]}, "without an answer"),
    ({"messages": [{"role": "robot", "content": "a"}]}, "'robot'"),
    ({"messages": [{"role": "user"}]}, '"content" must be text, it is absent'),
    ({"messages": [{"role": "assistant", "content": ""}]}, "is empty"),
])
def test_a_bad_line_is_named_by_file_line_and_reason(line, reason, tmp_path):
    path = write(tmp_path / "bad.jsonl", {"text": "fine"}, line)
    with pytest.raises(ValueError) as caught:
        read_records(path)
    assert f"{path}, line 2: " in str(caught.value) and reason in str(caught.value)


def test_a_file_that_is_not_utf8_is_named_with_its_line(tmp_path):
    path = tmp_path / "latin.jsonl"
    path.write_bytes(b'{"text": "fine"}\n{"text": "caf\xe9"}\n')
    with pytest.raises(ValueError, match=r"latin\.jsonl, line 2: not UTF-8 text"):
        read_records(path)


def test_a_byte_order_mark_is_no_error_and_an_empty_file_is(tmp_path):
    path = tmp_path / "mark.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "fine"}\r\n')
    assert len(read_records(path)) == 1
    with pytest.raises(ValueError, match="the file is empty"):
        read_records(write(tmp_path / "empty.jsonl", "", " "))


# Tokens and the loss mask

def test_the_loss_asks_for_the_answer_and_the_eos_that_closes_it_and_for_nothing_else(tokenizer, tmp_path):
    record, = read_records(write(tmp_path / "data.jsonl", {"input": "What is a bond?", "output": "A loan."}))
    example, = encode([record], tokenizer, EOS, 64).examples
    asked = example.ids[~example.learned].tolist()
    answered = example.ids[example.learned].tolist()
    assert tokenizer.decode(asked, skip_special_tokens=False) == "Question: What is a bond?\nAnswer:"
    assert tokenizer.decode(answered, skip_special_tokens=False) == " A loan.<|endoftext|>"
    assert answered[-1] == EOS


def test_a_question_asked_later_has_the_tokens_it_was_taught_with(tokenizer, tmp_path):
    # The text is chosen so that tokenizing all of it at once would merge across the boundary: this template ends the prompt on a space.
    template = Template(user="Q: {content}\nAnswer: ", assistant="{content}")
    record, = read_records(write(tmp_path / "data.jsonl", {"input": "bond", "output": "A loan."}))
    example, = encode([record], tokenizer, EOS, 64, template).examples
    whole = tokenizer.encode("Q: bond\nAnswer: A loan.").ids
    prompt, learned = tokenize((("user", "bond"),), tokenizer, template, EOS)
    assert example.ids.tolist()[:len(prompt)] == prompt and not any(learned)
    assert whole[:len(prompt)] != prompt


def test_every_answer_of_a_chat_is_learned_and_what_follows_the_last_is_left_out(tokenizer, tmp_path):
    chat = [("system", "Be brief."), ("user", "bond?"), ("assistant", "A loan."),
            ("user", "stock?"), ("assistant", "A share."), ("user", "so?")]
    record, = read_records(write(tmp_path / "data.jsonl", {"messages": [{"role": r, "content": c} for r, c in chat]}))
    example, = encode([record], tokenizer, EOS, 99).examples
    assert tokenizer.decode(example.ids.tolist(), skip_special_tokens=False) == (
        "Be brief.\n\nQuestion: bond?\nAnswer: A loan.<|endoftext|>Question: stock?\nAnswer: A share.<|endoftext|>")
    assert tokenizer.decode(example.ids[example.learned].tolist(), skip_special_tokens=False) == (
        " A loan.<|endoftext|> A share.<|endoftext|>")


def test_a_message_that_quotes_the_eos_does_not_end_the_record(tokenizer, tmp_path):
    record, = read_records(write(tmp_path / "data.jsonl", {"input": "a<|endoftext|>b", "output": "c"}))
    example, = encode([record], tokenizer, EOS, 99).examples
    assert example.ids.tolist().count(EOS) == 1 and example.ids[-1] == EOS


def test_learning_everything_asks_for_all_but_the_first_token(tokenizer, tmp_path):
    records = read_records(write(tmp_path / "data.jsonl", {"input": "bond?", "output": "A loan."}, {"text": "A bond is a loan."}))
    for example in encode(records, tokenizer, EOS, 64, learn_all=True).examples:
        assert not example.learned[0] and example.learned[1:].all()
    text = encode(records, tokenizer, EOS, 64).examples[1]
    assert text.learned[1:].all(), "a plain text is learned whole in either case"


def test_a_record_too_long_is_cut_or_dropped_and_counted_aloud(tokenizer, tmp_path):
    records = read_records(write(tmp_path / "data.jsonl", {"input": "a", "output": "b"}, {"input": "a", "output": "bond " * 30},
                                 {"input": "bond " * 60, "output": "b"}))
    length = len(encode(records[:1], tokenizer, EOS, 999).examples[0].ids) + 9
    cut = encode(records, tokenizer, EOS, length)
    assert (len(cut.examples), cut.cut, cut.dropped) == (2, 1, 1)        # the third's answer lies beyond the limit
    assert len(cut.examples[1].ids) == length and cut.examples[1].ids[-1] != EOS
    assert "1 too long and CUT; 1 too long and DROPPED" in str(cut)
    dropped = encode(records, tokenizer, EOS, length, overlong="drop")
    assert (len(dropped.examples), dropped.cut, dropped.dropped) == (1, 0, 2)
    with pytest.raises(ValueError, match="every label is masked"):
        encode(records[2:], tokenizer, EOS, length)
    with pytest.raises(ValueError, match="length is 1"):
        encode(records, tokenizer, EOS, 1)
    with pytest.raises(ValueError, match="overlong is 'wrap'"):
        encode(records, tokenizer, EOS, 9, overlong="wrap")


def test_padding_is_out_of_the_loss_by_length_although_its_id_is_eos(tokenizer, tmp_path):
    records = read_records(write(tmp_path / "data.jsonl", {"input": "a", "output": "b"}, {"input": "a", "output": "A bond is a loan."}))
    examples = encode(records, tokenizer, EOS, 64).examples
    batch = collate(examples, pad=EOS, multiple=8)
    assert batch.input_ids.shape[1] % 8 == 0 and batch.attention_mask is None
    for row, example in enumerate(examples):
        tokens = len(example.ids)
        assert batch.labels[row, tokens - 1] == EOS, "the closing eos is in the loss"
        assert (batch.input_ids[row, tokens:] == EOS).all() and (batch.labels[row, tokens:] == IGNORE).all()
    assert len(batch.learned) == sum(int(example.learned.sum()) for example in examples)
    assert torch.equal(batch.labels.flatten()[batch.learned], batch.labels[batch.labels != IGNORE])
    assert batch.tokens == sum(len(example.ids) for example in examples) < batch.input_ids.numel()


# Template

def test_a_template_survives_its_file_and_takes_braces_in_the_content(tmp_path):
    template = Template(user="### {content}\n")
    template.save(tmp_path)
    assert Template.load(tmp_path / "prompt_template.json") == template
    assert template.write("user", "f({content})") == "### f({content})\n"


@pytest.mark.parametrize("text, reason", [
    ("{", "Expecting"), ("[]", "mapping"), ('{"usr": "{content}"}', "unknown roles usr"), ('{"user": "no place"}', "one {content}"),
    ('{"user": 1}', "must be text"),
])
def test_a_bad_template_is_refused_with_its_file(text, reason, tmp_path):
    path = write(tmp_path / "template.json", text)
    with pytest.raises(ValueError) as caught:
        Template.load(path)
    assert str(path) in str(caught.value) and reason in str(caught.value)


# Batches

@settings(deadline=None, max_examples=50)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=60), batch_size=st.integers(1, 7), seed=st.integers(0, 9),
       epoch=st.integers(0, 3), grouped=st.booleans())
def test_an_epoch_takes_every_example_once(lengths, batch_size, seed, epoch, grouped):
    order = order_of_epoch(lengths, batch_size, seed, epoch, grouped)
    assert sorted(itertools.chain(*order)) == list(range(len(lengths)))
    assert sum(len(chunk) == batch_size for chunk in order) == len(lengths) // batch_size
    assert order == order_of_epoch(lengths, batch_size, seed, epoch, grouped)


def test_grouping_leaves_a_tenth_of_the_padding_and_epochs_differ():
    lengths = torch.randint(1, 500, (2000,), generator=torch.Generator().manual_seed(0)).tolist()

    def padding(grouped):
        order = order_of_epoch(lengths, 8, 0, 1, grouped)
        return sum(max(lengths[i] for i in chunk) * len(chunk) - sum(lengths[i] for i in chunk) for chunk in order)

    # Of 400 sorted lengths between 1 and 500, 8 neighbours lie about 8 * 500/400 = 10 apart, 5 of padding each; 8 drawn at
    # random fall short of their maximum by about 500 (8/9 - 1/2) = 194.
    assert padding(True) < padding(False) / 10
    assert order_of_epoch(lengths, 8, 0, 0) != order_of_epoch(lengths, 8, 0, 1)
    assert order_of_epoch(lengths, 8, 0, 1) != order_of_epoch(lengths, 8, 1, 1)


def test_the_longest_batch_comes_first():
    lengths = [5, 900, 7, 3, 8, 2, 900, 4]
    for seed in range(5):
        assert max(lengths[i] for i in order_of_epoch(lengths, 2, seed, epoch=0)[0]) == 900


@pytest.mark.parametrize("start", [0, 1, 3, 4, 11])
def test_a_run_resumed_at_a_batch_sees_what_it_would_have_seen(start):
    examples = rows(3, 4, 5, 6, 7, 8, 9)                           # 4 batches an epoch, the last of one example
    seen = itertools.islice(batches(examples, 2, seed=1, pad=0), start, start + 6)
    resumed = itertools.islice(batches(examples, 2, seed=1, pad=0, start=start), 6)
    for a, b in zip(seen, resumed, strict=True):
        assert torch.equal(a.input_ids, b.input_ids) and torch.equal(a.labels, b.labels)


def test_evaluation_takes_every_example_once():
    examples = rows(3, 9, 5)
    seen = list(batches_in_order(examples, 2, pad=0))
    assert [batch.input_ids.shape for batch in seen] == [(2, 9), (1, 3)]
    assert sum(int((batch.labels != IGNORE).sum()) for batch in seen) == 2 + 8 + 4


# Packing

@settings(deadline=None, max_examples=50)
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=40))
def test_packing_keeps_every_record_whole_and_every_row_within_the_length(lengths):
    packed = pack(rows(*lengths), 20)
    assert sorted(n for row in packed for n in row.lengths) == sorted(lengths)
    assert all(sum(row.lengths) == len(row.ids) == len(row.learned) <= 20 for row in packed)
    # Two rows that are both at most half full would have been one.
    assert sum(len(row.ids) <= 10 for row in packed) <= 1
    assert sum(int(row.learned.sum()) for row in packed) == sum(n - 1 for n in lengths)


def test_a_packed_batch_numbers_the_tokens_of_each_record():
    batch = collate(pack(rows(3, 2, 4), 5), pad=7)
    assert batch.input_ids.tolist() == [[20, 21, 22, 23, 7], [0, 1, 2, 10, 11]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 2, 2]]
    # No record's first token is asked for: the record before it says nothing about it.
    assert batch.labels.tolist() == [[IGNORE, 21, 22, 23, IGNORE], [IGNORE, 1, 2, IGNORE, 11]]


def test_a_batch_moves_as_a_whole():
    batch = collate(rows(3), pad=0).to("meta")
    assert {part.device.type for part in batch if isinstance(part, torch.Tensor)} == {"meta"}
    assert batch.attention_mask is None and batch.tokens == 3


# Held-out records

def test_the_same_question_never_stands_on_both_sides(tmp_path):
    lines = [{"input": f"question {i % 20}", "output": f"answer {i}"} for i in range(60)]
    records = read_records(write(tmp_path / "data.jsonl", *lines))
    train, held_out = split_records(records, 0.2, seed=0)
    assert len(held_out) == 12 and len(train) == 48                # 4 of 20 questions, three records each
    assert not {r.question() for r in train} & {r.question() for r in held_out}
    assert split_records(records, 0.2, seed=0) == (train, held_out)
    assert split_records(records, 0.2, seed=1) != (train, held_out)
    # The side depends on the question, not on its place in the file.
    _, reversed_file = split_records(records[::-1], 0.2, seed=0)
    assert {r.question() for r in reversed_file} == {r.question() for r in held_out}


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 2])
def test_a_fraction_outside_0_and_1_is_refused(fraction, tmp_path):
    with pytest.raises(ValueError, match="held-out fraction"):
        split_records([], fraction, 0)


def test_one_question_cannot_be_split(tmp_path):
    records = read_records(write(tmp_path / "data.jsonl", {"input": "a", "output": "b"}, {"input": "a", "output": "c"}))
    with pytest.raises(ValueError, match="nothing can be held out"):
        split_records(records, 0.5, 0)
