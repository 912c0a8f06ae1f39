# SPDX-License-Identifier: Apache-2.0
"""Pretrained files: right or refused, from the first source that answers, and every failure explained."""

import dataclasses
import hashlib
import io
import tarfile
import zipfile

import pytest

from feature_extractors import ASSETS, AssetError, asset_path, cache_root, get_asset, sources
from feature_extractors.assets import CONVERTERS
from feature_extractors.catalogue import Asset, Carrier, NpmPackage

CONTENT = b"weights of a very small model"
ONE = Asset(
    name="tiny",
    description="a model for tests",
    files=("tiny.bin",),
    sha256={"tiny.bin": hashlib.sha256(CONTENT).hexdigest()},
    megabytes=1,
    carrier=Carrier(("tiny-carrier==1.0",), "tiny_carrier/model"),
)
FOLDER = dataclasses.replace(ONE, files=("config.json", "tiny.bin"))
FROM_NPM = dataclasses.replace(
    FOLDER, carrier=None, npm=NpmPackage("@someone/tiny-nets", "1.2.3", "package/model")
)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Registers an asset, points the cache to an empty folder and pip to a local folder of wheels."""
    (tmp_path / "wheels").mkdir()
    monkeypatch.setenv("MSA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))

    def register(asset: Asset) -> None:
        monkeypatch.setitem(ASSETS, "tiny", asset)

    return register


def write_wheel(tmp_path, name: str, files: dict[str, bytes]) -> None:
    """A wheel pip accepts, with the given files in it."""
    info = f"{name}-1.0.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
    wheel = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files = files | {f"{info}/METADATA": metadata.encode(), f"{info}/WHEEL": wheel.encode()}
    with zipfile.ZipFile(tmp_path / "wheels" / f"{name}-1.0-py3-none-any.whl", "w") as archive:
        for path, content in (files | {f"{info}/RECORD": b""}).items():
            archive.writestr(path, content)


def test_a_file_comes_from_its_address_and_is_not_fetched_twice(tmp_path, place):
    upstream = tmp_path / "upstream.bin"
    upstream.write_bytes(CONTENT)
    place(dataclasses.replace(ONE, url=upstream.as_uri()))
    said = []
    assert asset_path("tiny") is None
    path = get_asset("tiny", said.append)
    assert path == cache_root() / "models" / "tiny" / "tiny.bin" and path.read_bytes() == CONTENT
    assert "downloaded from file://" in said[-1] and "sha256 correct" in said[-1]
    upstream.unlink()
    assert get_asset("tiny", said.append) == asset_path("tiny") == path and len(said) == 2


def test_a_folder_comes_out_of_a_wheel_without_what_is_not_needed(tmp_path, place):
    files = {f"tiny_carrier/model/{name}": CONTENT for name in ("config.json", "tiny.bin", "model.onnx")}
    write_wheel(tmp_path, "tiny_carrier", files)
    place(FOLDER)
    path = get_asset("tiny")
    assert {file.name for file in path.iterdir()} == {".verified.json", "config.json", "tiny.bin"}
    assert [file.name for file in path.parent.iterdir()] == ["tiny"]  # nothing temporary is left


def test_an_archive_is_joined_out_of_several_wheels(tmp_path, place):
    with zipfile.ZipFile(tmp_path / "whole.zip", "w") as archive:
        archive.writestr("inner/tiny.bin", CONTENT)
        archive.writestr("inner/config.json", b"{}")
    content = (tmp_path / "whole.zip").read_bytes()
    for number, part in ((1, content[:100]), (2, content[100:])):
        write_wheel(tmp_path, f"tiny_part_{number}", {f"anywhere/whole.zip.00{number}": part})
    requirements = ("tiny-part-1==1.0", "tiny-part-2==1.0")
    carrier = Carrier(requirements, "inner", ("whole.zip.001", "whole.zip.002"))
    place(dataclasses.replace(FOLDER, carrier=carrier))
    path = get_asset("tiny")
    assert (path / "tiny.bin").read_bytes() == CONTENT and (path / "config.json").read_bytes() == b"{}"


@pytest.fixture
def npm(tmp_path, place, monkeypatch):
    """Publishes an archive with these members on a registry, a local folder, for the asset `FROM_NPM`."""
    monkeypatch.setenv("NPM_CONFIG_REGISTRY", (tmp_path / "registry").as_uri())
    place(FROM_NPM)

    def publish(members: dict[str, bytes], keep: float = 1.0) -> None:
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w:gz") as archive:
            for name, content in members.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                if content.startswith(b"link to "):
                    member.type, member.linkname, member.size = tarfile.SYMTYPE, content[8:].decode(), 0
                archive.addfile(member, io.BytesIO(content))
        path = tmp_path / "registry" / "@someone" / "tiny-nets" / "-" / "tiny-nets-1.2.3.tgz"
        path.parent.mkdir(parents=True)
        path.write_bytes(packed.getvalue()[: int(keep * len(packed.getvalue()))])

    return publish


IN_NPM = {
    "package/index.js": b"never run",
    "package/model/config.json": b"{}",
    "package/model/tiny.bin": CONTENT,
}


def test_a_folder_comes_out_of_an_npm_package_without_what_is_not_needed(tmp_path, npm):
    npm(IN_NPM | {"../escaped.txt": b"outside", str(tmp_path / "absolute.txt"): b"outside"})
    said = []
    path = get_asset("tiny", said.append)
    assert {file.name for file in path.iterdir()} == {".verified.json", "config.json", "tiny.bin"}
    assert (path / "tiny.bin").read_bytes() == CONTENT and "npm @someone/tiny-nets@1.2.3" in said[-1]
    assert not list(tmp_path.rglob("*.txt")) and not list(tmp_path.rglob("*.js"))


@pytest.mark.parametrize(
    ("members", "keep", "message"),
    [
        ({"package/index.js": b""}, 1, "tiny-nets-1.2.3.tgz does not contain package/model/config.json"),
        (
            IN_NPM | {"package/model/tiny.bin": b"link to /etc/passwd"},
            1,
            "not contain package/model/tiny.bin",
        ),
        (IN_NPM | {"package/model/tiny.bin": b"other"}, 1, "tiny.bin has sha256"),
        (IN_NPM, 0.5, "tiny-nets-1.2.3.tgz is no complete archive"),
        ({"package/big": bytes(200_000)} | IN_NPM, 1, "the archive has more than 0 MB"),
    ],
    ids=["nothing wanted", "link", "other weights", "cut", "too large"],
)
def test_a_bad_npm_package_is_refused_in_one_line(members, keep, message, npm, monkeypatch):
    monkeypatch.setattr(sources, "ARCHIVE_LIMIT", 100_000)
    npm(members, keep)
    with pytest.raises(AssetError) as caught:
        get_asset("tiny")
    (line,) = [line for line in str(caught.value).splitlines() if line.startswith("  - ")]
    assert line.startswith("  - npm @someone/tiny-nets@1.2.3: ") and message in line
    assert asset_path("tiny") is None


def test_a_silent_npm_registry_is_reported_in_one_line(npm):
    with pytest.raises(AssetError, match=r"npm @someone/tiny-nets@1.2.3: no answer \(.*\)\nConnect to"):
        get_asset("tiny")


def test_wrong_weights_are_refused_and_the_next_source_is_asked(tmp_path, place):
    (tmp_path / "wrong.bin").write_bytes(b"something else")
    write_wheel(tmp_path, "tiny_carrier", {"tiny_carrier/model/tiny.bin": CONTENT})
    place(dataclasses.replace(ONE, url=(tmp_path / "wrong.bin").as_uri()))
    said = []
    assert get_asset("tiny", said.append).read_bytes() == CONTENT
    assert any("tiny.bin has sha256" in line and "failed: file://" in line for line in said)
    assert "downloaded from PyPI tiny-carrier==1.0" in said[-1]


def test_the_error_names_every_source_tried_and_the_remedy(tmp_path, place):
    wrong = {"tiny_carrier/model/tiny.bin": b"something else"}
    write_wheel(tmp_path, "tiny_carrier", wrong)
    place(dataclasses.replace(ONE, url=(tmp_path / "nowhere.bin").as_uri()))
    with pytest.raises(AssetError) as caught:
        get_asset("tiny")
    message = str(caught.value)
    for words in ("file://", "no answer", "PyPI tiny-carrier==1.0", "has sha256", "MSA_MODEL_TINY"):
        assert words in message
    assert str(cache_root() / "models" / "tiny") in message
    assert not list(cache_root().rglob("*.bin")) and asset_path("tiny") is None


def test_the_last_line_of_pip_is_in_the_message(place):
    place(ONE)
    with pytest.raises(
        AssetError, match="pip failed: .*No matching distribution found for tiny-carrier==1.0"
    ):
        get_asset("tiny")


def test_offline_mode_does_not_touch_the_hub(place, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # what HF_HUB_OFFLINE=1 sets at start
    place(dataclasses.replace(ONE, hub_id="someone/tiny", url="https://example.invalid/tiny.bin"))
    with pytest.raises(AssetError) as caught:
        get_asset("tiny")
    assert str(caught.value).count("HF_HUB_OFFLINE is set") == 2


def test_what_the_hubs_own_cache_has_is_taken_without_network(tmp_path, place, monkeypatch):
    from huggingface_hub import constants

    repository, commit = tmp_path / "hub" / "models--someone--tiny", "0" * 40
    (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "snapshots" / commit / "tiny.bin").write_bytes(CONTENT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    place(dataclasses.replace(ONE, hub_id="someone/tiny"))
    said = []
    assert get_asset("tiny", said.append).read_bytes() == CONTENT
    assert "downloaded from Hugging Face Hub someone/tiny" in said[-1]


def test_files_put_into_the_cache_are_used_if_right_and_refused_if_wrong(place):
    place(ONE)
    path = cache_root() / "models" / "tiny" / "tiny.bin"
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT)
    assert asset_path("tiny") == path
    path.write_bytes(b"something else")
    with pytest.raises(AssetError, match=r"has sha256 .* remove this folder .* MSA_MODEL_TINY"):
        asset_path("tiny")


def test_a_users_own_file_takes_precedence(tmp_path, place, monkeypatch):
    place(ONE)
    own = tmp_path / "own.bin"
    own.write_bytes(b"my own weights")
    monkeypatch.setenv("MSA_MODEL_TINY", str(own))
    assert get_asset("tiny") == own
    own.unlink()
    with pytest.raises(AssetError, match="MSA_MODEL_TINY is .* which does not exist"):
        asset_path("tiny")


def test_too_little_disk_is_reported_before_anything_is_downloaded(place):
    place(dataclasses.replace(ONE, megabytes=10**9))
    with pytest.raises(AssetError, match=r"tiny temporarily needs \d+ MB .* free disk space"):
        get_asset("tiny")


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(AssetError, match="'nonsense'; known are face_landmarker, all-MiniLM-L6-v2"):
        asset_path("nonsense")


def test_every_asset_pins_its_weights_and_carrier_versions():
    for name, asset in ASSETS.items():
        assert asset.name == name and set(asset.sha256) <= set(asset.files)
        assert asset.sha256 and all(len(digest) == 64 for digest in asset.sha256.values())
        carriers = [asset.carrier, asset.npm, asset.converted_from]
        assert sum(map(bool, carriers)) == 1 and not (asset.hub_id and asset.url)
        assert bool(asset.converted_from) == (name in CONVERTERS)
        if asset.carrier:
            assert all("==" in requirement for requirement in asset.carrier.requirements)
