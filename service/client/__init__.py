"""Talk to a running service: the verbs of the HTTP API, typed, with retries."""

from service.client.client import DEFAULT_URL, AsyncClient, Client
from service.client.requests import ImageSource, InvalidValue, ServiceProblem, Unreachable

__all__ = [
    "DEFAULT_URL",
    "AsyncClient",
    "Client",
    "ImageSource",
    "InvalidValue",
    "ServiceProblem",
    "Unreachable",
]
