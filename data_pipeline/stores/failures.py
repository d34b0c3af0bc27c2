"""What obstore's errors mean: exceptions of one line that say what to do, without secrets."""

from __future__ import annotations

import re
from typing import Any

from data_pipeline.errors import DataError, LoadError
from data_pipeline.masking import mask
from data_pipeline.stores.folders import store_of

KINDS = {
    **dict.fromkeys(("s3", "s3a"), "s3"),
    "gs": "gs",
    **dict.fromkeys(("az", "adl", "azure", "abfs", "abfss"), "az"),
    **dict.fromkeys(("http", "https"), "http"),
    "hf": "hf",
}
"""Scheme of a URL -> what its store speaks."""
ALLOW_HTTP = {"s3": "AWS_ALLOW_HTTP", "az": "AZURE_ALLOW_HTTP", "gs": "GOOGLE_ALLOW_HTTP"}
"""What a store speaks -> the environment variable that allows an endpoint without TLS."""
_CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, a web identity, the container's and the "
    "instance's role; profiles of ~/.aws need `pip install boto3`; for a public bucket set AWS_SKIP_SIGNATURE=true; "
    "AWS_REGION and AWS_ENDPOINT_URL say where the bucket is",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, the application default credentials, the instance's account; "
    "for a public bucket set GOOGLE_SKIP_SIGNATURE=true",
    "az": "AZURE_STORAGE_ACCOUNT_NAME with AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN, a workload or managed "
    "identity, AZURE_USE_AZURE_CLI; for a public container set AZURE_SKIP_SIGNATURE=true",
    "http": "user and password, or a token, in the URL",
    "hf": "HF_TOKEN, and the token that `hf auth login` keeps",
}
_NO_CREDENTIALS = ("169.254.169.254", "metadata.google", "MissingRegion", "InvalidAccessKey")
_NO_RANGES = re.compile(
    r"non-partial response|Range request not supported|CONTENT_RANGE header|Content-Range header"
    r"|Requested \d+\.\.\d+, got"
)
_WITHOUT_RANGES = (
    "the server answers no ranged requests, or wrongly: `alignvlm data fetch` copies shards without them, and with "
    "`read: shards` training reads them without, once their samples are measured"
)
_NO_LIST = re.compile("decoding PROPFIND response|Got invalid list response")
_REDIRECT = re.compile(r"status code: 3\d\d")
_STATUS = re.compile(r"status:? ([45]\d\d)")
_NO_BUCKET = re.compile("NoSuchBucket|ContainerNotFound")
_WHY = re.compile(
    r"kind: (Connection\w+|TimedOut|HostUnreachable|NetworkUnreachable)|\"(failed to lookup[^\"]*)\"|(TunnelUnsucc\w+)"
)
"""What "error sending request" means, in the dump behind an error's first line."""
_BODY = re.compile(r"(status code: \d{3}[^:\n]*):.*")
"""What a store answered, behind its status: S3 repeats a token that has expired, Azure what a signature was made of."""
_CODE = re.compile(r"<Code>(\w{1,60})</Code>")
_EXPIRED = ("ExpiredToken", "InvalidToken", "TokenRefreshRequired")
"""Codes that S3 answers with 400 instead of 403."""
_WAYS_OUT = {
    "RequestTimeTooSkewed": "this machine's clock is not the store's; set it",
    "InvalidObjectState": "the object is archived; restore it",
}
"""Codes of S3 that stand beside 403, and have nothing to do with credentials."""
_REGION = re.compile(
    r"redirect without LOCATION|<Code>AuthorizationHeaderMalformed</Code>.*?<Region>([\w-]{1,30})", re.DOTALL
)
_NOT_TRUSTED = re.compile(r"InvalidCertificate\(\s*(\w+)")


NO_STORE = "a proxy or a login page may answer in the place of the store; open its URL in a browser, or with curl"


class MissingObjectError(DataError):
    """There is no object of this name."""


class AccessError(LoadError):
    """The store refuses: no credentials, or they do not allow it."""


class ReplacedError(LoadError):
    """The object is not the one that was indexed."""


class NoRangesError(LoadError):
    """The server answers no ranged requests, or wrongly: whole objects may be read all the same."""


class NotModifiedError(DataError):
    """The object still has the ETag that was given."""


class TooLargeError(DataError):
    """The object has more bytes than are read."""


class NoRoomError(DataError):
    """The disk of this node's cache is full."""


class ExistsError(DataError):
    """There is an object of this name already."""


class TransientError(DataError):
    """The store did not answer, or not as it should: worth another try."""


class BrokenOffError(TransientError):
    """The store stopped in the middle of an answer: what came of it is kept."""


class BusyError(TransientError):
    """The store refused the request for the number of those that it gets."""


