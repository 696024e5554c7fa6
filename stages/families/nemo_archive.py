"""NeMo's .nemo archives, read as files from a stranger: nothing in them is unpickled or trusted."""

from __future__ import annotations

import gzip
import hashlib
import io
import logging
import os
import tarfile
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path, PurePosixPath
from typing import Any
from unittest.mock import patch

from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.basecontainer import BaseContainer
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor
from yaml import YAMLError

from stages.errors import UserError
from stages.families.weights import load_tensors

CONFIGURATION, WEIGHTS = "model_config.yaml", "model_weights.ckpt"

FORCE_TENSORS, FORCE_OBJECTS = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
"""Variables by which torch.load takes tensors alone, or unpickles what it is not told to refuse."""

REROUTES = ("_target_", "cls", "params")
"""Keys of a configuration by which NeMo would build something else than the class it is asked."""

CONFIGURATION_LIMIT = 8 * 2**20
"""Most bytes of a configuration; NeMo's have a few thousand."""
MEMBERS_LIMIT = 10_000
"""Most members of an archive; NeMo's have a dozen."""
UNZIPPED_SHARE, UNZIPPED_SLACK = 64, 64 * 2**20
"""Most bytes that a gzipped archive unpacks to: so many times its size, and so many more."""

REFUSALS = (
    ValueError, TypeError, KeyError, AttributeError, AssertionError, OmegaConfBaseException,
    InstantiationException,
)  # fmt: skip
"""What NeMo raises for a configuration that is not as it should be."""


class NemoPrints(io.TextIOBase):
    """Where the prints of NeMo go: line by line into the log, at the level of details."""

    def write(self, text: str) -> int:
        """Log every line of a text that is not blank."""
        for line in filter(str.strip, text.splitlines()):
            logging.getLogger("nemo_prints").debug(line)
        return len(text)


@contextmanager
def quiet() -> Iterator[None]:
    """Import or call NeMo without its warnings, and with its prints in the log, not on stdout."""
    with warnings.catch_warnings(), redirect_stdout(NemoPrints()):
        warnings.simplefilter("ignore")
        yield


with quiet():
    # Its telemetry says that it is off, as a warning.
    logging.getLogger("nv_one_logger").setLevel(logging.ERROR)
    from nemo.core.connectors.save_restore_connector import SaveRestoreConnector
    from nemo.utils import logging as nemo_logging

# NeMo's own handlers write to stdout, which belongs to `--json`, and catch everyone's warnings.
nemo_logging.remove_stream_handlers()
nemo_logging.captureWarnings(False)
nemo_logging.set_verbosity(logging.ERROR)
logging.getLogger("nemo_logger").propagate = True


def read_config(path: Path) -> DictConfig:
    """Read the configuration of an archive's model, resolved, without its weights.

    Raises UserError when the file is missing, no archive, damaged, or holds no configuration, and
    for a configuration that asks for more than its own values, such as an environment variable.
    """
    with _open(path) as archive:
        content = _configuration(archive, path)
    try:
        # What is read here is saved with a student: nothing of this machine may get into it.
        with patch.dict(BaseContainer._resolvers, clear=True):
            config = OmegaConf.create(content.decode("utf-8"))
            resolved = OmegaConf.to_container(config, resolve=True)
    except (UnicodeDecodeError, YAMLError, OmegaConfBaseException, RecursionError) as error:
        raise UserError(
            f"{CONFIGURATION} in {path} cannot be read: {error}. Save the model again with NeMo, "
            "which writes values, no references to anything else"
        ) from error
    if isinstance(resolved, dict) and "model" in resolved:
        resolved = resolved["model"]  # as NeMo reads a training's configuration
    if not isinstance(resolved, dict):
        raise UserError(f"{CONFIGURATION} in {path} holds no settings of a model")
    _check_literal(path, resolved)
    return OmegaConf.create(resolved)


def _configuration(archive: tarfile.TarFile, path: Path) -> bytes:
    file, size = _file(archive, path, CONFIGURATION)
    if size > CONFIGURATION_LIMIT:
        raise UserError(
            f"{CONFIGURATION} in {path} has {size} bytes, but no more than {CONFIGURATION_LIMIT} "
            "are read: give the file that NeMo saved"
        )
    content: bytes = file.read()
    return content


def _check_literal(path: Path, value: Any) -> None:
    """Refuse references that an escape kept from being resolved: they would be the next time."""
    if isinstance(value, str) and "${" in value:
        raise UserError(
            f"{CONFIGURATION} in {path} holds the reference {value!r}, which is not resolved: "
            "write its value there"
        )
    values = value.values() if isinstance(value, dict) else value
    for inner in values if isinstance(value, dict | list) else ():
        _check_literal(path, inner)


def archive_names(path: Path) -> frozenset[str]:
    """Names of the files in an archive; raises UserError as `read_config` does."""
    with _open(path) as archive:
        return frozenset(_files(archive, path))


