"""Random schedules on a real engine: every request gets what it gets alone."""

import json
import random
import re
import string
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tests.engine.rescheduling import reschedule, settle

# Its programs take two minutes to make where others compile, too.
pytestmark = [pytest.mark.timeout(600), pytest.mark.slow]
VOCAB_SIZE, PAGE_SIZE = 160, 16
EOS = 2
MAX_NUM_SEQS, MAX_PROMPT, MAX_OUTPUT, MAX_STEPS = 4, 32, 24, 3
# What a request runs with alone: it is neither cut nor preempted, and each step gives a token.
ROOMY = {
    "max_num_seqs": MAX_NUM_SEQS,
    "max_num_batched_tokens": MAX_PROMPT,
    "is_caching": False,
    "decode_steps": 1,
    "prefill_first": False,
    "speculation": None,
}
DRAFTING = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_max": 3,
    "prompt_lookup_min": 1,
}
TOLERANCE = 1e-4  # of logprobs

SAMPLING: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 1.0},
    {"temperature": 0.8, "top_k": 20},
    {"temperature": 1.2, "top_p": 0.9, "min_p": 0.02},
]
PENALTIES: dict[str, Any] = {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": 0.2}
LOOKED_AT: dict[str, Any] = {**PENALTIES, "logprobs": 2}
# What each token reads as. llguidance needs byte tokens where all that may come begins with the same byte.
LETTERS = [*string.ascii_letters, *string.digits, *(chr(0x100 + i) for i in range(VOCAB_SIZE - 62))]
LIMITS = st.fixed_dictionaries(
    {
        "num_pages": st.integers(5, 10),  # a request needs at most 4; one is the null page
        "max_num_seqs": st.integers(2, MAX_NUM_SEQS),
        "max_num_batched_tokens": st.integers(4, 20),
        "is_caching": st.sampled_from([True, True, False]),
        "decode_steps": st.integers(1, MAX_STEPS),
        "prefill_first": st.booleans(),
    }
)
# What must have happened, for the rest to mean anything, and how often at least.
WANTED = {
    "preempted": 10,
    "preempted with logprobs": 5,
    "cut prompts": 50,
    "cut prompts with logprobs": 10,
    "cached prompts": 10,
    "cached prompts with penalties": 3,
    "overtaken": 10,
    "several continuations": 30,
    "continuations without a cache": 5,
    "several tokens at once": 20,
    "kept drafts": 20,
    "wrong drafts": 100,
    **dict.fromkeys(("logit_bias", "bad_words", "allowed_token_ids", "min_tokens", "stop"), 10),
    "structured_outputs": 20,
    "logits_processors": 20,
    "preempted with a processor": 3,
    "preempted with a grammar": 3,
    "ended by a grammar": 5,
    "stopped by a string": 5,
    "aborted before a token": 5,
    "aborted with tokens": 5,
    "ended by stop": 20,
    "ended by length": 50,
}


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """A request, the step before which it comes, and the one before which it is aborted."""

    step: int
    prompt: list[int]
    params: Any
    priority: int
    aborted_at: int | None


def write_tokenizer(folder: Path) -> Path:
    """One letter for each token."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(LETTERS)}, LETTERS[0]))
    words.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    # With the first one of them it is what SentencePiece's are, which llguidance can read.
    words.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    words.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


@pytest.fixture(scope="module")
def engine(
    gqa_folder: Path, unchecked_types: None, full_compile: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    """Has the largest programs, of most rows and all that a request may ask for: others take minutes."""
    from pjengine import LLM, SamplingParams
    from pjengine.edits import Edits

    with (
        pytest.MonkeyPatch.context() as patch,
        LLM(
            gqa_folder,
            dtype="float32",
            tokenizer=str(write_tokenizer(tmp_path_factory.mktemp("tokenizer"))),
            warm_up=False,
            max_model_len=MAX_PROMPT + MAX_OUTPUT,
            max_num_seqs=MAX_NUM_SEQS,
            max_num_batched_tokens=MAX_PROMPT,
            decode_steps=MAX_STEPS,
            speculative_config=DRAFTING,
            scheduling_policy="priority",
        ) as llm,
    ):
        assert llm.engine.model_config.vocab_size == VOCAB_SIZE
        assert llm.engine.model_config.eos_token_ids == (EOS,)
        patch.setattr("pjengine.runner.PATIENCE", 1_000_000)
        # The last token is often followed by itself, so that outputs repeat themselves, and drafts hold.
        llm.params["head"] = llm.params["head"] + 1.4 * llm.params["embed"]
        llm.params["embed"] = 4 * llm.params["embed"]
        every = {**make_edits(random.Random(0), 8, share=1), "prompt_logprobs": 2}
        for fields in ({}, {**every, "stop_token_ids": [*range(10)]}):
            params = SamplingParams(max_tokens=8, temperature=0, **fields)
            warm_up = Arrival(step=0, prompt=[1, 2, 3], params=params, priority=0, aborted_at=None)
            run(llm.engine, [warm_up] * MAX_NUM_SEQS, Counter())
        runner = llm.engine.runner
        for needs in (Edits().needs, Edits(repetition_penalty=1.3, num_logprobs=2).needs):
            while not runner.can_draft(MAX_NUM_SEQS, np.array(needs)):
                runner.wait_for_programs()
        yield llm.engine


def eager_speculation(engine: Any) -> Any:
    """Speculates in every step that can."""
    from pjengine.speculation import Speculation

    class Eager(Speculation):
        def _pays(self, *_: Any) -> bool:
            return True

    sizes = engine.runner.config
    return Eager(sizes.speculation, sizes.max_num_seqs, engine.runner.can_draft)


def make_edits(rng: random.Random, max_tokens: int, share: float) -> dict[str, Any]:
    """Penalties and logprobs, and each other wish with the probability `share`."""
    single, pairs = rng.sample(LETTERS, 14), ["".join(rng.sample(LETTERS, 2)) for _ in range(2)]
    wishes: dict[str, Any] = {
        "logit_bias": {rng.randrange(VOCAB_SIZE): 6.0},
        "bad_words": [*single[:4], *pairs],
        "allowed_token_ids": rng.sample(range(VOCAB_SIZE), 60),
        "min_tokens": rng.randint(1, max_tokens),
        "stop": [*single[4:], *pairs],
        "structured_outputs": make_form(rng),
        "logits_processors": [shun_known],
    }
    return {**LOOKED_AT, **{name: wish for name, wish in wishes.items() if rng.random() < share}}


def shun_known(token_ids: Any, logits: Any) -> Any:
    """A logits processor: the more often a token has come, the rarer it gets."""
    import jax.numpy as jnp

    return logits.at[jnp.where(token_ids < 0, VOCAB_SIZE, token_ids)].add(-0.5, mode="drop")


def make_form(rng: random.Random) -> Any:
    """A language of a few letters, whose words may end or have to."""
    from pjengine import StructuredOutputsParams

    first, second, third = ("".join(rng.sample(LETTERS, 40)) for _ in range(3))
    forms = (f"[{first}]([{second}][{third}])*", f"([{first}][{second}]{{2}}){{1,4}}", f"[{first}]*")
    return StructuredOutputsParams(regex=rng.choice(forms))


def make_arrivals(rng: random.Random, has_priorities: bool) -> list[Arrival]:
    """A few requests of every kind; prompts begin alike."""
    from pjengine import SamplingParams

    prefix = [rng.randrange(VOCAB_SIZE) for _ in range(MAX_PROMPT)]
    arrivals, step = [], 0
    for _ in range(rng.randint(4, 8)):
        step += rng.choice((0, 0, 0, 1, 4))
        num_tokens = rng.randint(rng.choice((1, 20)), MAX_PROMPT)
        num_shared = min(rng.choice((0, 24, 24)), num_tokens - 1)
        prompt = prefix[:num_shared] + [rng.randrange(VOCAB_SIZE) for _ in range(num_tokens - num_shared)]
        sampling = rng.choice(SAMPLING)
        max_tokens = rng.choice((1, rng.randint(1, MAX_OUTPUT), MAX_OUTPUT))
        edits = make_edits(rng, max_tokens, share=0.3) if rng.random() < 0.6 else {}
        if edits and rng.random() < 0.3:
            edits["prompt_logprobs"] = 2
        elif rng.random() < 0.1:
            edits["skip_reading_prefix_cache"] = True
        params = SamplingParams(
            max_tokens=max_tokens,
            seed=rng.randrange(2**40),
            n=rng.choice((1, 1, 2, 3)) if sampling["temperature"] > 0 else 1,
            stop_token_ids=rng.sample(range(VOCAB_SIZE), 10) if rng.random() < 0.4 else None,
            detokenize="stop" in edits or rng.random() < 0.2,
            **sampling,
            **edits,
        )
        arrivals.append(
            Arrival(
                step=step,
                prompt=prompt,
                params=params,
                priority=rng.randint(0, 2) if has_priorities else 0,
                aborted_at=step + rng.randint(0, 40) if rng.random() < 0.25 else None,
            )
        )
    return arrivals


def run(engine: Any, arrivals: list[Arrival], seen: Counter[str]) -> dict[int, Any]:
    """The last output of each request that had one, by its number."""
    outputs: dict[int, Any] = {}
    try:
        for step in range(3000):
            for number, arrival in enumerate(arrivals):
                if arrival.step == step:
                    engine.add_request(
                        arrival.prompt, arrival.params, request_id=str(number), priority=arrival.priority
                    )
                if arrival.aborted_at == step:
                    engine.abort_request(str(number))
            for output in engine.step():
                before = outputs.get(int(output.request_id))
                outputs[int(output.request_id)] = output
                seen["several tokens at once"] += before is not None and grew_by_several(before, output)
            engine.scheduler.check_integrity()
            if step >= arrivals[-1].step and not engine.has_unfinished_requests():
                break
    finally:  # a failure here does not show again as another one in the next example
        for number in range(len(arrivals)):
            engine.abort_request(str(number))
    settle(engine)
    return outputs


def run_alone(engine: Any, arrival: Arrival) -> Any:
    """What the request gets by itself, each of its continuations as a request of its own."""
    params, outputs = arrival.params, []
    for index in range(params.n):
        own = replace(params, n=1, seed=params.seed + index)
        [output] = run(engine, [replace(arrival, step=0, aborted_at=None, params=own)], Counter()).values()
        assert output.finished and output.metrics.num_preemptions == 0
        outputs.append(output)
    completions = [replace(output.outputs[0], index=index) for index, output in enumerate(outputs)]
    return replace(outputs[0], outputs=completions)


def grew_by_several(before: Any, after: Any) -> bool:
    pairs = zip(before.outputs, after.outputs, strict=True)
    return any(len(new.token_ids) > len(old.token_ids) + 1 for old, new in pairs)


def check_logprobs(got: Any, wanted: Any) -> None:
    """Both None, or the same tokens at each position with nearly the same logprobs."""
    assert (got is None) == (wanted is None)
    for ours, theirs in zip(got or (), wanted or (), strict=True):
        assert (ours is None) == (theirs is None)
        assert list(ours or ()) == list(theirs or ())
        for token, entry in (ours or {}).items():
            assert entry.logprob == pytest.approx(theirs[token].logprob, abs=TOLERANCE)
            assert abs(entry.rank - theirs[token].rank) <= 1  # two may be as likely as each other


def check_same(got: Any, alone: Any, is_finished: bool) -> None:
    """What a request got is what it gets alone, or the beginning of that if it was aborted."""
    assert [output.index for output in got.outputs] == [output.index for output in alone.outputs]
    if is_finished or got.prompt_logprobs is not None:
        check_logprobs(got.prompt_logprobs, alone.prompt_logprobs)
    for ours, theirs in zip(got.outputs, alone.outputs, strict=True):
        count = len(ours.token_ids)
        assert ours.token_ids == theirs.token_ids[:count]
        check_logprobs(ours.logprobs, theirs.logprobs and theirs.logprobs[:count])
        if is_finished or ours.finish_reason is not None:
            assert count == len(theirs.token_ids)
            assert (ours.finish_reason, ours.stop_reason) == (theirs.finish_reason, theirs.stop_reason)
            assert ours.text == theirs.text


def note(seen: Counter[str], arrival: Arrival, output: Any, chunk_size: int, is_caching: bool) -> None:
    """Counts what happened to a request in its schedule."""
    params, has_logprobs = arrival.params, arrival.params.logprobs is not None
    is_preempted = output.metrics.num_preemptions > 0
    is_cut = len(arrival.prompt) - output.num_cached_tokens > chunk_size
    seen["preempted"] += is_preempted
    seen["preempted with logprobs"] += is_preempted and has_logprobs
    seen["cut prompts"] += is_cut
    seen["cut prompts with logprobs"] += is_cut and params.prompt_logprobs is not None
    seen["cached prompts"] += output.num_cached_tokens > 0
    seen["cached prompts with penalties"] += output.num_cached_tokens > 0 and has_logprobs
    seen["several continuations"] += params.n > 1 and output.finished
    seen["continuations without a cache"] += params.n > 1 and output.finished and not is_caching
    for wish in ("logit_bias", "bad_words", "allowed_token_ids", "min_tokens", "stop"):
        seen[wish] += bool(getattr(params, wish)) and output.finished
    for wish in ("structured_outputs", "logits_processors"):
        seen[wish] += bool(getattr(params, wish)) and output.finished
    form = params.structured_outputs
    seen["preempted with a grammar"] += is_preempted and form is not None
    seen["preempted with a processor"] += is_preempted and params.logits_processors is not None
    seen["aborted with tokens"] += not output.finished
    for completion in output.outputs:
        seen[f"ended by {completion.finish_reason}"] += 1
        if form is not None and (completion.finish_reason, completion.stop_reason) == ("stop", None):
            seen["ended by a grammar"] += 1
            letters = "".join(LETTERS[token] for token in completion.token_ids)
            assert re.fullmatch(f"({form.regex}){LETTERS[EOS]}?", letters)
        seen["stopped by a string"] += isinstance(completion.stop_reason, str)


def num_overtaken(arrivals: list[Arrival], outputs: dict[int, Any]) -> int:
    """Requests that got a token after one that came later did."""
    firsts = [outputs[i].metrics.first_token_s for i in range(len(arrivals)) if i in outputs]
    return sum(any(later < first for later in firsts[i:]) for i, first in enumerate(firsts))


def test_every_request_gets_what_it_gets_alone(engine: Any) -> None:
    seen: Counter[str] = Counter()

    @settings(max_examples=50, deadline=None, derandomize=True, phases=[Phase.generate])
    @given(seed=st.integers(0, 2**32), has_priorities=st.booleans(), has_drafts=st.booleans(), limits=LIMITS)
    def check(seed: int, has_priorities: bool, has_drafts: bool, limits: dict[str, Any]) -> None:
        arrivals = make_arrivals(random.Random(seed), has_priorities)
        speculation = eager_speculation(engine) if has_drafts else None
        reschedule(engine, **limits, speculation=speculation)
        outputs = run(engine, arrivals, seen)
        if speculation is not None:
            seen["kept drafts"] += speculation.num_accepted_tokens
            seen["wrong drafts"] += speculation.num_draft_tokens - speculation.num_accepted_tokens
        reschedule(engine, **ROOMY)
        seen["overtaken"] += num_overtaken(arrivals, outputs)
        for number, arrival in enumerate(arrivals):
            if number not in outputs:
                assert arrival.aborted_at is not None
                seen["aborted before a token"] += 1
                continue
            alone = run_alone(engine, arrival)
            assert outputs[number].finished or arrival.aborted_at is not None
            check_same(outputs[number], alone, outputs[number].finished)
            note(seen, arrival, outputs[number], limits["max_num_batched_tokens"], limits["is_caching"])

    check()
    assert not {name: seen[name] for name, least in WANTED.items() if seen[name] < least}
