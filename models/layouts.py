"""The layouts in which checkpoints store what architectures share, as rows of a weight table.

Each function returns the leaves of some parameters of `Block` or `Decoder`, those that the config asks for.
`name` and `prefix` are of the checkpoint, with "{layer}" for the layer's number; a tensor's kind, ".weight"
or ".bias", is appended here. `is_conv` says that matrices lie as [in, out] (Conv1D) and not as [out, in].
"""

from collections.abc import Mapping
from typing import Literal

from pjengine.models.config import ModelConfig
from pjengine.models.weight_table import Cut, Leaf, Source

type Leaves = dict[str, Leaf]


def plain(
    name: str,
    *,
    shape: tuple[int, ...] | None = None,
    reshape: tuple[int, ...] | None = None,
    transpose: tuple[int, ...] | None = None,
) -> Leaf:
    """One tensor, by its whole name."""
    return Leaf(sources=(Source(name=name, shape=shape, reshape=reshape, transpose=transpose),))


def norms(c: ModelConfig, names: Mapping[str, str]) -> Leaves:
    """Norms of rows, {parameter: name in the checkpoint}."""
    leaves: Leaves = {}
    for path, name in names.items():
        if c.has_norm_weight:
            leaves[path] = plain(f"{name}.weight")
        if c.has_norm_bias:
            leaves[f"{path}_bias"] = plain(f"{name}.bias")
    return leaves


def separate_qkv(
    c: ModelConfig,
    prefix: str,
    names: tuple[str, str, str] = ("q_proj", "k_proj", "v_proj"),
    num_paired: int = 0,
) -> Leaves:
    """Queries, keys and values in three tensors.

    Args:
      num_paired: dimensions of a head that the checkpoint rotates in pairs, as GPT-J does.
    """

    def sources(kind: str, tail: tuple[int, ...], transpose: tuple[int, ...] | None) -> tuple[Source, ...]:
        return tuple(
            Source(
                name=f"{prefix}.{name}.{kind}",
                shape=(c.num_kv_heads * width * c.head_dim, *tail),
                reshape=(c.num_kv_heads, width, c.head_dim, *tail),
                transpose=transpose,
                num_paired=num_paired if is_rotated else 0,
            )
            for name, width, is_rotated in zip(names, (c.group, 1, 1), (True, True, False), strict=True)
        )

    weights = sources("weight", (c.hidden_size,), (3, 0, 1, 2))
    leaves = {"layers/qkv": Leaf(sources=weights, concat_axis=2)}
    if c.qkv_bias:
        leaves["layers/qkv_bias"] = Leaf(sources=sources("bias", (), None), concat_axis=1)
    return leaves


def fused_qkv(
    c: ModelConfig, name: str, layout: Literal["blocks", "groups"], *, is_conv: bool = False
) -> Leaves:
    """Queries, keys and values in one tensor.

    Args:
      layout: "blocks": all queries, then all keys, then all values; "groups": for each KV head its queries,
        its key and its value. With as many KV heads as heads: thirds, and [heads, 3, head_dim].
    """
    q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim

    def leaf(kind: str) -> Leaf:
        is_weight = kind == "weight"
        tail = (c.hidden_size,) if is_weight and not is_conv else ()
        lead = (c.hidden_size,) if is_weight and is_conv else ()
        transpose = (3, 0, 1, 2) if tail else None
        full, whole = f"{name}.{kind}", (*lead, q + 2 * kv, *tail)
        if layout == "groups":
            heads = (c.num_kv_heads, c.group + 2, c.head_dim)
            return plain(full, shape=whole, reshape=(*lead, *heads, *tail), transpose=transpose)
        sources = []
        for start, size, width in ((0, q, c.group), (q, kv, 1), (q + kv, kv, 1)):
            cut = Cut(start=start, stop=start + size, size=q + 2 * kv, axis=len(lead))
            shape = (*lead, c.num_kv_heads, width, c.head_dim, *tail)
            sources.append(Source(name=full, shape=whole, cut=cut, reshape=shape, transpose=transpose))
        return Leaf(sources=tuple(sources), concat_axis=2 if is_weight else 1)

    leaves = {"layers/qkv": leaf("weight")}
    if c.qkv_bias:
        leaves["layers/qkv_bias"] = leaf("bias")
    return leaves


def qk_norms(c: ModelConfig, q: str, k: str, num_paired: int = 0, *, has_head_axis: bool = False) -> Leaves:
    """The norms of queries and keys, each in one tensor; `num_paired` as in `separate_qkv`.

    Args:
      has_head_axis: the tensor of a norm over all heads is [heads, head_dim] and not [heads * head_dim].
    """
    leaves: Leaves = {}
    for path, name, group in (("q_norm", q, c.group), ("k_norm", k, 1)):
        heads = c.num_kv_heads * group
        axes: tuple[int, ...] = (c.num_kv_heads, group, c.head_dim)
        whole: tuple[int, ...] = (heads, c.head_dim) if has_head_axis else (heads * c.head_dim,)
        if c.qk_norm == "head":
            axes = whole = (c.head_dim,)
        for kind, suffix in (("weight", ""), ("bias", "_bias"))[: 1 + c.has_qk_norm_bias]:
            source = Source(name=f"{name}.{kind}", shape=whole, reshape=axes, num_paired=num_paired)
            leaves[f"layers/{path}{suffix}"] = Leaf(sources=(source,))
    return leaves


