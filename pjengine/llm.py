"""LLM: prompts in, text out, in the caller's own process."""

import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, overload

from pjengine.beams import BeamSearchOutput, BeamSearchParams, beam_search_output
from pjengine.chunks import CompletionChunk, chunks_of
from pjengine.config import EngineConfig, known_settings
from pjengine.embeddings import EmbeddingOutput, embedding_of, embedding_params
from pjengine.engine import LLMEngine
from pjengine.generation import Generation
from pjengine.iterating import generate_each
from pjengine.models.checkpoint_writer import MAX_SHARD_BYTES
from pjengine.models.decoder import Decoder
from pjengine.models.pair import target_of, target_params
from pjengine.outputs import RequestOutput
from pjengine.progress import prompts_bar
from pjengine.prompts import Prompt, as_prompts, one_each
from pjengine.replicas import Engine, engines_of, start_engine
from pjengine.runner import Runner
from pjengine.sampling_params import SamplingParams
from pjengine.saving import save_checkpoint
from pjengine.schedule_record import ScheduleRecord, explain_schedule
from pjengine.scoring import (
    PerplexityOutput,
    ScoreOutput,
    perplexity_of,
    prepare_scores,
    prepare_windows,
    score_of,
)
from pjengine.trace import trace

type Message = Mapping[str, Any]

LOOKS = 16  # requests that `generate` looks at after a step, of those that have not grown in it


