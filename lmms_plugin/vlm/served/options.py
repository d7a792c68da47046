"""The arguments of a served model: which server, how it is asked, and what its user states about it."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints
from urllib.parse import urlsplit

from lmms_plugin.arguments import OF_THE_CACHE, ModelArguments
from lmms_plugin.utils.outputs import expect_file
from lmms_plugin.utils.processes.launch_command import LaunchCommand
from lmms_plugin.utils.variables import API_KEY

MISMATCH = ("error", "warn")
AUTO, RENDERED, CHAT = "auto", "rendered", "chat"
PROMPTS = (AUTO, RENDERED, CHAT)
OF_THE_SERVER = (
    *("group_size", "vision_bits", "connector_bits", "language_bits", "head_bits", "symmetric", "plan"),
    *("calibration", "calibration_samples", "dtype", "device", "device_map", "attn_implementation", "static_cache"),
    *("share_prefix", "use_safetensors", "save_quantized", "features", "feature_layer", "selector"),
    *("selector_transfer", "storage", "reference"),
    *OF_THE_CACHE,
)
"""Arguments of `ModelArguments` about weights and arithmetic, which are the server's."""


@dataclass(frozen=True)
class ServedOptions:
    """What a served model takes besides the arguments of all models.

    Attributes:
        base_url: Address of the API, for instance `http://127.0.0.1:8000/v1`; not needed with `launch`.
        launch: Command that starts the server, with `{port}` where its port goes, or a file that holds the command;
            the server is ended with the run.
        launch_timeout: Seconds from its start within which it must have answered a question about an image.
        launch_log: File of its output; by default a temporary one, kept if the run fails.
        model: Name under which the server serves it; by default the only one of `/v1/models`.
        concurrency: Maximum number of requests in flight at once.
        timeout: Seconds for one response.
        retries: Number of further attempts when the server is busy or does not answer.
        mismatch: Reaction to a server that makes other tokens of a prompt than the checkpoint's processor: `error`
            or `warn`.
        prompts: Writing of prompts: `rendered` by the checkpoint's processor and sent raw (llama.cpp's `/completion`),
            as messages of the `chat` API, which the server's own template renders, or `auto`: rendered where the
            server takes that.
        method: Quantization of the model, as far as its user knows.
        key_variable: Environment variable that holds the key of the server, if it wants one.
    """

    base_url: str | None = None
    launch: str | None = None
    launch_timeout: float = 1800.0
    launch_log: str | None = None
    model: str | None = None
    concurrency: int = 16
    timeout: float = 600.0
    retries: int = 8
    mismatch: str = "error"
    prompts: str = AUTO
    method: str | None = None
    key_variable: str = API_KEY

    def __post_init__(self) -> None:
        if self.base_url is not None:
            self._expect_address(self.base_url)
        if self.launch is None and self.base_url is None:
            raise ValueError(
                "base_url is missing: the address of the API, such as http://127.0.0.1:8000/v1 (or launch=, a command "
                "that starts a server)"
            )
        if self.launch is None and self.launch_log is not None:
            raise ValueError("launch_log says nothing without launch")
        if self.launch is not None and self.base_url is not None:
            raise ValueError("base_url and launch are both given: a server that is started here has its own address")
        if self.launch is not None:
            LaunchCommand.parse(self.launch).expect_program()
        if self.launch_log is not None:
            expect_file("launch_log", Path(self.launch_log).expanduser())
        for name, least in (("concurrency", 1), ("retries", 0), ("timeout", 0.001), ("launch_timeout", 0.001)):
            value = getattr(self, name)
            if not least <= value < math.inf:
                raise ValueError(f"{name} must be at least {least:g} and finite, got {value}")
        if self.mismatch not in MISMATCH:
            raise ValueError(f"mismatch must be one of {', '.join(MISMATCH)}, got {self.mismatch!r}")
        if self.prompts not in PROMPTS:
            raise ValueError(f"prompts must be one of {', '.join(PROMPTS)}, got {self.prompts!r}")

    def _expect_address(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(
                f"base_url must be the address of an API such as http://127.0.0.1:8000/v1, got {url!r:.100}"
            )
        if parts.username or parts.password or parts.query:
            raise ValueError(
                f"base_url must hold no key, which would go into logs: set the variable {self.key_variable} instead"
            )

    @classmethod
    def of(cls, arguments: ModelArguments) -> ServedOptions:
        """Take a served model's own options out of its arguments.

        Raises:
            ValueError: there is neither base_url nor launch, or a value is impossible.
        """
        return cls(**{name: value for name, value in arguments.options.items() if value is not None})

    @property
    def command(self) -> LaunchCommand | None:
        """The command that starts the server; None where it runs already."""
        return None if self.launch is None else LaunchCommand.parse(self.launch)

    @property
    def key(self) -> str | None:
        """The server's key, None without one."""
        return os.environ.get(self.key_variable) or None


OPTION_TYPES: Mapping[str, Any] = get_type_hints(ServedOptions)
"""What `ModelArguments.parse` is to let through."""


def expect_effect(given: Mapping[str, Any]) -> None:
    """Refuse arguments about what only the server decides.

    Args:
        given: Name -> value, as the user gave them.

    Raises:
        ValueError: one of them would have no effect.
    """
    useless = [name for name in OF_THE_SERVER if name in given]
    if useless and useless[0] in OF_THE_CACHE:
        raise ValueError(
            f"{useless[0]} has no effect on a served model, whose server decides how keys and values are stored: leave "
            "it out, and start the server with its own option (vLLM: --kv-cache-dtype fp8_e4m3)"
        )
    if useless:
        raise ValueError(
            f"{useless[0]} has no effect on a served model, whose server decides it: leave it out (method= and bits= "
            "state how the weights were quantized)"
        )
