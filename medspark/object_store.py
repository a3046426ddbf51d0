"""S3 as a file system of fsspec: whole puts, conditional puts, and errors of one sentence.

obstore (``medspark[s3]``) reaches the store. Credentials and endpoint come from the environment
alone: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_REGION, AWS_ENDPOINT_URL, or
what a machine of the cloud has by itself. Nothing is cached, because other machines write too.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

from medspark.errors import MedsparkError, RunError, UsageError

__all__ = ["AccessDeniedError", "ObjectStore", "StoreError"]

# How long a request is repeated while the store does not answer.
_PATIENCE = timedelta(seconds=60)
_CODE = re.compile(r"<Code>(\w+)</Code>")
_CHUNK = 8 << 20


class StoreError(MedsparkError):
    """The store failed or refused, whatever the object: no object of it can be judged by that."""


class _StoreUsageError(StoreError, UsageError):
    """The bucket, the credentials or the package is missing or wrong."""


class _StoreRunError(StoreError, RunError):
    """The store does not answer, or answers with an error."""


class AccessDeniedError(UsageError, PermissionError):
    """These credentials may not do this with this object."""


class ObjectStore(AbstractFileSystem):  # type: ignore[misc] # untyped in fsspec
    """All buckets that the environment's credentials reach. A path is ``bucket/key``."""

    protocol = "s3"
    root_marker = ""

    # --- reading ---

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        """Return name, type and size. A folder is there if an object is below it."""
        path = self._strip_protocol(path)
        bucket, key = _split(path)
        with _told(path):
            if key:
                try:
                    return _file(bucket, _obstore().head(_bucket(bucket), key))
                except FileNotFoundError:
                    pass
            listed = iter(_obstore().list(_bucket(bucket), key or None, chunk_size=1))
            with suppress(_obstore().exceptions.InvalidPathError):  # then something is there
                if not next(listed, None) and key:
                    raise FileNotFoundError(path)
        return {"name": path, "type": "directory", "size": 0}

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        """Return the entries of a folder. Raises FileNotFoundError if there is none."""
        path = self._strip_protocol(path)
        bucket, key = _split(path)
        with _told(path):
            found = _obstore().list_with_delimiter(_bucket(bucket), key or None)
        below = found["common_prefixes"]
        entries = [{"name": f"{bucket}/{p}", "type": "directory", "size": 0} for p in below]
        entries += [_file(bucket, meta) for meta in found["objects"]]
        if not entries:
            entries = [self.info(path)]  # a file, or an empty bucket
            entries = [entry for entry in entries if entry["type"] == "file"]
        return entries if detail else [entry["name"] for entry in entries]

    def find(self, path: str, detail: bool = False, **_: Any) -> Any:
        """Return all objects below a folder, with one request for each thousand."""
        path = self._strip_protocol(path)
        bucket, key = _split(path)
        with _told(path):
            listed = _obstore().list(_bucket(bucket), key or None)
            files = [_file(bucket, meta) for chunk in listed for meta in chunk]
        return {file["name"]: file for file in files} if detail else [f["name"] for f in files]

    def cat_file(
        self, path: str, start: int | None = None, end: int | None = None, **_: Any
    ) -> bytes:
        """Return an object, or its bytes from ``start`` to ``end``."""
        if start is None or end is None:
            return self.read_version(path)[0][slice(start, end)]
        path = self._strip_protocol(path)
        bucket, key = _split(path)
        with _told(path):
            return bytes(_obstore().get_range(_bucket(bucket), key, start=start, end=end))

    def read_version(self, path: str) -> tuple[bytes, str]:
        """Return an object and its version, the ETag."""
        path = self._strip_protocol(path)
        bucket, key = _split(path)
        with _told(path):
            found = _obstore().get(_bucket(bucket), key)
            return bytes(found.bytes()), str(found.meta["e_tag"])

    def get_file(self, rpath: str, lpath: str, **_: Any) -> None:
        """Copy an object to a local file."""
        path = self._strip_protocol(rpath)
        bucket, key = _split(path)
        with _told(path), open(lpath, "wb") as file:
            for chunk in _obstore().get(_bucket(bucket), key).stream(min_chunk_size=_CHUNK):
                file.write(chunk)

    def exists(self, path: str, **_: Any) -> bool:
        """Return whether a file or folder is there."""
        return self._kind(path) is not None

    def isdir(self, path: str) -> bool:
        """Return whether a folder is there."""
        return self._kind(path) == "directory"

    def isfile(self, path: str) -> bool:
        """Return whether a file is there."""
        return self._kind(path) == "file"

    def _kind(self, path: str) -> str | None:
        # fsspec takes any error for a file that is not there.
        try:
            return str(self.info(path)["type"])
        except FileNotFoundError:
            return None

    def modified(self, path: str) -> Any:
        """Return when an object was written."""
        return self.info(path)["LastModified"]

    # --- writing ---

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        """Write an object, whole or not at all."""
        path = self._strip_protocol(path)
        bucket, key = _split(path)
        with _told(path):
            _obstore().put(_bucket(bucket), key, value, mode=mode)

    def put_file(self, lpath: str, rpath: str, **_: Any) -> None:
        """Write an object from a local file, whole or not at all."""
        path = self._strip_protocol(rpath)
        bucket, key = _split(path)
        with _told(path):
            _obstore().put(_bucket(bucket), key, Path(lpath))

    def put_if(self, path: str, value: bytes, version: str | None) -> str | None:
        """Write an object if it still has ``version``, or is still absent for None.

        Returns its new version, or None if another process was faster (If-Match, If-None-Match).
        """
        path = self._strip_protocol(path)
        bucket, key = _split(path)
        errors = _obstore().exceptions
        mode: Any = "create" if version is None else {"e_tag": version}
        with _told(path):
            try:
                done = _obstore().put(_bucket(bucket), key, value, mode=mode, use_multipart=False)
                return str(done["e_tag"])
            except (errors.AlreadyExistsError, errors.PreconditionError):
                pass
            except FileNotFoundError as error:  # what should be replaced is gone
                if "NoSuchBucket" in str(error):
                    raise
                return None
        # A request that is repeated after a lost answer meets what it wrote itself.
        try:
            there, written = self.read_version(path)
        except FileNotFoundError:
            return None
        return written if there == value else None

    def rm_file(self, path: str) -> None:
        """Remove an object. One that is gone already is no error."""
        path = self._strip_protocol(path)
        bucket, key = _split(path)
        with _told(path):
            _obstore().delete(_bucket(bucket), key)

    def rm(self, path: str, recursive: bool = False, **_: Any) -> None:
        """Remove an object, or all below a folder."""
        for name in self.find(path) if recursive else [path]:
            self.rm_file(name)

    def makedirs(self, path: str, **_: Any) -> None:
        """Do nothing: a folder is there with its first object. Raises if the bucket is not."""
        self.info(_split(self._strip_protocol(path))[0])

    def rmdir(self, path: str) -> None:
        """Do nothing: a folder goes with its last object."""

    def _open(self, path: str, mode: str = "rb", **_: Any) -> Any:
        if mode == "rb":
            return _Reader(self, path, mode)
        bucket, key = _split(path)
        return _Writer(path, bucket, key)


