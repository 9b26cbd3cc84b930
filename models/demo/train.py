"""Trains the demo model: data, AdamW in a time box, checkpoint, samples.

    python -m pjengine.models.demo.train prepare --data build/demo
    python -m pjengine.models.demo.train train --data build/demo --out build/demo/model --minutes 5

`train` prepares the data itself, from the running Python's own library, where the folder holds none.
"""

import argparse
import functools
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, UInt16
from tokenizers import Tokenizer

from pjengine.models.config import ModelConfig
from pjengine.models.decoder import Params
from pjengine.models.demo.checkpoint import save_checkpoint
from pjengine.models.demo.corpus import bytes_per_token, prepare, stdlib_folder
from pjengine.models.llama import Llama
from pjengine.models.rope import RopeConfig

END_OF_TEXT_ID = 0
SAMPLE_TEMPERATURE = 0.6
PROMPTS = (
    "def fibonacci(n):",
    'class Stack:\n    """A last-in, first-out container."""\n\n    def __init__(self):\n',
    "import os\nimport sys\n\ndef main():\n",
    "class TestParser(unittest.TestCase):\n    def test_empty(self):\n",
    "    try:\n        with open(path) as f:\n",
)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    minutes: float = 5.0  # time box of all runs together, compilation included
    steps: int | None = None  # of each run, in place of the time box: exactly repeatable
    batch_size: int = 32  # windows per step
    context: int = 1024  # tokens per window
    peak_lr: float = 3e-3
    warmup_steps: int = 200
    weight_decays: tuple[float, ...] = (0.2, 0.8)  # one run each; the best on the held-out files is kept
    steps_per_call: int = 20  # optimiser steps per jitted call
    calls_per_report: int = 10
    seed: int = 0


type Report = dict[str, int | float]


class TrainState(NamedTuple):
    params: Params  # float32
    opt_state: optax.OptState
    step: Int[Array, ""]


@dataclass(frozen=True, kw_only=True)
class Run:
    """One finished training run and the parameters of its best report."""

    params: Params
    weight_decay: float
    held_out_loss: float
    train_loss: float  # mean of the last report's steps
    steps: int
    minutes: float
    tokens_per_s: float
    curve: list[Report]


def demo_config(vocab_size: int, context: int) -> ModelConfig:
    """The shape of the demo model: 5.0 M parameters at a vocabulary of 4096."""
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=384,
        num_layers=8,
        num_heads=8,
        num_kv_heads=4,
        head_dim=32,
        max_position_embeddings=context,
        norm_eps=1e-5,
        rope=RopeConfig(kind="default", theta=10000.0, rotary_dim=32),
        tie_word_embeddings=True,
        dtype="bfloat16",
        bos_token_id=END_OF_TEXT_ID,
        eos_token_ids=(END_OF_TEXT_ID,),
    )


def init_params(model: Llama, key: Array) -> Params:
    """Float32 parameters; what feeds the residual stream starts smaller, by the root of its terms."""
    params = Llama(model.config, jnp.dtype(jnp.float32)).init(key)
    for name in ("out", "down"):
        params["layers"][name] = params["layers"][name] / math.sqrt(2 * model.config.num_layers)
    return params


def token_losses(model: Llama, params: Params, windows: Int[Array, "b t1"]) -> Float[Array, "b t"]:
    """Cross-entropy in nats of each token but the first of each window, computed in bfloat16."""
    low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    logits = model.forward(low, windows[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:])


def learning_rate(config: TrainConfig, step: Int[Array, ""], total: Int[Array, ""]) -> Float[Array, ""]:
    """Linear warm-up times linear decay to zero at `total`, which may be re-planned on the way."""
    now = step.astype(jnp.float32)
    warmup = jnp.minimum((now + 1) / config.warmup_steps, 1.0)
    return config.peak_lr * warmup * jnp.maximum(1 - now / total.astype(jnp.float32), 0.0)


def optimizer() -> optax.GradientTransformation:
    """Adam's direction; `train_steps` adds weight decay and scales by the learning rate."""
    return optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(b1=0.9, b2=0.95))


