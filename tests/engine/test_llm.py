"""Text in, text out, with the packaged model."""

import functools
from typing import Any

import pytest

PROMPTS = ["def fibonacci(n):\n", "import os\n", "class Stack:\n    "]


def greedy(**fields: Any) -> Any:
    from pjengine import SamplingParams

    return SamplingParams(temperature=0, max_tokens=24, **fields)


def test_the_demo_model_writes_python(demo: Any) -> None:
    from pjengine import SamplingParams

    params = SamplingParams(temperature=0.6, top_p=0.95, seed=1, max_tokens=48)
    outputs = demo.generate(PROMPTS, params, use_tqdm=False)
    assert [output.prompt for output in outputs] == PROMPTS
    text = "".join(output.outputs[0].text for output in outputs)
    assert any(word in text for word in ("return", "import", "self", "def "))
    assert all(output.finished and output.metrics.ttft_s > 0 for output in outputs)


def test_streamed_text_put_together_is_the_generated_text(demo: Any) -> None:
    from pjengine import SamplingParams

    # Hot enough to break characters apart.
    params = [SamplingParams(temperature=2.0, seed=i, max_tokens=40, ignore_eos=True) for i in range(3)]
    wanted = demo.generate(PROMPTS, params, use_tqdm=False)
    texts, tokens, reasons = [""] * 3, [list[int]() for _ in range(3)], [None] * 3
    for chunk in demo.stream(PROMPTS, params):
        if chunk.finish_reason is None:  # bytes that can still become a character are held back
            assert not chunk.text.endswith("\ufffd")
        texts[chunk.index] += chunk.text
        tokens[chunk.index] += chunk.token_ids
        reasons[chunk.index] = chunk.finish_reason
    assert texts == [output.outputs[0].text for output in wanted]
    assert tokens == [output.outputs[0].token_ids for output in wanted]
    assert reasons == ["length"] * 3


def test_the_first_chunk_comes_before_the_last_token(demo: Any) -> None:
    stream = demo.stream(PROMPTS[0], greedy())
    next(stream)
    assert demo.engine.has_unfinished_requests()
    stream.close()
    assert not demo.engine.has_unfinished_requests()


def test_a_stream_that_is_never_read_leaves_nothing_behind(demo: Any) -> None:
    for _ in range(3):
        demo.stream(PROMPTS, greedy())
    assert not demo.engine.has_unfinished_requests()


@pytest.mark.parametrize(
    "arguments",
    [
        {"use_tqdm": None},
        {"sampling_params": {"temperature": 1}},
        {"sampling_params": [None, 3]},
        {"priority": 1},
        {"priority": [0]},
    ],
)
def test_a_bad_argument_of_generate_leaves_nothing_behind(demo: Any, arguments: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError)):
        demo.generate(PROMPTS[:2], **arguments)
    assert not demo.engine.has_unfinished_requests()


@pytest.mark.parametrize(
    "prompt",
    [
        b"bytes",
        {"prompt": 5},
        {"prompt_token_ids": "abc"},
        {"prompt_token_ids": {"a": 1}},
        {"prompt": "x", "cache_salt": "\ud800"},
        "\ud800",
    ],
)
def test_what_is_no_prompt_is_refused_before_anything_runs(demo: Any, prompt: Any) -> None:
    stream = demo.stream(PROMPTS[0], greedy())
    text = next(stream).text
    with pytest.raises((TypeError, ValueError)):
        demo.generate([prompt], greedy(), use_tqdm=False)
    assert text + "".join(chunk.text for chunk in stream)  # undisturbed


