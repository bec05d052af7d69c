"""How a generated Vision Transformer is spelled: what can be chosen, and which choices fit together."""

from dataclasses import dataclass, fields, replace
from typing import Any

HAND_WRITTEN = ("matmul", "permute", "einsum", "einsum_bnhd", "bmm", "baddbmm")
TOKENS_BEFORE_HEADS = ("permute", "einsum_bnhd")
MULTIHEAD = ("multihead", "multihead_weights")

CHOICES: dict[str, tuple[Any, ...]] = {
    "core": ("sdpa", *HAND_WRITTEN, *MULTIHEAD),
    "scale": ("default", "before", "after", "divided", "both", "learned", "learned_per_head"),
    "projection": ("fused", "chunked", "interleaved", "separate", "key_value", "raw", "raw_heads"),
    "groups": ("none", "repeated", "expanded", "native", "broadcast"),
    "mask": ("none", "float", "boolean", "diagonal", "diagonal_added"),
    "bias": ("none", "table", "distances", "computed_distances"),
    "rotary": ("none", "given", "computed", "image_only", "complex"),
    "qk_norm": ("none", "layer", "written", "cosine"),
    "talking": ("none", "linear", "einsum"),
    "dropout": (False, True),
    "block": (
        "pre", "post", "sandwich", "parallel", "parallel_norms", "mlp_first", "branches", "two_cores", "nested",
        "attention_only",
    ),
    "residual": ("plain", "half", "alpha", "layer_scale", "shortcut", "in_place"),
    "mlp": ("plain", "gated", "glu", "flattened", "raw", "pointwise_convolution"),
    "norm": ("layer", "rms", "written", "affine", "none"),
    "tokens_first": (False, True),
    "shared": (False, True),
    "prefix": (1, 0, 2, 3),
    "place": ("front", "end", "split", "class_last", "late"),
    "positions": ("learned", "image", "none", "inside", "queries"),
    "head": ("class", "class_and_mean", "mean", "mean_of_all", "pooling", "image_pooling", "dense"),
    "inputs": ("image", "label", "label_token", "modulated", "valid"),
    "around": ("none", "stem", "neck", "both"),
    "injected": (False, True),
    "batch": ("shape", "len", "implicit"),
    "outputs": ("tensor", "dict", "dataclass", "features", "skips"),
    "collision": ("none", "width", "head", "hidden", "all"),
    "grid": ((4, 4), (3, 5), (2, 6)),
    "unfit": (
        "none", "depthwise", "token_mean", "token_norm", "token_mlp", "token_shift", "token_sum", "squeeze",
        "reduced_keys", "overlapping", "written_buffer", "autocast",
    ),
    "gradient": ("plain", "reversed", "reversed_in_blocks", "hooked", "module_hook"),
    "buffer": ("none", "in_place", "reassigned", "copied"),
    "statistics": (False, True),
    "region": ("none", "no_grad", "no_grad_write", "no_grad_in_blocks", "autocast", "autocast_attention"),
    "flag": ("none", "number", "switch"),
    "modes": ("eval", "train", "frozen_blocks", "frozen_statistics", "sampling"),
    "wrapper": ("none", "compiled", "parallel", "both", "compiled_block", "forward_hook"),
    "depth": (3, 2, 1),
}  # fmt: skip

MOSTLY_THE_SIMPLEST = {  # how many more times the simplest choice is drawn than each of the others
    "batch": 9, "dropout": 2, "unfit": 18, "collision": 4, "gradient": 12, "buffer": 2, "statistics": 2, "region": 6,
    "flag": 1, "modes": 1, "wrapper": 6,
}  # fmt: skip


