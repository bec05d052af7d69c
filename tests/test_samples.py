"""Sample photographs are kept whole or not at all; here nothing is downloaded."""

import zipfile

import pytest

from idlefx.demo import samples, wheels
from idlefx.demo.cache import sha256_of
from idlefx.errors import InputError


@pytest.fixture
def package(monkeypatch, tmp_path):
    """A cache that is empty, and a package with photographs whose hashes are known."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    content = {name: name.encode() * 100 for name in samples.SHA256}
    for name, photograph in content.items():
        (tmp_path / name).write_bytes(photograph)
    monkeypatch.setattr(samples, "SHA256", {name: sha256_of(tmp_path / name) for name in content})

    def run_tool(command, folder, wanted, remedy):
        assert command[-1] == "scikit-image" and "--no-deps" in command
        with zipfile.ZipFile(folder / "scikit_image.whl", "w") as wheel:
            for name, photograph in content.items():
                wheel.writestr(f"skimage/data/{name}", photograph)

    monkeypatch.setattr(wheels, "run_tool", run_tool)
    return content


def test_samples_are_fetched_once(package, monkeypatch):
    with pytest.raises(InputError, match=r"`python -m idlefx.demo fetch samples` gets scikit-image .*public domain"):
        samples.kept_samples()
    folder = samples.fetch_samples()
    assert [path.name for path in samples.kept_samples()] == ["grace_hopper.jpg", *package]
    assert all(path.is_file() for path in samples.kept_samples())
    monkeypatch.setattr(wheels, "run_tool", lambda *_: pytest.fail("fetched again"))
    assert samples.fetch_samples() == folder


def test_damaged_samples_are_fetched_anew(package):
    damaged = samples.fetch_samples() / "chelsea.png"
    damaged.write_bytes(b"half")
    with pytest.raises(InputError, match=r"damaged; .* gets it anew"):
        samples.kept_samples()
    samples.fetch_samples()
    assert damaged.read_bytes() == package["chelsea.png"]


def test_other_package_leaves_nothing(package):
    photograph = package.pop("chelsea.png")
    with pytest.raises(InputError, match=r"scikit_image\.whl is damaged or another: .*chelsea\.png"):
        samples.fetch_samples()
    package["chelsea.png"] = photograph + b"more"
    with pytest.raises(InputError, match="not those known here; nothing was kept"):
        samples.fetch_samples()
    assert list(samples.samples_path().parent.iterdir()) == []
