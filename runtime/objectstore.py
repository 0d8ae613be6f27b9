# SPDX-License-Identifier: Apache-2.0
"""One object of an S3 store, `s3://BUCKET/KEY`: its name, parts, ranges, uploads, and refusals.

Only this file imports botocore, and only when a store is asked.

Credentials, region and endpoint come from where every S3 tool looks for them:
the environment (AWS_…) and ~/.aws. Why botocore: docs/decisions/0010-object-store.md.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from vmapipe.runtime.errors import Failure, UsageError
from vmapipe.runtime.object_names import SCHEME, check_prefix, split_name
from vmapipe.runtime.objectlock import GRAIN_S, UNLOCKED, ObjectLock, locked_until_s

# A store's own words, of which there may be any number, in the one line that the user sees.
MAX_WORDS = 300
_CONFLICTS = ("PreconditionFailed", "ConditionalRequestConflict", "412", "409")
_WAY_OUT = {
    "NoSuchBucket": "create the bucket, or mend its name",
    "AccessDenied": "these credentials may not do that",
    "403": "these credentials may not do that, or are wrong",
    "InvalidAccessKeyId": "mend AWS_ACCESS_KEY_ID or ~/.aws/credentials",
    "SignatureDoesNotMatch": "mend AWS_SECRET_ACCESS_KEY or ~/.aws/credentials",
    "RequestTimeTooSkewed": "set this machine's clock",
}


class StoreError(Failure):
    """The store cannot be reached or refuses; `code` is its own word for why, if it said one."""

    def __init__(self, text: str, code: str = "") -> None:
        super().__init__(text)
        self.code = code


class ConflictError(StoreError):
    """The object is not as the request asked for: it exists already, or was replaced."""


def refusal(what: str, reason: Mapping[str, Any], times: int) -> StoreError:
    """`reason`: the store's `Code` and `Message`; `what`: "cannot write s3://…"."""
    code = str(reason.get("Code") or "")[:MAX_WORDS]
    text = str(reason.get("Message") or "no reason given")[:MAX_WORDS]
    often = f", {times} times" if times > 1 else ""
    out = f"; {_WAY_OUT[code]}" if code in _WAY_OUT else ""
    kind = ConflictError if code in _CONFLICTS else StoreError
    return kind(f"{what}: {code}: {text}{often}{out}", code)


ALLOW_HTTP = "AWS_ALLOW_HTTP"
# A healthy store answers within a second; an upload of thousands of parts may take a minute to complete.
CONNECT_S, READ_S = 10, 120
# With waits of 1, 2, 4, 8 and 16 s at most between them: a store that restarts is survived, one
# that is down is told within a minute. AWS_MAX_ATTEMPTS and ~/.aws/config have another number.
ATTEMPTS = 6
# Of an upload's parts, of which there are at most ten thousand; a page has a thousand.
_MAX_PAGES = 10
# Of a listing: archives by the hundred thousand. A store could go on for ever.
_MAX_LISTED_PAGES = 2000
# What marks an object as ours, so that an answer that was lost can be asked for again.
_MARK = "vmapipe-upload"
Result = TypeVar("Result")


class ObjectInfo(NamedTuple):
    """`mark`: of the upload that made the object, if it was one of ours. `locked_until_s`: see `ObjectLock`."""

    size_bytes: int
    etag: str
    mark: str
    locked_until_s: float = 0.0


