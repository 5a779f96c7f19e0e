"""train.py: a step's gradient does not depend on how it was cut, a stopped run goes on as if it had not been, and nothing is lost."""

import errno
import json
import math
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

from minqlora.data import Example, collate, pack
from minqlora.falcon import Falcon, FalconConfig
from minqlora.lora import adapters
from minqlora.optim import make_optimizer
from minqlora.progress import Interrupt, peak_memory
from minqlora.qlora import add_lora
from minqlora.train import TrainConfig, answer_loss, evaluate, lr_at, take_step, train, write_atomically

VOCAB = 61


def small(dropout=0.0, dtype=torch.float32):
    torch.manual_seed(0)
    model = Falcon(FalconConfig(VOCAB, 16, 2, 2, initializer_range=0.3)).to(dtype)
    add_lora(model, rank=4, alpha=8, dropout=dropout, dtype=dtype)
    for layer in adapters(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.3)               # B = 0 would leave A without a gradient
    return model


def questions(count=10, seed=0, longest=24):
    """Random records, each with a question of 1 to 8 tokens that is not learned."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        asked, total = (int(torch.randint(low, high, (), generator=generator)) for low, high in ((1, 9), (10, longest + 1)))
        ids = torch.randint(0, VOCAB, (total,), generator=generator, dtype=torch.int32)
        made.append(Example(ids, torch.arange(total) >= asked, (total,)))
    return made


def gradients(model, pieces, config=None):
    """The gradient of one step, by a plain SGD step of rate 1 without clipping: parameters before minus after."""
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    parameters = [p for p in model.parameters() if p.requires_grad]
    loss, norm = take_step(model, torch.optim.SGD(parameters, 1.0), parameters, pieces, 1, config or TrainConfig(steps=1, lr=1.0, clip=0.0))
    after = dict(model.named_parameters())
    return {name: before[name] - after[name].detach() for name in before}, loss, norm


def run(output, steps=8, model=None, optimizer="adamw", rows=None, **changes):
    model = model or small(dropout=0.2)
    loop = {name: changes.pop(name) for name in ("resume", "held_out", "on_save", "loss", "show") if name in changes}
    config = TrainConfig(**{"steps": steps, "batch_size": 2, "accumulate": 2, "lr": 1e-2} | changes)
    outcome = train(model, make_optimizer(model.parameters(), optimizer, config.lr), rows or questions(), config, output, pad=0,
                    **{"show": False} | loop)
    return outcome, model


def metrics(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def losses(output):
    return {line["step"]: line["loss"] for line in metrics(output) if "set" not in line}


def trained(model):
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# Loss and gradient

def test_the_loss_is_the_sum_over_learned_tokens_computed_by_hand():
    model, examples = small(), questions(3)
    by_hand = 0.0
    for example in examples:
        ids = example.ids.long()
        logp = model(ids[None])[0].log_softmax(-1)
        by_hand -= sum(logp[i - 1, ids[i]] for i in range(1, len(ids)) if example.learned[i])
    # Some 40 terms of a few nats each, in float32: 100 * 1.2e-7 * 40 relative to 1 is far below.
    torch.testing.assert_close(answer_loss(model, collate(examples, pad=0)), by_hand, rtol=1e-5, atol=0)


@pytest.mark.parametrize("cut", [[1] * 6, [2, 2, 2], [1, 5], [4, 2]])
def test_accumulated_pieces_give_the_gradient_of_one_large_batch(cut):
    examples = questions(6)
    whole, loss, norm = gradients(small(dtype=torch.float64), [collate(examples, pad=0)])
    parts = iter(examples)
    pieces = [collate([next(parts) for _ in range(size)], pad=0) for size in cut]
    summed, loss2, norm2 = gradients(small(dtype=torch.float64), pieces)
    for name in whole:
        # float64, gradients of size 0.1 that are differences of parameters of size 1: 2.2e-16 and a few hundred additions.
        torch.testing.assert_close(summed[name], whole[name], rtol=0, atol=1e-13)
    # answer_loss ends in float32, which the loss shows: 6e-8 relative a sum.
    torch.testing.assert_close((loss2, norm2), (loss, norm), rtol=1e-6, atol=0, check_dtype=False)


def test_a_step_weighs_tokens_alike_where_the_mean_of_the_pieces_means_would_not():
    long, short = questions(2, longest=60)
    short = Example(short.ids, torch.arange(len(short.ids)) >= len(short.ids) - 2, short.lengths)
    tokens = [int(example.learned.sum()) for example in (long, short)]
    assert tokens[0] > 3 * tokens[1]
    together, _, _ = gradients(small(dtype=torch.float64), [collate([long], 0), collate([short], 0)])
    alone = [gradients(small(dtype=torch.float64), [collate([example], 0)])[0] for example in (long, short)]
    for name, gradient in together.items():
        weighed = (alone[0][name] * tokens[0] + alone[1][name] * tokens[1]) / sum(tokens)
        # The loss is float32, and so is its gradient: 6e-8 of gradients of size 1, less the sum over some 50 tokens.
        torch.testing.assert_close(gradient, weighed, rtol=0, atol=1e-6)
    name = max(together, key=lambda name: together[name].abs().max())
    mean = (alone[0][name] + alone[1][name]) / 2
    assert (mean - together[name]).abs().max() > 0.1 * together[name].abs().max()


def test_padding_changes_nothing():
    examples = questions(4)
    tight, _, _ = gradients(small(dtype=torch.float64), [collate([example], pad=0) for example in examples])
    padded, _, _ = gradients(small(dtype=torch.float64), [collate(examples, pad=7, multiple=32)])
    for name in tight:
        torch.testing.assert_close(padded[name], tight[name], rtol=0, atol=1e-13)


def test_packed_records_give_the_gradient_they_give_alone():
    examples = questions(7)
    alone, _, _ = gradients(small(dtype=torch.float64), [collate(examples, pad=0)])
    rows = pack(examples, 40)
    assert len(rows) < 7
    packed, _, _ = gradients(small(dtype=torch.float64), [collate(rows, pad=0)])
    for name in alone:
        # Rotary angles are computed in float32 and positions go on within a row: 6e-8 * 40 positions, through two layers.
        torch.testing.assert_close(packed[name], alone[name], rtol=0, atol=2e-5)
    # The tolerance tells: with attention across records the gradient is another one.
    batch = collate(rows, pad=0)
    mixed, _, _ = gradients(small(dtype=torch.float64), [batch._replace(attention_mask=None)])
    assert max((mixed[name] - alone[name]).abs().max() for name in alone) > 1e-3


def test_activation_checkpointing_changes_nothing_with_dropout_either():
    batch = collate(questions(4), pad=0)
    plain, _, _ = gradients(small(dropout=0.3), [batch])
    model = small(dropout=0.3)
    model.checkpointing = True
    again, _, _ = gradients(model, [batch])
    assert same(plain, again)


def test_clipping_bounds_the_step_and_reports_the_norm_before_it():
    batch = collate(questions(4), pad=0)
    free, _, norm = gradients(small(), [batch])
    length = math.sqrt(sum(float(g.square().sum()) for g in free.values()))
    assert norm == pytest.approx(length, rel=1e-4)
    clipped, _, norm2 = gradients(small(), [batch], TrainConfig(steps=1, lr=1.0, clip=length / 4))
    assert norm2 == norm
    assert math.sqrt(sum(float(g.square().sum()) for g in clipped.values())) == pytest.approx(length / 4, rel=1e-3)


def test_the_rate_climbs_in_the_warmup_and_then_stays_or_follows_a_cosine():
    constant = TrainConfig(steps=10, lr=1.0, warmup=4)
    assert [lr_at(step, constant) for step in (1, 2, 4, 5, 10)] == [0.25, 0.5, 1.0, 1.0, 1.0]
    cosine = TrainConfig(steps=10, lr=1.0, warmup=2, schedule="cosine")
    # Half a cosine over the 8 steps after the warm-up: 1 at its start, 1/2 in its middle, never zero.
    assert [lr_at(step, cosine) for step in (1, 2, 3, 7)] == pytest.approx([0.5, 1.0, 1.0, 0.5])
    assert 0 < lr_at(10, cosine) == pytest.approx((1 + math.cos(math.pi * 7 / 8)) / 2)


@pytest.mark.parametrize("changes, message", [
    ({"steps": 0}, "steps is 0"), ({"batch_size": 0}, "batch_size is 0"), ({"accumulate": -1}, "accumulate is -1"),
    ({"lr": 0.0}, "lr is 0.0"), ({"lr": math.nan}, "lr is nan"), ({"clip": -1.0}, "clip is -1.0"), ({"clip": math.nan}, "clip is nan"),
    ({"schedule": "linear"}, "constant, cosine"), ({"warmup": 5}, "warmup is 5 steps"), ({"eval_every": -1}, "eval_every is -1"),
    ({"seed": -1}, "seed is -1"),
])
def test_what_a_run_cannot_do_is_refused_with_its_limit(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**{"steps": 5} | changes)


# The loop

@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_training_lowers_the_loss_of_what_it_sees(schedule, tmp_path):
    rows = questions(4)
    model = small()
    before = evaluate(model, rows, 4, pad=0)
    outcome, _ = run(tmp_path, 40, model, rows=rows, schedule=schedule, lr=3e-2)
    after = evaluate(model, rows, 4, pad=0)
    assert after.loss < before.loss - 1 and outcome.step == 40 and not outcome.interrupted
    assert outcome.tokens == 40 * sum(len(row.ids) for row in rows)


def test_evaluation_is_the_mean_over_learned_tokens_without_dropout_and_leaves_no_trace():
    model, rows = small(dropout=0.5), questions(5)
    model.train()
    state = torch.get_rng_state()
    result = evaluate(model, rows, 2, pad=0)
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert result == evaluate(model, rows, 2, pad=0)
    total = sum(answer_loss(model.eval(), collate([row], 0)).item() for row in rows)
    tokens = sum(int(row.learned.sum()) for row in rows)
    assert result.tokens == tokens and result.loss == pytest.approx(total / tokens, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(result.loss))


def test_metrics_hold_every_step_and_every_evaluation(tmp_path):
    run(tmp_path, 5, held_out={"old": questions(2, 1), "new": questions(2, 2)}, eval_every=2)
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines if "set" not in line] == [1, 2, 3, 4, 5]
    assert [(line["step"], line["set"]) for line in lines if "set" in line] == [(s, n) for s in (0, 2, 4, 5) for n in ("old", "new")]
    assert all(line["perplexity"] == pytest.approx(math.exp(line["loss"])) for line in lines if "set" in line)
    assert lines[-1]["tokens"] > 0 and {"loss", "grad_norm", "lr", "tokens", "seconds"} < lines[2].keys()


def test_the_bar_shows_loss_speed_memory_and_the_time_left(tmp_path, capsys):
    run(tmp_path, 3, show=True)
    shown = capsys.readouterr().err
    assert all(word in shown for word in ("3/3", "loss", "tokens/s", "peak", "MiB", "elapsed", "left"))


class Killed(Exception):
    pass


def failing(at_call, action):
    """answer_loss that does something at its n-th call; two calls make a step."""
    calls = iter(range(1, 10**9))

    def loss(model, batch):
        value = answer_loss(model, batch)
        return (action(value) or value) if next(calls) == at_call and model.training else value
    return loss


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "paged"])
def test_a_killed_run_resumed_from_its_checkpoint_takes_the_same_steps_bit_for_bit(optimizer, tmp_path):
    _, whole = run(tmp_path / "whole", 12, optimizer=optimizer)

    def kill(value):
        raise Killed
    with pytest.raises(Killed):
        run(tmp_path / "killed", 12, optimizer=optimizer, save_every=5, loss=failing(2 * 8 - 1, kill))
    assert max(losses(tmp_path / "killed")) >= 5, "steps after the checkpoint are in the metrics, and must be taken back"
    torch.rand(7)                                                  # a resumed process has another generator state
    outcome, resumed = run(tmp_path / "killed", 12, optimizer=optimizer, resume=True)
    assert outcome.step == 12 and losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert len(metrics(tmp_path / "killed")) == 12 and same(trained(resumed), trained(whole))
    assert metrics(tmp_path / "killed")[-1]["tokens"] == metrics(tmp_path / "whole")[-1]["tokens"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_the_run_after_its_step_and_the_rest_follows_later(number, tmp_path):
    _, whole = run(tmp_path / "whole", 6)
    before = signal.getsignal(number)
    outcome, _ = run(tmp_path / "stopped", 6, loss=failing(2 * 3, lambda _: os.kill(os.getpid(), number)))
    assert outcome.interrupted and outcome.step == 3 and signal.getsignal(number) is before
    outcome, resumed = run(tmp_path / "stopped", 6, resume=True)
    assert not outcome.interrupted and same(trained(resumed), trained(whole))
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")


def test_a_second_interrupt_does_not_wait():
    with Interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_finished_run_can_be_followed_for_longer(tmp_path):
    _, whole = run(tmp_path / "whole", 9)
    run(tmp_path / "short", 4)
    _, longer = run(tmp_path / "short", 9, resume=True)
    assert same(trained(longer), trained(whole))
    outcome, _ = run(tmp_path / "short", 9, resume=True)
    assert outcome.step == 9 and len(losses(tmp_path / "short")) == 9, "nothing is left to do"


def test_a_loss_that_is_not_finite_ends_the_run_and_the_last_good_checkpoint_stays(tmp_path):
    rows = questions(10)
    with pytest.raises(FloatingPointError, match=r"step 6: the loss is nan .* at lr 0\.01"):
        run(tmp_path, 8, rows=rows, save_every=1, loss=failing(2 * 6, lambda value: value * math.nan))
    outcome, _ = run(tmp_path, 8, rows=rows, resume=True)
    assert outcome.step == 8 and sorted(losses(tmp_path)) == list(range(1, 9))
    assert all(math.isfinite(loss) for loss in losses(tmp_path).values())


def test_what_belongs_to_a_checkpoint_is_saved_with_it(tmp_path):
    saved = []
    run(tmp_path, 7, save_every=3, on_save=lambda: saved.append(torch.load(tmp_path / "checkpoint.pt")["step"]))
    assert saved == [3, 6, 7]


# What stands in the way of resuming

@pytest.mark.parametrize("changes, message", [
    ({"lr": 2e-2}, "lr: 0.01 then, 0.02 now"),
    ({"accumulate": 1}, "accumulate: 2 then, 1 now"),
    ({"seed": 3}, "seed: 0 then, 3 now"),
    ({"rows": questions(10, seed=5)}, "examples: "),
    ({"optimizer": "adamw8bit"}, "optimizer: AdamW then"),
])
def test_a_run_does_not_go_on_as_another_one(changes, message, tmp_path):
    run(tmp_path, 2)
    with pytest.raises(ValueError, match=message):
        run(tmp_path, 4, resume=True, **changes)
    run(tmp_path, 4, resume=True, save_every=1, eval_every=1)      # these two change no step


def test_a_cosine_cannot_be_made_longer_afterwards(tmp_path):
    run(tmp_path, 2, schedule="cosine")
    with pytest.raises(ValueError, match="steps: 2 then, 4 now"):
        run(tmp_path, 4, resume=True, schedule="cosine")


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    run(tmp_path, 2)
    other = Falcon(FalconConfig(VOCAB, 16, 2, 2))
    add_lora(other, rank=8, alpha=8, dropout=0.0)
    with pytest.raises(ValueError, match="another rank, other targets or another base"):
        run(tmp_path, 4, other, resume=True)


def test_a_missing_or_damaged_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint to resume from"):
        run(tmp_path, 2, resume=True)
    run(tmp_path, 2)
    whole = (tmp_path / "checkpoint.pt").read_bytes()
    (tmp_path / "checkpoint.pt").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(ValueError, match="not a whole checkpoint"):
        run(tmp_path, 4, resume=True)


def test_a_torn_last_line_of_the_metrics_is_left_out(tmp_path):
    run(tmp_path, 3)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    run(tmp_path, 5, resume=True)
    assert sorted(losses(tmp_path)) == [1, 2, 3, 4, 5]


# Disks that fill up

@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on file sizes, which Windows does not have")
def test_a_disk_that_fills_up_while_saving_leaves_the_checkpoint_before(tmp_path):
    import resource
    run(tmp_path, 3)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The system itself refuses the write, in the middle of the file.
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        with pytest.raises(OSError, match=r"checkpoint\.pt could not be saved .*the one written before it is whole"):
            run(tmp_path, 6, resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint.pt", "metrics.jsonl"}
    _, whole = run(tmp_path / "whole", 6)
    _, resumed = run(tmp_path, 6, resume=True)
    assert same(trained(resumed), trained(whole))


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failing_system_call_leaves_the_file_before(call, tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, lambda file: file.write(b"old"))

    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="No space left on device"):
        write_atomically(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


# Memory

@pytest.mark.skipif(sys.platform != "linux", reason="compares with /proc, which only Linux has")
def test_peak_memory_is_at_least_what_is_resident_now():
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    # The kernel counts pages a processor in batches: some MiB may not have been added yet.
    assert peak_memory(torch.device("cpu")) >= resident - 2**23
