import pytest


def test_a_plan_is_printed_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    from pjengine.serving.cli import main

    assert main(["plan", "llama-8b", "--gpu", "h200", "--max-model-len", "4096"]) == 0
    out = capsys.readouterr().out
    assert "weights" in out and "requests of max_model_len=4096 at once" in out
    assert main(["plan", "llama-8b", "--max-model-len", "1k"]) == 0
    assert "requests of max_model_len=1000 at once" in capsys.readouterr().out
    assert main(["plan", "llama2-13b", "--gpu", "l4"]) == 2
    assert "of weights" in capsys.readouterr().err
    assert main(["plan", "demo", "--gpu", "abacus"]) == 2
