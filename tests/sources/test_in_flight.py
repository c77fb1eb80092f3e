"""A batch in flight that another number of processes takes over: the same minibatches, every row once."""

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

from moa_lightning.sources.in_flight import InFlight, redistribute
from moa_lightning.sources.loader import ExperienceLoader
from moa_lightning.types import Experience, Responses, RewardTable

PER_PROMPT = 2


def collected(rows, rank):
    """Two responses to each row, longer on later processes; numbers tell the row and the response."""
    numbers = [10 * row["prompt"] + i for row in rows for i in range(PER_PROMPT)]
    count, prompt, length = len(numbers), 2 + rank, 3 + rank
    texts = [str(number) for number in numbers]
    marks_B1 = torch.tensor(numbers).unsqueeze(1)
    mask_BT = torch.arange(length).expand(count, -1) < length - 1
    tokens_BL = marks_B1.expand(-1, prompt + length)
    attention_BL = torch.cat([torch.ones(count, prompt).long(), mask_BT.long()], 1)
    score_B1, of_tokens_BT = marks_B1.float(), marks_B1.float() * mask_BT
    return Experience(
        responses=Responses(tokens_BL, attention_BL, mask_BT, mask_BT[:, 0], texts, texts, {"text": texts}),
        rewards=RewardTable(("a",), (True,), score_B1, score_B1),
        valid_BN=torch.ones(count, 1).bool(),
        mask_BT=mask_BT,
        behaviour_logprobs_BT=of_tokens_BT,
        reference_logprobs_BT=of_tokens_BT,
        advantages_BTN=of_tokens_BT.unsqueeze(-1),
        returns_BTN=None,
        values_BTN=None,
        preference_BN=2 * score_B1,
        tokens_per_row=2.5,
        group_B=torch.arange(len(rows)).repeat_interleave(PER_PROMPT),
        sequences=count,
        kl=1.0,
    )


class Run:
    """Loaders of several processes, one after the other in this one."""

    def __init__(self, processes, batch_size, minibatches=2, rows=24):
        self.processes, self.prompts = processes, []
        given = [{"prompt": i} for i in range(rows)]
        counts = (PER_PROMPT, minibatches, 2 * minibatches)
        self.loaders = []
        for rank in range(processes):
            with self.process(rank):
                self.loaders.append(ExperienceLoader(given, batch_size, self.collect, *counts, seed=3))
        self.running = [iter(loader) for loader in self.loaders]

    def collect(self, rows, seed):
        self.prompts += [row["prompt"] for row in rows]
        return collected(rows, self.rank)

    def process(self, rank):
        self.rank = rank
        module = "moa_lightning.sources.loader"
        return patch.multiple(module, rank=lambda: rank, world_size=lambda: self.processes)

    def step(self):
        """The next minibatch of every process."""
        found = []
        for rank, running in enumerate(self.running):
            with self.process(rank):
                found.append(next(running).experience)
        return found

    def saved(self):
        parts = [loader.in_flight.plain() for loader in self.loaders]
        replies = [parts, [{}] * self.processes]
        with self.process(0), patch("moa_lightning.sources.loader.all_objects", lambda mine: replies.pop(0)):
            return self.loaders[0].state_dict()

    def load(self, state):
        said = []
        for rank, loader in enumerate(self.loaders):
            with self.process(rank), patch("moa_lightning.sources.loader.rank_zero_warn", said.append):
                loader.load_state_dict(state)
        self.running = [iter(loader) for loader in self.loaders]
        return said[0]


