"""Places for files: a folder on a disk (a `Path`), or one in a store that is reached by URI (a `Remote`).

A worker writes its net and its state to the place of results, and the driver brings finished nets home to the study's folder. If a
study keeps them in its own folder, which every node must then see, a place is a plain `Path` and nothing here costs anything.

Files appear whole or not at all: an object in a store is there once its upload is complete, a file is first written under another name.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit

from ranksearch.errors import UsageError, nearest
from ranksearch.places.files import make_folder, partly_written

SCHEMES = ("s3", "gs", "file")
SAYINGS = {
    ("NO_SUCH_BUCKET", "Bucket not found", "does not exist as a bucket"): "there is no such bucket: make it first",
    ("ACCESS_DENIED", "INVALID_ACCESS_KEY_ID", "SIGNATURE", "HTTP response code 403", "Permission", "credentials"): (
        "access is refused: credentials come from the environment of every node (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
        "AWS_PROFILE, a role; GOOGLE_APPLICATION_CREDENTIALS)"
    ),
    ("NETWORK_CONNECTION", "resolve host", "curlCode", "Connection refused"): (
        "nothing answers there: a server of your own is named by AWS_ENDPOINT_URL, or by ?endpoint_override=HOST:PORT&scheme=http "
        "in the URI"
    ),
}
"""What stores' own messages contain -> what we say."""

PAUSES = (2.0, 10.0, 30.0)
"""Seconds between the tries to write a net."""


class PlaceError(OSError):
    """A place cannot be read or written; its text is meant for the user."""


@dataclass(frozen=True)
class Remote:
    """A file or folder by URI: `s3://bucket/path`, `gs://bucket/path`, `file:///path`; options of the store follow a `?`."""

    uri: str

    def __truediv__(self, name: str) -> Remote:
        parts = urlsplit(self.uri)
        return Remote(parts._replace(path=f"{parts.path.rstrip('/')}/{name}").geturl())

    def __str__(self) -> str:
        return self.uri

    def read(self) -> bytes | None:
        """What the file holds; None where there is none.

        Raises:
            PlaceError: it cannot be read.
        """
        with _told(self, "read"):
            store, path = _opened(self.uri)
            try:
                with store.open_input_file(path) as stream:
                    return stream.read()
            except FileNotFoundError:
                return None

    def write(self, data: bytes | memoryview) -> None:
        """Puts `data` there in one go, in the place of what was there.

        Raises:
            PlaceError: it cannot be written; what was there stays.
        """
        with _told(self, "written"):
            store, path = _opened(self.uri)
            if store.type_name != "local":  # a store shows an object only once it is complete
                with store.open_output_stream(path) as stream:
                    stream.write(data)
                return
            store.create_dir(path.rpartition("/")[0], recursive=True)
            unfinished = f"{path}.{os.uname().nodename}-{os.getpid()}"
            with store.open_output_stream(unfinished) as stream:
                stream.write(data)
            store.move(unfinished, path)

    def remove(self) -> None:
        """Removes the file, if there is one, and what killed writers left of it.

        Raises:
            PlaceError: it is still there.
        """
        with _told(self, "removed"):
            store, path = _opened(self.uri)
            with suppress(FileNotFoundError):
                store.delete_file(path)
            if store.type_name == "local":
                for left in Path(path).parent.glob(f"{Path(path).name}.*"):
                    left.unlink(missing_ok=True)

    def remove_folder(self) -> None:
        """Removes the folder and what is in it, if it is there.

        Raises:
            PlaceError: it is still there.
        """
        with _told(self, "removed"), suppress(FileNotFoundError):
            store, path = _opened(self.uri)
            store.delete_dir(path)


Place = Path | Remote