@functools.partial(jax.jit, static_argnames=("model", "seed"))
def start_state(*, model: Llama, seed: int) -> TrainState:
    params = init_params(model, jax.random.key(seed))
    return TrainState(params, optimizer().init(params), jnp.zeros((), jnp.int32))


@functools.partial(jax.jit, static_argnames=("model", "config"), donate_argnames=("state",))
def train_steps(
    state: TrainState,
    tokens: UInt16[Array, " n"],
    total: Int[Array, ""],
    weight_decay: Float[Array, ""],
    *,
    model: Llama,
    config: TrainConfig,
) -> tuple[TrainState, Float[Array, ""]]:
    """`config.steps_per_call` optimiser steps on random windows of `tokens`; donates `state`. Mean loss."""

    def one_step(state: TrainState, _: None) -> tuple[TrainState, Float[Array, ""]]:
        key = jax.random.fold_in(jax.random.key(config.seed + 1), state.step)
        starts = jax.random.randint(key, (config.batch_size,), 0, tokens.shape[0] - config.context)
        windows = tokens[starts[:, None] + jnp.arange(config.context + 1)[None]].astype(jnp.int32)
        loss, grads = jax.value_and_grad(lambda params: token_losses(model, params, windows).mean())(
            state.params
        )
        with jax.numpy_dtype_promotion("standard"):  # optax mixes its int32 step count with floats
            updates, opt_state = optimizer().update(grads, state.opt_state)
        lr = learning_rate(config, state.step, total)

        def step_leaf(path: tuple[Any, ...], leaf: Array, update: Array) -> Array:
            is_norm = path[-1].key.endswith("norm")
            return leaf - lr * (update if is_norm else update + weight_decay * leaf)

        params = jax.tree_util.tree_map_with_path(step_leaf, state.params, updates)
        return TrainState(params, opt_state, state.step + 1), loss

    state, losses = jax.lax.scan(one_step, state, None, length=config.steps_per_call)
    return state, losses.mean()


@functools.partial(jax.jit, static_argnames=("model",))
def _summed_losses(params: Params, windows: Int[Array, "b t1"], *, model: Llama) -> Float[Array, " b"]:
    return token_losses(model, params, windows).sum(axis=1)


def evaluate(model: Llama, params: Params, windows: Int[np.ndarray, "n t1"], batch_size: int) -> float:
    """Mean loss in nats per token over all windows."""
    total = 0.0
    for start in range(0, len(windows), batch_size):
        batch = windows[start : start + batch_size]
        padding = np.zeros((batch_size - len(batch), batch.shape[1]), batch.dtype)
        losses = _summed_losses(params, jnp.asarray(np.concatenate([batch, padding])), model=model)
        total += float(np.asarray(losses)[: len(batch)].sum())
    return total / (len(windows) * (windows.shape[1] - 1))


def held_out_windows(tokens: UInt16[np.ndarray, " n"], context: int) -> Int[np.ndarray, "w t1"]:
    """Windows whose targets do not overlap; the last, partial one is dropped."""
    count = (len(tokens) - 1) // context
    return np.stack([tokens[i * context : (i + 1) * context + 1] for i in range(count)]).astype(np.int32)


