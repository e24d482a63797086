"""The S3 operations of the test server: what a request means, over Files; the server sends what comes out."""

from __future__ import annotations

import base64
import hashlib
import shutil
import uuid
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from tiercache.testing.s3files import KEY_BYTES_MAX, Draft, Files, Found

if TYPE_CHECKING:
    from pathlib import Path

    from tiercache.clock import Clock
    from tiercache.testing.httpwire import Request

NAMESPACE = "http://s3.amazonaws.com/doc/2006-03-01/"
DECLARATION = '<?xml version="1.0" encoding="UTF-8"?>\n'
LIST_ROWS_MAX = 1000
COPY_BYTES = 1 << 20


@dataclass(slots=True)
class Answer:
    """What to send: a body, or bytes [start, stop) of a file; `found` asks the server for an object's own headers."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    operation: str = ""
    found: Found | None = None
    file: Path | None = None
    start: int = 0
    stop: int = 0
    received: int = 0


class Refusal(Exception):
    """An S3 error answer."""

    def __init__(
        self, status: int, code: str, message: str, *, headers: dict[str, str] | None = None, condition: str = ""
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.headers = status, code, message, headers or {}
        self.condition = condition

    @classmethod
    def condition_failed(cls, name: str) -> Refusal:
        """412, naming the header that did not hold (s3fs tells "it exists" by it)."""
        return cls(
            412, "PreconditionFailed", "At least one of the pre-conditions you specified did not hold", condition=name
        )

    def answer(self, resource: str) -> Answer:
        """The XML error document."""
        text = (
            f"{DECLARATION}<Error><Code>{self.code}</Code><Message>{escape(self.message)}</Message>"
            f"<Resource>{escape(resource)}</Resource><RequestId>TIERCACHE</RequestId>"
        )
        text += f"<Condition>{self.condition}</Condition></Error>" if self.condition else "</Error>"
        headers = {"Content-Type": "application/xml"} | self.headers
        return Answer(self.status, headers, text.encode(), operation=f"Error{self.status}")


@dataclass(slots=True)
class Upload:
    """A multipart upload that is not complete: drafts by part number."""

    bucket: str
    key: str
    facts: dict[str, object]
    parts: dict[int, Draft] = field(default_factory=dict)


def xml(root: str, inner: str, operation: str) -> Answer:
    """An XML answer in S3's namespace."""
    text = f'{DECLARATION}<{root} xmlns="{NAMESPACE}">{inner}</{root}>'
    return Answer(headers={"Content-Type": "application/xml"}, body=text.encode(), operation=operation)


