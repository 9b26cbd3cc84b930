from dataclasses import replace

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


def test_a_deterministic_engine_is_planned_for_the_rows_that_the_card_gives_it() -> None:
    from pjengine import EngineConfig
    from pjengine.planning import plan_without_device

    config = EngineConfig(model="llama-8b", deterministic=True)
    few, many = (plan_without_device(config, gpu).activations_bytes for gpu in ("a100-80gb", "h100"))
    assert many > few  # 512 rows of logits for 256
    single = replace(config, kernel_backend="triton")  # the products of a library: one size of steps
    assert plan_without_device(single, "h100").activations_bytes == few


def test_a_plan_counts_the_experts_that_a_device_has_whole(capsys: pytest.CaptureFixture[str]) -> None:
    from pjengine import EngineConfig
    from pjengine.planning import plan_without_device
    from pjengine.serving.cli import main

    config = EngineConfig(model="qwen3-30b-a3b", max_num_seqs=8)  # so few that logits are not the largest
    one, parts, whole = (
        plan_without_device(replace(config, tensor_parallel_size=n, enable_expert_parallel=ep), "h200")
        for n, ep in ((1, False), (4, False), (4, True))
    )
    assert whole.weights_bytes == parts.weights_bytes < one.weights_bytes / 3.9
    assert whole.activations_bytes > parts.activations_bytes  # rows are as wide as on one device
    argv = ["plan", "qwen3-30b-a3b", "--tensor-parallel-size", "4"]
    assert main([*argv, "--enable-expert-parallel"]) == 0
    assert f"{whole.weights_bytes / 2**30:.2f} GiB" in capsys.readouterr().out
    assert main(["plan", "llama-8b", "-tp", "2", "-ep"]) == 2
    assert "wants a mixture of experts, and 'llama-8b' has none" in capsys.readouterr().err