def texts(parts):
    return sorted(int(text) for part in parts for text in part.responses.prompts)


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 3), (3, 2), (1, 6)])
@pytest.mark.parametrize("stop", [1, 3])
def test_the_minibatches_left_are_the_same(before, after, stop, tmp_path):
    old = Run(before, 12 // before)
    for _ in range(stop):
        old.step()
    torch.save(old.saved(), tmp_path / "state.pt")
    new = Run(after, 12 // after)
    said = new.load(torch.load(tmp_path / "state.pt", weights_only=False))
    assert f"{before} processes and this run has {after}" in said
    assert "12 prompts each, as before" in said
    assert f"the {4 - stop} updates left" in said
    for _ in range(stop, 4):
        expected, found = old.step(), new.step()
        assert texts(found) == texts(expected)
        assert sum(part.counted_rows for part in found) == pytest.approx(12)
        assert len({part.counted_rows for part in found}) == 1  # each loss is divided by the rows of all
        for part in found:
            numbers = [int(text) for text in part.responses.prompts]
            assert {n // 10 for n in numbers} & {n // 10 for n in texts(p for p in found if p is not part)} == set()
            assert part.rewards.raw_BN.flatten().tolist() == part.scores_BN.flatten().tolist() == numbers
            assert part.preference_BN.flatten().tolist() == [2 * number for number in numbers]
            of_tokens_BT = torch.tensor(numbers).unsqueeze(1) * part.mask_BT.float()
            assert torch.equal(part.behaviour_logprobs_BT, of_tokens_BT)
            assert torch.equal(part.advantages_BTN[..., 0], of_tokens_BT)
            # Real tokens stay side by side: prompts are padded on their left, responses on their right.
            real_BL = part.responses.attention_mask_BL.bool()
            assert (
                part.responses.input_ids_BL[real_BL] == torch.tensor(numbers).repeat_interleave(real_BL.sum(1))
            ).all()
            prompt = part.responses.prompt_length
            assert torch.equal(real_BL[:, prompt:], part.mask_BT)
            assert real_BL[:, prompt - 1].all()
            assert len({(int(g), n // 10) for g, n in zip(part.group_B, numbers, strict=True)}) == len(numbers) // 2
    # Then the epoch goes on behind the same prompts.
    assert len(new.loaders[0]) == len(old.loaders[0]) == 8
    new.step()
    assert sorted(old.prompts + new.prompts) == list(range(24))


def test_another_global_batch_goes_on_at_the_same_prompt():
    old, new = Run(2, 4), Run(3, 2)
    old.step()
    said = new.load(old.saved())
    assert "6 prompts each, 8 before" in said
    taken = old.prompts[:]
    while len(new.loaders[0]) > new.loaders[0].position:
        new.step()
    assert len(new.prompts) == 12  # 16 were left: two batches of six
    assert len(set(taken + new.prompts)) == 20


def test_fewer_prompts_than_processes_are_parted_and_one_without_any_stands_in():
    whole = collected([{"prompt": 1}, {"prompt": 2}], 0)
    one = InFlight(whole, [torch.tensor([3, 0, 2]), torch.tensor([1])], [1.0, 1.0])
    parts = redistribute([one], 3)
    again = redistribute([InFlight.of(part.plain()) for part in parts], 2)  # before any of them was taken
    first, second = ([part.take() for part in parts] for _ in range(2))
    assert texts(first) == [10, 20, 21]
    assert [part.counted_rows for part in first] == [1.0] * 3
    (holder,) = [part for part in second if part.mask_BT.any()]
    assert holder.responses.prompts == ["11"]
    assert holder.counted_rows == pytest.approx(1 / 3)
    for part in second:
        assert len(part) == 1
        if part is not holder:
            assert part.counted_rows < 1e-6
            assert not part.valid_BN.any()
    assert texts(part.take() for part in again) == [10, 20, 21]


def test_shares_of_a_batch_taken_over_twice_are_those_of_the_last_processes():
    parts = [InFlight(collected([{"prompt": i}], 0), [torch.arange(2)], [1.0]) for i in range(3)]
    twice = redistribute(redistribute(parts, 2), 3)
    assert [part.take().counted_rows for part in twice] == [2.0] * 3
    uneven = [part.take() for part in redistribute(parts, 2)]
    assert sorted(len(part) for part in uneven) == [2, 4]
    assert [part.counted_rows for part in uneven] == [3.0] * 2


def test_what_was_measured_comes_back_and_an_older_checkpoint_may_lack_it():
    plain = InFlight(collected([{"prompt": 1}, {"prompt": 2}], 0), [torch.tensor([0, 1])], [1.0]).plain()
    taken = InFlight.of(plain).take()
    assert (taken.sequences, taken.kl) == (4, 1.0)
    for name in ("sequences", "tokens", "kl", "kl_coefficient"):  # the fields that were keys of ``metrics`` before
        del plain["experience"][name]
    older = InFlight.of(plain).take()
    assert texts([older]) == texts([taken])
    assert (older.sequences, older.kl) == (0, None)


def test_a_checkpoint_with_the_old_name_of_the_kl_penalty_is_read():
    rows = replace(collected([{"prompt": 1}], 0), kl_penalty_B=torch.tensor([0.5, 0.25]))
    plain = InFlight(rows, [torch.tensor([1, 0])], [1.0]).plain()
    plain["experience"]["charge_B"] = plain["experience"].pop("kl_penalty_B")
    assert InFlight.of(plain).take().kl_penalty_B.tolist() == [0.25, 0.5]
