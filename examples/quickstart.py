"""Let the uninformative tokens of a trained model idle, and look at what it still looks at."""

import urllib.error
import urllib.request

import timm
import torch
from huggingface_hub import constants
from matplotlib import cbook
from PIL import Image
from timm.data import ImageNetInfo, create_transform, resolve_model_data_config

import idlefx
from idlefx.bench.runner import bench
from idlefx.bench.tables import render
from idlefx.demo.glyphs import Glyphs
from idlefx.demo.model import glyph_vit

PICTURE = "quickstart.png"


def trained_model() -> tuple[torch.nn.Module, list[str], list[Image.Image]]:
    """A model, the names of its classes, and images for it.

    DeiT-S and a portrait if the hub answers, or the small model that the package ships and scenes like those that it
    was trained on.
    """
    try:
        urllib.request.urlopen(constants.ENDPOINT, timeout=3).close()
    except (urllib.error.URLError, TimeoutError):
        constants.HF_HUB_OFFLINE = True  # look into the cache only, instead of retrying for a minute
    name = "deit_small_patch16_224"
    try:
        model = timm.create_model(name, pretrained=True)
    except (OSError, RuntimeError):
        print(f"The hub does not answer, so instead of {name} this is the model that idlefx ships.")
        scenes = Glyphs("test", size=5)
        return glyph_vit(), scenes.classes, [scenes.scene(number).image for number in range(5)]
    print(f"{name} with its published weights.")
    portrait = Image.open(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))
    return model.eval(), ImageNetInfo().label_descriptions(), [portrait]


def title(text: str) -> None:
    print(f"\n{text}\n{'=' * len(text)}")


@torch.inference_mode()
def main() -> None:
    dense, classes, images = trained_model()
    transform = create_transform(**resolve_model_data_config(dense))
    x = torch.stack([transform(image) for image in images])

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
    for name, logits in (("idling", ours), ("dense", theirs)):
        print(f"the {name} model sees:", ", ".join(classes[best] for best in logits.argmax(1)))

    title("What it takes")
    print(render(bench(dense, idle, x, batches=[1, 8], modes=["eager"])))

    title("What it looks at")
    print(idlefx.draw(idle, images, PICTURE))


if __name__ == "__main__":
    main()
