"""The gallery: enroll crops with their features, find them again by modulated distance."""

from service.gallery.gallery import DEFAULT_CANDIDATES, Gallery
from service.gallery.index.recall_index import IndexKind
from service.gallery.index.shard import Counters, Statistics
from service.gallery.records import (
    AuditEntry,
    AuditPage,
    Filters,
    Hit,
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

__all__ = [
    "DEFAULT_CANDIDATES",
    "Act",
    "AuditEntry",
    "AuditPage",
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
    "SearchResult",
    "Statistics",
]
