"""The base that travels with the code, and the script that trained it: what it is, what it has learned, and the numbers on its card."""

import importlib.util
import json
import lzma
import math
import re
import shlex
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from torch import nn

from minqlora.load import eos_token_id, load_falcon, load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
BASE = ROOT / "examples" / "tiny_falcon"
spec = importlib.util.spec_from_file_location("pretrain_tiny_falcon", ROOT / "examples" / "pretrain_tiny_falcon.py")
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)


@pytest.fixture(scope="module")
def base():
    return load_falcon(BASE, quantize=False, dtype=torch.float32)


TOKENIZER = load_tokenizer(BASE)


@pytest.fixture
def tokenizer():
    return TOKENIZER


@pytest.fixture(scope="module")
def answers():
    """Explanations written for this project: the base has read none of them."""
    records = [json.loads(line) for line in (ROOT / "examples" / "data" / "finance.jsonl").read_text().splitlines()]
    return [record["output"] for record in records if record["kind"] == "explained"]


# ------------------------------------------------------------------------------------------------------------ the base


def test_the_base_is_falcon_7b_in_small_and_in_8_megabytes(base):
    config = json.loads((BASE / "config.json").read_text())
    assert config["model_type"] == "falcon" and config["multi_query"] and config["parallel_attn"] and config["tie_word_embeddings"]
    assert not config["bias"] and not config["alibi"] and not config["new_decoder_architecture"]
    assert base.config.num_kv_heads == 1 < base.config.num_attention_heads
    assert (BASE / "model.safetensors").stat().st_size <= 8_000_000
    with safe_open(BASE / "model.safetensors", framework="pt") as file:
        assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"BF16"}  # noqa: SIM118


def test_transformers_opens_it_and_gives_the_same_logits(base, tokenizer, answers):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()
    text = "\n".join(answers[:12])
    ids = tokenizer.encode(text).ids
    assert AutoTokenizer.from_pretrained(BASE)(text).input_ids == ids
    ids = torch.tensor([ids[:400]])
    assert ids.shape[1] > 256
    with torch.no_grad():
        expected, ours = theirs(ids).logits, base(ids)
    # Float32 sums in another order: logits of up to about 20 carry 24 bits, and each goes through 7 blocks.
    assert (expected - ours).abs().max() < 1e-4
    assert theirs.generation_config.eos_token_id == eos_token_id(BASE) == tokenizer.token_to_id(script.EOS) == 0


@given(st.text())
def test_any_text_survives_the_tokenizer(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text).ids, skip_special_tokens=False) == text


def test_every_digit_is_one_token(tokenizer):
    tokens = tokenizer.encode("It costs $1,250.75 in 2024").tokens
    assert "".join(token for token in tokens if any(c.isdigit() for c in token)) == "1250752024"
    assert all(len(token) == 1 for token in tokens if any(c.isdigit() for c in token))


def bits_per_byte(model, tokenizer, texts):
    bits = sum(script.held_out_bits(model, script.encode(tokenizer, [text]), 512) for text in texts)
    return bits / sum(len(text.encode()) for text in texts)