def as_uri(text: str) -> str:
    """Returns a place that a user named as a URI; a path becomes an absolute `file://`.

    Raises:
        UsageError: it is another kind of URI, or holds a password.
    """
    if "://" not in text:
        return Path(text).expanduser().absolute().as_uri()
    parts = urlsplit(text)
    if parts.scheme not in SCHEMES:
        known = nearest(parts.scheme, SCHEMES)
        raise UsageError(
            f"there is no kind of place {parts.scheme!r}; expected s3://, gs://, file:// or a path. {known}"
        )
    if parts.password is not None:
        raise UsageError(
            "the URI holds a password, which would be written down: leave it out; stores take it from the environment"
        )
    if parts.scheme != "file" and not parts.hostname:
        raise UsageError(f"{text!r} names no bucket, such as {parts.scheme}://my-bucket/ranksearch")
    return text.rstrip("/")


def check_place(uri: str) -> None:
    """Writes and removes a small file in a folder that trials will write to.

    Raises:
        UsageError: the folder cannot be written to.
    """
    probe = Remote(uri) / f".probe-{os.uname().nodename}-{os.getpid()}"
    try:
        probe.write(b"")
        probe.remove()
    except PlaceError as error:
        raise UsageError(f"storage.results: {error}.") from error


def text_of(place: Place) -> str:
    """A place as it travels to a worker."""
    return place.uri if isinstance(place, Remote) else str(place.absolute())


def place_at(text: str) -> Place:
    """The place that `text_of` wrote."""
    return Remote(text) if "://" in text else Path(text)


@contextmanager
def filling(place: Place) -> Iterator[Path]:
    """Yields a folder on this machine to fill; its files are in `place` once the block ends. A `Path` is filled directly.

    JSON files are written last. A store that refuses is tried again for most of a minute: the trial behind the files took longer.

    Raises:
        PlaceError: they cannot be written.
    """
    if isinstance(place, Path):
        yield place
        return
    with tempfile.TemporaryDirectory(prefix="ranksearch-") as scratch:
        yield Path(scratch)
        for file in sorted(Path(scratch).iterdir(), key=lambda file: file.suffix == ".json"):
            _write_patiently(place / file.name, file.read_bytes())


def _write_patiently(place: Remote, data: bytes) -> None:
    for pause in PAUSES:
        try:
            place.write(data)
            break
        except PlaceError:
            time.sleep(pause)
    else:
        place.write(data)


def fetch(place: Remote, folder: Path, names: tuple[str, ...]) -> bool:
    """Brings the files `names` from `place` to `folder`, whole and durably; if one is missing, writes nothing and returns False.

    Raises:
        PlaceError: the store cannot be read.
        OSError: `folder` cannot be written.
    """
    found = {name: (place / name).read() for name in names}
    if any(data is None for data in found.values()):
        return False
    make_folder(folder)
    for name, data in found.items():
        assert data is not None
        with partly_written(folder / name) as partial:
            partial.write_bytes(data)
    return True


@lru_cache(maxsize=16)
def _store(scheme: str, netloc: str, query: str) -> Any:
    from pyarrow import fs  # takes a third of a second, and a study in its own folder does not need it

    root = SplitResult(scheme, netloc, "/", query, "").geturl()
    return fs.FileSystem.from_uri(root)[0]


def _opened(uri: str) -> tuple[Any, str]:
    """The store of a URI, and the path in it."""
    parts = urlsplit(uri)
    bucket = parts.netloc.rpartition("@")[2]
    return _store(parts.scheme, parts.netloc, parts.query), f"{bucket}{unquote(parts.path)}"


@contextmanager
def _told(place: Remote, what: str) -> Iterator[None]:
    """Turns a store's own errors into one sentence."""
    try:
        yield
    except PlaceError:
        raise
    except (OSError, ValueError) as error:  # pyarrow raises both
        first = " ".join(str(error).split())
        said = next((text for marks, text in SAYINGS.items() if any(mark in first for mark in marks)), None)
        raise PlaceError(f"{place} cannot be {what}: {said if said is not None else first}") from error
