"""Sampling by hand and by its properties. Greedy tokens beside transformers' are in test_parity_transformers.py."""

import collections
import itertools

import pytest
import torch

from minqlora.falcon import Falcon, FalconConfig
from minqlora.generate import generate, generate_steps, sample

VARIANTS = {
    "7b": {},
    "40b": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "rw-1b": {"multi_query": False, "parallel_attn": False, "alibi": True, "bias": True},
}


def small(**changes):
    torch.manual_seed(0)
    config = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 6, "initializer_range": 0.3}
    return Falcon(FalconConfig(**config | changes))


def prompts(lengths):
    """Random prompts, each alone and all together padded on the left: [(1, length)], ids (batch, longest), mask (batch, longest)."""
    generator = torch.Generator().manual_seed(1)
    alone = [torch.randint(0, 61, (1, length), generator=generator) for length in lengths]
    longest = max(lengths)
    ids = torch.cat([torch.nn.functional.pad(prompt, (longest - prompt.shape[1], 0), value=7) for prompt in alone])
    mask = torch.stack([torch.arange(longest) >= longest - length for length in lengths]).long()
    return alone, ids, mask


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_is_the_largest_logit_of_the_whole_text_so_far(variant):
    model = small(**VARIANTS[variant])
    _, ids, _ = prompts([5])
    expected = ids
    for _ in range(12):
        expected = torch.cat([expected, model(expected)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generate(model, ids, max_new_tokens=12), expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_batch_gives_each_prompt_what_it_gives_alone(variant):
    model = small(**VARIANTS[variant])
    alone, ids, mask = prompts([9, 3, 260, 1])
    together = generate(model, ids, mask, max_new_tokens=10)
    for row, prompt in enumerate(alone):
        assert together[row, 260:].tolist() == generate(model, prompt, max_new_tokens=10)[0, -10:].tolist()


def test_a_finished_row_is_filled_with_eos_and_all_finished_ends_it():
    model = small()
    alone, ids, mask = prompts([9, 3, 4])
    answers = [generate(model, prompt, max_new_tokens=20)[0, prompt.shape[1] :].tolist() for prompt in alone]
    # Whatever the first row says as its third token is eos from here on.
    eos = answers[0][2]
    expected = [answer[: answer.index(eos) + 1] if eos in answer else answer for answer in answers]
    longest = max(map(len, expected))
    together = generate(model, ids, mask, max_new_tokens=20, eos_token_id=eos)
    assert together[:, 9:].tolist() == [answer + [eos] * (longest - len(answer)) for answer in expected]
    # Alone, the first ends there.
    assert generate(model, alone[0], max_new_tokens=20, eos_token_id=eos).shape[1] < 9 + 20


def test_any_of_several_eos_ends_an_answer():
    model = small()
    _, ids, _ = prompts([5])
    answer = generate(model, ids, max_new_tokens=20)[0, 5:].tolist()
    first = answer[4]
    length = answer.index(first) + 1
    unused = next(token for token in range(61) if token not in answer)
    assert generate(model, ids, max_new_tokens=20, eos_token_id=[unused, first])[0, 5:].tolist() == answer[:length]


def test_steps_are_what_generate_returns_one_at_a_time():
    model = small()
    _, ids, mask = prompts([6, 2])
    steps = generate_steps(model, ids, mask, 7, temperature=0.8, top_p=0.9, generator=torch.Generator().manual_seed(3))
    whole = generate(model, ids, mask, 7, temperature=0.8, top_p=0.9, generator=torch.Generator().manual_seed(3))
    assert torch.equal(torch.stack(list(steps), dim=1), whole[:, 6:])


def test_every_module_is_in_eval_meanwhile_and_as_it_was_afterwards():
    model = small(hidden_dropout=0.5).train()
    model.transformer["h"][1].eval()    # not all alike
    before = [module.training for module in model.modules()]
    _, ids, _ = prompts([5])
    assert torch.equal(generate(model, ids, max_new_tokens=8), generate(model, ids, max_new_tokens=8))    # no dropout
    assert [module.training for module in model.modules()] == before
    steps = generate_steps(model, ids, max_new_tokens=8)
    next(steps)
    assert not any(module.training for module in model.modules())
    assert torch.is_grad_enabled()    # the caller's own code keeps its gradients
    steps.close()                     # as when a person stops an answer
    assert [module.training for module in model.modules()] == before


def test_what_is_generated_can_be_trained_on():
    model = small()
    _, ids, _ = prompts([5])
    model(generate(model, ids, max_new_tokens=3)).sum().backward()
    assert model.lm_head.weight.grad is not None


# --- sampling -------------------------------------------------------------------------------------------------------------------

LOGITS = torch.tensor([0.5, 0.25, 0.15, 0.1]).log()[None]


def shares(n=20_000, **how):
    drawn = sample(LOGITS.expand(n, 4), generator=torch.Generator().manual_seed(0), **how)
    count = collections.Counter(drawn.tolist())
    return [count[token] / n for token in range(4)]


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({"temperature": 1.0}, [0.5, 0.25, 0.15, 0.1]),
        # p^2, summing to 0.345
        ({"temperature": 0.5}, [0.25 / 0.345, 0.0625 / 0.345, 0.0225 / 0.345, 0.01 / 0.345]),
        # 0.5 alone does not reach 0.7, with 0.25 it does: two stay
        ({"temperature": 1.0, "top_p": 0.7}, [2 / 3, 1 / 3, 0, 0]),
        # the largest always stays
        ({"temperature": 1.0, "top_p": 0.01}, [1, 0, 0, 0]),
        ({"temperature": 0.0, "top_p": 0.9}, [1, 0, 0, 0]),
    ],
)
def test_shares_are_those_of_the_softmax_cut_at_p(how, expected):
    # A share of n draws has a standard deviation of at most 0.5 / sqrt(n) = 0.0035; four of those.
    assert shares(**how) == pytest.approx(expected, abs=0.014)
    assert [share > 0 for share in shares(**how)] == [share > 0 for share in expected]


