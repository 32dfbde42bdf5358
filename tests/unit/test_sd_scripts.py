"""kohya.sd_scripts: the checkout that is found, and what is said of one that is not the pinned one."""

from pathlib import Path

import pytest

from kohya import sd_scripts
from kohya.config import Kind
from kohya.sd_scripts import MissingSdScripts, SdScripts, find

BLOBS = {  # git ls-tree v0.10.1
    "train_network.py": "2f8797d25a38b09623ffd62505fdb0e803b9aa69",
    "sdxl_train_network.py": "5c5bcd63a371fa8bec758ab7360112549b0de6c4",
    "library/train_util.py": "d8577b9d7ff0787cf98225d8c6690aac098afd7f",
    "networks/lora.py": "1699a60ff0832e0718dfee7df975150107de63cc",
}


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of files that count as those of the pinned commit while they are empty."""
    for name in BLOBS:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setenv("SD_SCRIPTS_DIR", str(tmp_path))
    monkeypatch.setenv("SD_SCRIPTS_PYTHON", "/a/python")
    blob = sd_scripts._blob
    assert blob(tmp_path / "networks/lora.py") == "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"  # git's for b""

    def pretended(file: Path) -> str:
        return blob(file) if file.read_bytes() else BLOBS[file.relative_to(tmp_path).as_posix()]

    monkeypatch.setattr(sd_scripts, "_blob", pretended)
    return tmp_path


def test_the_pinned_checkout_is_found(checkout: Path) -> None:
    assert find() == SdScripts(checkout, Path("/a/python"))


@pytest.mark.parametrize("name", BLOBS)
def test_a_checkout_that_lacks_a_file_or_has_another(name: str, checkout: Path) -> None:
    (checkout / name).write_text("another version")
    with pytest.raises(MissingSdScripts) as told:
        find()
    assert str(told.value) == f"{checkout / name} is not the one of sd-scripts v0.10.1 (commit ae72efb9)"
    (checkout / name).unlink()
    with pytest.raises(MissingSdScripts) as told:
        find()
    assert str(told.value) == f"sd-scripts is not in {checkout}: there is no {name}"


@pytest.mark.parametrize(
    ("kind", "script"), [("sd15", "train_network.py"), ("sdxl", "sdxl_train_network.py")]
)
def test_each_kind_has_its_script(kind: Kind, script: str) -> None:
    command = SdScripts(Path("/s"), Path("/a/python")).command(kind, Path("/c.toml"))
    assert command == ["/a/python", "-m", "kohya.launch", f"/s/{script}", "--config_file=/c.toml"]
    several = SdScripts(Path("/s"), Path("/a/python")).command(kind, Path("/c.toml"), 2)
    assert several[:3] == ["/a/python", "-m", "accelerate.commands.launch"]
    assert several[-4:] == command[1:]
