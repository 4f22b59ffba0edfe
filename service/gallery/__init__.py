"""The gallery: enroll crops with their features, find them again by modulated distance."""

from service.gallery.gallery import DEFAULT_CANDIDATES, Gallery
from service.gallery.records import Filters, Hit, Item, NewItem, Page, RequestKey, SearchResult
from service.gallery.shard import Counters

__all__ = [
    "DEFAULT_CANDIDATES",
    "Counters",
    "Filters",
    "Gallery",
    "Hit",
    "Item",
    "NewItem",
    "Page",
    "RequestKey",
    "SearchResult",
]