def train(
    model: Llama,
    tokens: UInt16[Array, " n"],
    windows: Int[np.ndarray, "w t1"],
    config: TrainConfig,
    weight_decay: float,
    *,
    steps: int | None,
    minutes: float,
) -> Run:
    """One run, which ends with a fully decayed learning rate after `steps` or, without it, `minutes`.

    The time box becomes a number of steps by the speed measured so far, after each call anew.
    """
    begun = time.monotonic()
    state = start_state(model=model, seed=config.seed)
    step, total = 0, steps or 10**9
    best_loss, best_params, curve, losses = math.inf, state.params, [], []
    while step < total:
        scalars = jnp.int32(total), jnp.float32(weight_decay)
        state, loss = train_steps(state, tokens, *scalars, model=model, config=config)
        step += config.steps_per_call
        losses.append(float(loss))
        elapsed_s = time.monotonic() - begun
        if steps is None:
            calls_left = (minutes * 60 / elapsed_s - 1) * step / config.steps_per_call
            total = step + max(int(calls_left), 0) * config.steps_per_call
        if step >= total or len(losses) == config.calls_per_report:
            held_out_loss = evaluate(model, state.params, windows, config.batch_size)
            speed = step * config.batch_size * config.context / elapsed_s
            curve.append(_report(step, total, losses, held_out_loss, speed, elapsed_s))
            losses = []
            if held_out_loss < best_loss:
                best_loss, best_params = held_out_loss, jax.tree.map(jnp.copy, state.params)
    return Run(
        params=best_params,
        weight_decay=weight_decay,
        held_out_loss=best_loss,
        train_loss=float(curve[-1]["loss"]),
        steps=step,
        minutes=(time.monotonic() - begun) / 60,
        tokens_per_s=float(curve[-1]["tokens_per_s"]),
        curve=curve,
    )


def _report(
    step: int, total: int, losses: list[float], held_out_loss: float, speed: float, elapsed_s: float
) -> Report:
    """Prints one line of JSON and returns what it says."""
    line: Report = {
        "step": step,
        "planned_steps": total,
        "loss": round(sum(losses) / len(losses), 4),
        "held_out_loss": round(held_out_loss, 4),
        "tokens_per_s": round(speed),
        "elapsed_s": round(elapsed_s, 1),
    }
    print(json.dumps(line), flush=True)
    return line


@functools.partial(jax.jit, static_argnames=("model",))
def _complete(
    params: Params,
    tokens: Int[Array, "b t"],
    lengths: Int[Array, " b"],
    temperature: Float[Array, ""],
    *,
    model: Llama,
) -> Int[Array, "b t"]:
    """Fills each row of `tokens` behind its prompt; recomputes the whole sequence for every token."""

    def one_token(i: Array, tokens: Int[Array, "b t"]) -> Int[Array, "b t"]:
        logits = jax.lax.dynamic_index_in_dim(model.forward(params, tokens), i - 1, axis=1, keepdims=False)
        # Scaling the noise instead of the logits makes temperature 0 greedy.
        logits += temperature * jax.random.gumbel(jax.random.fold_in(jax.random.key(0), i), logits.shape)
        given = jax.lax.dynamic_index_in_dim(tokens, i, axis=1, keepdims=False)
        drawn = jnp.argmax(logits, axis=-1).astype(tokens.dtype)
        return tokens.at[:, i].set(jnp.where(i < lengths, given, drawn))

    return jax.lax.fori_loop(1, tokens.shape[1], one_token, tokens)


def sample(
    model: Llama,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    temperature: float,
    num_tokens: int = 192,
) -> list[dict[str, Any]]:
    """Completes the prompts to `num_tokens` in all, or to the end of the text, with bfloat16 weights."""
    encoded = [tokenizer.encode(prompt).ids for prompt in prompts]
    tokens = np.zeros((len(prompts), num_tokens), np.int32)
    for row, ids in zip(tokens, encoded, strict=True):
        row[: len(ids)] = ids
    lengths = jnp.asarray([len(ids) for ids in encoded], jnp.int32)
    low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    filled = np.asarray(_complete(low, jnp.asarray(tokens), lengths, jnp.float32(temperature), model=model))
    samples = []
    for prompt, ids, row in zip(prompts, encoded, filled, strict=True):
        new = row[len(ids) :].tolist()
        new = new[: new.index(END_OF_TEXT_ID)] if END_OF_TEXT_ID in new else new
        samples.append({"prompt": prompt, "temperature": temperature, "completion": tokenizer.decode(new)})
    return samples


