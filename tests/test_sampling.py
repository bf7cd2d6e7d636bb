"""Drawing tokens: the distribution of each rule, and results that depend on nothing but a row's own."""

import math

import pytest
import torch

from torch_paged.serving import Request, Sampling
from torch_paged.serving.requests import Generation
from torch_paged.serving.sampling import draw, rules_of, uniform

LOGITS = torch.tensor([2.0, -1.0, 0.5, 1.5, 1.5, -4.0, 0.0])
MANY = 20_000
PLAIN = torch.device("cpu")


def samples(*samplings):
    return [Generation(Request(prompt=[1], sampling=sampling)).samples[0] for sampling in samplings]


def frequencies(sampling, logits=LOGITS):
    """Of tokens drawn at many positions."""
    rules = rules_of(samples(sampling), 1, PLAIN)
    rules = rules._replace(**{name: getattr(rules, name).expand(MANY, 1) for name in ("temperature", "top_p", "min_p")})
    rules = rules._replace(top_k=rules.top_k.expand(MANY, 1), seed=rules.seed.expand(MANY))
    tokens = draw(logits.expand(MANY, -1), torch.arange(MANY), rules).tokens
    return tokens.bincount(minlength=len(logits)) / MANY


def allowed(sampling, logits=LOGITS):
    """The distribution by definition, one rule after the other, for distinct or all-kept equal logits."""
    probabilities = (logits.double() / sampling.temperature).softmax(0)
    if sampling.top_k:
        probabilities[probabilities < probabilities.sort(descending=True).values[: sampling.top_k][-1]] = 0
        probabilities /= probabilities.sum()
    before = torch.tensor([probabilities[probabilities > p].sum() for p in probabilities])
    keep = (before < sampling.top_p) & (probabilities >= sampling.min_p * probabilities.max())
    probabilities[~keep] = 0
    return (probabilities / probabilities.sum()).float()


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0, seed=1),
        Sampling(temperature=0.5, seed=2),
        Sampling(temperature=3.0, seed=3),
        Sampling(temperature=1.0, top_k=3, seed=4),
        Sampling(temperature=1.0, top_k=50, seed=5),
        Sampling(temperature=1.0, top_p=0.4, seed=6),
        Sampling(temperature=2.0, top_p=0.9, seed=7),
        Sampling(temperature=1.0, min_p=0.3, seed=8),
        Sampling(temperature=1.5, top_k=6, top_p=0.95, min_p=0.1, seed=9),
    ],
    ids=str,
)
def test_the_distribution(sampling):
    """Within 4.5 standard deviations, and never a token that is cut."""
    actual, expected = frequencies(sampling), allowed(sampling)
    assert not actual[expected == 0].any()
    deviation = (expected * (1 - expected) / MANY).sqrt()
    assert ((actual - expected).abs() <= 4.5 * deviation + 1e-9).all()


def test_the_coldest_is_greedy_and_the_first_of_equals_wins():
    logits = torch.tensor([[1.0, 3.0, 3.0], [0.0, -1.0, 5.0]]).half()
    for mixed in (Sampling(), Sampling(temperature=1.0, seed=0)):
        rules = rules_of(samples(Sampling(), Sampling(), mixed), 4, PLAIN)
        drawn = draw(logits[[0, 1, 0, 1]], torch.arange(4), rules)
        assert drawn.tokens[:2].tolist() == [1, 2]
        assert drawn.tokens[3] == 2  # padding
    assert frequencies(Sampling(temperature=1e-30, seed=3))[0] == 1


def test_a_row_does_not_depend_on_its_batch():
    """Alone, and beside rows with every combination of rules, in another place of the batch."""
    torch.manual_seed(3)
    rules = [
        Sampling(temperature=t, top_k=k, top_p=p, min_p=m, seed=11)
        for t in (0.7, 1.3)
        for k in (0, 5)
        for p in (0.8, 1.0)
        for m in (0.0, 0.05)
    ]
    logits = torch.randn(len(rules), 300)
    logits[:, 20:40] = logits[:, :20]  # equal scores
    positions = torch.arange(100, 100 + len(rules))
    alone = [
        draw(logits[i : i + 1], positions[i : i + 1], rules_of(samples(rule), 1, PLAIN)).tokens.item()
        for i, rule in enumerate(rules)
    ]
    backwards = rules_of(samples(*rules[::-1]), len(rules), PLAIN)
    assert draw(logits.flip(0), positions.flip(0), backwards).tokens.flip(0).tolist() == alone
    padded = draw(
        torch.cat([logits, torch.zeros(9, 300)]),
        torch.cat([positions, torch.zeros(9, dtype=torch.int64)]),
        rules_of(samples(*rules), len(rules) + 9, PLAIN),
    )
    assert padded.tokens[: len(rules)].tolist() == alone