def out_proj(c: ModelConfig, name: str, *, is_conv: bool = False) -> Leaves:
    """What attention's heads go through together."""
    heads, width = (c.num_kv_heads, c.group, c.head_dim), c.num_heads * c.head_dim
    if is_conv:
        leaf = plain(f"{name}.weight", shape=(width, c.hidden_size), reshape=(*heads, c.hidden_size))
    else:
        shape, axes = (c.hidden_size, width), (c.hidden_size, *heads)
        leaf = plain(f"{name}.weight", shape=shape, reshape=axes, transpose=(1, 2, 3, 0))
    leaves = {"layers/out": leaf}
    if c.out_bias:
        leaves["layers/out_bias"] = plain(f"{name}.bias")
    return leaves


def gated_mlp(
    c: ModelConfig, prefix: str, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
) -> Leaves:
    """Gate, up and down in three tensors."""
    gate, up, down = names

    def gate_up(kind: str, tail: tuple[int, ...], transpose: tuple[int, ...] | None, axis: int) -> Leaf:
        sources = tuple(
            Source(
                name=f"{prefix}.{name}.{kind}",
                shape=(c.intermediate_size, *tail),
                reshape=(1, c.intermediate_size, *tail),
                transpose=transpose,
            )
            for name in (gate, up)
        )
        return Leaf(sources=sources, concat_axis=axis)

    leaves = {"layers/gate_up": gate_up("weight", (c.hidden_size,), (2, 0, 1), 1)}
    if c.mlp_bias:
        leaves["layers/gate_up_bias"] = gate_up("bias", (), None, 0)
    return leaves | _down(c, f"{prefix}.{down}")


def fused_gated_mlp(c: ModelConfig, gate_up: str, down: str) -> Leaves:
    """Gate and up in one tensor, the gate first."""
    rows, halves = (2 * c.intermediate_size,), (2, c.intermediate_size)
    weight, halves_of_weight = (*rows, c.hidden_size), (*halves, c.hidden_size)
    leaves = {
        "layers/gate_up": plain(
            f"{gate_up}.weight", shape=weight, reshape=halves_of_weight, transpose=(2, 0, 1)
        )
    }
    if c.mlp_bias:
        leaves["layers/gate_up_bias"] = plain(f"{gate_up}.bias", shape=rows, reshape=halves)
    return leaves | _down(c, down)


def plain_mlp(c: ModelConfig, up: str, down: str, *, is_conv: bool = False) -> Leaves:
    """An MLP without a gate."""
    leaves = {"layers/up": plain(f"{up}.weight", transpose=None if is_conv else (1, 0))}
    if c.mlp_bias:
        leaves["layers/up_bias"] = plain(f"{up}.bias")
    return leaves | _down(c, down, is_conv=is_conv)


def _down(c: ModelConfig, name: str, *, is_conv: bool = False) -> Leaves:
    leaves = {"layers/down": plain(f"{name}.weight", transpose=None if is_conv else (1, 0))}
    if c.mlp_bias:
        leaves["layers/down_bias"] = plain(f"{name}.bias")
    return leaves


def experts(c: ModelConfig, router: str, prefix: str, names: tuple[str, str, str]) -> Leaves:
    """A router, and experts whose gate, up and down are tensors of their own: "{prefix}.3.{name}.weight"."""
    gate, up, down = (f"{prefix}.{{expert}}.{name}.weight" for name in names)
    assert c.experts is not None
    shape = (c.experts.inner_size, c.hidden_size)
    halves = tuple(
        Source(name=name, shape=shape, reshape=(1, *shape), transpose=(2, 0, 1)) for name in (gate, up)
    )
    return {
        "layers/router": plain(f"{router}.weight", transpose=(1, 0)),
        "layers/expert_gate_up": Leaf(sources=halves, concat_axis=1),
        "layers/expert_down": plain(down, transpose=(1, 0)),
    }


def with_experts(c: ModelConfig, leaves: Leaves, experts: Leaves) -> Leaves:
    """Leaves of a model with MLPs to those of one with experts, where only `dense_layers` keep their MLP."""
    mlp = ("layers/gate_up", "layers/down")
    dense = {f"dense_{path}": leaf for path, leaf in leaves.items() if path.startswith("layers/")}
    others = {path: leaf for path, leaf in leaves.items() if path not in mlp}
    return others | experts | (dense if c.dense_layers else {})


def head(c: ModelConfig, name: str = "lm_head", *, has_unit_rows: bool = False) -> Leaves:
    """The output layer; nothing where it is tied to the embeddings (see `tied_copies`)."""
    leaves: Leaves = {}
    if not c.tie_word_embeddings:
        leaves["head"] = Leaf(sources=(Source(name=f"{name}.weight", has_unit_rows=has_unit_rows),))
    if c.head_bias:
        leaves["head_bias"] = plain(f"{name}.bias")
    return leaves


def tied_copies(c: ModelConfig, name: str = "lm_head") -> tuple[str, ...]:
    """Checkpoints of tied models may hold the embeddings twice: the second copy, to be ignored."""
    return (f"{name}.weight",) if c.tie_word_embeddings else ()
