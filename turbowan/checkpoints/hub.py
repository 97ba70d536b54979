"""Fetching published models from the Hugging Face hub: sizes first, resumable, checked by checksum, with a manifest.

`huggingface_hub` lists, authenticates and transfers. The file that grows is ours: its own downloads start again from
nothing when the process ends, and these files are tens of gigabytes.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from .. import __version__
from ..errors import CheckpointError, MachineError
from ..machine import free_disk, size_text
from ..specs import FAMILIES
from .manifest import FILE_NAME, from_defaults, read_manifest, write_manifest
from .published import QUANT, Part, Published

_CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
_NETWORK = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")  # their errors come through unchanged


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository at one commit. checksum: ("sha256", hex) of a large file, else ("git", hex) of a blob."""

    repo: str
    commit: str
    path: str
    size: int
    checksum: tuple[str, str]


@dataclass(frozen=True)
class Item:
    """A file and what of it is on disk.

    have: bytes that need not come. whole: it is in its place, by checksum. copy: a neighbouring folder's same file.
    """

    file: RemoteFile
    target: Path
    have: int = 0
    whole: bool = False
    copy: Path | None = None

    @property
    def missing(self) -> int:
        return self.file.size - self.have

    @property
    def partial(self) -> Path:
        return self.target.with_name(f".{self.target.name}.{self.file.checksum[1][:12]}.part")


def folder_for(model: Published, quant: bool) -> Path:
    """Where a model goes unless another folder is named."""
    return Path("checkpoints") / (model.name + (QUANT if quant else ""))


def list_files(model: Published, quant: bool) -> list[RemoteFile]:
    """All files of a model as the hub has them now.

    Raises:
        CheckpointError: a repository or file is not published there, or needs a permission.
        MachineError: the hub cannot be reached.
    """
    parts = _parts(model, quant)
    listings = {repo: _list_repo(repo) for repo in dict.fromkeys(part.repo for part in parts.values())}
    files = []
    for role, part in parts.items():
        found = [file for file in listings[part.repo] if part.holds(file.path)]
        if not found:
            raise CheckpointError(f"{part.repo} at {_endpoint()} holds no {part.path} (the {role.replace('_', ' ')})")
        files += found
    for file in files:
        if ".." in Path(file.path).parts or Path(file.path).is_absolute():
            raise CheckpointError(f"{file.repo} at {_endpoint()} names a file outside its folder: {file.path}")
    return files


def look(files: Sequence[RemoteFile], folder: Path) -> list[Item]:
    """What of these files is in the folder, or in the folders beside it, already. Reads all of it for the checksums."""
    return [_on_disk(file, folder) for file in files]


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Make the folder and keep other downloads out of it meanwhile; they wait."""
    from huggingface_hub.utils import WeakFileLock

    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = folder / ".download.lock"
        lock.touch()
    except OSError as error:
        reason = f"the folder {folder} cannot be written ({error.strerror})"
        raise MachineError(f"{reason}; choose another with -o") from error
    with WeakFileLock(lock):
        yield


def check_folder(model: Published, quant: bool, folder: Path) -> None:
    """Raise CheckpointError if the folder is another model's, or its manifest cannot be read."""
    path = folder / FILE_NAME
    if model.family and path.exists() and read_manifest(path).files != _by_role(model, quant, folder):
        name = folder_for(model, quant).name
        raise CheckpointError(f"{path} names other files than {name} has; choose another folder with -o, or remove it")


def check_space(items: Sequence[Item], folder: Path) -> None:
    """Raise MachineError, with numbers, unless what is missing fits on the folder's disk."""
    needed, free = sum(item.missing for item in items), free_disk(folder)
    if needed > free:
        raise MachineError(
            f"{folder} has {size_text(free)} free, but {size_text(needed)} are still to come;"
            " make room or choose another disk with -o"
        )


def fetch(items: Sequence[Item]) -> None:
    """Bring every file that is not there, going on from what came before, and check it.

    Raises:
        CheckpointError: a file's checksum is wrong (it is removed), or it may not be fetched.
        MachineError: the connection is lost or the disk is full; what came so far is kept.
    """
    for item in items:
        with _clear_errors(f"{item.file.repo}/{item.file.path}"):
            item.target.parent.mkdir(parents=True, exist_ok=True)
            if item.copy is not None:
                _link(item.copy, item.target)
            elif not item.whole:
                _fetch(item)


def write_model_manifest(model: Published, quant: bool, folder: Path) -> Path | None:
    """Write `turbowan.toml` beside the files, unless it is there; None for files that are no whole model."""
    if model.family is None:
        return None
    path = folder / FILE_NAME
    if path.exists():  # with the user's own settings, perhaps
        return path
    defaults = replace(FAMILIES[model.family], **model.settings)  # type: ignore[arg-type]
    manifest = from_defaults(folder_for(model, quant).name, model.family, _by_role(model, quant, folder), defaults)
    return write_manifest(manifest, folder)