def test_it_reads_explanations_it_never_saw_in_fewer_bits_than_xz_has_for_all_of_them(base, tokenizer, answers):
    # xz gets every answer of the file at once and may look back on all of them; the model gets 40, each alone.
    xz = 8 * len(lzma.compress("\n".join(answers).encode(), preset=9)) / len("\n".join(answers).encode())
    assert bits_per_byte(base, tokenizer, answers[::len(answers) // 40]) < 0.9 * xz


def test_it_has_learned_more_than_which_words_are_frequent(base, tokenizer, answers):
    generator = torch.Generator().manual_seed(0)
    texts = answers[::len(answers) // 20]
    shuffled = []
    for text in texts:
        words = text.split(" ")
        shuffled.append(" ".join(words[i] for i in torch.randperm(len(words), generator=generator).tolist()))
    # The same words in no order. A model of single words would need the same bits for both.
    assert bits_per_byte(base, tokenizer, texts) < 0.75 * bits_per_byte(base, tokenizer, shuffled)


# ------------------------------------------------------------------------------------------------------------ the card


def test_the_card_quotes_the_results_of_the_run():
    card, results = (BASE / "README.md").read_text(), json.loads((BASE / "results.json").read_text())
    section = card.split("## How good it is")[1].split("\n## ")[0]
    cells = [re.split(r"\s*\|\s*", line.strip("| ")) for line in section.splitlines() if line.startswith("|")]
    rows = {first: rest for first, *rest in cells}
    for name, row in [*results["sources"].items(), ("**all**", results["bits_per_byte"])]:
        expected = [f"{row[method]:.3f}" for method in ("tiny_falcon", "bigram", "xz_9")]
        assert [cell.strip("*") for cell in rows[name][:3]] == expected, name
    assert results["bits_per_byte"]["tiny_falcon"] < results["bits_per_byte"]["bigram"] < results["bits_per_byte"]["xz_9"]
    for number in (f"{results['parameters']:,}", f"{results['held_out_loss']:.3f}", f"{round(results['tokens_seen'] / 1e6)} million"):
        assert number in card, number
    assert sum(p.numel() for p in load_falcon(BASE, quantize=False).parameters()) == results["parameters"]
    assert results["seconds"] < 600


def test_the_card_names_the_command_that_made_it(tmp_path):
    card, results = (BASE / "README.md").read_text(), json.loads((BASE / "results.json").read_text())
    command = re.search(r"python (examples/pretrain_tiny_falcon\.py[^`]*)```", card).group(1).replace("\\\n", " ")
    args = vars(script.arguments([*shlex.split(command)[1:], "--overwrite"]))
    assert [script.stem(path) for path in args["files"]] == list(results["sources"])
    for key, value in results["arguments"].items():
        if key in ("weights", "last_weights") and args[key] is not None:
            given = [weight / sum(args[key]) for weight in args[key]]
            assert value == pytest.approx(given, abs=1e-6), key
        elif key not in ("device", "weights", "last_weights"):
            assert args[key] == value, key


# ---------------------------------------------------------------------------------------------------------- the script

SUBJECTS = ("bank", "firm", "market", "bond", "price", "loan", "tax", "wage")
SMALL = ["--vocab-size", "320", "--hidden", "32", "--layers", "1", "--head-dim", "16", "--context", "32", "--batch-size", "8",
         "--steps", "30", "--held-out", "0.2", "--device", "cpu"]  # fmt: skip


@pytest.fixture
def files(tmp_path):
    """Two sources of ten documents each, one of them compressed."""
    documents = [" ".join(f"The {SUBJECTS[(i * j) % 8]} of {i}{j} is a {SUBJECTS[j % 8]}." for j in range(20)) for i in range(20)]
    (tmp_path / "a.txt").write_text(script.EOS.join(documents[:10]))
    (tmp_path / "b.txt.xz").write_bytes(lzma.compress(script.EOS.join(documents[10:]).encode()))
    return [str(tmp_path / "a.txt"), str(tmp_path / "b.txt.xz")]


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_small_run_learns_and_the_same_seed_gives_the_same_weights(files, tmp_path, optimizer, capsys):
    runs = []
    for name in ("first", "second"):
        results = script.main([*files, *SMALL, "--optimizer", optimizer, "--dropout", "0.1", "--output", str(tmp_path / name)])
        runs.append(load_falcon(tmp_path / name, quantize=False, dtype=torch.float32).state_dict())
    assert all(torch.equal(runs[0][key], value) for key, value in runs[1].items())
    # Without training every token would cost log2(vocabulary) bits.
    tokens, size = results["held_out_tokens"], results["held_out_bytes"]
    assert results["bits_per_byte"]["tiny_falcon"] < 0.8 * math.log2(results["arguments"]["vocab_size"]) * tokens / size
    assert json.loads((tmp_path / "first" / "config.json").read_text())["hidden_dropout"] == 0
    assert "s left" in capsys.readouterr().out


def test_what_cannot_be_trained_on_is_refused_by_name(files, tmp_path):
    (tmp_path / "c.pdf").write_text("text")
    (tmp_path / "d.txt").write_text("One document alone.")
    out = ["--output", str(tmp_path / "out")]
    for argv, message in (
        ([str(tmp_path / "c.pdf"), *out], r"c\.pdf: a text file must end in"),
        ([str(tmp_path / "d.txt"), *out], r"d\.txt: 1 documents"),
        ([*files, *out, "--weights", "1"], "one number of at least 0 a file, 2 in all"),
        ([*files, *out, "--last-weights", "1", "-1"], "one number of at least 0 a file"),
        ([*files, *out, "--hidden", "100"], "multiple of --head-dim 64"),
        ([*files, *out, "--vocab-size", "200"], "at least 257"),
        ([*files, *out, *SMALL, "--context", "4096"], r"a\.txt: \d+ tokens to train on"),
    ):
        with pytest.raises(ValueError, match=message):
            script.main(argv)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").touch()
    with pytest.raises(ValueError, match="holds a model already"):
        script.main([*files, *out])


def test_text_is_cleaned_into_one_line_a_paragraph():
    assert script.clean("The bankâ€™s rate â€“ 5Â½%  was \u201chigh\u201d\u2014very.") == "The bank's rate - 5½% was \"high\"--very."
    assert script.clean("invest-  ment in cross- border, short- and long-term") == "investment in cross-border, short- and long-term"
    # Wrapped by hand: lines of about 60, blank lines between paragraphs.
    line = "word " * 12 + "end"
    assert script.clean("\n".join([line] * 15) + "\n\n" + "\n".join([line] * 15)) == "\n".join([" ".join([line] * 15)] * 2)
    # One sentence a line, longer than anything wrapped by hand.
    assert script.clean("\n".join([line * 2 + "."] * 30)) == " ".join([line * 2 + "."] * 30)
    assert script.clean("Sources: A, B.\nIt grew. See A, https://a.org, 2017. It fell.") == "It grew. It fell."


def test_whole_documents_are_held_out_and_none_twice():
    documents = [f"{i:03} " * 50 for i in range(100)]
    kept, held = script.hold_out(documents, 0.1, seed=0)
    assert sorted(kept + held) == documents and len(held) == 10
    assert script.hold_out(documents, 0.1, seed=0) == (kept, held) != script.hold_out(documents, 0.1, seed=1)
    assert [len(part) for part in script.hold_out(documents[:2], 0.9, seed=0)] == [1, 1]


def test_a_stream_holds_every_document_between_ends(tokenizer):
    texts = ["A bond pays interest.\n" * 3000, "x"]
    ids = script.encode(tokenizer, texts).tolist()
    assert ids[0] == ids[-1] == 0 and ids.count(0) == 3
    middle = ids.index(0, 1)
    assert [tokenizer.decode(ids[1:middle]), tokenizer.decode(ids[middle + 1 : -1])] == texts


class Uniform(nn.Module):
    """Knows nothing: every token of `vocab` is as likely as any other. Remembers where it looked."""

    def __init__(self, vocab):
        super().__init__()
        self.vocab = vocab

    def forward(self, ids):
        return torch.zeros(*ids.shape, self.vocab)


@pytest.mark.parametrize("length", [2, 5, 8, 9, 13, 16, 17, 40, 101])
def test_held_out_bits_count_every_token_once(length):
    stream = torch.arange(length, dtype=torch.int32) % 16
    assert script.held_out_bits(Uniform(16), stream, context=8, batch=3) == pytest.approx(4 * (length - 1))


def test_held_out_bits_give_each_token_half_a_window_of_the_past():
    class Counter(nn.Module):
        """Needs one bit less for each token of the past that it sees: the bits tell how much it saw."""

        def forward(self, ids):
            seen = torch.arange(1, ids.shape[1] + 1).float() * math.log(2)
            return torch.stack((seen.expand(ids.shape), torch.zeros(ids.shape)), dim=-1)

    # Targets are all token 0; at context 8, the 1st to 8th see 1 .. 8 tokens, and those of each later window 5 .. 8.
    bits = script.held_out_bits(Counter(), torch.zeros(21, dtype=torch.int32), context=8)
    seen = [*range(1, 9), *range(5, 9), *range(5, 9), *range(5, 9)]
    assert bits == pytest.approx(sum(math.log2(1 + 2.0**-n) for n in seen), rel=1e-5)


def test_the_bigram_baseline_is_a_distribution_and_counts_by_hand():
    generator = torch.Generator().manual_seed(0)
    train = torch.randint(0, 12, (400,), generator=generator, dtype=torch.int32)
    train[train == 7] = 3                                      # token 7 never occurs: as context and as continuation
    for v in (0, 3, 7):
        pairs = [torch.tensor([v, w], dtype=torch.int32) for w in range(12)]
        bits, _ = script.bigram_bits([train], pairs, 12)
        assert sum(2**-b for b in bits) == pytest.approx(1, abs=1e-9)
    # 0 1 0 1 0 2: c(0 1) = 2, c(0) = 3, two continuations of 0; pairs 01, 10, 02 make N(. 1) = 1 of 3, and V = 3.
    bits, d = script.bigram_bits([torch.tensor([0, 1, 0, 1, 0, 2])], [torch.tensor([0, 1])], 3)
    unigram = (1 - d) / 3 + d * 3 / 3 / 3
    assert 2 ** -bits[0] == pytest.approx((2 - d) / 3 + d * 2 / 3 * unigram)


def test_muon_steps_along_a_nearly_orthogonal_matrix():
    matrices = torch.randn(3, 16, 48, generator=torch.Generator().manual_seed(0))
    for gradient in (matrices, matrices.mT.contiguous()):
        result = script.Muon.orthogonalize(gradient)
        # The polynomial's orbits end between 0.68 and 1.14; a product with the input keeps the singular directions.
        values = torch.linalg.svdvals(result)
        assert values.min() > 0.6 and values.max() < 1.2
        left, _, right = torch.linalg.svd(gradient, full_matrices=False)
        aligned = left.mT @ result @ right.mT
        assert torch.allclose(aligned, torch.diag_embed(aligned.diagonal(dim1=1, dim2=2)), atol=1e-4)


def test_the_learning_rate_rises_stays_and_falls():
    rates = [script.schedule(step, 100, 10, 0.5) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9:51] == [1.0] * 42
    assert rates[75] == pytest.approx(0.5) and rates[99] == pytest.approx(0.02)


def test_windows_come_from_their_sources_by_weight():
    corpus = torch.cat((torch.arange(100), torch.arange(1000, 1100)))
    generator = torch.Generator().manual_seed(0)
    inputs, targets = script.draw(corpus, torch.tensor([100, 100]), torch.tensor([0.25, 0.75]), 4000, 9, generator)
    assert torch.equal(inputs + 1, targets)                    # never across the end of a source
    assert set(inputs[:, 0].tolist()) == {*range(91), *range(1000, 1091)}
    # A binomial of 4000 draws: six standard deviations are 0.041.
    assert (inputs[:, 0] >= 1000).float().mean().item() == pytest.approx(0.75, abs=0.041)
