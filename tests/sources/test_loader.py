import pytest
import torch

from moa_lightning.sources.loader import ExperienceLoader
from moa_lightning.sources.prompt_loader import PromptLoader
from moa_lightning.types import Experience, Responses, RewardTable


class Collector:
    def __init__(self):
        self.calls = []

    def __call__(self, rows, seed):
        self.calls.append(([row["prompt"] for row in rows], seed))
        count = len(rows) * 2
        texts = [f"{row['prompt']}{i}" for row in rows for i in range(2)]
        tokens = torch.arange(count).unsqueeze(1)
        responses = Responses(
            tokens, tokens, torch.ones(count, 1).bool(), torch.zeros(count).bool(), texts, texts, {"text": texts}
        )
        rewards = RewardTable(("a",), (True,), torch.ones(count, 1), torch.ones(count, 1))
        zeros = torch.zeros(count, 1)
        return Experience(
            responses=responses,
            rewards=rewards,
            valid_BN=torch.ones(count, 1).bool(),
            mask_BT=torch.ones(count, 1).bool(),
            behaviour_logprobs_BT=zeros,
            reference_logprobs_BT=zeros,
            advantages_BTN=torch.randn(count, 1, 1),
            returns_BTN=None,
            values_BTN=None,
            tokens_per_row=1.0,
            seconds={"generation": 1.0},
            kl=0.5,
        )


def loader(collector, minibatches=2, passes=2, seed=0):
    rows = [{"prompt": chr(97 + i)} for i in range(10)]
    return ExperienceLoader(rows, 4, collector, 2, minibatches, minibatches * passes, seed)


def test_one_epoch_hands_out_every_row_once_a_pass():
    collector = Collector()
    handed = list(loader(collector))
    assert len(handed) == len(loader(collector)) == 8
    assert len(collector.calls) == 2
    assert [m.collected is not None for m in handed] == [True, False, False, False] * 2
    for sweep in range(4):
        rows = [t for m in handed[2 * sweep : 2 * sweep + 2] for t in m.experience.responses.prompts]
        assert sorted(rows) == sorted(f"{p}{i}" for p in collector.calls[sweep // 2][0] for i in range(2))
    for m in handed:  # tensors and texts of a row stay together
        texts = m.experience.responses.columns["text"]
        order = [f"{p}{i}" for p in collector.calls[0][0] + collector.calls[1][0] for i in range(2)]
        assert [order.index(t) % 8 for t in texts] == m.experience.responses.input_ids_BL[:, 0].tolist()


def test_collection_waits_until_its_first_minibatch_is_asked_for():
    collector = Collector()
    iterator = iter(loader(collector))
    for _ in range(4):
        next(iterator)
    assert len(collector.calls) == 1


def test_epochs_differ_and_seeds_repeat():
    collector = Collector()
    running = loader(collector)
    list(running)
    list(running)
    first, second = collector.calls[:2], collector.calls[2:]
    assert first != second
    again = Collector()
    list(loader(again))
    assert again.calls == first
    assert len({seed for _, seed in collector.calls}) == 4
    other = Collector()
    list(loader(other, seed=1))
    assert other.calls != first


@pytest.mark.parametrize("stop", range(1, 17))
def test_a_restored_loader_goes_on_at_the_next_minibatch(stop, tmp_path):
    torch.manual_seed(0)
    straight = loader(Collector())
    expected = [m for _ in range(3) for m in straight]

    torch.manual_seed(0)
    first = loader(Collector())
    handed = []
    iterator = iter(first)
    while len(handed) < stop:
        item = next(iterator, None)
        if item is None:
            iterator = iter(first)
            continue
        handed.append(item)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = loader(Collector())
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    rest = list(second)
    for mine, theirs in zip(rest, expected[stop:], strict=False):
        assert mine.experience.responses.prompts == theirs.experience.responses.prompts
        assert (mine.collected is None) == (theirs.collected is None)
    in_flight = stop % 4
    if in_flight:  # the batch in flight is the saved one, not a new one
        assert torch.equal(rest[0].experience.advantages_BTN, expected[stop].experience.advantages_BTN)
        assert second.collect.calls == [] or len(rest) > 4 - in_flight


def test_prompt_loader_keeps_order_and_every_row():
    batches = list(PromptLoader([{"prompt": i} for i in range(7)], 3, lambda rows: [r["prompt"] for r in rows]))
    assert batches == [[0, 1, 2], [3, 4, 5], [6]]
    assert len(PromptLoader([{}] * 7, 3, list)) == 3
