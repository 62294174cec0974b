"""Storage in S3, or in what speaks its language (MinIO, R2, Ceph, ...), through boto3, which Streaming brings."""

from __future__ import annotations

import os
from typing import Any

from ettin_foundry.data.storage import missing
from ettin_foundry.data.storage_remote import BUSY, RemoteStorage, brief, client_of_this_process, refused

__all__ = ["S3Storage"]

_UPLOAD_PART_BYTES = 64 << 20  # larger files go up in parts of this size
_PAGE = 1000  # names asked for at a time, the most that S3 gives
_CONNECT_SECONDS, _READ_SECONDS = 10, 60
_BUSY_CODES = {"RequestTimeout", "SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded", "InternalError"}


class S3Storage(RemoteStorage):
    """A bucket, or a folder of one. The endpoint is S3_ENDPOINT_URL (Streaming's variable) or boto3's own choice."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.bucket, _, self.prefix = self.url[len("s3://"):].partition("/")
        if not self.bucket:
            raise ValueError(f"{url}: no bucket; s3://BUCKET or s3://BUCKET/FOLDER is needed. Correct the URL")

    def client(self) -> Any:
        endpoint = os.environ.get("S3_ENDPOINT_URL") or ""

        def make() -> Any:
            from boto3.session import Session
            from botocore import UNSIGNED
            from botocore.config import Config

            session = Session()
            options: dict[str, Any] = {} if session.get_credentials() else {"signature_version": UNSIGNED}
            config = Config(retries={"total_max_attempts": 1}, connect_timeout=_CONNECT_SECONDS,
                            read_timeout=_READ_SECONDS, **options)
            return session.client("s3", endpoint_url=endpoint or None, config=config)

        return client_of_this_process(f"s3 {endpoint}", make)

    def _place(self, name: str) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": f"{self.prefix}/{name}" if self.prefix else name}

    def request_stat(self, name: str) -> tuple[int, str | None]:
        head = self.client().head_object(**self._place(name))
        return int(head["ContentLength"]), head.get("ETag")

    def request_list(self, prefix: str, after: str | None) -> tuple[list[tuple[str, int]], str | None]:
        start = self._place(prefix)["Key"]
        cut = len(start) - len(prefix)
        more = {"ContinuationToken": after} if after else {}
        page = self.client().list_objects_v2(Bucket=self.bucket, Prefix=start, MaxKeys=_PAGE, **more)
        found = [(entry["Key"][cut:], int(entry["Size"])) for entry in page.get("Contents", ())]
        return found, page.get("NextContinuationToken")

    def request_range(self, name: str, begin: int, end: int, version: str | None) -> bytes:
        match = {"IfMatch": version} if version else {}
        return self.client().get_object(**self._place(name), Range=f"bytes={begin}-{end - 1}", **match)["Body"].read()

    def request_write(self, name: str, data: bytes) -> None:
        self.client().put_object(**self._place(name), Body=data)

    def request_upload(self, path: str, name: str) -> None:
        from boto3.s3.transfer import TransferConfig

        config = TransferConfig(multipart_threshold=_UPLOAD_PART_BYTES, multipart_chunksize=_UPLOAD_PART_BYTES,
                                use_threads=False)
        self.client().upload_file(path, *self._place(name).values(), Config=config)

    def request_delete(self, name: str) -> None:
        self.client().delete_object(**self._place(name))

    def judge(self, error: Exception, place: str) -> Exception | None:
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError, NoCredentialsError, ParamValidationError

        if isinstance(error, Boto3Error):  # wraps what went wrong in an upload
            return self.judge(error.__context__, place) if isinstance(error.__context__, Exception) else None
        if isinstance(error, NoCredentialsError):
            return refused(place, brief(error))
        if isinstance(error, ParamValidationError):
            return ValueError(f"{place}: {error}; a valid bucket and name are needed. Correct the URL")
        if not isinstance(error, ClientError):
            lost = isinstance(error, (HTTPClientError, BotoCoreError, ConnectionError, TimeoutError))
            return None if lost else error
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        code = str(error.response.get("Error", {}).get("Code"))
        if status in BUSY or code in _BUSY_CODES:
            return None
        if status == 404:
            return missing(place)
        if status in (401, 403):
            return refused(place, brief(error))
        if status == 412:
            return OSError(f"{place}: it was replaced while it was read; a file that stays as it is is needed. Start again")
        return OSError(f"{place}: the store refuses ({brief(error)}); a request that it understands is needed. Check the "
                       "URL, the region and the endpoint (S3_ENDPOINT_URL)")
