"""What is promised of a combiner's update. The contract test holds every combiner to its word."""

from enum import StrEnum


class Claim(StrEnum):
    """A property of a combiner that ``tests/combiners/claims.py`` knows how to check. Combiners claim what they have.

    It is one of a collected batch that was observed and then combined, whatever is in it.
    """

    SIMPLEX = "simplex"
    PERMUTATION = "permutation"
    MONOTONE = "monotone"
    ONE_OBJECTIVE = "one objective"
    COMMON_SCALE = "common scale"
    OWN_SCALE = "own scale"
    SHIFT = "shift"
    NON_CONFLICT = "no conflict"
    MIN_NORM = "min norm"


CONVEX = frozenset({Claim.SIMPLEX, Claim.PERMUTATION, Claim.MONOTONE})
"""What every convex combination has whose weights are the same for all responses."""

MEANINGS = {
    Claim.SIMPLEX: "weights are at least 0 and sum to 1",
    Claim.PERMUTATION: "the order of the objectives does not matter",
    Claim.MONOTONE: "what is at least as good in every objective never gets the lower score in its batch",
    Claim.ONE_OBJECTIVE: "one alone gives its own advantage, to the bit; of scores, the score less its prompt's mean",
    Claim.COMMON_SCALE: "the direction of the update does not depend on a unit that all objectives share",
    Claim.OWN_SCALE: "nor on the unit of any one of them",
    Claim.SHIFT: "a constant on one objective's scores changes nothing (in advantages there is none)",
    Claim.NON_CONFLICT: "before clipping, no objective gets worse to first order where the gradients are taken",
    Claim.MIN_NORM: "no convex combination of the gradients, as they are scaled, is shorter, where max_iters suffices",
}
