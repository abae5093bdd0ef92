"""How far to go: the largest strength at which sources are still themselves.

Knows a number that falls with strength; nothing of what measures it.
"""

from collections.abc import Callable

STEPS = 10  # strengths tried between nothing and the highest
HALVINGS = 4  # of the interval in which the floor is met


def strength_at_floor(identity_at: Callable[[float], float], highest: float, floor: float) -> float:
    """The largest strength from 0 to `highest` up to which identity stays at `floor` or above.

    Identity need not fall evenly: strengths are tried in equal steps upwards, and the first that
    falls below the floor, or is no number, ends the search; what lies between it and the one before
    is halved.
    A negative `highest` is searched downwards in the same way.
    """
    kept = 0.0
    for step in range(1, STEPS + 1):
        strength = highest * step / STEPS
        if not identity_at(strength) >= floor:
            break
        kept = strength
    else:
        return kept
    fallen = strength
    for _ in range(HALVINGS):
        middle = (kept + fallen) / 2
        if identity_at(middle) >= floor:
            kept = middle
        else:
            fallen = middle
    return kept