class StoredObject:
    """Requests about one object, each tried several times. They block; any thread may make them.

    All raise StoreError with the object's name. `connections`: how many requests at the same time.
    """

    def __init__(
        self, name: str, connections: int = 8, lock: ObjectLock | None = None, client: Any = None
    ) -> None:
        """`lock`: of objects that are made. `client`: somebody else's, whose `close` ends it."""
        self.name = name
        self.bucket, self.key = split_name(name)
        self._client = client or _client(name, connections)
        self._where = {"Bucket": self.bucket, "Key": self.key}
        self._until_s = lock.until_s if lock is not None else 0.0
        self._lock = lock.fields() if lock is not None else {}

    def head(self) -> ObjectInfo | None:
        """Return what is known of the object; None: there is no such object."""
        try:
            found = self._ask("look at", self._client.head_object)
        except StoreError as error:
            if error.code in ("404", "NoSuchKey", "NotFound"):
                return None
            raise
        mark = {k.lower(): v for k, v in found.get("Metadata", {}).items()}.get(_MARK, "")
        return ObjectInfo(
            found.get("ContentLength", 0), found.get("ETag", ""), mark, locked_until_s(found)
        )

    def read_small(self, limit_bytes: int) -> bytes | None:
        """Return an object of at most so many bytes; None: there is none, or it is larger."""
        found = self.head()
        if found is None or found.size_bytes > limit_bytes:
            return None
        return self.read(found.size_bytes, 0, found.etag) if found.size_bytes else b""

    def read(self, length: int, offset: int, etag: str) -> bytes:
        """Read all of these bytes, which must be there. Raises ConflictError: the object was replaced."""
        at = f" at offset {offset}"
        ask = {"Range": f"bytes={offset}-{offset + length - 1}"}
        if etag:
            ask["IfMatch"] = etag
        problem = ""
        for attempt in range(ATTEMPTS):
            body = self._ask("read", self._client.get_object, place=at, **ask)["Body"]
            problem = "more bytes came than were asked for"
            try:
                data: bytes = body.read(length + 1)
                if len(data) == length:
                    return data
                if len(data) < length:
                    problem = f"{len(data)} of {length} bytes came"
            # The library knows an answer that was cut by half a dozen names, its own and others'.
            except Exception as error:  # noqa: BLE001
                problem = _reason(error)
            finally:
                body.close()
            time.sleep(random.uniform(0, min(1 << attempt, 16)) / 4)
        raise StoreError(f"cannot read {self.name}{at}: {problem}, {ATTEMPTS} times")

    # --- writing ---

    def put(self, data: bytes | bytearray, mark: str, condition: Mapping[str, str]) -> None:
        """The whole object in one request. Raises ConflictError."""
        self._ask(
            "write",
            self._client.put_object,
            Body=data,
            ContentMD5=_md5(data),
            Metadata={_MARK: mark},
            **self._lock,
            **condition,
        )

    def begin(self, mark: str) -> str:
        """Begin an upload in parts; returns its id."""
        begun = self._ask(
            "write", self._client.create_multipart_upload, Metadata={_MARK: mark}, **self._lock
        )
        return str(begun.get("UploadId", ""))

    def put_part(self, upload: str, number: int, data: bytes | bytearray) -> str:
        """Returns what `complete` wants to know of the part."""
        done = self._ask(
            "write",
            self._client.upload_part,
            place=f", part {number}",
            UploadId=upload,
            PartNumber=number,
            Body=data,
            ContentMD5=_md5(data),
        )
        return str(done.get("ETag", ""))

    def complete(self, upload: str, etags: Sequence[str], condition: Mapping[str, str]) -> None:
        """Make the object from its parts. Raises ConflictError."""
        parts = [{"PartNumber": n, "ETag": etag} for n, etag in enumerate(etags, start=1)]
        self._ask(
            "complete",
            self._client.complete_multipart_upload,
            UploadId=upload,
            MultipartUpload={"Parts": parts},
            **condition,
        )

    def abort(self, upload: str) -> None:
        """Give the upload and its parts up; no error where there is none."""
        try:
            self._ask("abort the upload of", self._client.abort_multipart_upload, UploadId=upload)
        except StoreError as error:
            if error.code not in ("NoSuchUpload", "404"):
                raise

    def remove(self) -> None:
        self._ask("remove", self._client.delete_object)

    def check_lock(self) -> None:
        """Check that objects of the bucket can be locked. Raises StoreError."""
        if not _has_object_lock(self):
            raise StoreError(
                f"{self.name} cannot be locked: its bucket has no Object Lock, which is switched on when a "
                "bucket is made; choose another bucket, or leave --lock out"
            )

    def is_locked(self) -> bool | None:
        """Return whether the object is locked for as long as was asked; None: that cannot be seen."""
        found = self.head()
        until_s = found.locked_until_s if found is not None else 0.0
        if not until_s:
            # Who may not see a lock sees a head without one.
            try:
                until_s = locked_until_s(
                    self._ask("look at the lock of", self._client.get_object_retention)
                )
            except StoreError as error:
                return False if error.code in UNLOCKED else None
        return until_s > self._until_s - GRAIN_S

    def look_at_bucket(self) -> None:
        """Check that the bucket is there and may be used."""
        self._ask("use the bucket of", self._client.head_bucket, key="")

    def uploads_beside(
        self, endings: Sequence[str], *, below: bool = False
    ) -> Iterator[tuple[str, str, float]]:
        """Uploads under way in the object's folder: (key, id, seconds since its last part).

        Only of keys with one of these endings. `below`: in folders below it, too.
        """
        folder = self.key.rpartition("/")[0]
        ask: dict[str, Any] = {"Prefix": f"{folder}/" if folder else ""}
        if not below:
            ask["Delimiter"] = "/"
        found = self._ask(
            "list the uploads beside", self._client.list_multipart_uploads, key="", **ask
        )
        for upload in found.get("Uploads", ()):
            key, number = str(upload["Key"]), str(upload["UploadId"])
            if not key.endswith(tuple(endings)):
                continue
            times = [part["LastModified"] for part in self._parts(key, number)]
            yield key, number, time.time() - max([upload["Initiated"], *times]).timestamp()

    def parts(self, upload: str) -> Iterator[tuple[int, tuple[int, str]]]:
        """Yield the number, length and MD5 (hex; of stores that tell another ETag something else) of each part."""
        for part in self._parts(self.key, upload):
            yield part["PartNumber"], (part["Size"], str(part.get("ETag", "")).strip('"'))

    def _parts(self, key: str, upload: str) -> Iterator[Mapping[str, Any]]:
        marker = 0
        for _ in range(_MAX_PAGES):
            found = self._ask(
                "list the parts of",
                self._client.list_parts,
                key=key,
                UploadId=upload,
                PartNumberMarker=marker,
            )
            parts = found.get("Parts", ())
            yield from parts
            if not found.get("IsTruncated") or not parts:
                return
            marker = parts[-1]["PartNumber"]

    def sibling(self, key: str) -> StoredObject:
        """Another object of the same bucket."""
        return StoredObject(f"{SCHEME}{self.bucket}/{key}")

    def close(self) -> None:
        """Give the connections back; the next request makes new ones."""
        self._client.close()

    def _ask(
        self,
        verb: str,
        request: Callable[..., Result],
        *,
        place: str = "",
        key: str | None = None,
        **parameters: Any,
    ) -> Result:
        from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError

        where = dict(self._where) if key is None else {"Bucket": self.bucket}
        if key:
            where["Key"] = key
        try:
            return request(**where, **parameters)
        except ClientError as error:
            tried = error.response.get("ResponseMetadata", {}).get("RetryAttempts", 0)
            reason = error.response.get("Error", {})
            raise refusal(f"cannot {verb} {self.name}{place}", reason, tried + 1) from error
        # With the latter the library fails at numbers and times that are none.
        except (BotoCoreError, HTTPClientError, ArithmeticError, LookupError, ValueError) as error:
            raise StoreError(f"cannot {verb} {self.name}{place}: {_reason(error)}") from error


