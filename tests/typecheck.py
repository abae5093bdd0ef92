"""The checker of types and shapes that the tests put on every function of the project."""

from beartype import BeartypeConf, beartype

# An int is a float to mypy and to people, but not to beartype unless it is told.
check = beartype(conf=BeartypeConf(is_pep484_tower=True))
