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
    "batch": ("shape", "len", "implicit"),
    "outputs": ("tensor", "dict", "features", "skips"),
    "collision": ("none", "width", "head", "hidden", "all"),
    "grid": ((4, 4), (3, 5), (2, 6)),
    "unfit": ("none", "depthwise", "token_mean", "token_norm", "reduced_keys", "windows", "token_mlp"),
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
    batch: str = "shape"
    outputs: str = "tensor"
    collision: str = "none"
    grid: tuple[int, int] = (4, 4)
    unfit: str = "none"
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
        """The class token: the one the head reads, or the first prefix token where it reads all tokens alike."""
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

    def normalised(self) -> "Config":
        """The nearest config whose parts fit together."""
        c, none = self, "none"
        if c.unfit in ("windows", "reduced_keys"):
            c = replace(c, core="sdpa", grid=(4, 4), mask=none, bias=none, rotary=none, groups=none, prefix=0)
            c = replace(c, inputs="image" if c.inputs in ("label_token", "valid") else c.inputs, positions="learned")
        if c.unfit != none:
            c = replace(c, block="pre", tokens_first=False, shared=False, place="front", collision=none)
            c = replace(c, residual="plain" if c.residual == "in_place" else c.residual)
        if c.collision == "all":
            c = replace(c, grid=(8, 8), prefix=0, inputs="image" if c.inputs == "label_token" else c.inputs)
        if c.inputs == "label_token":
            c = replace(c, prefix=max(c.prefix, 1))
        if c.prefix == 0:
            c = replace(c, place="front", head={"class": "mean", "class_and_mean": "mean"}.get(c.head, c.head))
        if c.place == "late":
            c = replace(c, mask=none, bias=none, rotary=none, positions="image", outputs="tensor", block="pre")
            c = replace(c, inputs="image" if c.inputs in ("label_token", "valid") else c.inputs)
        if c.core in MULTIHEAD:
            c = replace(c, scale="default", projection="fused", groups=none, rotary=none, qk_norm=none, talking=none)
        if c.core not in HAND_WRITTEN:
            c = replace(c, talking=none, scale=c.scale if c.scale in ("default", "after") else "default")
        if c.core in ("bmm", "baddbmm"):
            c = replace(c, talking=none)
        if c.core == "baddbmm":
            c = replace(c, scale="after" if "learned" in c.scale or c.scale == "divided" else c.scale)
        if c.inputs == "valid" and c.mask != "float":
            c = replace(c, mask=none)
        takes_groups = {"native": ("sdpa",), "broadcast": ("matmul", "permute")}
        if c.core not in takes_groups.get(c.groups, (c.core,)):
            c = replace(c, groups="repeated")
        if c.heads == 1:
            c = replace(c, groups=none, talking=none)
        if c.groups != none and c.projection in ("fused", "chunked", "interleaved", "raw_heads"):
            c = replace(c, projection="separate")
        if c.mlp == "pointwise_convolution" and c.tokens_first:
            c = replace(c, mlp="plain")
        if c.head_width % 2:
            c = replace(c, rotary=none)
        if c.block == "post" and c.norm == none:
            c = replace(c, norm="layer")
        if c.head == "dense" and c.outputs == "features":
            c = replace(c, outputs="dict")
        return c
