"""Why a delivery failed, in one line: what MLflow, requests and SQLAlchemy raise, without their pages and secrets."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from alignvlm.errors import UserError
from alignvlm.training.tracking.target import Target
from data_pipeline.errors import DataError

MAX_REASON = 200
CLOSED = (ConnectionResetError, ConnectionAbortedError, BrokenPipeError)
LOGIN = "check MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"


class Failure(NamedTuple):
    """`MLflow at URI <verb>: <reason>`, or another tracker."""

    verb: str
    reason: str


def explain(target: Target, error: BaseException, consequence: str) -> str:
    """`MLflow at URI does not answer; <consequence>: <reason>`, one line without secrets."""
    verb, reason = _failure(error) if target.tracker == "mlflow" else _other_failure(error)
    return one_line(target, f"{target.shown} {verb}; {consequence}: {reason}")


def too_late(target: Target, seconds: float, consequence: str) -> str:
    """The line for a call that did not end within its limit."""
    return one_line(target, f"{target.shown} does not answer within {seconds:g} s; {consequence}")


def one_line(target: Target, text: str) -> str:
    """Text as one line, without secrets."""
    return " ".join(target.mask(text).split())


def is_refusal(error: BaseException) -> bool:
    """Whether MLflow refused what was sent, and would take something else."""
    from mlflow.exceptions import MlflowException, RestException

    if not isinstance(error, MlflowException):
        return False
    return error.error_code == "INVALID_PARAMETER_VALUE" or (
        isinstance(error, RestException) and error.error_code == "BAD_REQUEST"
    )


def is_missing(error: BaseException) -> bool:
    """Whether the database holds no such run."""
    return getattr(error, "error_code", None) == "RESOURCE_DOES_NOT_EXIST"


def _other_failure(error: BaseException) -> Failure:
    """A failure of a tracker whose client has no errors of its own."""
    is_plain = isinstance(error, UserError | DataError | OSError)
    return Failure("cannot be used", first_line(error) if is_plain else f"{type(error).__name__}: {first_line(error)}")


def _failure(error: BaseException) -> Failure:
    from mlflow.exceptions import MlflowException
    from requests import exceptions as http
    from sqlalchemy.exc import SQLAlchemyError

    if isinstance(error, UserError | DataError):
        return Failure("cannot be used", first_line(error))
    chain = list(_chain(error))
    for each in chain:
        if isinstance(each, http.RequestException):
            return _http_failure(each, _innermost(chain[-1]))
        if isinstance(each, SQLAlchemyError):
            return Failure("cannot be used", first_line(getattr(each, "orig", None) or each))
    if isinstance(error, MlflowException):
        return _answer(error)
    if isinstance(error, OSError):
        return Failure("cannot be used", first_line(error))
    return Failure("cannot be used", f"{type(error).__name__}: {first_line(error)}")


def _http_failure(error: BaseException, root: BaseException) -> Failure:
    """No answer, or one that requests gives up."""
    from requests import exceptions as http

    status = re.search(r"too many (\d+) error responses", str(error))
    if status:
        return _status(int(status[1]), "")
    if isinstance(error, http.SSLError):
        return Failure("cannot be reached over TLS", first_line(root))
    if isinstance(error, http.TooManyRedirects) or "too many redirects" in str(error):
        return Failure("answers with redirects without end", "is this the address of an MLflow server?")
    if isinstance(error, http.Timeout) or "timed out" in str(error):
        return Failure("does not answer", "the connection timed out")
    if isinstance(error, http.ChunkedEncodingError) or isinstance(root, CLOSED):
        return Failure("closes the connection", first_line(root))
    if isinstance(error, http.ConnectionError):
        return Failure("does not answer", first_line(root))
    return Failure("cannot be used", first_line(root))


def _answer(error: BaseException) -> Failure:
    """A response with an error, or one that is not MLflow's."""
    text = str(error)
    status = re.search(r"failed with error code (\d+)", text)
    if status:
        body = text.partition("Response body: ")[2].strip("'")
        return _status(int(status[1]), "" if body.lstrip().startswith("<") else body)
    if "not in a valid JSON format" in text:
        return Failure("answers with a page that is not MLflow's", "is a login or a proxy in between?")
    return Failure("refuses the delivery", first_line(text))


def _status(status: int, detail: str) -> Failure:
    hints = {401: LOGIN, 403: LOGIN, 404: "is this the address of an MLflow server?", 429: "it asks to come back later"}
    return Failure(f"answers with HTTP {status}", first_line(detail) or hints.get(status) or "an error of the server")


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error, what it was raised from, and so on to the first."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def _innermost(error: BaseException) -> BaseException:
    """urllib3 wraps what happened as an argument of its own errors."""
    while error.args and isinstance(error.args[-1], BaseException):
        error = error.args[-1]
    return error


def first_line(text: object) -> str:
    """The first line, which says what happened; libraries add statements and links below it."""
    first = str(text).strip().partition("\n")[0]
    return first if len(first) <= MAX_REASON else f"{first[:MAX_REASON]}…"
