"""Slack's Web API, and what its errors mean."""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from penstock import config
from penstock.errors import ConfigError, one_line
from penstock.node import configs

if TYPE_CHECKING:
    from slack_sdk.web.async_client import AsyncWebClient

HINT = "pip install 'penstock[slack]'"
URL = "SLACK_API_URL"
"""The environment variable that names another server than Slack's."""
APP_TOKENS = ("PENSTOCK_SLACK_APP_TOKEN", "SLACK_APP_TOKEN")
"""The environment variables of the app token, the first one first."""
TRIES_AT_LIMIT = 3  # of a request that Slack has put off, each after the time that it says
TIMEOUT = 30  # seconds of a request

REFUSALS = frozenset(
    {
        "access_denied",
        "account_inactive",
        "app_missing_action_url",
        "ekm_access_denied",
        "invalid_auth",
        "missing_scope",
        "no_permission",
        "not_allowed_token_type",
        "not_authed",
        "org_login_required",
        "team_access_not_granted",
        "token_expired",
        "token_revoked",
    }
)
"""Errors that are the same however often one asks."""


def missing() -> str | None:
    """What is not installed. It blocks, and takes its time when all is."""
    for module in ("aiohttp", "slack_sdk.web.async_client"):
        try:
            importlib.import_module(module)
        except ImportError:
            return "aiohttp" if module == "aiohttp" else "slack-sdk"
    return None


def web_client(token: str | None) -> AsyncWebClient:
    """Each request has a connection of its own: there is nothing to close."""
    from slack_sdk.http_retry.builtin_async_handlers import (
        AsyncConnectionErrorRetryHandler,
        AsyncRateLimitErrorRetryHandler,
    )
    from slack_sdk.web.async_client import AsyncWebClient

    return AsyncWebClient(
        token=token,
        base_url=os.environ.get(URL) or AsyncWebClient.BASE_URL,
        timeout=TIMEOUT,
        retry_handlers=[AsyncConnectionErrorRetryHandler(), AsyncRateLimitErrorRetryHandler(TRIES_AT_LIMIT)],
    )


def app_token(given: str | None) -> str | None:
    """That of a definition, `${ENV}` replaced, else that of the environment. It blocks.

    :raises ConfigError: a variable that is not set, a file that cannot be read.
    """
    if given is not None:
        return str(configs.expand(given))
    for name in APP_TOKENS:
        found = config.secret(name, os.environ)
        if found:
            return found
    return None


def bot_token(given: str) -> str:
    """That of a definition, `${ENV}` replaced.

    :raises ConfigError: a variable that is not set, or is empty.
    """
    found = str(configs.expand(given))
    if not found.strip():
        raise ConfigError("slack.token is empty")
    return found


def code_of(error: BaseException) -> str | None:
    """Slack's word for what is wrong; None: it did not say anything."""
    from slack_sdk.errors import SlackApiError

    if not isinstance(error, SlackApiError):
        return None
    response: Any = error.response
    try:
        return str(response["error"])
    except (KeyError, TypeError, ValueError, IndexError):
        return None


def refused(error: BaseException) -> bool:
    """Whether to ask again would be in vain."""
    return code_of(error) in REFUSALS


def told(error: BaseException) -> str:
    """An error in one line, without a URL, for that may hold a ticket."""
    import aiohttp

    code = code_of(error)
    if code is not None:
        return f"Slack says {code}"
    if isinstance(error, aiohttp.ClientResponseError):
        return f"{type(error).__name__}: {error.status} {error.message}"
    return one_line(error)
