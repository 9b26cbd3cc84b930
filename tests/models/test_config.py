"""ModelConfig.from_hf and the RoPE frequencies, against what transformers writes and computes."""

import json
from typing import Any

import numpy as np
import pytest

from tests.golden import golden


def test_x() -> None:
    from pjengine.models.config import ModelConfig
    assert ModelConfig.from_hf(golden.load("mha").config)
