"""A private Vision Transformer that no library knows: converted, checked, drawn, fine-tuned, packaged and served.

It has what tools written for one library trip over: rotary embedding on the image tokens only, registers at the
end of the sequence, blocks made of raw parameters, and attention spelled by hand. Run it from the folder above, as
`python -m examples.in_house`, where the script that is emitted can import the model too.
"""

import math
import subprocess
import sys

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import idlefx
from idlefx.demo.scenes import CLASSES
from idlefx.runtime.selections import selections

WIDTH, HEADS, DEPTH, GRID, PATCH, REGISTERS = 96, 4, 6, 7, 16, 2


def rotary_tables() -> tuple[Tensor, Tensor]:
    """Cosines and sines of every patch's row and column, (GRID², WIDTH / HEADS)."""
    quarter = WIDTH // HEADS // 4
    frequencies = 100.0 ** (-torch.arange(quarter) / quarter)
    rows, columns = torch.meshgrid(torch.arange(GRID), torch.arange(GRID), indexing="ij")
    angles = torch.cat([rows.reshape(-1, 1) * frequencies, columns.reshape(-1, 1) * frequencies], dim=1)
    return angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)


class RawBlock(nn.Module):
    """A pre-norm block in plain tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.ParameterDict({name: nn.Parameter(torch.ones(WIDTH)) for name in ("attention", "mlp")})
        self.qkv = nn.Parameter(torch.randn(WIDTH, 3 * WIDTH) / math.sqrt(WIDTH))
        self.out = nn.Parameter(torch.randn(WIDTH, WIDTH) / math.sqrt(WIDTH))
        self.up = nn.Parameter(torch.randn(WIDTH, 4 * WIDTH) / math.sqrt(WIDTH))
        self.down = nn.Parameter(torch.randn(4 * WIDTH, WIDTH) / math.sqrt(4 * WIDTH))

    def norm(self, x: Tensor, scale: Tensor) -> Tensor:
        """RMS norm."""
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * scale

    def rotate(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """Turn the image tokens, which stand between the class token and the registers."""
        front, image, back = x[:, :, :1], x[:, :, 1:-REGISTERS], x[:, :, -REGISTERS:]
        a, b = image.chunk(2, dim=-1)
        return torch.cat([front, image * cosine + torch.cat([-b, a], dim=-1) * sine, back], dim=2)

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """Attention and MLP on x (B, N, C)."""
        batch, count, width = x.shape
        qkv = self.norm(x, self.scale["attention"]) @ self.qkv
        q, k, v = qkv.view(batch, count, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        q, k = self.rotate(q, cosine, sine), self.rotate(k, cosine, sine)
        weights = (torch.einsum("bhqd,bhkd->bhqk", q, k) / math.sqrt(q.shape[-1])).softmax(-1)
        x = x + (weights @ v).transpose(1, 2).reshape(batch, count, width) @ self.out
        return x + F.gelu(self.norm(x, self.scale["mlp"]) @ self.up) @ self.down


class InHouseViT(nn.Module):
    """Class token in front, registers at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.class_token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.registers = nn.Parameter(torch.randn(1, REGISTERS, WIDTH))
        self.blocks = nn.ModuleList(RawBlock() for _ in range(DEPTH))
        self.head = nn.Linear(WIDTH, len(CLASSES))
        cosine, sine = rotary_tables()
        self.register_buffer("cosine", cosine, persistent=False)
        self.register_buffer("sine", sine, persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        """Logits (B, 24) of images (B, 3, 112, 112)."""
        x = self.patches(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x, self.registers.expand(len(x), -1, -1)], dim=1)
        for block in self.blocks:
            x = block(x, self.cosine, self.sine)
        return self.head(x[:, 0])


def build() -> nn.Module:
    """The model, for `--model examples.in_house:build`."""
    torch.manual_seed(0)
    return InHouseViT().eval()


def masked_reference(model: nn.Module, image: Tensor, kept: dict[int, Tensor]) -> Tensor:
    """Idling as masks: in a block the idle tokens are no keys, and their own update is thrown away."""

    def idling(block: nn.Module, index: Tensor):
        plain = block.forward

        def forward(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
            works = torch.zeros(x.shape[:2], dtype=torch.bool).scatter(1, index, True)
            hidden = torch.zeros(works.shape).masked_fill(~works, -math.inf)[:, None, None, :]
            softmax, Tensor.softmax = Tensor.softmax, lambda t, dim: torch.softmax(t + hidden, dim)  # type: ignore
            try:
                return torch.where(works[:, :, None], plain(x, cosine, sine), x)
            finally:
                Tensor.softmax = softmax  # type: ignore[method-assign]

        return forward

    for number, index in kept.items():
        model.blocks[number].forward = idling(model.blocks[number], index)
    return model(image)


def main() -> None:
    """Inspect, convert and compare; then emit, tune for two steps, and load what that packaged."""
    model, image = build(), torch.randn(3, 3, GRID * PATCH, GRID * PATCH)
    print(idlefx.inspect(model, image[:2]))
    idle = idlefx.convert(model, layers=[2, 4], keep=0.6, example_inputs=image[:2])
    print(idle.plan, idlefx.report(idle), sep="\n\n")
    with torch.no_grad():
        dense = idlefx.convert(model, layers=[0], keep=1.0, example_inputs=image[:2])
        print("\nkeeping every token gives the model's own output:", torch.equal(dense(image), model(image)))
        expected = masked_reference(build(), image, selections(idle, image))
        error = (idle(image) - expected).norm() / expected.norm()
    print(f"relative difference to idling by masks: {error:.1e}")

    directory = idlefx.emit(idle, "in_house", model="examples.in_house:build", batch=(1, 64))
    print("\nemitted:", *sorted(path.name for path in directory.iterdir()))
    subprocess.run([sys.executable, directory / "finetune.py", "glyphs", "2"], check=True)
    served = idlefx.load(directory / "tuned.pt2")
    print("two steps later the artifact says", served(image).argmax(1).tolist(), "where the model said", end=" ")
    print(model(image).argmax(1).tolist())


if __name__ == "__main__":
    main()