class _Reader(AbstractBufferedFile):  # type: ignore[misc] # untyped in fsspec
    def _fetch_range(self, start: int, end: int) -> bytes:
        content: bytes = self.fs.cat_file(self.path, start, end)
        return content


class _Writer(io.RawIOBase):
    """An object that appears when it is closed, and not after an error."""

    def __init__(self, path: str, bucket: str, key: str) -> None:
        self._path, self._size = path, 0
        with _told(path):
            self._file: Any = _obstore().open_writer(_bucket(bucket), key, buffer_size=_CHUNK)

    def write(self, data: Any) -> int:
        with _told(self._path):
            self._file.write(data)
        self._size += len(data)
        return len(data)

    def tell(self) -> int:
        return self._size

    def writable(self) -> bool:
        return True

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is not None:
            self._file = None
        self.close()

    def close(self) -> None:
        file, self._file = getattr(self, "_file", None), None
        if file is not None:
            with _told(self._path):
                file.close()
        super().close()


# --- the store ---


def _obstore() -> Any:
    try:
        import obstore
    except ImportError:
        raise _StoreUsageError(
            "Addresses of object stores (s3://) need obstore: pip install 'medspark[s3]'."
        ) from None
    return obstore


@lru_cache(maxsize=8)
def _bucket(name: str) -> Any:
    _obstore()
    from obstore.store import S3Store

    # An address without TLS is only used if AWS_ENDPOINT_URL names one.
    return S3Store(
        name, client_options={"allow_http": True}, retry_config={"retry_timeout": _PATIENCE}
    )


def _split(path: str) -> tuple[str, str]:
    bucket, _, key = path.partition("/")
    if "@" in bucket:
        raise _StoreUsageError(
            "An address of an object store has no credentials in it: set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY."
        )
    if not bucket:
        raise _StoreUsageError("An address of an object store names a bucket: s3://BUCKET/FOLDER.")
    return bucket, key


def _file(bucket: str, meta: Any) -> dict[str, Any]:
    return {
        "name": f"{bucket}/{meta['path']}",
        "type": "file",
        "size": meta["size"],
        "LastModified": meta["last_modified"],
        "ETag": meta["e_tag"],
    }


@contextmanager
def _told(path: str) -> Iterator[None]:
    """Turn errors of obstore into ours. Its own texts can quote signed requests."""
    base = _obstore().exceptions.BaseError
    try:
        yield
    except FileNotFoundError as error:
        if "NoSuchBucket" in str(error):
            raise _explained(error, path) from None
        raise FileNotFoundError(f"There is no s3://{path}.") from None
    except base as error:
        raise _explained(error, path) from None


def _explained(error: Exception, path: str) -> MedsparkError:
    text, kind = str(error), type(error).__name__
    found = _CODE.search(text)
    code = found[1] if found else kind
    where = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "AWS"
    if code == "NoSuchBucket":
        return _StoreUsageError(f"There is no bucket {path.partition('/')[0]} at {where}.")
    if kind == "InvalidPathError":
        return _StoreUsageError(
            f"The name of s3://{path}, or of an object below it, has a part that is empty, '.' or "
            "'..': rename it."
        )
    if code in ("AccessDenied", "PermissionDeniedError"):
        return AccessDeniedError(f"These credentials have no access to s3://{path} at {where}.")
    if kind in ("PermissionDeniedError", "UnauthenticatedError") or code in _NOT_ACCEPTED:
        return _StoreUsageError(
            f"{where} does not accept the credentials for s3://{path} ({code}): see "
            "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN."
        )
    if "169.254." in text:
        return _StoreUsageError(
            f"There are no credentials for s3://{path}: set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY."
        )
    if found is None and "error sending request" in text:
        return _StoreRunError(f"{where} does not answer (s3://{path}).")
    return _StoreRunError(f"{where} failed with {code} (s3://{path}).")


_NOT_ACCEPTED = {"ExpiredToken", "InvalidToken", "InvalidAccessKeyId", "SignatureDoesNotMatch"}
