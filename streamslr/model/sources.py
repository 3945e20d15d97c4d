"""Sources of a model's files: a folder on this machine, or a hub repository fetched file by file through its cache."""

import errno
import logging
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from huggingface_hub import HfApi, constants, hf_hub_url, scan_cache_dir, try_to_load_from_cache
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # public, but re-exported without saying so
    build_hf_headers,
    hf_raise_for_status,
    http_stream_backoff,
    validate_repo_id,
)

from streamslr.errors import BudgetError, HubError, InputError, StreamslrError, first_line
from streamslr.io.safetensors_file import read_part

CONFIG_FILE = "config.json"

log = logging.getLogger("streamslr")


class ModelSource(Protocol):
    """Files of one model: a `LocalFolder` or a `HubRepo`.

    Attributes:
        label: name of the source in error messages.
        identity: name of the files' content, "hub:ID@commit"; None where the files may change.
        downloaded: files that this process downloaded, and may delete.
    """

    label: str
    identity: str | None
    downloaded: set[str]

    @property
    def files(self) -> Collection[str]:
        """Names of the files, without those in subfolders."""
        ...

    def read_part(self, name: str, first: int, nbytes: int) -> tuple[bytes, int]:
        """Return up to `nbytes` of a file from `first` on, and the size of the whole."""
        ...

    def local_path(self, name: str) -> Path | None:
        """Return the file's path, or None when it must be downloaded first."""
        ...

    def fetch(self, name: str) -> Path:
        """Return the file's path, after downloading it where that is needed."""
        ...

    def evict(self, name: str) -> None:
        """Delete the file if it is one of `downloaded`."""
        ...

    def outer_target(self, name: str) -> Path | None:
        """Return where the file is a link to, if that lies outside of the model's files."""
        ...

    def missing_file_error(self, name: str, detail: str) -> StreamslrError:
        """Return the error for a file that should be there and is not; `detail` goes on after its name."""
        ...


def find_source(model: str, revision: str | None) -> ModelSource:
    """Return the folder `model`, or the hub repository of that id at one commit. Errors as `open_checkpoint`."""
    path = Path(model).expanduser()
    if path.is_dir():
        if revision is not None:
            raise InputError(f"{model} is a folder: --revision {revision} is only for models on the hub")
        return LocalFolder(path)
    if path.is_file():
        raise InputError(f"{model} is a file; give the folder that holds it and its config.json")
    try:
        if model.startswith(("/", ".", "~")):
            raise ValueError
        validate_repo_id(model)
    except ValueError:  # HFValidationError is one
        raise InputError(
            f"there is no folder {model}, and that is no hub id either; give a model folder, or org/name"
        ) from None
    return HubRepo(model, revision)


