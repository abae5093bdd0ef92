"""Seeds: how random numbers are named, and which seeds are whose.

Knows numbers only. Every random number of the project comes from a seed made by `seed_of`, or from
one named here. Sources and targets that judge must differ from those that anything learns from, so
the seeds of both stand in one place.
"""

import hashlib

# Sources: samples of a generator
BANK_SEED = 1 << 40  # first of the optimizer's bank; far from the small seeds that people choose
BANK = 256  # sources in the bank
VALIDATION_SOURCES = 1  # of trainings, calibration and studies
PAIR_SOURCES = 2  # every pair of a dataset is scored on them
TEST_SOURCES = 3  # of the evaluation alone

# Targets: avatars or generated pictures
DEFAULT_TARGETS = 4_000_037  # of specs without @SEED, such as styles:200
TRAINING_TARGETS = 17  # specs ending in @17
VALIDATION_TARGETS = 23  # specs ending in @23
CALIBRATION_TARGETS = 29  # specs ending in @29
STUDY_TARGETS = 2_000_003  # validation targets of studies
WORLD_TARGETS = 3_000_017  # faces that measure the bundled world
TEST_TARGETS = 5_000_011  # of the evaluation alone
TEXT_TARGETS = 6_000_011  # captioned faces of the study of texts
STYLE_TARGETS = 7_000_003  # of the study of styles
CHALLENGE = 8_000_009  # targets and sources of data/challenge


def seed_of(*parts: object) -> int:
    """Return the seed of a random generator from the names of what it is for.

    Each part counts by its text. Returns a number from 0 to 2^56 - 1.
    """
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:7], "big")


def source_seeds(seed: int, count: int) -> list[int]:
    """Return the seeds of the first `count` generated sources of a seed."""
    return [seed_of("source", seed, i) for i in range(count)]


def probe_seeds(count: int) -> list[int]:
    """Return the seeds of the first `count` sources that a mapper's answers are checked on."""
    return [seed_of("probe", i) for i in range(count)]