def test_the_same_generator_draws_the_same():
    model = small()
    _, ids, _ = prompts([5])

    def draw(seed):
        return generate(model, ids, max_new_tokens=20, temperature=1.0, generator=torch.Generator().manual_seed(seed)).tolist()

    assert draw(0) == draw(0)
    assert draw(0) != draw(1)


# --- limits ---------------------------------------------------------------------------------------------------------------------


def test_the_last_position_can_be_used_and_the_next_is_refused_with_the_number():
    model = small(max_position_embeddings=16)
    _, ids, _ = prompts([6])
    assert generate(model, ids, max_new_tokens=10).shape == (1, 16)
    with pytest.raises(ValueError, match=r"max_new_tokens is 11, the prompt has 6 tokens and the model 16 positions: at most 10"):
        generate(model, ids, max_new_tokens=11)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -1.0}, r"temperature is -1\.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, r"top_p is 0\.0"),
        ({"top_p": 1.5}, r"top_p is 1\.5"),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, r"input_ids has shape \(1, 0\)"),
        ({"input_ids": torch.zeros(3, dtype=torch.long)}, r"input_ids has shape \(3,\)"),
        ({"attention_mask": torch.ones(1, 4)}, r"attention_mask \(1, 4\)"),
        ({"attention_mask": torch.tensor([[1, 1, 0]])}, "padded on the left"),
    ],
)
def test_what_makes_no_sense_is_refused(how, message):
    with pytest.raises(ValueError, match=message):
        generate(small(), **{"input_ids": torch.zeros(1, 3, dtype=torch.long)} | how)


def test_an_endless_model_still_stops_at_the_limit():
    _, ids, _ = prompts([5])
    steps = generate_steps(small(), ids, max_new_tokens=4, eos_token_id=None)
    assert len(list(itertools.islice(steps, 10))) == 4