def check_class(path: Path, config: DictConfig, kind: str, *expected: str) -> None:
    """Check that a configuration is of one of the expected classes, given by their full names.

    NeMo builds whatever class `target` names. Raises UserError naming it and the `kind` expected.
    """
    rerouted = [key for key in REROUTES if key in config]
    if rerouted:
        raise UserError(
            f"the configuration of {path} has {', '.join(rerouted)} at its top, which no model "
            "that NeMo saves has: use the file as it was published"
        )
    found = config.get("target")
    if found not in expected:
        raise UserError(f"{path} holds a {found}, but {kind} is needed here: give another file")


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read the weights of an archive onto the CPU, by their names.

    Raises UserError when the file is no archive, damaged, or holds more than tensors.
    """
    with _open(path) as archive:
        file, _ = _file(archive, path, WEIGHTS)
        return load_tensors(file, str(path), "cpu")


def archive_fingerprint(path: Path) -> str:
    """Hexadecimal sha256 of the names and contents of all files, however they are packed.

    Raises UserError as `read_config` does.
    """
    with _open(path) as archive:
        _file(archive, path, CONFIGURATION)
        contents = {
            name: hashlib.file_digest(_extracted(archive, member), "sha256").digest()
            for name, member in _files(archive, path).items()
        }
    digest = hashlib.sha256()
    for name in sorted(contents):
        digest.update(hashlib.sha256(name.encode()).digest() + contents[name])
    return digest.hexdigest()


class SafeConnector(SaveRestoreConnector):  # type: ignore[misc]
    """NeMo's way to restore a model, on an archive that was checked and without unpickling.

    A model that restores another one while it is built (its audio codec) is held to the same.
    Give `restore_from(..., save_restore_connector=SafeConnector())` a checked `target` first.
    """

    def load_config_and_state_dict(
        self, calling_cls: Any, restore_path: str, *options: Any, **more: Any
    ) -> Any:
        """Build the model of an archive and read its weights.

        Raises UserError when a file would be unpacked elsewhere, or when weights are no tensors.
        """
        with _open(Path(restore_path)) as archive:
            _files(archive, Path(restore_path))
        with tensors_only():
            return super().load_config_and_state_dict(calling_cls, restore_path, *options, **more)

    @staticmethod
    def _load_state_dict_from_disk(model_weights: str, map_location: Any = "cpu") -> Any:
        with Path(model_weights).open("rb") as file:
            return load_tensors(file, model_weights, map_location)


@contextmanager
def tensors_only() -> Iterator[None]:
    """Let no torch.load unpickle objects, whatever its caller or the environment asked for."""
    before = {name: os.environ.pop(name, None) for name in (FORCE_TENSORS, FORCE_OBJECTS)}
    os.environ[FORCE_TENSORS] = "1"
    try:
        yield
    finally:
        del os.environ[FORCE_TENSORS]
        os.environ.update({name: value for name, value in before.items() if value is not None})


class _Unzipped(gzip.GzipFile):
    """A gzipped archive as plain bytes, which end in an error where they would hardly end."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "rb")
        self._limit = UNZIPPED_SHARE * path.stat().st_size + UNZIPPED_SLACK

    def read(self, size: int | None = -1) -> bytes:
        """Read as any file; tarfile asks for what a header announces, however much it is."""
        self._check(self.tell() + (size or 0))
        return super().read(size)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move as any file does, which unpacks all that is between."""
        self._check(offset)
        return super().seek(offset, whence)

    def _check(self, end: int) -> None:
        if end > self._limit:
            raise tarfile.ReadError(f"it unpacks to more than {self._limit} bytes")


@contextmanager
def _open(path: Path) -> Iterator[tarfile.TarFile]:
    """Open a plain or gzipped archive; raises UserError when it is none, or damaged."""
    try:
        with path.open("rb") as file:
            gzipped = file.read(2) == b"\x1f\x8b"
        with (
            _Unzipped(path) if gzipped else path.open("rb") as plain,
            tarfile.open(fileobj=plain, mode="r:") as archive,
        ):
            yield archive
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise UserError(
            f"{path} cannot be read as a .nemo archive ({error}): give the file that NeMo saved"
        ) from error


def _files(archive: tarfile.TarFile, path: Path) -> dict[str, tarfile.TarInfo]:
    """Members by their names; raises UserError for any that NeMo would not have written."""
    files: dict[str, tarfile.TarInfo] = {}
    for number, member in enumerate(archive, start=1):
        name = PurePosixPath(member.name)
        if number > MEMBERS_LIMIT:
            raise UserError(
                f"{path} holds more than {MEMBERS_LIMIT} members: give the file that NeMo saved"
            )
        plain = member.isdir() or (member.isfile() and not member.issparse())
        if name.is_absolute() or ".." in name.parts or not plain:
            raise UserError(
                f"{path} holds {member.name!r}, which is a link or leads out of the archive; such "
                "a file is not opened"
            )
        if member.isfile() and str(name) in files:
            raise UserError(f"{path} holds {str(name)!r} twice, so it is not clear what is meant")
        if member.isfile():
            files[str(name)] = member
    return files


def _file(archive: tarfile.TarFile, path: Path, name: str) -> tuple[Any, int]:
    """Open a member for reading and tell its size; raises UserError when there is none such."""
    files = _files(archive, path)
    if name not in files:
        raise UserError(
            f"{path} is no model of NeMo's: it holds {sorted(files)[:5]}, but no {name}"
        )
    return _extracted(archive, files[name]), files[name].size


def _extracted(archive: tarfile.TarFile, member: tarfile.TarInfo) -> Any:
    file = archive.extractfile(member)
    assert file is not None
    return file