def meaning(exceptions: Any, error: Exception, url: str, name: str) -> DataError:
    """Our error for one of obstore's, whose module of exceptions is given."""
    place, text, dump = mask(f"{url}/{name}".rstrip("/")), first_line(error), str(error)
    if _NO_BUCKET.search(dump):
        kind = "container" if KINDS[scheme_of(url)] == "az" else "bucket"
        return LoadError(f"{mask(store_of(url))}: there is no such {kind}")
    status = found[1] if (found := _STATUS.search(dump)) else ""
    if isinstance(error, FileNotFoundError) and status == "405" and name:
        return LoadError(f"{place}: the server answers no HEAD requests (405), which are needed")
    if isinstance(error, FileNotFoundError):
        return MissingObjectError(f"{place}: no such object")
    if isinstance(error, exceptions.PreconditionError):
        return ReplacedError(f"{place} was replaced")
    if isinstance(error, exceptions.AlreadyExistsError):
        return ExistsError(f"{place} is there already")
    if isinstance(error, exceptions.NotModifiedError):
        return NotModifiedError(place)
    code = found[1] if (found := _CODE.search(dump)) else ""
    if code in _WAYS_OUT:
        return AccessError(f"{place}: access is denied ({code}): {_WAYS_OUT[code]}")
    if isinstance(error, exceptions.PermissionDeniedError | exceptions.UnauthenticatedError):
        return AccessError(f"{place}: access is denied ({text}); {credentials(url)}")
    if isinstance(error, exceptions.NotSupportedError) or _NO_RANGES.search(text):
        return NoRangesError(f"{place}: {text}; {_WITHOUT_RANGES}")
    if "Invalid last modified" in text:  # the client takes an object without a date, and none with a wrong one
        return LoadError(f"{place}: {text}; let the server send a date as Last-Modified, or none")
    if not name and status in ("405", "501"):
        way_out = "name a file, or put the manifest.json of indexed shards there"
        return LoadError(f"{place} cannot be listed; {way_out}")
    if "Unable to extract metadata" in text:  # as of a page that a proxy sends
        return LoadError(f"{place}: {text}; {NO_STORE}")
    if not name and _NO_LIST.search(text):
        return LoadError(f"{place} cannot be listed: {text}; {NO_STORE}")
    if any(word in dump for word in _NO_CREDENTIALS):
        return AccessError(f"{place}: no credentials ({text}); {credentials(url)}")
    if "builder error" in text:
        return LoadError(f"{place}: {text}; an http: endpoint needs {ALLOW_HTTP.get(KINDS[scheme_of(url)])}=true")
    if found := _REGION.search(dump):
        region = f"let AWS_REGION be {found[1]}" if found[1] else "let AWS_REGION name it"
        return LoadError(f"{place}: the bucket is in another region; {region}")
    if _REDIRECT.search(text):
        return LoadError(f"{place}: {text}: the server redirects to where the client does not follow; name that URL")
    if "object with invalid path" in text:
        return LoadError(f"{place}: {text}; the client cannot list such a name: move or rename that object")
    if "TooManyRedirects" in dump:
        return LoadError(f"{place}: the server redirects without end")
    if "InvalidContentType" in dump:
        return LoadError(f"{place}: the server, or the proxy before it, does not speak TLS here; is it http:?")
    if found := _NOT_TRUSTED.search(dump):
        return LoadError(
            f"{place}: the server's certificate is not trusted ({found[1]}); let SSL_CERT_FILE name a file with the "
            "certificate of who signed it"
        )
    if status in ("401", "403"):  # of a list, which has no exception of its own
        return AccessError(f"{place}: access is denied ({text}); {credentials(url)}")
    if code in _EXPIRED:
        return LoadError(f"{place}: the credentials have expired or are not valid ({text}); {credentials(url)}")
    if status == "501" or (status.startswith("4") and status not in ("408", "425", "429")):
        return LoadError(f"{place}: {text} (status {status})")
    return (BusyError if status in ("429", "503") else TransientError)(f"{place}: {text}")


def knows_no_conditions(error: Exception) -> bool:
    """Whether a write was refused for its condition, whatever lies there: by the store, or by AWS_CONDITIONAL_PUT."""
    return isinstance(error, NotImplementedError) or "status: 501" in str(error)


def credentials(url: str) -> str:
    """Where credentials of a URL's store are looked for."""
    return f"looked for {_CREDENTIALS[KINDS[scheme_of(url)]]}"


def scheme_of(url: str) -> str:
    """The scheme of a URL in small letters."""
    return url.partition(":")[0].lower()


def first_line(error: BaseException) -> str:
    """The first line of an error, without secrets: the rest is a dump of structures of Rust. Of an answer its code."""
    text, cut = _BODY.subn(r"\1", mask(str(error).strip().partition("\n")[0].strip()))
    text = text[:300] + (f" ({code[1]})" if cut and (code := _CODE.search(str(error))) else "")
    why = _WHY.search(str(error)) if text.endswith("error sending request") else None
    return f"{text}: {next(filter(None, why.groups()))}" if why else text