# What a store says of a bucket without Object Lock, and one that does not know it.
_NO_LOCKS = ("ObjectLockConfigurationNotFoundError", "NotImplemented", "501", "404", "NoSuchKey")


def _has_object_lock(store: StoredObject) -> bool:
    try:
        found = store._ask(
            "look at the locks of", store._client.get_object_lock_configuration, key=""
        )
    except StoreError as error:
        if error.code in _NO_LOCKS:
            return False
        raise
    configuration: Mapping[str, Any] = found.get("ObjectLockConfiguration", {})
    return configuration.get("ObjectLockEnabled") == "Enabled"


class ListedObject(NamedTuple):
    """An object as a listing has it: `name` is its key behind the folder's."""

    name: str
    size_bytes: int
    changed_s: float
    etag: str


class StoredFolder:
    """The objects right below `s3://BUCKET/PREFIX/`, by one client. All raise StoreError."""

    def __init__(self, name: str) -> None:
        """Raises UsageError."""
        self.name = name.removesuffix("/")
        check_prefix(self.name, 0)
        bucket, _, prefix = self.name.removeprefix(SCHEME).partition("/")
        self._prefix = f"{prefix}/" if prefix else ""
        # Any key of the folder: its client, and its errors.
        self._any = StoredObject(f"{SCHEME}{bucket}/{self._prefix}vm.vma")
        self._any.name = f"{self.name}/"
        self.bucket = bucket

    def objects(self) -> Iterator[ListedObject]:
        """Yield all of them, a page of a thousand after the other, in the order of their names."""
        ask: dict[str, Any] = {"Prefix": self._prefix, "Delimiter": "/"}
        for _ in range(_MAX_LISTED_PAGES):
            found = self._any._ask("list", self._any._client.list_objects_v2, key="", **ask)
            for item in found.get("Contents", ()):
                key = str(item.get("Key", ""))
                name = key.removeprefix(self._prefix) if key.startswith(self._prefix) else ""
                if "LastModified" not in item or item.get("Size", -1) < 0:
                    raise StoreError(f"cannot list {self.name}: no size, or no time, of {name!r}")
                if name and "/" not in name:
                    changed = item["LastModified"].timestamp()
                    yield ListedObject(name, item["Size"], changed, item.get("ETag", ""))
            token = found.get("NextContinuationToken")
            if not found.get("IsTruncated") or not token or token == ask.get("ContinuationToken"):
                return
            ask["ContinuationToken"] = token
        text = f"the list has more than {_MAX_LISTED_PAGES} pages; keep archives below a prefix of their own"
        raise StoreError(f"cannot list {self.name}: {text}")

    def object(self, name: str) -> StoredObject:
        """One of them. It is closed with this folder, and not by itself."""
        key = f"{self._prefix}{name}"
        return StoredObject(f"{SCHEME}{self.bucket}/{key}", client=self._any._client)

    def has_object_lock(self) -> bool:
        return _has_object_lock(self._any)

    def close(self) -> None:
        self._any.close()


