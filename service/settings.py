"""Every setting of the service: an environment variable CMT_<NAME>, a key of one optional TOML
file, or an option of `cmt serve`; the option wins over the environment, that over the file."""

from __future__ import annotations

import ipaddress
import os
import tomllib
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict
from pydantic_settings import SettingsError as PydanticSettingsError

from service.gallery import IndexKind
from service.keys import KeyFile, KeyFileError


class SettingsError(Exception):
    """Settings that are missing, wrong or contradict each other; the message says the remedy."""


class Settings(BaseSettings):
    """What one service process is given. Sizes are in bytes, times in seconds."""

    model_config = SettingsConfigDict(env_prefix="CMT_", extra="forbid", frozen=True)

    checkpoint: Path
    """One .safetensors file that `cmt train` wrote."""
    data_dir: Path
    """Database, index and caches; made where it is missing, locked while the service runs."""
    database_url: str | None = None
    """SQLAlchemy URL of another database than the SQLite file in `data_dir`."""

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    """0 takes any free port."""
    api_keys_file: Path | None = None
    """Keys made by `cmt keys create`; without one, only loopback may be bound."""
    cors_origins: tuple[str, ...] = ()
    """Origins of other sites' pages that may call the service, such as https://desk.example."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    runtime: Literal["auto", "torch", "openvino"] = "auto"
    candidates: int = Field(default=256, ge=1, le=100_000)
    """Shortlist size of the recall stage where a query does not say."""
    index: IndexKind | None = None
    """Kind of the recall index; without one, what measures best for the gallery's size."""

    max_image_bytes: int = Field(default=20_000_000, ge=1)
    max_image_pixels: int = Field(default=20_000_000, ge=16 * 32)
    max_pending: int = Field(default=64, ge=1)
    """Uploads in progress at once; one more is answered with 429."""
    body_timeout: float = Field(default=60, gt=0)
    """How long a body may take to arrive."""
    decode_threads: int = Field(default_factory=lambda: os.cpu_count() or 1, ge=1)
    shutdown_timeout: int = Field(default=30, ge=0)
    """How long requests in flight may take to finish after SIGTERM."""

    @model_validator(mode="after")
    def _nothing_contradicts(self) -> Settings:
        if self.api_keys_file is not None:
            try:
                keys = KeyFile(self.api_keys_file).read()
            except KeyFileError as error:
                raise ValueError(str(error)) from error
            if not keys:
                raise ValueError(
                    f"{self.api_keys_file} holds no key, so nobody could get in; make one with "
                    f"`cmt keys create --file {self.api_keys_file}`"
                )
        elif not is_loopback(self.host):
            raise ValueError(
                f"{self.host} can be reached from other machines and there is no API key; make "
                "one with `cmt keys create --file keys.json` and set CMT_API_KEYS_FILE=keys.json, "
                "or bind to 127.0.0.1"
            )
        if "*" in self.cors_origins:
            raise ValueError(
                "cors_origins may not be '*': any page could then use the service; name the origins"
            )
        return self


def load_settings(config: Path | None = None, **options: Any) -> Settings:
    """Settings from `options` (those that are not None), the environment and the TOML file.

    config: the TOML file; None takes the one that CMT_CONFIG names, if any.
    Raises SettingsError with one sentence.
    """
    if config is None and os.environ.get("CMT_CONFIG"):
        config = Path(os.environ["CMT_CONFIG"])
    values = {} if config is None else _read(config)
    # pydantic-settings ranks arguments above the environment; the file stands below it.
    values = {name: v for name, v in values.items() if f"CMT_{name.upper()}" not in os.environ}
    values |= {name: value for name, value in options.items() if value is not None}
    try:
        return Settings(**values)
    except ValidationError as error:
        raise SettingsError("; ".join(map(_sentence, error.errors()))) from error
    except PydanticSettingsError as error:
        raise SettingsError(f"{error}; lists are written as JSON") from error


def _read(config: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(config.read_text())
    except FileNotFoundError as error:
        raise SettingsError(
            f"no settings file at {config}; give the path of a TOML file"
        ) from error
    except (OSError, ValueError) as error:
        raise SettingsError(f"{config} is no readable TOML file: {error}") from error


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a service that binds to `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _sentence(error: Any) -> str:
    name = ".".join(map(str, error["loc"]))
    if error["type"] == "missing":
        return (
            f"the setting {name} is missing; give --{name.replace('_', '-')} or CMT_{name.upper()}"
        )
    if error["type"] == "extra_forbidden":
        return f"there is no setting {name}; see `cmt serve --help`"
    message = str(error["msg"]).removeprefix("Value error, ")
    return f"setting {name}: {message}" if name else message
