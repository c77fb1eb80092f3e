"""The point that distances are measured from: given, or the best that was seen.

Legend: N objectives.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import override

from moa_lightning.combiners.claims import Claim
from moa_lightning.combiners.shared.named import named_point
from moa_lightning.combiners.shared.responses import ScoredResponses
from moa_lightning.combiners.shared.scores import ScoreCombiner
from moa_lightning.distributed import all_rows
from moa_lightning.types import State


class DistanceToIdeal(ScoreCombiner):
    """A combiner whose score is a distance from an ideal point, in the objectives' units."""

    ideal: dict[str, float] | None

    @property
    def claimed(self) -> frozenset[Claim]:
        """A point that moves with the scores leaves their origin without meaning."""
        return self.claims if self.ideal else self.claims | {Claim.SHIFT, Claim.ONE_OBJECTIVE}

    def init(self, objectives: Sequence[str], weights_N: Tensor) -> State:
        """The point so far: -inf where it is still to be seen.

        Raises:
            UserError: ``ideal`` names something that is no trained objective, or is not finite.
        """
        ideal_N = named_point(
            f"{type(self).__name__}.ideal", self.ideal, objectives, "to take the best score seen so far"
        )
        given_N = ideal_N.isfinite()
        more = {"ideal": ideal_N.where(given_N, -torch.inf), "ideal_given": given_N.float()}
        return super().init(objectives, weights_N) | more

    def resume(self, saved: State, fresh: State) -> State:
        """The configuration's weights and given coordinates; a coordinate that was given before is not a score seen."""
        seen_N = torch.where(saved["ideal_given"] > 0, -torch.inf, saved["ideal"])
        ideal_N = torch.where(fresh["ideal_given"] > 0, fresh["ideal"], seen_N)
        return super().resume(saved, fresh) | {"ideal": ideal_N, "ideal_given": fresh["ideal_given"]}

    def learn(self, responses: ScoredResponses, state: State) -> State:
        """The best score of each objective over all batches and processes, where none was given."""
        best_1N = responses.scores_BN.new_full((1, responses.scores_BN.shape[1]), -torch.inf)
        seen_BN = torch.cat([best_1N, responses.scores_BN.where(responses.valid_BN, -torch.inf)])
        best_N = all_rows(seen_BN.amax(0, keepdim=True)).amax(0).to(state["ideal"])
        ideal_N = torch.where(state["ideal_given"] > 0, state["ideal"], torch.maximum(state["ideal"], best_N))
        return state | {"ideal": ideal_N}

    @override
    def report(self, state: State) -> dict[str, Tensor]:
        return {"ideal": state["ideal"].where(state["ideal"].isfinite(), torch.nan)}

    def point(self, state: State, like: Tensor) -> Tensor:
        """The ideal point; 0 for an objective that has not been seen yet and so has no distance either."""
        return state["ideal"].where(state["ideal"].isfinite(), 0.0).to(like)
