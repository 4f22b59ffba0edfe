"""Every setting of the service.

Each is an environment variable CMT_<NAME>, a key of one optional TOML file, or an option of `cmt
serve`; the option wins over the environment, and the environment over the file.
"""

from __future__ import annotations

import ipaddress
import os
import tomllib
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict
from pydantic_settings import SettingsError as PydanticSettingsError
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from model.cores import allowed_cores
from model.device import checked_name
from service.auth.keys import KeyFile, KeyFileError
from service.auth.rate_limit import checked_rate
from service.gallery.records import IndexKind
from service.gallery.storage.objects import parse_address
from service.kit.urls import checked_prefix, is_loopback, without_password


class SettingsError(Exception):
    """Settings that are missing, wrong or contradict each other; the message says the remedy."""


class Settings(BaseSettings):
    """The settings of one service process. Sizes are in bytes, times in seconds."""

    model_config = SettingsConfigDict(env_prefix="CMT_", extra="forbid", frozen=True)

    checkpoint: Path
    """One .safetensors file that `cmt train` wrote."""
    data_dir: Path
    """Database, index and caches; created if missing, locked while the service runs."""
    database_url: str | None = None
    """SQLAlchemy URL of another database than the SQLite file in `data_dir`.

    `?password_file=FILE` names the file that holds its password."""
    crops_url: str | None = None
    """Bucket of an object storage for large crops, such as s3://bucket/prefix; needs the extra s3.

    `?endpoint=URL`, `&region=NAME` and `&credentials_file=FILE` say what boto3 does not find."""
    crops_inline_bytes: int = Field(default=65_536, ge=0)
    """Up to this size a crop is in the database all the same."""

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    """0 takes any free port."""
    api_keys_file: Path | None = None
    """Keys made by `cmt keys create`; without one, only loopback may be bound."""
    cors_origins: tuple[str, ...] = ()
    """Origins of other sites' pages that may call the service, such as https://desk.example."""

    device: str = "auto"
    """auto, cpu, cuda, or cuda:1 of several GPUs: a process uses one."""
    runtime: Literal["auto", "torch", "openvino", "int8"] = "auto"
    """int8: of OpenVINO, where `cmt export --format int8` wrote it beside the checkpoint."""
    candidates: int = Field(default=256, ge=1, le=100_000)
    """Shortlist size of the recall stage where a query does not set it."""
    rerank: Literal["none", "k_reciprocal"] | None = None
    """Whether queries that do not say are re-ranked; without it as the checkpoint says."""
    prior: float = Field(default=0.5, gt=0, lt=1)
    """How probable it is, before looking, that a person asked for is in the gallery."""
    match_likely: float = Field(default=0.8, ge=0, le=1)
    """From this probability of the first result on, an answer's `match` is `likely`."""
    match_none: float = Field(default=0.2, ge=0, le=1)
    """Below this `probability_enrolled` it is `none`."""
    engine: Literal["embedded", "ray"] = "embedded"
    """ray: the gallery is in shards on a Ray cluster; needs the extra scale."""
    shards: int = Field(default=1, ge=1, le=1024)
    """How many, with the engine ray."""
    ray_address: str | None = None
    """HOST:PORT of the cluster's head, or auto for the one on this machine; without it RAY_ADDRESS,
    else one is started for this process alone."""
    shard_timeout: float = Field(default=10, gt=0)
    """How long a shard may take to answer before it counts as missing."""
    partial_answers: bool = True
    """Answer also where some shards are missing; otherwise queries get 503 meanwhile."""
    index: IndexKind | None = None
    """Kind of the recall index; without one, what measures best for the gallery's size."""
    index_figures: Path | None = None
    """Of a GPU: JSON that `cmt bench recall --device cuda` wrote there, to choose the kind by."""

    max_image_bytes: int = Field(default=20_000_000, ge=1)
    max_image_pixels: int = Field(default=20_000_000, ge=16 * 32)
    max_batch_bytes: int = Field(default=256_000_000, ge=1)
    """All images of one POST /gallery/batch."""
    max_pending: int = Field(default=64, ge=1)
    """Uploads that have arrived and are worked on; one more is answered with 429."""
    max_receiving: int = Field(default=256, ge=1)
    """Uploads on their way, so that slow clients do not take the places of the others."""
    max_pending_bytes: int = Field(default=1_000_000_000, ge=1)
    """Of all uploads in progress."""
    header_timeout: float = Field(default=10, gt=0)
    """How long a connection may take to send the headers of a request."""
    body_timeout: float = Field(default=60, gt=0)
    """How long a body may take to arrive."""
    request_timeout: float | None = Field(default=None, gt=0)
    """How long an upload may take that does not say so itself (`X-Request-Timeout`)."""
    keep_alive_timeout: int = Field(default=130, ge=1)
    """How long a connection may be idle between two requests: longer than a proxy keeps it."""
    rate_limit: str | None = None
    """Requests of one key (without keys: of one address), such as 50/second or 1000/minute."""

    decode_processes: int = Field(default_factory=allowed_cores, ge=1)
    """Processes that decode images; without it one for each core that this process may use."""
    decode_timeout: float = Field(default=10, gt=0)
    """Computing time that one image may take to decode."""
    decode_budget: float = Field(default=30, gt=0)
    """Computing time that all images of one request may take to decode; the rest is refused."""
    keep_image_metadata: bool = False
    """Store images as uploaded, with EXIF, positions, comments and color profiles."""
    max_batch: int | None = Field(default=None, ge=1, le=1024)
    """Images embedded at once; without it 8 on each stream of a CPU and 32 on a GPU."""
    batch_wait: float = Field(default=0.005, ge=0, le=1)
    """How long an image waits for others to be embedded with, while others are in progress."""

    retention_days: float | None = Field(default=None, gt=0, le=36_500)
    """Items enrolled longer ago are deleted; without it none is."""
    clock_confirmed: date | None = None
    """Today's date, where retention waits because the clock differs much from what it was."""
    trusted_proxies: tuple[str, ...] = ()
    """Addresses or networks of reverse proxies whose X-Forwarded-For, -Proto and -Prefix are
    trusted."""
    root_path: str = ""
    """Path under which a reverse proxy shows the service, such as /reid."""
    shutdown_timeout: int = Field(default=30, ge=0)
    """How long requests in flight may take to finish after SIGTERM."""
    shutdown_linger: float = Field(default=1.0, ge=0)
    """How long new requests are answered with 503 before the service stops listening."""

    log_format: Literal["auto", "json", "console"] = "auto"
    """auto: console on a terminal, else JSON lines."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    otlp_endpoint: str | None = None
    """Where traces go, such as http://collector:4318/v1/traces; needs the extra otel."""

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
        for name in ("max_image_bytes", "max_batch_bytes"):
            if getattr(self, name) > self.max_pending_bytes:
                raise ValueError(
                    f"{name} is more than max_pending_bytes, so that such an upload could never "
                    "be received; raise max_pending_bytes"
                )
        if self.otlp_endpoint is not None and find_spec("opentelemetry.sdk") is None:
            raise ValueError(
                "otlp_endpoint is set and OpenTelemetry is not installed; install the extra otel"
            )
        if self.crops_url is not None and find_spec("boto3") is None:
            raise ValueError("crops_url is set and boto3 is not installed; install the extra s3")
        if self.device.startswith("cuda") and self.runtime in ("openvino", "int8"):
            raise ValueError("OpenVINO runs on the CPU here; use device cpu or runtime torch")
        if self.shards > 1 and self.engine != "ray":
            raise ValueError("only the engine ray has several shards; give --engine ray")
        if "*" in self.cors_origins:
            raise ValueError(
                "cors_origins may not be '*': any page could then use the service; name the origins"
            )
        return self

    @field_validator("device")
    @classmethod
    def _is_device(cls, value: str) -> str:
        return checked_name(value)

    @field_validator("data_dir", mode="before")
    @classmethod
    def _is_named(cls, value: Any) -> Any:
        if isinstance(value, str) and not value.strip():  # the current folder otherwise
            raise ValueError("it is empty; name the folder of the gallery, such as data")
        return value

    @field_validator("crops_url")
    @classmethod
    def _is_bucket(cls, value: str | None) -> str | None:
        if value is not None:
            parse_address(value)
        return value

    @field_validator("rate_limit")
    @classmethod
    def _is_rate(cls, value: str | None) -> str | None:
        return None if value is None else checked_rate(value)

    @field_validator("root_path")
    @classmethod
    def _is_prefix(cls, value: str) -> str:
        return checked_prefix(value)

    @field_validator("trusted_proxies")
    @classmethod
    def _are_networks(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        for value in values:
            try:
                ipaddress.ip_network(value)
            except ValueError as error:
                raise ValueError(
                    f"{value!r} is no address or network, such as 10.0.0.5 or 10.0.0.0/8"
                ) from error
        return values

    def redacted(self) -> dict[str, Any]:
        """All settings as text for a log, without the passwords in addresses."""
        shown = self.model_dump(mode="json")
        for name in ("database_url", "otlp_endpoint"):
            if shown[name] is not None:
                shown[name] = _shown(shown[name])
        return shown


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


def _shown(address: str) -> str:
    try:
        return without_password(make_url(address))
    except ArgumentError:
        return "***"


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