def _client(name: str, connections: int) -> Any:
    """Raises UsageError where the library or the permission for plain http is missing."""
    try:
        import botocore.session
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError
    except ImportError as error:
        raise UsageError(f"{name}: s3:// needs botocore: pip install 'vmapipe[s3]'") from error
    try:
        session = botocore.session.get_session()
        session.register_component("data_loader", _loader())
        options: dict[str, Any] = {
            "connect_timeout": CONNECT_S,
            "read_timeout": READ_S,
            "max_pool_connections": connections,
            # Checksums in trailers are refused by many stores that are not Amazon's: each part
            # has its MD5 in its header instead, which all of them check.
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
        }
        if session.get_config_variable("max_attempts") is None:
            options["retries"] = {"mode": "standard", "total_max_attempts": ATTEMPTS}
        region = os.environ.get("AWS_REGION") or session.get_config_variable("region")

        def make() -> Any:
            return session.create_client(
                "s3", region_name=region or "us-east-1", config=Config(**options)
            )

        client = make()
        endpoint = str(client.meta.endpoint_url)
        style = (session.get_scoped_config().get("s3") or {}).get("addressing_style")
        if not style and "amazonaws.com" not in endpoint:
            # Few who run a store of their own have a name in the DNS for each bucket.
            options["s3"] = {"addressing_style": "path"}
            client = make()
    except (BotoCoreError, ValueError) as error:
        raise UsageError(f"{name}: {error}") from error
    if endpoint.startswith("http:") and os.environ.get(ALLOW_HTTP, "").lower() not in ("1", "true"):
        raise UsageError(
            f"{name}: over {endpoint} anybody on the way could read and change the data; use an "
            f"https:// endpoint, or accept the risk with {ALLOW_HTTP}=true"
        )
    return client


@functools.cache
def _loader() -> Any:
    """Return the loader of botocore's description of S3, which takes 0.1 s to read: shared."""
    import botocore.session

    return botocore.session.get_session().get_component("data_loader")


def _md5(data: bytes | bytearray) -> str:
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()


def _reason(error: BaseException) -> str:
    from botocore.exceptions import NoCredentialsError, PartialCredentialsError

    if isinstance(error, NoCredentialsError | PartialCredentialsError):
        names = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        return f"no credentials were found; set {names}, or write ~/.aws/credentials"
    return " ".join(str(error)[:MAX_WORDS].split()) or type(error).__name__
