"""What checks annotations while the tests run: beartype, which takes an int for a float as PEP 484 does."""

from beartype import BeartypeConf, beartype

typechecker = beartype(conf=BeartypeConf(is_pep484_tower=True))