class LLM:
    """A model, loaded and ready.

    Args:
      model: a folder in the Hugging Face format, a Hub id, or "demo" for the packaged model.
      **settings: the fields of `EngineConfig`, under vLLM's names.

    Raises:
      TypeError: no such setting.
      NotImplementedError: a setting of vLLM asks for what is not here.
      ValueError, OSError: the model or a setting is not possible; the text says what to change.

    Use it as a context manager, or call `close()`: the device memory then returns at once.
    """

    def __init__(self, model: str | os.PathLike[str], **settings: Any) -> None:
        config = EngineConfig(model=os.fspath(model), **known_settings(settings))
        if config.prefill_first is None and not config.deterministic:
            config = replace(config, prefill_first=True)
        self._engine: Engine | None = start_engine(config)

    @property
    def engine(self) -> Any:
        """The engine underneath: an `LLMEngine`, or `Replicas` that is used as one.

        Raises:
          RuntimeError: this LLM was closed.
        """
        if self._engine is None:
            raise RuntimeError("this LLM is closed; create another")
        return self._engine

    @property
    def model(self) -> Decoder:
        """What computes: pure functions over `params`, such as `forward` and `logits`."""
        return target_of(self._runner.model)

    @property
    def _runner(self) -> Runner:
        """Of several engines the first one's."""
        return engines_of(self.engine)[0].runner

    @property
    def params(self) -> Any:
        """The model's parameters in force: nested dicts of `jax.Array`, no copy.

        `docs/weights_and_training.md` says what the names mean, and how the arrays are shaped and divided.
        Of several engines they are the first one's. What the engine has loaded ends with `close()`.
        """
        runner = self._runner
        return target_params(runner.model, runner.params)

    def update_params(self, tree: Any, *, donate: bool = False) -> None:
        """Has the engine compute with other parameters from its next step on: no restart, copy, compilation.

        The prefix cache is forgotten. Requests under way go on with the new weights, over the keys and values
        that the old ones have left, and share none of these. Of a draft model the weights stay. Each further
        engine of `data_parallel_size` gets a copy. If the arrays are donated to another program later, as a
        training step does, the next step here raises RuntimeError, and `update_params` mends it.

        Args:
          tree: as `params`: the same paths, shapes, dtypes and sharding. The engine keeps the arrays.
          donate: they are the engine's from now on: it deletes them when others take their place, and in
            `close()`. Else it deletes nothing that it was given.

        Raises:
          ValueError: the tree differs; the text lists how, and the old weights stay in force.
          NotImplementedError: the engine is of several hosts.
        """
        self.engine.update_params(tree, donate=donate)

    def save_pretrained(
        self, folder: str | os.PathLike[str], *, max_shard_bytes: int = MAX_SHARD_BYTES
    ) -> None:
        """Writes the parameters in force as a checkpoint that transformers loads, and this engine.

        It has the model's own config and tokenizer files, and safetensors of at most `max_shard_bytes`. One
        tensor at a time is on the host. The folder gets its name once all is in it.

        Raises:
          FileExistsError: the folder is there and not empty.
          ValueError: the model has no config.json, as a named shape.
          NotImplementedError: parts of the parameters are on other hosts.
        """
        save_checkpoint(
            Path(folder), self.engine.config, self.model, self.params, max_shard_bytes=max_shard_bytes
        )

    @overload
    def generate(
        self,
        prompts: Iterator[Prompt],
        sampling_params: SamplingParams | Iterator[SamplingParams | None] | None = None,
        *,
        use_tqdm: bool | Callable[..., Any] = True,
        priority: int = 0,
    ) -> Iterator[RequestOutput]: ...

    @overload
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool | Callable[..., Any] = True,
        priority: int | Sequence[int] = 0,
    ) -> list[RequestOutput]: ...

    def generate(
        self,
        prompts: Any,
        sampling_params: Any = None,
        *,
        use_tqdm: bool | Callable[..., Any] = True,
        priority: Any = 0,
    ) -> list[RequestOutput] | Iterator[RequestOutput]:
        """Completes each prompt; returns the outputs in the order of the prompts.

        Args:
          prompts: a text, a list of token ids, a dict with "prompt" or "prompt_token_ids", or a
            list of such, mixed as you like. Of an iterator the outputs are one, too: prompts are taken as
            they are needed, a bounded number ahead; leaving the loop aborts what runs.
          sampling_params: one for all, or one for each (an iterator with an iterator); None:
            `get_default_sampling_params()`.
          use_tqdm: show a progress bar; or what makes one, such as `partial(tqdm, leave=False)`.
          priority: one for all, or one for each, under scheduling_policy="priority"; lower goes first.

        Raises:
          ValueError: a prompt or parameter is not possible. Nothing has been run then; of an iterator, what
            comes before has been yielded, and the text says which prompt it is. Where an iterator itself
            raises, or `sampling_params` end before the prompts, what runs is aborted.
        """
        if isinstance(prompts, Iterator):
            bar = partial(prompts_bar, use_tqdm, None)
            return generate_each(self.engine, prompts, sampling_params, priority=priority, make_bar=bar)
        generations = self._prepare(as_prompts(prompts), sampling_params, priority)
        outputs = self._finish(generations, use_tqdm, Generation.output)
        return [outputs[generation] for generation in generations]

    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: BeamSearchParams,
        *,
        use_tqdm: bool | Callable[..., Any] = False,
    ) -> list[BeamSearchOutput]:
        """Finds the likeliest sequences after each prompt: `params.beam_width` of them, best first.

        Their tokens and texts begin with the prompt's, as vLLM's do. `generate` takes the same search as
        `SamplingParams(use_beam_search=True)`, with more to choose, and gives the continuations alone.

        Raises:
          ValueError: a prompt or parameter is not possible. Nothing has been run then.
        """
        if not isinstance(params, BeamSearchParams):
            raise TypeError(f"params must be BeamSearchParams, got {params!r:.80}")
        most = self.engine.runner.config.max_num_seqs
        if params.beam_width > most:
            raise ValueError(
                f"beam_width must be at most max_num_seqs={most}, got {params.beam_width}: ask for fewer, or "
                "create the engine with a higher max_num_seqs"
            )
        outputs = self.generate(prompts, params.sampling_params, use_tqdm=use_tqdm)
        return [beam_search_output(output, params, self.engine.tokenizer) for output in outputs]

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Iterator[CompletionChunk]:
        """Yields text as it is generated; never half a character, never the start of a stop string.

        Takes what `generate` takes, and checks it when called. The requests start with the first chunk
        that is asked for, and end when the loop is left.
        """
        generations = self._prepare(as_prompts(prompts), sampling_params, 0)
        if any(generation.request.params.is_chosen for generation in generations):
            raise ValueError(
                "beam search, and best_of above n, cannot be streamed: what is chosen is known at the end. "
                "Use generate"
            )
        return chunks_of(self.engine, generations)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool | Callable[..., Any] = True,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answers one conversation, or each of a list of them.

        Raises:
          ValueError: no chat template, or a message that the template does not take.
        """
        tokenizer = self.engine.tokenizer
        if tokenizer is None:
            raise ValueError("chat needs a tokenizer, and skip_tokenizer_init=True")
        if isinstance(messages, str | Mapping):
            raise TypeError(
                f"messages must be a list of dicts, or a list of such lists; got {messages!r:.80}"
            )
        if len(messages) == 0:
            raise ValueError("messages is empty: at least one message is needed")
        conversations: Any = [messages] if isinstance(messages[0], Mapping) else messages
        texts = [
            tokenizer.render_chat(
                conversation,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tools=tools,
                chat_template=chat_template,
                **(chat_template_kwargs or {}),
            )
            for conversation in conversations
        ]
        # The template has put the special tokens into the text.
        prompts = [
            {"prompt": text, "prompt_token_ids": tokenizer.encode(text, add_special_tokens=False)}
            for text in texts
        ]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def score(
        self,
        prompts: Prompt | Sequence[Prompt],
        completions: Sequence[Any],
        *,
        use_tqdm: bool | Callable[..., Any] = True,
    ) -> list[ScoreOutput]:
        """How likely each completion is after its prompt, in the order of the prompts.

        The completions of a prompt share its pages: together they cost about as much as one. A text is
        encoded together with its prompt (`prepare_scores` says where it begins); token ids follow as they
        are.

        Args:
          completions: of one prompt, a list of texts or lists of token ids; of a list of prompts, such a list
            for each.

        Raises:
          ValueError, TypeError: a prompt or a completion is not possible. Nothing has been run then.
        """
        each = as_prompts(prompts)
        is_one = len(each) == 1 and each[0] is prompts
        if not is_one and len(completions) != len(each):
            raise ValueError(
                f"completions must be a list for each of the {len(each)} prompts, got {len(completions)}"
            )
        pairs = zip(each, [completions] if is_one else completions, strict=True)
        prepared = [prepare_scores(self.engine, *pair) for pair in pairs]
        generations = [generation for own in prepared for generation in own.generations]
        scores = self._finish(generations, use_tqdm, score_of)
        return [own.output(scores) for own in prepared]

    def perplexity(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        stride: int | None = None,
        max_window: int | None = None,
        use_tqdm: bool | Callable[..., Any] = True,
    ) -> list[PerplexityOutput]:
        """The perplexity of each text, of any length.

        It is exp(-sum of logprobs / number of tokens), over all tokens but the first. A text longer than
        `max_window` tokens (None: max_model_len) is read in windows of so many that begin `stride` tokens
        apart (None: half a window), and each counts the tokens that none before it has. These have at least
        `max_window - stride` tokens before them: a small stride is exacter, and dearer.

        Raises:
          ValueError, TypeError: a text has fewer than two tokens, or an argument is out of range.
        """
        each = [prepare_windows(self.engine, prompt, stride, max_window) for prompt in as_prompts(prompts)]
        scores = self._finish([own for windows in each for own in windows], use_tqdm, score_of)
        return [perplexity_of([scores[own] for own in windows]) for windows in each]

    def encode(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        pooling: str = "last",
        layer: int = -1,
        normalize: bool = True,
        truncate_prompt_tokens: int | None = None,
        use_tqdm: bool | Callable[..., Any] = True,
    ) -> list[EmbeddingOutput]:
        """An embedding of each prompt, in the order of the prompts.

        Args:
          pooling: "last": the hidden state of the last token; "mean": the mean of all tokens'.
          layer: numbered as `HiddenStatesParams` says; -1: after the last norm.
          normalize: makes its length 1.
          truncate_prompt_tokens: as of `SamplingParams`.

        Raises:
          ValueError, TypeError: a prompt or an argument is not possible. Nothing has been run then.
        """
        if not isinstance(normalize, bool):
            raise TypeError(f"normalize must be True or False, got {normalize!r:.80}")
        params = embedding_params(pooling=pooling, layer=layer, truncate_prompt_tokens=truncate_prompt_tokens)
        outputs = self.generate(prompts, params, use_tqdm=use_tqdm)
        return [embedding_of(output, normalize=normalize) for output in outputs]

    def get_default_sampling_params(self) -> SamplingParams:
        """What holds where a caller gives none: the model's generation_config.json says it."""
        return self.engine.default_sampling_params

    def reset_prefix_cache(self) -> None:
        """Forgets the pages that requests could share, as after a change of the weights."""
        self.engine.reset_prefix_cache()

    def explain_schedule(self, *, num_steps: int | None = None, engine: int | None = None) -> ScheduleRecord:
        """The batch over time, of what has just run: which request had which tokens and pages in which step.

        Engines keep their last steps (`step_log.MAX_STEPS`), so nothing has to be switched on before.

        Args:
          num_steps: so many of the last; None: those since the engine last had nothing to do.
          engine: of several (`data_parallel_size`), which.

        Raises:
          ValueError: there has been no step yet, or one of several engines has to be named.
        """
        own = _one_of(engines_of(self.engine), engine)
        return explain_schedule(own.step_log, own.scheduler, num_steps)

    @contextmanager
    def trace(self, folder: str | os.PathLike[str]) -> Iterator[Path]:
        """Writes what host and devices do in it, for https://ui.perfetto.dev; gives the path of the file.

        It is `perfetto_trace.json.gz` in `folder`, there when the block ends; one of that name is replaced.
        Steps have the numbers that `explain_schedule` gives them. On a GPU, XLA launches the kernels of CUDA
        graphs one by one while it is watched, unless XLA_FLAGS has, before JAX starts,
        `--xla_enable_command_buffers_during_profiling=true`.

        Raises:
          RuntimeError: this process writes another profile already, or this LLM was closed.
        """
        with trace(folder, engines_of(self.engine)) as path:
            yield path

    def _prepare(self, prompts: list[Prompt], params: Any, priority: int | Sequence[int]) -> list[Generation]:
        """Checks all requests before any is queued."""
        each = one_each("sampling_params", params, len(prompts))
        priorities = one_each("priority", priority, len(prompts))
        return [
            self.engine.prepare(prompt, own, priority=rank)
            for prompt, own, rank in zip(prompts, each, priorities, strict=True)
        ]

    def _submit(self, generations: list[Generation]) -> None:
        for generation in generations:
            self.engine.submit(generation)

    def _finish[T](
        self, generations: list[Generation], use_tqdm: Any, output_of: Callable[[Generation], T]
    ) -> dict[Generation, T]:
        """Queues requests and runs until they have ended, or one cannot go on."""
        bar = prompts_bar(use_tqdm, len(generations))
        try:
            self._submit(generations)
            return self._run(generations, bar, output_of)
        finally:
            self._abort(generations)
            bar.close()

    def _run[T](
        self, generations: list[Generation], bar: Any, output_of: Callable[[Generation], T]
    ) -> dict[Generation, T]:
        """Runs until all have ended; makes each one's output as it ends, while the device computes."""
        num_prompt_tokens = num_output_tokens = 0
        outputs: dict[Generation, T] = {}
        still_open, each_in_turn = set(generations), itertools.cycle(generations)
        while still_open:
            grown = self.engine.advance()
            # Some may have ended elsewhere, by an abort or in a step that somebody else ran.
            is_idle = not self.engine.has_unfinished_requests()
            others = generations if is_idle else itertools.islice(each_in_turn, LOOKS)
            looked_at = dict.fromkeys([*grown, *others])
            ended = [own for own in looked_at if own in still_open and own.is_finished]
            if not ended:
                continue
            still_open.difference_update(ended)
            outputs |= {generation: output_of(generation) for generation in ended}
            num_prompt_tokens += sum(len(generation.request.prompt_token_ids) for generation in ended)
            num_output_tokens += sum(generation.num_output_tokens for generation in ended)
            elapsed = max(bar.format_dict["elapsed"], 1e-9)
            bar.set_postfix_str(
                f"est. speed input: {num_prompt_tokens / elapsed:.2f} toks/s, "
                f"output: {num_output_tokens / elapsed:.2f} toks/s",
                refresh=False,
            )
            bar.update(len(ended))
        return outputs

    def _abort(self, generations: list[Generation]) -> None:
        if self._engine is not None:
            for generation in generations:
                self._engine.abort_request(generation.request.request_id)

    def close(self) -> None:
        """Frees the device memory. Safe to call twice."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _one_of(engines: Sequence[LLMEngine], index: int | None) -> LLMEngine:
    if index is None and len(engines) > 1:
        raise ValueError(f"each of {len(engines)} engines has steps of its own: explain_schedule(engine=0)")
    if index is not None and (type(index) is not int or not 0 <= index < len(engines)):
        raise ValueError(f"engine must be in 0..{len(engines) - 1}, got {index!r:.80}")
    return engines[index or 0]
