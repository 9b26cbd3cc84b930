"""Pictures of a schedule, with matplotlib: the extra `notebooks` installs it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from pjengine.step_record import CACHED, FREE, LONG_S, SHARED, RequestRecord, State, StepRecord

COLOURS = {
    State.WAITING: "#d4d4d8",
    State.PREFILL: "#f2a541",
    State.DECODE: "#3f7cac",
    State.HELD: "#c3dbec",
    State.PREEMPTED: "#c8374a",
}
NAMES = {
    State.WAITING: "waits",
    State.PREFILL: "prefill",
    State.DECODE: "decode",
    State.HELD: "holds its pages",
    State.PREEMPTED: "preempted",
}
WAIT_COLOUR = "#8b5e34"  # for a program
FOUND_COLOUR, FREE_COLOUR, CACHED_COLOUR, SHARED_COLOUR = "#63b598", "#ffffff", "#dfe5dd", "#1f2937"
TIMES = (("schedule", "#8d6a9f"), ("launch", "#dda15e"), ("read", "#64748b"), ("output", "#84a98c"))
MAX_LABELS = 40  # requests that are named
WIDTH_IN = 9.5


def plot_batch(
    labels: Sequence[str],
    steps: Sequence[StepRecord],
    states: UInt8[np.ndarray, "requests steps"],
    tokens: Int[np.ndarray, "requests steps"],
    cached_tokens: Int[np.ndarray, "requests steps"],
) -> Any:
    """Requests over steps, the tokens of each step, and the host's part of its time.

    Waits for a program to be made are named, and taken off the launch: one would flatten all other times.
    Where a request starts behind a cached prefix, its cell is divided as its tokens are.
    """
    rows_in = min(max(1.2, 0.24 * len(labels)), 7.0)
    figure, (batch, taken, times) = _figure((WIDTH_IN, rows_in + 3.6), [rows_in, 1.3, 1.3])
    numbers = np.array([own.number for own in steps])
    left = numbers - 0.5
    for state, colour in COLOURS.items():
        for index, begin, end in _runs(states == state):
            batch.broken_barh([(left[begin], end - begin)], (index - 0.4, 0.8), color=colour, linewidth=0)
    for index, column in np.argwhere(cached_tokens > 0).tolist():
        found = cached_tokens[index, column]
        share = 0.8 * found / (found + tokens[index, column])
        batch.broken_barh([(left[column], 1)], (index + 0.4 - share, share), color=FOUND_COLOUR, linewidth=0)
    batch.set_ylim(len(labels) - 0.5, -0.5)
    _name_rows(batch, labels)
    kinds = [(NAMES[state], colour) for state, colour in COLOURS.items() if (states == state).any()]
    if cached_tokens.any():
        kinds.append(("cached prefix", FOUND_COLOUR))
    _legend(batch, kinds)

    decoded, read = (
        np.array([getattr(own, name) for own in steps])
        for name in ("num_decode_tokens", "num_prefill_tokens")
    )
    padded = np.array([own.num_padded_tokens for own in steps])
    taken.bar(numbers, padded, width=0.9, color="none", edgecolor="#9ca3af", linewidth=0.6)
    taken.bar(numbers, decoded, width=0.9, color=COLOURS[State.DECODE])
    taken.bar(numbers, read, width=0.9, bottom=decoded, color=COLOURS[State.PREFILL])
    taken.set_ylabel("tokens")
    _legend(
        taken, [("padding", None), ("prefill", COLOURS[State.PREFILL]), ("decode", COLOURS[State.DECODE])]
    )

    made_s = np.array([own.compile_s for own in steps])
    bottom = np.zeros(len(steps))
    for name, colour in TIMES:
        own_s = np.array([getattr(own, f"{name}_s") or 0.0 for own in steps])
        own_ms = 1e3 * (np.maximum(own_s - made_s, 0.0) if name == "launch" else own_s)
        times.bar(numbers, own_ms, width=0.9, bottom=bottom, color=colour)
        bottom += own_ms
    _name_waits(times, numbers, made_s)
    times.set_ylabel("host, ms")
    times.set_xlabel("step")
    _legend(times, list(TIMES))
    times.set_xlim(left[0], left[-1] + 1)
    _whole_numbers(times)
    return figure


def plot_pages(
    labels: Sequence[str], steps: Sequence[StepRecord], owners: Int[np.ndarray, "pages steps"]
) -> Any:
    """The page pool over steps: each page in the colour of its request, or of what else it is."""
    figure, (axes,) = _figure((WIDTH_IN, 4.2), [1])
    from matplotlib.colors import ListedColormap, to_hex

    own = [to_hex(colour) for colour in _request_colours(len(labels))]
    special = {SHARED: SHARED_COLOUR, CACHED: CACHED_COLOUR, FREE: FREE_COLOUR}
    colours = [special[code] for code in sorted(special)] + own  # -3, -2, -1, then the requests
    image = owners[1:] - min(special)
    first, last = steps[0].number - 0.5, steps[-1].number + 0.5
    axes.imshow(
        image,
        cmap=ListedColormap(colours),
        vmin=-0.5,
        vmax=len(colours) - 0.5,
        aspect="auto",
        interpolation="nearest",
        origin="lower",
        extent=(first, last, 0.5, len(owners) - 0.5),
    )
    axes.set_ylabel("page")
    axes.set_xlabel("step")
    _whole_numbers(axes)
    kinds = [("shared", SHARED_COLOUR), ("cached", CACHED_COLOUR), ("free", FREE_COLOUR)]
    kinds += list(zip([f"request {label}" for label in labels], own, strict=True))[: MAX_LABELS // 2]
    _legend(axes, kinds)
    return figure


def plot_latencies(requests: Sequence[RequestRecord]) -> Any:
    """Histograms of TTFT and TPOT, in ms, with their medians."""
    figure, panels = _figure((WIDTH_IN, 2.8), [1, 1], is_beside=True)
    for axes, field, name in zip(
        panels, ("ttft_s", "tpot_s"), ("time to first token", "time per output token"), strict=True
    ):
        values_ms = [1e3 * s for own in requests if (s := getattr(own, field)) is not None]
        axes.set_xlabel(f"{name}, ms")
        axes.set_ylabel("requests")
        if not values_ms:
            axes.text(0.5, 0.5, "none yet", transform=axes.transAxes, ha="center")
            continue
        axes.hist(values_ms, bins=min(24, max(4, len(values_ms))), color=COLOURS[State.DECODE])
        median = float(np.median(values_ms))
        axes.axvline(median, color=COLOURS[State.PREEMPTED], linewidth=1.2, label=f"median {median:.1f}")
        axes.legend(frameon=False, fontsize=8)
        axes.yaxis.get_major_locator().set_params(integer=True)
    return figure


def _figure(size_in: tuple[float, float], sizes: Sequence[float], *, is_beside: bool = False) -> Any:
    """A figure that no global list knows, and its panels: below each other, with steps in common, or beside.

    Raises:
      ImportError: there is no matplotlib.
    """
    try:
        import matplotlib.pyplot  # noqa: F401 - teaches notebooks to show figures
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'pjengine[notebooks]'") from error
    figure = Figure(figsize=size_in, layout="constrained")
    if is_beside:
        panels = figure.subplots(1, len(sizes), squeeze=False)[0]
    else:
        panels = figure.subplots(len(sizes), 1, squeeze=False, sharex=True, height_ratios=sizes)[:, 0]
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    return figure, panels


def _runs(mask: np.ndarray) -> list[tuple[int, int, int]]:
    """Where a mask is true: row, first column, and the one behind the last."""
    edges = np.diff(np.pad(mask.astype(np.int8), ((0, 0), (1, 1))), axis=1)
    begins, ends = np.argwhere(edges == 1), np.argwhere(edges == -1)
    return [(int(row), int(begin), int(end)) for (row, begin), (_, end) in zip(begins, ends, strict=True)]


def _name_rows(axes: Any, labels: Sequence[str]) -> None:
    every = -(-len(labels) // MAX_LABELS)
    axes.set_yticks(range(0, len(labels), every), labels[::every])
    axes.set_ylabel("request")


def _name_waits(axes: Any, numbers: np.ndarray, waits_s: np.ndarray) -> None:
    """Marks the steps that waited long, above the panel, and says for how long it was in all."""
    long = waits_s > LONG_S
    if not long.any():
        return
    axes.plot(
        numbers[long],
        [1.0] * int(long.sum()),
        "v",
        color=WAIT_COLOUR,
        markersize=4,
        transform=axes.get_xaxis_transform(),
        clip_on=False,
    )
    axes.set_title(
        f"▾ waited for programs to be made: {waits_s[long].sum():.1f} s in all",
        fontsize=8,
        loc="right",
        color=WAIT_COLOUR,
    )


def _whole_numbers(axes: Any) -> None:
    axes.xaxis.get_major_locator().set_params(integer=True)


def _legend(axes: Any, kinds: Sequence[tuple[str, str | None]]) -> None:
    """Names of colours, right of a panel; None: an outline."""
    from matplotlib.patches import Patch

    patches = [
        Patch(facecolor=colour or "none", edgecolor="#9ca3af", linewidth=0.6, label=name)
        for name, colour in kinds
    ]
    axes.legend(
        handles=patches, frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0), borderpad=0
    )


def _request_colours(count: int) -> Any:
    """Hues that lie far apart for neighbours, and do not look like those of free or shared pages."""
    from matplotlib.colors import hsv_to_rgb

    indices = np.arange(count)
    return hsv_to_rgb(
        np.stack([indices * 0.618 % 1, 0.45 + 0.2 * (indices % 2), 0.92 - 0.14 * (indices % 3)], axis=-1)
    )