def test_a_second_thread_is_turned_away_and_disturbs_nobody(demo: Any) -> None:
    """The other thread comes in the middle of a step, which a patched clock makes certain."""
    import threading

    errors = []

    def intrude() -> None:
        try:
            demo.engine.advance()
        except RuntimeError as error:
            errors.append(str(error))

    schedule = demo.engine.scheduler.schedule

    def schedule_beside_an_intruder() -> Any:
        thread = threading.Thread(target=intrude)
        thread.start()
        thread.join()
        return schedule()

    wanted = demo.generate(PROMPTS[0], greedy(), use_tqdm=False)[0].outputs[0].text
    demo.engine.scheduler.schedule = schedule_beside_an_intruder
    try:
        [output] = demo.generate(PROMPTS[0], greedy(), use_tqdm=False)
    finally:
        del demo.engine.scheduler.schedule
    assert output.outputs[0].text == wanted
    assert errors and "AsyncLLM" in errors[0]


def test_a_bad_prompt_is_refused_when_stream_is_called(demo: Any) -> None:
    with pytest.raises(ValueError, match="empty"):
        demo.stream("", greedy())


def test_generate_while_a_stream_is_open_disturbs_neither(demo: Any) -> None:
    alone = demo.generate(PROMPTS[:2], greedy(), use_tqdm=False)
    stream = demo.stream(PROMPTS[0], greedy())
    text = next(stream).text
    assert demo.generate(PROMPTS[1], greedy(), use_tqdm=False)[0].outputs[0].text == alone[1].outputs[0].text
    assert text + "".join(chunk.text for chunk in stream) == alone[0].outputs[0].text


def test_a_stop_string_across_tokens_ends_the_text_before_it(demo: Any) -> None:
    whole = demo.generate(PROMPTS[1], greedy(), use_tqdm=False)[0].outputs[0]
    pieces = [chunk.text for chunk in demo.stream(PROMPTS[1], greedy()) if chunk.text]
    stop = pieces[2][-1] + pieces[3] + pieces[4][:1]  # starts and ends in the middle of tokens
    assert whole.text.find(stop) >= 0
    [output] = demo.generate(PROMPTS[1], greedy(stop=["never", stop]), use_tqdm=False)
    assert output.outputs[0].text == whole.text[: whole.text.find(stop)]
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", stop)
    streamed = "".join(chunk.text for chunk in demo.stream(PROMPTS[1], greedy(stop=stop)))
    assert streamed == output.outputs[0].text


def test_a_stop_id_ends_the_text_before_its_token(demo: Any) -> None:
    whole = demo.generate(PROMPTS[1], greedy(), use_tqdm=False)[0].outputs[0]
    stop_id = whole.token_ids[5]
    cut = whole.token_ids.index(stop_id)
    [output] = demo.generate(PROMPTS[1], greedy(stop_token_ids=[stop_id]), use_tqdm=False)
    assert output.outputs[0].token_ids == whole.token_ids[: cut + 1]
    assert output.outputs[0].text == demo.engine.tokenizer.decode(whole.token_ids[:cut])
    assert output.outputs[0].stop_reason == stop_id


def test_a_stream_without_text_gives_every_token_as_it_comes(demo: Any) -> None:
    chunks = list(demo.stream(PROMPTS[0], greedy(detokenize=False)))
    assert [len(chunk.token_ids) for chunk in chunks] == [1] * 24


def test_detokenize_off_gives_ids_only(demo: Any) -> None:
    [output] = demo.generate(PROMPTS[0], greedy(detokenize=False), use_tqdm=False)
    assert output.outputs[0].text == "" and len(output.outputs[0].token_ids) == 24


def test_chat_renders_the_template_and_keeps_the_prompt(demo: Any) -> None:
    messages = [{"role": "user", "content": "Write a stack."}]
    [output] = demo.chat(messages, greedy(), use_tqdm=False)
    wanted = demo.engine.tokenizer.hf.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    assert output.prompt == wanted
    two = demo.chat([messages, messages], greedy(), use_tqdm=False)
    assert [o.outputs[0].text for o in two] == [output.outputs[0].text] * 2
    with pytest.raises(ValueError, match="empty"):
        demo.chat([])


def test_progress_goes_to_whoever_is_asked(demo: Any) -> None:
    from tqdm import tqdm

    bars = []

    def make(**settings: Any) -> Any:
        bars.append(tqdm(**settings, disable=True))
        return bars[-1]

    demo.generate(PROMPTS, greedy(), use_tqdm=make)
    assert bars[0].total == 3


