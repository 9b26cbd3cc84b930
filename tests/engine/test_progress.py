"""Progress bars: on standard error for who asks, and nowhere otherwise."""

from typing import Any

import pytest

SIZES: dict[str, Any] = {
    "max_num_seqs": 1,
    "max_num_batched_tokens": 32,
    "decode_steps": 1,
}


@pytest.mark.parametrize("is_asked", [True, False])
def test_loading_and_compiling_show_how_far_they_are_only_if_asked(
    is_asked: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    from pjengine import LLM

    with LLM("demo", use_tqdm_on_load=is_asked, **SIZES) as llm:
        num_layers = llm.engine.model_config.num_layers
    out, err = capsys.readouterr()
    assert out == ""
    if is_asked:
        assert f"Loading weights: 100%|██████████| {num_layers}/{num_layers}" in err
        assert "Compiling programs: 100%|██████████| 2/2" in err
    else:
        assert err == ""