def iso(wall_s: float) -> str:
    """A time as S3's XML writes it."""
    return datetime.fromtimestamp(wall_s, UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")


def _tags(document: bytes, name: str) -> list[ElementTree.Element]:
    try:
        root = ElementTree.fromstring(document)
    except ElementTree.ParseError as error:
        raise Refusal(400, "MalformedXML", "The XML you provided was not well-formed") from error
    return [node for node in root.iter() if node.tag.rpartition("}")[2] == name]


def _text(node: ElementTree.Element, name: str) -> str:
    return next((child.text or "" for child in node if child.tag.rpartition("}")[2] == name), "")


class S3Api:
    """Answers requests. Bodies are read as they come; nothing of a refused or broken upload becomes visible."""

    def __init__(self, files: Files, clock: Clock) -> None:
        self._files = files
        self._clock = clock
        self._uploads: dict[str, Upload] = {}

    async def answer(self, request: Request) -> Answer:
        """The answer to one request, or Refusal."""
        bucket, _, key = request.path[1:].partition("/")
        if len(key.encode()) > KEY_BYTES_MAX:
            raise Refusal(400, "KeyTooLongError", "Your key is too long")
        if not bucket:
            return self._list_buckets()
        if key:
            return await self._object(request, bucket, key)
        return await self._bucket(request, bucket)

    async def _bucket(self, request: Request, bucket: str) -> Answer:
        method, query = request.method, request.query
        if method == "PUT" and not query:
            if not self._files.create_bucket(bucket):
                raise Refusal(409, "BucketAlreadyOwnedByYou", "The bucket exists")
            return Answer(headers={"Location": f"/{bucket}"}, operation="CreateBucket")
        self._need(bucket)
        if method == "HEAD":
            return Answer(headers={"x-amz-bucket-region": "us-east-1"}, operation="HeadBucket")
        if method == "DELETE":
            if not self._files.delete_bucket(bucket):
                raise Refusal(409, "BucketNotEmpty", "The bucket you tried to delete is not empty")
            return Answer(204, operation="DeleteBucket")
        if method == "POST" and "delete" in query:
            return await self._delete_objects(request, bucket)
        if method == "GET" and "location" in query:
            return xml("LocationConstraint", "", "GetBucketLocation")
        if method == "GET" and "versioning" in query:
            return xml("VersioningConfiguration", "", "GetBucketVersioning")
        if method == "GET" and "uploads" in query:
            rows = [(u.key, name) for name, u in self._uploads.items() if u.bucket == bucket]
            inner = "".join(f"<Upload><Key>{escape(k)}</Key><UploadId>{i}</UploadId></Upload>" for k, i in sorted(rows))
            return xml("ListMultipartUploadsResult", inner, "ListMultipartUploads")
        if method == "GET" and not {"acl", "policy", "tagging", "versions", "lifecycle", "cors"} & query.keys():
            return self._list(bucket, query)
        raise Refusal(501, "NotImplemented", "This test server does not know this operation")

    async def _object(self, request: Request, bucket: str, key: str) -> Answer:
        self._need(bucket)
        method, query = request.method, request.query
        if method in ("GET", "HEAD") and not {"acl", "tagging", "uploadId", "attributes"} & query.keys():
            found = self._files.find(bucket, key)
            if found is None:
                raise Refusal(404, "NoSuchKey", "The specified key does not exist.")
            return Answer(found=found, operation="GetObject" if method == "GET" else "HeadObject")
        if method == "PUT" and "x-amz-copy-source" in request.head.headers:
            return self._copy(request, bucket, key)
        if method == "PUT" and "uploadId" in query:
            return await self._upload_part(request)
        if method == "PUT" and not {"acl", "tagging"} & query.keys():
            return await self._put(request, bucket, key)
        if method == "POST" and "uploads" in query:
            return self._create_upload(request, bucket, key)
        if method == "POST" and "uploadId" in query:
            return await self._complete(request)
        if method == "DELETE" and "uploadId" in query:
            for draft in self._upload(request).parts.values():
                draft.drop()
            del self._uploads[query["uploadId"]]
            return Answer(204, operation="AbortMultipartUpload")
        if method == "DELETE":
            self._files.delete(bucket, key)
            return Answer(204, operation="DeleteObject")
        raise Refusal(501, "NotImplemented", "This test server does not know this operation")

    def _need(self, bucket: str) -> None:
        if not self._files.has_bucket(bucket):
            raise Refusal(404, "NoSuchBucket", "The specified bucket does not exist")

    def _list_buckets(self) -> Answer:
        rows = self._files.buckets()
        inner = "".join(
            f"<Bucket><Name>{escape(name)}</Name><CreationDate>{iso(wall_s)}</CreationDate></Bucket>"
            for name, wall_s in rows
        )
        return xml("ListAllMyBucketsResult", f"<Owner><ID>test</ID></Owner><Buckets>{inner}</Buckets>", "ListBuckets")

    def _list(self, bucket: str, query: dict[str, str]) -> Answer:
        second = query.get("list-type") == "2"
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        token = query.get("continuation-token", "")
        after = query.get("start-after" if second else "marker", "")
        if token:
            try:
                after = base64.urlsafe_b64decode(token).decode()
            except ValueError as error:
                raise Refusal(400, "InvalidArgument", "The continuation token provided is incorrect") from error
        if not query.get("max-keys", "0").isdigit():
            raise Refusal(400, "InvalidArgument", "max-keys is not a number")
        rows_max = min(LIST_ROWS_MAX, int(query.get("max-keys", LIST_ROWS_MAX)))
        rows = [row for row in self._files.keys(bucket, prefix, delimiter) if row[0].encode() > after.encode()]
        page, cut = rows[:rows_max], len(rows) > rows_max > 0
        spell = _spell_url if query.get("encoding-type") == "url" else escape
        parts = [f"<Name>{escape(bucket)}</Name><Prefix>{spell(prefix)}</Prefix><MaxKeys>{rows_max}</MaxKeys>"]
        parts.append(f"<IsTruncated>{str(cut).lower()}</IsTruncated>")
        parts += [f"<Delimiter>{spell(delimiter)}</Delimiter>"] if delimiter else []
        parts += ["<EncodingType>url</EncodingType>"] if query.get("encoding-type") == "url" else []
        if second:
            parts.append(f"<KeyCount>{len(page)}</KeyCount>")
            parts += [f"<ContinuationToken>{token}</ContinuationToken>"] if token else []
            parts += [f"<StartAfter>{spell(after)}</StartAfter>"] if query.get("start-after") else []
            if cut:
                following = base64.urlsafe_b64encode(page[-1][0].encode()).decode()
                parts.append(f"<NextContinuationToken>{following}</NextContinuationToken>")
        else:
            parts.append(f"<Marker>{spell(after)}</Marker>")
            parts += [f"<NextMarker>{spell(page[-1][0])}</NextMarker>"] if cut and delimiter else []
        for key, found in page:
            if found is None:
                parts.append(f"<CommonPrefixes><Prefix>{spell(key)}</Prefix></CommonPrefixes>")
            else:
                parts.append(
                    f"<Contents><Key>{spell(key)}</Key><LastModified>{iso(found.mtime_s)}</LastModified>"
                    f"<ETag>{escape(found.etag)}</ETag><Size>{found.size}</Size><StorageClass>STANDARD</StorageClass></Contents>"
                )
        return xml("ListBucketResult", "".join(parts), "ListObjectsV2" if second else "ListObjects")

    async def _receive(self, request: Request) -> Draft:
        """The body as a draft; a broken body, or one that is not what it says, leaves nothing."""
        draft = self._files.draft()
        try:
            async for piece in request.body:
                draft.write(piece)
            told = request.header("content-md5")
            if told and base64.b64decode(told) != draft.digest.digest():
                raise Refusal(400, "BadDigest", "The Content-MD5 you specified did not match what we received.")
            decoded = request.header("x-amz-decoded-content-length")
            if decoded and int(decoded) != draft.size:
                raise Refusal(400, "IncompleteBody", "The request body ended before the decoded length was reached")
        except BaseException:
            draft.drop()
            raise
        return draft

    async def _put(self, request: Request, bucket: str, key: str) -> Answer:
        draft = await self._receive(request)
        try:
            # After the body, without a pause before publishing: of two exclusive creations one loses.
            self._check_write(request, bucket, key)
        except Refusal:
            draft.drop()
            raise
        found = self._files.publish(bucket, key, draft, **_facts(request))
        return Answer(headers={"ETag": found.etag}, operation="PutObject", received=draft.size)

    def _check_write(self, request: Request, bucket: str, key: str) -> None:
        match, none = request.header("if-match"), request.header("if-none-match")
        if match is None and none is None:
            return
        found = self._files.find(bucket, key)
        if none is not None and found is not None:
            raise Refusal.condition_failed("If-None-Match")
        if match is not None and found is None:
            raise Refusal(404, "NoSuchKey", "The specified key does not exist.")
        if match is not None and found is not None and match.strip('"') not in (found.etag.strip('"'), "*"):
            raise Refusal.condition_failed("If-Match")

    def _copy(self, request: Request, bucket: str, key: str) -> Answer:
        source = unquote(request.head.headers["x-amz-copy-source"]).lstrip("/").partition("?versionId=")[0]
        place, _, name = source.partition("/")
        self._need(place)
        found = self._files.find(place, name)
        if found is None:
            raise Refusal(404, "NoSuchKey", "The specified key does not exist.")
        draft = self._files.draft()
        first, last = 0, found.size - 1
        span = request.header("x-amz-copy-source-range")
        if span:
            first, last = (int(text) for text in span.removeprefix("bytes=").split("-"))
        with found.file.open("rb") as stream:
            stream.seek(first)
            left = last - first + 1
            while left > 0 and (piece := stream.read(min(left, COPY_BYTES))):
                draft.write(piece)
                left -= len(piece)
        if "uploadId" in request.query:
            etag = self._keep_part(request, draft)
            return xml(
                "CopyPartResult",
                f"<LastModified>{iso(self._clock.wall())}</LastModified><ETag>{etag}</ETag>",
                "UploadPartCopy",
            )
        facts = _facts(request) if request.header("x-amz-metadata-directive") == "REPLACE" else None
        facts = facts or {"type": found.content_type, "metadata": found.metadata}
        made = self._files.publish(bucket, key, draft, **facts)
        inner = f"<LastModified>{iso(made.mtime_s)}</LastModified><ETag>{escape(made.etag)}</ETag>"
        return xml("CopyObjectResult", inner, "CopyObject")

    async def _delete_objects(self, request: Request, bucket: str) -> Answer:
        document = b"".join([piece async for piece in request.body])
        keys = [_text(node, "Key") for node in _tags(document, "Object")]
        quiet = any(node.text == "true" for node in _tags(document, "Quiet"))
        for key in keys:
            self._files.delete(bucket, key)
        inner = "" if quiet else "".join(f"<Deleted><Key>{escape(key)}</Key></Deleted>" for key in keys)
        return xml("DeleteResult", inner, "DeleteObjects")

    def _create_upload(self, request: Request, bucket: str, key: str) -> Answer:
        name = uuid.uuid4().hex
        self._uploads[name] = Upload(bucket, key, _facts(request))
        inner = f"<Bucket>{escape(bucket)}</Bucket><Key>{escape(key)}</Key><UploadId>{name}</UploadId>"
        return xml("InitiateMultipartUploadResult", inner, "CreateMultipartUpload")

    def _upload(self, request: Request) -> Upload:
        upload = self._uploads.get(request.query["uploadId"])
        if upload is None:
            raise Refusal(404, "NoSuchUpload", "The specified upload does not exist.")
        return upload

    def _keep_part(self, request: Request, draft: Draft) -> str:
        draft.stream.close()
        upload, number = self._upload(request), int(request.query.get("partNumber", "0"))
        if number in upload.parts:
            upload.parts[number].drop()
        upload.parts[number] = draft
        return f'"{draft.digest.hexdigest()}"'

    async def _upload_part(self, request: Request) -> Answer:
        self._upload(request)
        draft = await self._receive(request)
        return Answer(headers={"ETag": self._keep_part(request, draft)}, operation="UploadPart", received=draft.size)

    async def _complete(self, request: Request) -> Answer:
        upload = self._upload(request)
        document = b"".join([piece async for piece in request.body])
        numbers = []
        for node in _tags(document, "Part"):
            number, etag = int(_text(node, "PartNumber") or 0), _text(node, "ETag").strip('"')
            part = upload.parts.get(number)
            if part is None or etag not in ("", part.digest.hexdigest()):
                raise Refusal(400, "InvalidPart", "One or more of the specified parts could not be found.")
            numbers.append(number)
        if not numbers or numbers != sorted(set(numbers)):
            raise Refusal(400, "InvalidPartOrder", "The list of parts was not in ascending order.")
        self._check_write(request, upload.bucket, upload.key)
        whole = self._files.draft()
        digests = b"".join(upload.parts[number].digest.digest() for number in numbers)
        for number in numbers:
            with upload.parts[number].file.open("rb") as stream:
                shutil.copyfileobj(stream, whole.stream, COPY_BYTES)
        for part in upload.parts.values():
            part.drop()
        del self._uploads[request.query["uploadId"]]
        etag = f'"{hashlib.md5(digests, usedforsecurity=False).hexdigest()}-{len(numbers)}"'
        found = self._files.publish(upload.bucket, upload.key, whole, **(upload.facts | {"etag": etag}))
        inner = (
            f"<Bucket>{escape(upload.bucket)}</Bucket><Key>{escape(upload.key)}</Key><ETag>{escape(found.etag)}</ETag>"
        )
        return xml("CompleteMultipartUploadResult", inner, "CompleteMultipartUpload")


def _facts(request: Request) -> dict[str, object]:
    prefix = "x-amz-meta-"
    metadata = {k[len(prefix) :]: v for k, v in request.head.headers.items() if k.startswith(prefix)}
    return {"type": request.header("content-type") or "", "metadata": metadata}


def _spell_url(text: str) -> str:
    return quote(text, safe="/")
