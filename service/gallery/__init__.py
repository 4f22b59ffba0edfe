"""The gallery: enroll crops with their features, find them again by modulated distance.

Its parts are imported on first use: the index needs no SQL, the settings no FAISS.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from service.gallery.gallery import DEFAULT_CANDIDATES, Gallery
    from service.gallery.index.shard import Counters, Scale, Statistics
    from service.gallery.records import (
        AuditEntry,
        AuditPage,
        Camera,
        Filters,
        Hit,
        IndexKind,
        Item,
        ItemUpdate,
        ModelVersion,
        NewItem,
        Page,
        RequestKey,
        SearchResult,
    )
    from service.gallery.reembedding import Progress, ReembeddingStopped
    from service.gallery.search import Options, Query
    from service.gallery.storage.audit import Act

_HOMES = {
    "Act": "service.gallery.storage.audit",
    "AuditEntry": "service.gallery.records",
    "AuditPage": "service.gallery.records",
    "Camera": "service.gallery.records",
    "Counters": "service.gallery.index.shard",
    "DEFAULT_CANDIDATES": "service.gallery.gallery",
    "Filters": "service.gallery.records",
    "Gallery": "service.gallery.gallery",
    "Hit": "service.gallery.records",
    "IndexKind": "service.gallery.records",
    "Item": "service.gallery.records",
    "ItemUpdate": "service.gallery.records",
    "ModelVersion": "service.gallery.records",
    "NewItem": "service.gallery.records",
    "Options": "service.gallery.search",
    "Page": "service.gallery.records",
    "Progress": "service.gallery.reembedding",
    "Query": "service.gallery.search",
    "ReembeddingStopped": "service.gallery.reembedding",
    "RequestKey": "service.gallery.records",
    "Scale": "service.gallery.index.shard",
    "SearchResult": "service.gallery.records",
    "Statistics": "service.gallery.index.shard",
}

__all__ = [
    "DEFAULT_CANDIDATES",
    "Act",
    "AuditEntry",
    "AuditPage",
    "Camera",
    "Counters",
    "Filters",
    "Gallery",
    "Hit",
    "IndexKind",
    "Item",
    "ItemUpdate",
    "ModelVersion",
    "NewItem",
    "Options",
    "Page",
    "Progress",
    "Query",
    "ReembeddingStopped",
    "RequestKey",
    "Scale",
    "SearchResult",
    "Statistics",
]


def __getattr__(name: str) -> object:
    """Find one of the names above in the module that defines it (PEP 562)."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'service.gallery' has no attribute {name!r}")
