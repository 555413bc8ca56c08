"""The Hugging Face hub: whether it can be reached, and its libraries without their progress bars.

Knows nothing of models or dictionaries. Sends one request at most; writes nothing.
"""

from __future__ import annotations

import io
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr

__all__ = ["hub_reachable", "quiet"]


def hub_reachable(timeout_s: float = 3.0) -> bool:
    """Whether the model hub answers. Any HTTP answer counts; there are no retries."""
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in {"1", "true", "yes", "on"}:
        return False
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        request = urllib.request.Request(endpoint, method="HEAD")
        with urllib.request.urlopen(request, timeout=timeout_s):
            return True
    except urllib.error.HTTPError as error:
        return error.code < 500 and error.code not in (403, 407)  # these two come from a proxy, not from the hub
    except (OSError, ValueError):
        return False


@contextmanager
def quiet() -> Iterator[None]:
    """Hide the progress bars of transformers: only the command line draws progress."""
    from transformers.utils import logging as theirs

    shown = theirs.is_progress_bar_enabled()
    theirs.disable_progress_bar()
    try:
        with redirect_stderr(io.StringIO()):  # the GGUF reader has a progress bar without a switch
            yield
    finally:
        if shown:
            theirs.enable_progress_bar()
