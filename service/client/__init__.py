"""Talk to a running service: the verbs of the HTTP API, typed, with retries."""

from service.api.schemas import BatchItem
from service.client.client import AsyncClient, Client
from service.client.requests import ImageSource, InvalidValue, ServiceProblem, Unreachable
from service.client.spread import OtherGallery
from service.client.stream import Entry, EntryResult
from service.kit.urls import DEFAULT_URL

__all__ = [
    "DEFAULT_URL",
    "AsyncClient",
    "BatchItem",
    "Client",
    "Entry",
    "EntryResult",
    "ImageSource",
    "InvalidValue",
    "OtherGallery",
    "ServiceProblem",
    "Unreachable",
]
