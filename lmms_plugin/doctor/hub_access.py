"""Whether models and datasets can be fetched from the Hugging Face hub, and as whom."""

from __future__ import annotations

from collections.abc import Iterator

from huggingface_hub import HfApi, get_token
from huggingface_hub.constants import ENDPOINT, HF_TOKEN_PATH, is_offline_mode
from huggingface_hub.errors import HfHubHTTPError

from lmms_plugin.doctor.rows import DiagnosisRow, fail, ok, warn
from lmms_plugin.tasks.grounding.refcocoplus import HUB_ID

TIMEOUT = 10.0
"""Seconds to wait for an answer."""


def check_hub() -> Iterator[DiagnosisRow]:
    """Ask the hub for RefCOCO+'s entry, and who the token belongs to."""
    try:
        token = get_token()
    except OSError as error:
        remedy = "set HF_TOKEN_PATH to another file, or HF_HOME to another folder"
        yield fail("token", f"{HF_TOKEN_PATH} cannot be read: {error.strerror or error}", remedy)
        return
    if is_offline_mode():
        yield ok("hub", "offline, as HF_HUB_OFFLINE says: what is in the cache, local folders and the demo can be used")
        yield ok("token", "not looked at while offline")
        return
    api = HfApi()
    try:
        api.dataset_info(HUB_ID, timeout=TIMEOUT, token=False)
    except Exception as error:  # which HTTP client raises its own errors depends on the version of huggingface_hub
        yield warn(
            "hub",
            f"{ENDPOINT} does not answer as it should: {error}",
            "set HF_ENDPOINT for a mirror, HTTPS_PROXY for a proxy, or HF_HUB_OFFLINE=1 to use what is in the cache",
        )
        yield ok("token", "there is none" if token is None else "there is one, which could not be tried")
        return
    yield ok("hub", f"{ENDPOINT} can be reached")
    yield _token(api, token)


def _token(api: HfApi, token: str | None) -> DiagnosisRow:
    if token is None:
        return ok("token", "there is none: gated models need one (hf auth login), public ones do not")
    try:
        return ok("token", f"valid, of {api.whoami(token=token).get('name', 'an unnamed account')}")
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            remedy = "hf auth login, or unset HF_TOKEN: the hub refuses even public models with such a token"
            return fail("token", f"{ENDPOINT} refuses the token", remedy)
        return warn("token", f"could not be tried: {error}")
    except Exception as error:  # as above
        return warn("token", f"could not be tried: {error}")
