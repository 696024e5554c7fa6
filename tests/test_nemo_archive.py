"""NeMo's archives: what is read of one, and what a stranger's may not do."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.errors import UserError

pytestmark = pytest.mark.slow

CONFIG = "target: some.Model\nsample_rate: 22050\nframe: ${sample_rate}\n"


@pytest.fixture(scope="module")
def archive(require: Callable[[str, str], None]) -> Any:
    require("nemo", "pip install 'foretell[magpie]'")
    from stages.families import nemo_archive

    return nemo_archive


def saved(weights: Any) -> bytes:
    file = io.BytesIO()
    torch.save(weights, file)
    return file.getvalue()


def pack(path: Path, members: dict[str, bytes | tarfile.TarInfo], mode: str = "w:") -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, content in members.items():
            member = tarfile.TarInfo(name) if isinstance(content, bytes) else content
            member.size = len(content) if isinstance(content, bytes) else 0
            tar.addfile(member, io.BytesIO(content) if isinstance(content, bytes) else None)
    return path


MODEL = {"./model_config.yaml": CONFIG.encode(), "./model_weights.ckpt": b"weights"}


@pytest.mark.parametrize("mode", ["w:", "w:gz"])
def test_the_configuration_is_read_resolved_without_the_weights(archive, tmp_path, mode):
    config = archive.read_config(pack(tmp_path / "m.nemo", MODEL, mode))
    assert config.frame == 22050


def test_the_fingerprint_depends_on_names_and_contents_and_not_on_the_packing(archive, tmp_path):
    prints = {
        "plain": pack(tmp_path / "a", MODEL),
        "zipped": pack(tmp_path / "b", MODEL, "w:gz"),
        "turned": pack(tmp_path / "c", dict(reversed(MODEL.items()))),
        "bare": pack(tmp_path / "d", {name[2:]: content for name, content in MODEL.items()}),
        "other": pack(tmp_path / "e", MODEL | {"./model_weights.ckpt": b"Weights"}),
        "more": pack(tmp_path / "f", MODEL | {"./dictionary.txt": b""}),
    }
    found = {name: archive.archive_fingerprint(path) for name, path in prints.items()}
    assert found["plain"] == found["zipped"] == found["turned"] == found["bare"]
    assert len(set(found.values())) == 3


def link(name: str, kind: bytes) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, "/etc/passwd"
    return member


@pytest.mark.parametrize(
    "member",
    [
        {"../escaped": b"x"},
        {"/tmp/escaped": b"x"},
        {"deep/../../escaped": b"x"},
        {"soft": link("soft", tarfile.SYMTYPE)},
        {"hard": link("hard", tarfile.LNKTYPE)},
        {"pipe": link("pipe", tarfile.FIFOTYPE)},
        {"sparse": link("sparse", tarfile.GNUTYPE_SPARSE)},
    ],
)
def test_a_member_that_leads_out_of_the_archive_is_refused_before_anything_is_unpacked(
    archive, tmp_path, member
):
    path = pack(tmp_path / "m.nemo", MODEL | member)
    for read in (archive.read_config, archive.read_weights, archive.archive_fingerprint):
        with pytest.raises(UserError, match=r"m\.nemo holds .* leads out of the archive"):
            read(path)
    with pytest.raises(UserError, match="leads out of the archive"):
        archive.SafeConnector().load_config_and_state_dict(None, str(path))


def test_a_member_that_stands_twice_is_refused(archive, tmp_path):
    path = pack(tmp_path / "m.nemo", MODEL | {"model_config.yaml": b"target: other.Model\n"})
    with pytest.raises(UserError, match=r"'model_config\.yaml' twice"):
        archive.read_config(path)


def truncated(path: Path) -> None:
    whole = pack(path, MODEL | {"./big": bytes(99999)}).read_bytes()
    path.write_bytes(gzip.compress(whole)[:60])


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, "cannot be read as a .nemo archive .*No such file"),
        (lambda path: path.mkdir(), "cannot be read as a .nemo archive"),
        (lambda path: path.write_bytes(b""), "cannot be read as a .nemo archive"),
        (lambda path: path.write_bytes(b"no archive" * 99), "cannot be read as a .nemo archive"),
        (truncated, "cannot be read as a .nemo archive"),
        (lambda path: pack(path, {"readme": b""}), r"holds \['readme'\], but no model_config.yaml"),
        (lambda path: pack(path, {"model_config.yaml": b"a: [1"}), "cannot be read"),
        (lambda path: pack(path, {"model_config.yaml": b"\xff\xfe"}), "cannot be read"),
        (lambda path: pack(path, {"model_config.yaml": b"a: ${b}"}), "cannot be read"),
        (lambda path: pack(path, {"model_config.yaml": b"[1, 2]"}), "holds no settings"),
        (lambda path: pack(path, {"model_config.yaml": b"!!python/name:os.system"}), "cannot be"),
    ],
)
def test_what_is_no_archive_of_a_model_is_an_error_with_its_name(archive, tmp_path, write, message):
    write(tmp_path / "m.nemo")
    with pytest.raises(UserError, match=message) as error:
        archive.read_config(tmp_path / "m.nemo")
    assert str(tmp_path / "m.nemo") in str(error.value)


@pytest.mark.parametrize(
    "value",
    ["${oc.env:HOME}", "${oc.decode:'1'}", "${frame}${oc.env:HOME}", r"\${oc.env:HOME}",
     "[{deep: '${oc.env:HOME}'}]", "${${oc.env:HOME}}"],
)  # fmt: skip
def test_a_configuration_reads_nothing_of_this_machine(archive, tmp_path, value):
    content = f"{CONFIG}note: {value}\n".encode()
    with pytest.raises(UserError, match=r"model_config\.yaml in .*m\.nemo"):
        archive.read_config(pack(tmp_path / "m.nemo", {"model_config.yaml": content}))


def test_a_configuration_of_many_bytes_or_levels_is_refused(archive, tmp_path):
    path = tmp_path / "m.nemo"
    with pytest.raises(UserError, match=r"has 8388609 bytes, but no more than 8388608"):
        archive.read_config(pack(path, {"model_config.yaml": b" " * (8 * 2**20 + 1)}, "w:gz"))
    with pytest.raises(UserError, match="cannot be read"):
        archive.read_config(pack(path, {"model_config.yaml": b"[" * 9999 + b"]" * 9999}))


def bomb_of_members(path: Path) -> Path:
    return pack(path, {f"{i}": b"" for i in range(40)} | MODEL)


def bomb_of_bytes(path: Path) -> Path:
    return pack(path, {"big": bytes(2**23)} | MODEL, "w:gz")


def bomb_of_headers(path: Path) -> Path:
    """An extended header as large as its writer likes, which tarfile reads at once."""
    header = tarfile.TarInfo("header")
    header.type, header.size = tarfile.XHDTYPE, 2**23
    path.write_bytes(gzip.compress(header.tobuf() + bytes(2**23)))
    return path


@pytest.mark.parametrize(
    ("bomb", "words"),
    [
        (bomb_of_members, "more than 20 members"),
        (bomb_of_bytes, "unpacks to more than"),
        (bomb_of_headers, "unpacks to more than"),
    ],
)
def test_an_archive_that_hardly_ends_is_refused(archive, tmp_path, monkeypatch, bomb, words):
    monkeypatch.setattr(archive, "MEMBERS_LIMIT", 20)
    monkeypatch.setattr(archive, "UNZIPPED_SLACK", 2**20)
    path = bomb(tmp_path / "m.nemo")
    for read in (archive.read_config, archive.read_weights, archive.archive_fingerprint):
        with pytest.raises(UserError, match=words):
            read(path)


def test_another_class_than_the_expected_is_refused(archive, tmp_path):
    config = archive.read_config(pack(tmp_path / "m.nemo", MODEL))
    archive.check_class(Path("m.nemo"), config, "a model", "another.Model", "some.Model")
    with pytest.raises(UserError, match=r"holds a some\.Model, but a vocoder is needed"):
        archive.check_class(Path("m.nemo"), config, "a vocoder", "another.Model", "third.Model")


@pytest.mark.parametrize("key", ["_target_: a.B", "cls: a.B", "params: {a: 1}"])
def test_a_configuration_that_names_another_way_to_build_is_refused(archive, tmp_path, key):
    members: dict[str, Any] = {"model_config.yaml": f"{CONFIG}{key}\n".encode()}
    config = archive.read_config(pack(tmp_path / "m.nemo", members))
    with pytest.raises(UserError, match=key.split(":", maxsplit=1)[0]):
        archive.check_class(Path("m.nemo"), config, "a model", "some.Model")


class Payload:
    """What a pickle of an attacker does when it is opened."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.witness),)


