"""Let the uninformative tokens of DeiT-S idle, on one real photograph."""

import urllib.error
import urllib.request

import timm
import torch
from huggingface_hub import constants
from matplotlib import cbook
from PIL import Image

import idlefx
from idlefx.bench import bench

PICTURE = "quickstart.png"


def dense_model() -> torch.nn.Module:
    """DeiT-S with its published weights if the hub answers, with random ones otherwise."""
    try:
        urllib.request.urlopen(constants.ENDPOINT, timeout=3).close()
    except (urllib.error.URLError, TimeoutError):
        constants.HF_HUB_OFFLINE = True  # look into the cache only, instead of retrying for a minute
    torch.manual_seed(0)
    name = "deit_small_patch16_224"
    try:
        model = timm.create_model(name, pretrained=True)
        print(f"{name} with its published weights")
    except (OSError, RuntimeError):
        model = timm.create_model(name)
        print(f"{name} with RANDOM weights: the hub does not answer, so the choice of tokens means little")
    return model.eval()


def photograph(model: torch.nn.Module) -> tuple[str, torch.Tensor]:
    """The portrait of Grace Hopper that matplotlib ships: its file, and the batch (1, 3, 224, 224)."""
    from timm.data import create_transform, resolve_model_data_config

    path = cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
    return path, create_transform(**resolve_model_data_config(model))(Image.open(path)).unsqueeze(0)


def label(logits: torch.Tensor) -> str:
    """ImageNet's name for the likeliest class."""
    from timm.data import ImageNetInfo

    return ImageNetInfo().index_to_description(int(logits.argmax()))


def title(text: str) -> None:
    print(f"\n{text}\n{'=' * len(text)}")


@torch.inference_mode()
def main() -> None:
    dense = dense_model()
    path, x = photograph(dense)

    title("What was found in the model")
    print(idlefx.inspect(dense))

    title("What will idle")  # blocks 3–5 keep 70 % of the tokens, 6–8 keep 49 %, 9–11 keep 34 %
    idle = idlefx.convert(dense, layers=[3, 6, 9], keep=0.7)
    print(idle.plan)

    title("What it saves")
    print(idlefx.report(idle))

    title("What it computes")
    all_kept = idlefx.convert(dense, layers=[3, 6, 9], keep=1.0)
    print("keeping every token gives the dense model's output:", torch.equal(all_kept(x), dense(x)))
    ours, theirs = idle(x), dense(x)
    print(f"without fine-tuning, idling moves the logits by {(ours - theirs).norm() / theirs.norm():.1%}")
    print(f"the idling model sees: {label(ours)}; the dense one: {label(theirs)}")

    title("What it takes")
    print(bench(dense, idle, x, batches=[1, 8], compiled=False))

    title("What it looks at")
    print(idlefx.draw(idle, path, PICTURE))


if __name__ == "__main__":
    main()