class LocalFolder:
    """Model folder on this machine. Its files are the user's own and never deleted."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.label = str(path)
        self.downloaded: set[str] = set()
        self.identity: str | None = None
        try:
            self.files = frozenset(entry.name for entry in path.iterdir() if entry.is_file())
            # transformers opens files by itself, and would wait for a pipe
            entries = (*path.iterdir(), *(path / "additional_chat_templates").glob("*"))
            odd = [e for e in entries if e.exists() and not (e.is_file() or e.is_dir())]
        except OSError as error:
            raise InputError(f"cannot read the folder {path}: {error.strerror}") from error
        if odd:
            raise InputError(f"{odd[0]} is a pipe, a socket or a device, not a file; remove it from the model's folder")

    def read_part(self, name: str, first: int, nbytes: int) -> tuple[bytes, int]:
        return read_part(self.path / name, first, nbytes)

    def local_path(self, name: str) -> Path | None:
        return self.path / name

    def fetch(self, name: str) -> Path:
        return self.path / name

    def evict(self, name: str) -> None:
        pass

    def outer_target(self, name: str) -> Path | None:
        target, folder = (self.path / name).resolve(), self.path.resolve()
        inside = target.is_relative_to(folder)
        if folder.parent.name == "snapshots":  # of the hub's cache, where files are links to ../../blobs
            inside = inside or target.is_relative_to(folder.parent.parent / "blobs")
        return None if inside else target

    def missing_file_error(self, name: str, detail: str) -> StreamslrError:
        links = " (a broken link)" if (self.path / name).is_symlink() else ""
        return InputError(f"{self.path} has no {name}{links}{detail}; copy or download it into the folder")


class HubRepo:
    """Model repository on the hub, at one commit. Its files come through huggingface_hub's cache."""

    def __init__(self, repo: str, revision: str | None) -> None:
        self.repo = repo
        self._api = HfApi()
        self._fetching: dict[str, threading.Lock] = {}  # by file, so that none is downloaded twice at once
        self.downloaded: set[str] = set()
        self.label = f"{repo} on the hub"
        with self._errors(revision=revision):
            if constants.is_offline_mode():
                config = Path(self._api.hf_hub_download(repo, CONFIG_FILE, revision=revision))
                self.commit = config.parent.name
                self.files = frozenset(entry.name for entry in config.parent.iterdir() if entry.exists())
            else:
                info = self._api.model_info(repo, revision=revision)
                if info.sha is None:
                    raise HubError(f"{self._api.endpoint} names no commit for {repo}; check HF_ENDPOINT")
                self.commit = info.sha
                # By the branch's name, so that the cache notes the commit: with HF_HUB_OFFLINE it is found by that.
                self._api.hf_hub_download(repo, CONFIG_FILE, revision=revision)
                self.files = frozenset(f.rfilename for f in info.siblings or () if "/" not in f.rfilename)
        self.label = f"{repo} at {self.commit[:12]}"
        self.identity: str | None = f"hub:{repo}@{self.commit}"

    def read_part(self, name: str, first: int, nbytes: int) -> tuple[bytes, int]:
        path = self.local_path(name)
        if path is not None:
            return read_part(path, first, nbytes)
        url = hf_hub_url(self.repo, name, revision=self.commit, endpoint=self._api.endpoint)
        headers = build_hf_headers() | {"Range": f"bytes={first}-{first + nbytes - 1}", "Accept-Encoding": "identity"}
        part = bytearray()
        with (
            self._errors(name),
            http_stream_backoff("GET", url, max_retries=2, headers=headers, follow_redirects=True) as response,
        ):
            hf_raise_for_status(response)
            # "bytes 0-131071/4976698672". A mirror that ignores Range sends the whole file: stop early.
            span = response.headers.get("Content-Range", "")
            if span or first == 0:
                size = int(span.rpartition("/")[2] or response.headers["Content-Length"])
                for chunk in response.iter_bytes():
                    part += chunk
                    if len(part) >= nbytes:
                        break
                return bytes(part[:nbytes]), size
        return read_part(self.fetch(name), first, nbytes)

    def local_path(self, name: str) -> Path | None:
        path = try_to_load_from_cache(self.repo, name, revision=self.commit)
        return Path(path) if isinstance(path, str) else None

    def fetch(self, name: str) -> Path:
        with self._fetching.setdefault(name, threading.Lock()):
            path = self.local_path(name)
            if path is None:
                with self._errors(name):
                    path = Path(self._api.hf_hub_download(self.repo, name, revision=self.commit))
                self.downloaded.add(name)
            return path

    def evict(self, name: str) -> None:
        with self._fetching.setdefault(name, threading.Lock()):
            path = self.local_path(name)
            if name not in self.downloaded or path is None:
                return
            self.downloaded.discard(name)
            cache = scan_cache_dir(constants.HF_HUB_CACHE)
            entries = [
                file
                for repo in cache.repos
                if repo.repo_id == self.repo and repo.repo_type == "model"
                for revision in repo.revisions
                if revision.commit_hash == self.commit
                for file in revision.files
                if file.file_path == path
            ]
            # The client's own deletion keeps a blob that another revision links to.
            cache.delete_files(*entries).execute()
            if path.exists():
                log.warning("could not delete %s, which this run downloaded and no longer needs", path)

    def outer_target(self, name: str) -> Path | None:
        return None  # the hub's client made the links of its cache

    def missing_file_error(self, name: str, detail: str) -> StreamslrError:
        if constants.is_offline_mode():
            return self._offline(name)
        return InputError(f"{self.label} has no {name}{detail}; choose another revision or model")

    def _offline(self, name: str) -> HubError:
        return HubError(
            f"{name} of {self.repo} is not in the cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE forbids "
            f"to fetch it; unset HF_HUB_OFFLINE, or copy the model here and give its folder"
        )

    @contextmanager
    def _errors(self, name: str = CONFIG_FILE, revision: str | None = None) -> Iterator[None]:
        """Turn errors of the hub's client into errors that say what to do."""
        endpoint = self._api.endpoint
        try:
            yield
        except hub_errors.GatedRepoError as error:
            raise HubError(
                f"{self.repo} is gated: ask for access on {endpoint}/{self.repo}, then log in with "
                f"`hf auth login` or set HF_TOKEN, and run the same line again"
            ) from error
        except hub_errors.RepositoryNotFoundError as error:
            raise InputError(
                f"there is no folder {self.repo}, and {endpoint} shows you no model {self.repo}; "
                f"check the name, or log in with `hf auth login` if it is private"
            ) from error
        except hub_errors.RevisionNotFoundError as error:
            raise InputError(
                f"{self.repo} has no revision {revision}; give a branch, tag or commit from "
                f"{endpoint}/{self.repo}/commits"
            ) from error
        except hub_errors.RemoteEntryNotFoundError as error:
            raise self.missing_file_error(name, "") from error
        except (hub_errors.LocalEntryNotFoundError, hub_errors.OfflineModeIsEnabled) as error:
            if constants.is_offline_mode():
                raise self._offline(name) from error
            raise self._unreachable(name, error) from error
        except hub_errors.HfHubHTTPError as error:
            if error.response.status_code in (401, 403):
                raise HubError(
                    f"{endpoint} refuses {name} of {self.repo} to this login (status "
                    f"{error.response.status_code}); check HF_TOKEN and what the token may read"
                ) from error
            raise self._unreachable(name, error) from error
        except hub_errors.HTTPError as error:  # type: ignore[attr-defined]  # of the library below the hub's client
            raise self._unreachable(name, error) from error
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise BudgetError(
                    f"no space for {name} of {self.repo} in the cache {constants.HF_HUB_CACHE}: free some, "
                    f"run with --evict-shards, or set HF_HUB_CACHE to another disk"
                ) from error
            raise self._unreachable(name, error) from error

    def _unreachable(self, name: str, error: Exception) -> HubError:
        return HubError(
            f"cannot fetch {name} of {self.repo} from {self._api.endpoint}: {first_line(error)}; check the "
            f"network and run the same line again, or set HF_HUB_OFFLINE=1 to use what is in the cache"
        )
