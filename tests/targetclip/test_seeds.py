"""Seeds: numbers that depend on names, and sources that nobody shares by chance."""

from targetclip import seeds
from targetclip.seeds import BANK, BANK_SEED, probe_seeds, seed_of, source_seeds


def test_a_seed_depends_on_every_part_and_on_no_machine() -> None:
    assert seed_of("source", 0, 1) == 26411325901598597
    named = {seed_of(*parts) for parts in [("a", 1, 2), ("a", 2, 1), ("b", 1, 2), ("a", 12), ()]}
    assert len(named) == 5 and all(0 <= seed < 2**56 for seed in named)


def test_fewer_sources_are_the_first_of_more() -> None:
    assert source_seeds(3, 20)[:5] == source_seeds(3, 5)
    assert probe_seeds(20)[:5] == probe_seeds(5)


def test_no_two_kinds_of_sources_share_a_seed() -> None:
    kinds = [list(range(BANK_SEED, BANK_SEED + BANK)), probe_seeds(256)]
    kinds += [source_seeds(seed, 256) for seed in (0, 1, 2, 3)]
    together = [seed for kind in kinds for seed in kind]
    assert len(set(together)) == len(together)


def test_no_two_purposes_share_a_number() -> None:
    for suffix in ("_SOURCES", "_TARGETS"):
        values = [value for name, value in vars(seeds).items() if name.endswith(suffix)]
        assert len(values) > 2 and len(set(values)) == len(values)
