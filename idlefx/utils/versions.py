"""Which versions made something."""

from importlib.metadata import version

VERSION = "0.1.0"


def versions(*packages: str) -> dict[str, str]:
    """The version of idlefx, which may run from a bare checkout, of torch, and of installed packages."""
    import torch  # which takes seconds, and whoever asks for VERSION alone has no use for it

    return {"idlefx": VERSION, "torch": torch.__version__, **{name: version(name) for name in packages}}