def _parts(model: Published, quant: bool) -> dict[str, Part]:
    return {**model.parts, **(model.quant if quant else {})}


def _by_role(model: Published, quant: bool, folder: Path) -> dict[str, Path]:
    return {role: folder / part.path for role, part in _parts(model, quant).items()}


def _endpoint() -> str:
    from huggingface_hub import constants

    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


def _list_repo(repo: str) -> list[RemoteFile]:
    from huggingface_hub import HfApi

    with _clear_errors(repo):
        info = HfApi(_endpoint()).model_info(repo, files_metadata=True)
    files = []
    for entry in info.siblings or []:
        checksum = ("sha256", entry.lfs.sha256) if entry.lfs else ("git", entry.blob_id)
        if entry.size is None or checksum[1] is None or info.sha is None:
            raise CheckpointError(
                f"{_endpoint()} lists {repo}/{entry.rfilename} without size or checksum; is it a hub?"
            )
        files.append(RemoteFile(repo, info.sha, entry.rfilename, entry.size, (checksum[0], checksum[1])))
    return files


def _on_disk(file: RemoteFile, folder: Path) -> Item:
    item = Item(file, folder / file.path)
    if _is_whole(item.target, file):
        return replace(item, have=file.size, whole=True)
    for neighbour in sorted(folder.absolute().parent.glob(f"*/{file.path}")):
        if _is_whole(neighbour, file):
            return replace(item, have=file.size, copy=neighbour)
    have = item.partial.stat().st_size if item.partial.exists() else 0
    return replace(item, have=have if have <= file.size else 0)


def _is_whole(path: Path, file: RemoteFile) -> bool:
    kind, wanted = file.checksum
    try:
        return path.is_file() and path.stat().st_size == file.size and _checksum(path, kind) == wanted
    except OSError:  # a neighbour's that may not be read
        return False


def _checksum(path: Path, kind: str) -> str:
    """Hexadecimal; kind "git" is the identity of a blob in git: SHA-1 over a header and the content."""
    digest = hashlib.sha256() if kind == "sha256" else hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _link(source: Path, target: Path) -> None:
    """The same file under a second name: no further disk space where the file system can do that."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _fetch(item: Item) -> None:
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    file, name, partial = item.file, item.target.name, item.partial
    url = hf_hub_url(file.repo, file.path, revision=file.commit, endpoint=_endpoint())
    headers = build_hf_headers(library_name="turbowan", library_version=__version__)
    headers["Accept-Encoding"] = "identity"  # a compressed answer could not be gone on with
    for stale in partial.parent.glob(f".{name}.*.part"):
        if stale != partial or not item.have:  # of another revision, or too long
            stale.unlink()
    have = item.have
    while True:
        try:
            with partial.open("ab") as growing:
                http_get(
                    url, growing, resume_size=have, headers=headers, expected_size=file.size, displayed_filename=name
                )
            break
        except Exception as error:
            before, have = have, partial.stat().st_size
            if have == before or not _connection_lost(error):  # one that brought something is worth another one
                raise
    kind, wanted = file.checksum
    got = _checksum(partial, kind)
    if got != wanted:
        partial.unlink()
        raise CheckpointError(
            f"{file.path} came damaged: its {kind} checksum is {got[:12]}…, the hub names {wanted[:12]}…;"
            " it was removed, run the command again"
        )
    partial.replace(item.target)


def _connection_lost(error: Exception) -> bool:
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, OSError):
        return error.errno not in _CANNOT_WRITE and not isinstance(error, HfHubHTTPError)
    return type(error).__module__.split(".")[0] in _NETWORK


@contextmanager
def _clear_errors(what: str) -> Iterator[None]:
    """Whatever goes wrong between us and the hub, as one line that says what to do."""
    from huggingface_hub import errors

    endpoint = _endpoint()
    try:
        yield
    except errors.OfflineModeIsEnabled as error:
        raise MachineError(f"{what} cannot be fetched: HF_HUB_OFFLINE is set; unset it to download") from error
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{what} is gated: accept its terms on its page at {endpoint}, then set HF_TOKEN or run 'hf auth login'"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(f"{what} is not at {endpoint}, or is private: then set HF_TOKEN") from error
    except (errors.EntryNotFoundError, errors.RevisionNotFoundError) as error:
        raise CheckpointError(f"{what} is no longer at {endpoint}; run the command again") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "an error"
        hint = "check HF_TOKEN" if status in (401, 403) else "run the command again later to go on"
        raise MachineError(f"{endpoint} answered {status} for {what}; {hint}") from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _CANNOT_WRITE:
            raise MachineError(f"cannot write {error.filename or what}: {error.strerror}") from error
        if not _connection_lost(error):
            raise
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise MachineError(
            f"no connection to {endpoint} for {what} ({reason}); run the command again to go on where it stopped"
        ) from error