def test_requests_that_are_aborted_while_generate_runs_end_there(demo: Any) -> None:
    from tqdm import tqdm

    from pjengine import SamplingParams

    class Aborting(tqdm):  # type: ignore[misc] # what a caller gives as a bar may do anything
        def update(self, n: float | None = 1) -> bool | None:
            for request_id in list(demo.engine._generations):
                demo.engine.abort_request(request_id)
            return super().update(n)

    each = [greedy(), *[SamplingParams(max_tokens=900, ignore_eos=True)] * 5]
    outputs = demo.generate([PROMPTS[0]] * 6, each, use_tqdm=functools.partial(Aborting, disable=True))
    assert [output.outputs[0].finish_reason for output in outputs] == ["length", *["abort"] * 5]


def test_what_ends_in_a_step_of_somebody_else_is_not_waited_for(demo: Any) -> None:
    advance = demo.engine.advance

    def advance_twice() -> Any:
        advance()
        return advance()

    wanted = demo.generate(PROMPTS, greedy(), use_tqdm=False)
    demo.engine.advance = advance_twice
    try:
        outputs = demo.generate(PROMPTS, greedy(), use_tqdm=False)
    finally:
        del demo.engine.advance
    assert [output.outputs for output in outputs] == [output.outputs for output in wanted]


def test_an_unknown_setting_is_refused() -> None:
    from pjengine import LLM

    with pytest.raises(TypeError, match="no setting 'block_size'; did you mean 'page_size'"):
        LLM("demo", block_size=16)
    with pytest.raises(TypeError, match="did you mean 'max_num_seqs'"):
        LLM("demo", max_num_seq=16)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"load_format": "gguf"}, "load_format must be one of"),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization"),
        ({"page_size": 24}, "page_size"),
        ({"page_size": "16"}, "page_size"),
        ({"max_num_seqs": 0}, "max_num_seqs"),
        ({"max_model_len": 1}, "max_model_len must be a whole number of at least 2"),
        ({"max_model_len": "long"}, "max_model_len"),
        ({"tokenizer_revision": "main"}, "tokenizer_revision"),
        ({"seed": -1}, "seed"),
        ({"max_model_len": 4096}, "4096 is beyond the 1024 positions"),
        ({"max_num_seqs": 64, "max_num_batched_tokens": 32}, "max_num_batched_tokens=32 must be at least"),
        ({"kv_cache_memory_bytes": 1000}, "one request of 16 tokens needs .* bytes: raise kv_cache"),
        ({"kv_cache_memory_bytes": 10**6, "max_model_len": 1024}, "one request of 1024 tokens needs"),
        ({"hf_overrides": {"model_type": "llama", "flux_capacitor": 1}}, "flux_capacitor"),
        ({"hf_overrides": {"architectures": ["MambaForCausalLM"]}}, "MambaForCausalLM"),
        ({"kernel_backend": "cuda"}, "cuda"),
    ],
)
def test_a_bad_setting_is_refused_by_name(settings: dict[str, Any], message: str) -> None:
    from pjengine import LLM

    with pytest.raises((ValueError, TypeError, NotImplementedError), match=message):
        LLM("demo", **settings)


@pytest.mark.parametrize(
    ("value", "wanted"),
    [(-1, None), ("auto", None), ("8k", 8000), ("8K", 8192), ("25.6k", 25600), ("64", 64)],
)
def test_lengths_are_written_as_vllm_writes_them(value: Any, wanted: int | None) -> None:
    from pjengine import EngineConfig

    assert EngineConfig(model="demo", max_model_len=value).max_model_len == wanted


def test_memory_that_does_not_suffice_is_found_before_the_weights_are_loaded() -> None:
    import jax

    from pjengine import LLM

    before = len(jax.live_arrays())
    with pytest.raises(ValueError, match="the KV cache gets") as error:
        LLM("demo", kv_cache_memory_bytes=1000)
    assert len(jax.live_arrays()) == before, error