def test_seeds():
    """Equal seeds draw the same, other seeds and the samples of one request do not."""
    request = Request(prompt=[1], samples=3, sampling=Sampling(temperature=1.0, seed=5))
    first, again = Generation(request).samples, Generation(request).samples
    other = Generation(Request(prompt=[1], sampling=Sampling(temperature=1.0, seed=6))).samples
    unseeded = samples(Sampling(), Sampling())
    seeds = [sample.seed for sample in [*first, *other, *unseeded]]
    assert [sample.seed for sample in again] == seeds[:3]
    assert len(set(seeds)) == len(seeds)
    assert all(-(2**63) <= seed < 2**63 for seed in seeds)


def test_uniform_numbers():
    """The mean, the spread and the correlation of neighbours in seed and position are those of independent ones."""
    seeds, positions = torch.meshgrid(torch.arange(-200, 200), torch.arange(400), indexing="ij")
    numbers = uniform(seeds.flatten(), positions.flatten()).view(400, 400)
    assert 0 <= numbers.min() < 1e-4
    assert 1 - 1e-4 < numbers.max() < 1
    assert len(numbers.unique()) == numbers.numel()
    for pairs in (numbers, numbers.T):
        correlation = torch.corrcoef(torch.stack([pairs[1:].flatten(), pairs[:-1].flatten()]))[0, 1]
        assert abs(correlation) < 4.5 / math.sqrt(numbers.numel())
    assert abs(numbers.mean() - 0.5) < 4.5 / math.sqrt(12 * numbers.numel())
    counts = torch.histc(numbers, bins=64, min=0, max=1)
    chi_squared = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    assert chi_squared < 63 + 4.5 * math.sqrt(2 * 63)


def test_tokens_without_weight_are_never_drawn():
    logits = torch.full((7,), -torch.inf)
    logits[3] = 1.0
    assert frequencies(Sampling(temperature=1.0, seed=1), logits)[3] == 1
    assert frequencies(Sampling(temperature=1.0, seed=1, top_p=0.5), logits)[3] == 1


def test_infinite_logits_take_all_of_the_weight():
    logits = torch.zeros(7)
    logits[[1, 4]] = torch.inf
    for sampling in (Sampling(temperature=1.0, seed=1), Sampling(temperature=0.3, seed=1, top_p=0.9, top_k=4)):
        drawn = frequencies(sampling, logits)
        assert drawn[[1, 4]].sum() == 1
        assert drawn[1] == pytest.approx(0.5, abs=0.05)
    rules = rules_of(samples(Sampling(logprobs=3)), 1, PLAIN)
    top = draw(logits[None], torch.zeros(1), rules).top_logprobs[0]
    assert top.exp().tolist() == pytest.approx([0.5, 0.5, 0])


def test_logprobs():
    rules = rules_of(samples(Sampling(temperature=0.1, logprobs=2, seed=0), Sampling(logprobs=4)), 2, PLAIN)
    drawn = draw(LOGITS.expand(2, -1), torch.zeros(2, dtype=torch.int64), rules).to_host()
    expected = LOGITS.log_softmax(0)
    torch.testing.assert_close(drawn.logprob, expected[drawn.tokens])
    torch.testing.assert_close(drawn.top_logprobs[0], expected.sort(descending=True).values[:4])
    assert drawn.top_tokens.shape == (2, 4)
    assert drawn.top_tokens[0, 0] == 0
    none = draw(LOGITS.expand(1, -1), torch.zeros(1), rules_of(samples(Sampling()), 1, PLAIN))
    assert none.logprob is None


def test_logits_that_are_not_numbers_draw_some_token():
    logits = torch.full((1, 7), torch.nan)
    for sampling in (Sampling(), Sampling(temperature=1.0, seed=0), Sampling(temperature=1.0, top_p=0.5, seed=0)):
        assert 0 <= draw(logits, torch.zeros(1), rules_of(samples(sampling), 1, PLAIN)).tokens < 7