@pytest.fixture
def dangerous(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An archive whose weights make a folder, in an environment that would let them."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    weights = saved({"a": Payload(tmp_path / "witness")})
    yield pack(tmp_path / "m.nemo", MODEL | {"./model_weights.ckpt": weights})
    assert not (tmp_path / "witness").exists()
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_weights_are_never_unpickled(archive, dangerous):
    with pytest.raises(UserError, match=r"m\.nemo is refused: the weights hold more than tensors"):
        archive.read_weights(dangerous)


def test_nemos_own_restoring_unpickles_nothing_either(archive, dangerous, tmp_path):
    from nemo.core.connectors.save_restore_connector import SaveRestoreConnector

    weights = tmp_path / "weights.ckpt"
    with tarfile.open(dangerous) as tar:
        member = tar.extractfile("./model_weights.ckpt")
        assert member is not None
        weights.write_bytes(member.read())
    with pytest.raises(UserError, match="hold more than tensors"):
        archive.SafeConnector._load_state_dict_from_disk(str(weights))
    with archive.tensors_only(), pytest.raises(Exception, match="Weights only load failed"):
        SaveRestoreConnector._load_state_dict_from_disk(str(weights))


@pytest.mark.parametrize("mode", ["w:", "w:gz"])
def test_weights_are_read_by_their_names(archive, tmp_path, mode):
    weights = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(1, dtype=torch.int32)}
    path = pack(tmp_path / "m.nemo", MODEL | {"./model_weights.ckpt": saved(weights)}, mode)
    found = archive.read_weights(path)
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in weights)


@pytest.mark.parametrize(
    "content",
    [
        b"", b"damaged", saved([1, 2]), saved({"a": torch.ones(9)})[:200], saved(None),
        saved({0: torch.ones(9)}),
    ],
)  # fmt: skip
def test_weights_that_are_damaged_or_no_dictionary_are_an_error(archive, tmp_path, content):
    path = pack(tmp_path / "m.nemo", MODEL | {"./model_weights.ckpt": content})
    with pytest.raises(UserError, match=r"m\.nemo"):
        archive.read_weights(path)


def test_nemo_writes_neither_to_stdout_nor_over_the_warnings_of_others(archive, capsys):
    from nemo.utils import logging as nemo_logging

    with archive.quiet():
        print("a print of NeMo's")  # noqa: T201
        nemo_logging.info("more than anyone wants to know")
        nemo_logging.warning("the same")
    assert capsys.readouterr() == ("", "")
    with pytest.warns(UserWarning, match="ours"):
        warnings.warn("ours", UserWarning, stacklevel=1)