@dataclass(frozen=True, repr=False)
class Config:
    """How a model is spelled; `CHOICES` lists what each field may say, the simplest first."""

    core: str = "sdpa"
    scale: str = "default"
    projection: str = "fused"
    groups: str = "none"
    mask: str = "none"
    bias: str = "none"
    rotary: str = "none"
    qk_norm: str = "none"
    talking: str = "none"
    dropout: bool = False
    block: str = "pre"
    residual: str = "plain"
    mlp: str = "plain"
    norm: str = "layer"
    tokens_first: bool = False
    shared: bool = False
    prefix: int = 1
    place: str = "front"
    positions: str = "learned"
    head: str = "class"
    inputs: str = "image"
    around: str = "none"
    injected: bool = False
    batch: str = "shape"
    outputs: str = "tensor"
    collision: str = "none"
    grid: tuple[int, int] = (4, 4)
    unfit: str = "none"
    gradient: str = "plain"
    buffer: str = "none"
    statistics: bool = False
    region: str = "none"
    flag: str = "none"
    modes: str = "eval"
    wrapper: str = "none"
    depth: int = 3

    def __repr__(self) -> str:
        said = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if getattr(self, f.name) != f.default]
        return f"Config({', '.join(said)})"

    @property
    def image_tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def tokens(self) -> int:
        return self.prefix + self.image_tokens

    @property
    def heads(self) -> int:
        if self.collision == "all":
            return 1
        return 2 if self.collision == "head" or self.width % 4 == 0 else 1

    @property
    def width(self) -> int:
        return {"width": self.tokens, "head": 2 * self.tokens, "all": 64}.get(self.collision, 24)

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def hidden(self) -> int:
        return self.tokens if self.collision in ("hidden", "all") else 2 * self.width

    @property
    def prefix_positions(self) -> tuple[int, ...]:
        front = {"end": 0, "split": min(self.prefix, 1)}.get(self.place, self.prefix)
        return (*range(front), *range(front + self.image_tokens, self.tokens))

    @property
    def image_start(self) -> int:
        """Where the image tokens begin, which stand side by side."""
        return next(p for p in range(self.tokens) if p not in self.prefix_positions)

    @property
    def class_position(self) -> int | None:
        """The class token: the one the head reads, or the first prefix token where it reads all tokens alike.

        A single prefix token is the class token even if the head reads image tokens only.
        """
        if self.prefix == 1:
            return self.prefix_positions[0]
        if self.head in ("mean", "image_pooling") or not self.prefix:
            return None
        if self.head in ("class", "class_and_mean") and self.place == "class_last":
            return self.prefix_positions[-1]
        return self.prefix_positions[0]

    def prefix_at(self, block: int) -> tuple[int, ...]:
        """The prefix that a block sees."""
        return () if self.place == "late" and block < self.depth - 1 else self.prefix_positions

    def class_at(self, block: int) -> int | None:
        """The class token that a block sees."""
        return self.class_position if self.prefix_at(block) else None

    def can_idle(self, block: int) -> bool:
        return self.unfit == "none" or block != 1

    def reset(self, *names: str, **values: tuple[Any, ...]) -> "Config":
        """With fields back at their defaults: those named, and those that hold one of the given values."""
        wrong = [*names, *(name for name, bad in values.items() if getattr(self, name) in bad)]
        return replace(self, **{f.name: f.default for f in fields(self) if f.name in wrong})

    def normalised(self) -> "Config":
        """The nearest config whose parts fit together."""
        c = self
        if c.outputs == "skips" or c.unfit != "none" or c.block == "mlp_first":
            c = c.reset("depth")  # there must be one in the middle, or several, to tell whose the MLPs are
        elif c.depth == 1 and (c.place == "late" or c.outputs == "features"):
            c = replace(c, depth=2)
        elif c.block in ("attention_only", "parallel", "parallel_norms") and c.around in ("neck", "both"):
            c = c.reset("depth")  # behind one block that ends with its attention, a residual layer looks like its MLP
        if c.unfit in ("overlapping", "reduced_keys"):
            c = replace(c, prefix=0).reset("core", "grid", "mask", "bias", "rotary", "groups", "positions")
            c = c.reset(inputs=("label_token", "valid"))
        if c.unfit != "none":
            c = c.reset("block", "tokens_first", "shared", "place", "collision", residual=("in_place",))
        if c.collision == "all":
            c = replace(c, grid=(8, 8), prefix=0).reset(inputs=("label_token",))
        if c.inputs == "label_token":
            c = replace(c, prefix=max(c.prefix, 1))
        if c.prefix == 0:
            c = replace(c.reset("place"), head="mean" if c.head in ("class", "class_and_mean") else c.head)
        if c.place == "late":
            c = replace(c, positions="image").reset("mask", "bias", "rotary", "injected", "outputs", "block")
            c = c.reset(inputs=("label_token", "valid"))
        if c.core in MULTIHEAD:
            c = c.reset("scale", "projection", "groups", "rotary", "qk_norm", "talking")
        if c.core == "sdpa":
            c = c.reset("talking", scale=("before", "divided", "both", "learned", "learned_per_head"))
        if c.core in ("bmm", "baddbmm"):
            c = c.reset("talking")
        if c.core == "baddbmm":
            c = c.reset(scale=("divided", "learned", "learned_per_head"))
        if c.inputs == "valid":
            c = c.reset(mask=("boolean", "diagonal", "diagonal_added"))
        takes_groups = {"native": ("sdpa",), "broadcast": ("matmul", "permute")}
        if c.core not in takes_groups.get(c.groups, (c.core,)):
            c = replace(c, groups="repeated")
        if c.heads == 1:
            c = c.reset("groups", "talking")
        if c.groups != "none" and c.projection not in ("separate", "key_value", "raw"):
            c = replace(c, projection="separate")
        if c.tokens_first:
            c = c.reset(mlp=("pointwise_convolution",))
        if c.head_width % 2:
            c = c.reset("rotary")
        if c.block == "mlp_first":  # with a skip in front of some blocks only, nothing tells whose the MLPs are
            c = c.reset(outputs=("skips",))
        if c.block == "post":
            c = c.reset(norm=("none",))
        if c.head == "dense":
            c = c.reset(outputs=("features",))
        if c.buffer == "reassigned":  # keeps the batch free in one way of tracing only, which `len(x)` does not stand
            c = c.reset(batch=("len",), unfit=("depthwise",))
        if c.gradient == "reversed_in_blocks":  # torch writes into no view that a function of one's own has made
            c = c.reset(residual=("in_place",))
        if c.modes == "frozen_statistics":
            c = replace(c, statistics=True)
        return c

    def is_deterministic(self, training: bool) -> bool:
        """Whether the model draws no random numbers in a mode, or only in its head."""
        frozen = self.modes == "frozen_blocks" or not self.dropout
        return frozen if training else True
