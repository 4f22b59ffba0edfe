"""The gallery: enroll crops with their features, find them again by modulated distance."""

from service.gallery.answering import Options, Query
from service.gallery.audit import Act
from service.gallery.gallery import DEFAULT_CANDIDATES, Gallery
from service.gallery.index import IndexKind
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
from service.gallery.shard import Counters, Statistics

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