def run_training(
    data: Path, out: Path, config: TrainConfig, shape: Callable[[int, int], ModelConfig] = demo_config
) -> dict[str, Any]:
    """Trains once per weight decay, writes the best model and its card into `out`; returns the log."""
    tokenizer = Tokenizer.from_file(str(data / "tokenizer.json"))
    model = Llama(shape(tokenizer.get_vocab_size(), config.context), jnp.dtype(jnp.bfloat16))
    tokens = jnp.asarray(np.load(data / "train.npy"))
    windows = held_out_windows(np.load(data / "held_out.npy"), config.context)
    end = time.monotonic() + config.minutes * 60
    # One throwaway call compiles everything, so that every run gets the same share of the time box.
    train(model, tokens, windows, config, 0.0, steps=config.steps_per_call, minutes=0.0)
    minutes = max(end - time.monotonic(), 1.0) / 60 / len(config.weight_decays)
    runs: list[Run] = []
    for weight_decay in config.weight_decays:
        print(json.dumps({"run": len(runs), "weight_decay": weight_decay, "minutes": minutes}), flush=True)
        runs.append(train(model, tokens, windows, config, weight_decay, steps=config.steps, minutes=minutes))
    best = min(runs, key=lambda run: run.held_out_loss)
    target_bytes = int(bytes_per_token(tokenizer)[windows[:, 1:]].sum())
    nats = best.held_out_loss * windows[:, 1:].size
    samples = [
        line
        for temperature in (0.0, SAMPLE_TEMPERATURE)
        for line in sample(model, best.params, tokenizer, PROMPTS, temperature)
    ]
    log = {
        "setup": asdict(config)
        | {"tokens_per_step": config.batch_size * config.context, "device": jax.devices()[0].device_kind},
        "corpus": json.loads((data / "corpus.json").read_text()),
        "result": _numbers(best)
        | {
            "perplexity": math.exp(best.held_out_loss),
            "bits_per_byte": nats / math.log(2) / target_bytes,
            "num_params": sum(leaf.size for leaf in jax.tree.leaves(best.params)),
        },
        "runs": [_numbers(run) | {"curve": run.curve} for run in runs],
        "samples": samples,
    }
    save_checkpoint(out, best.params, model.config, data=data, log=log)
    return log


def _numbers(run: Run) -> dict[str, Any]:
    names = ("weight_decay", "held_out_loss", "train_loss", "steps", "minutes", "tokens_per_s")
    return {name: getattr(run, name) for name in names}


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True)
    prepare_command, train_command = commands.add_parser("prepare"), commands.add_parser("train")
    for command in (prepare_command, train_command):
        command.add_argument("--data", type=Path, default=Path("build/demo"), help="tokens, tokenizer")
        command.add_argument("--stdlib", type=Path, nargs="+", default=[stdlib_folder()], help=".py files")
        command.add_argument("--seed", type=int, default=0)
    default = TrainConfig()
    add = train_command.add_argument
    add("--out", type=Path, default=Path("build/demo/model"))
    add("--minutes", type=float, default=default.minutes, help="time box of all runs together")
    add("--steps", type=int, help="of each run, in place of --minutes")
    add("--batch-size", type=int, default=default.batch_size)
    add("--peak-lr", type=float, default=default.peak_lr)
    add("--weight-decay", type=float, nargs="+", default=default.weight_decays, help="one run each")
    add("--steps-per-call", type=int, default=default.steps_per_call)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = _arguments(argv)
    if args.command == "prepare" or not (args.data / "train.npy").exists():
        prepare(args.stdlib, args.data, seed=args.seed)
    if args.command == "prepare":
        return
    config = TrainConfig(
        minutes=args.minutes,
        steps=args.steps,
        batch_size=args.batch_size,
        peak_lr=args.peak_lr,
        weight_decays=tuple(args.weight_decay),
        steps_per_call=args.steps_per_call,
        seed=args.seed,
    )
    log = run_training(args.data, args.out, config)
    for line in log["samples"]:
        print(f"--- temperature {line['temperature']}\n{line['prompt']}\N{BLACK SQUARE}{line['completion']}")
    print(json.dumps(log["result"]))


if __name__ == "__main__":
    main()
