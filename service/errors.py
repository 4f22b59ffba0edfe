"""Every error a client can meet: one base class, each with its status, stable code and title.

`service.http.exception_handlers` turns all of them into `application/problem+json` (RFC 9457). The
detail is one sentence that names the remedy.
"""

# Named for what went wrong, like the code of the problem: an "Error" suffix would say nothing.
# ruff: noqa: N818

from __future__ import annotations


class ServiceError(Exception):
    """Base of all errors that reach a client; `detail` is the sentence the client reads."""

    status: int = 500
    code: str = "internal_error"
    title: str = "Internal error"

    def __init__(self, detail: str, *, headers: dict[str, str] | None = None) -> None:
        super().__init__(detail)
        self.detail = detail
        self.headers = headers or {}


# 400


class FormMalformed(ServiceError):
    """A multipart body that cannot be parsed."""

    status, code, title = 400, "form_malformed", "Form malformed"


class RequestMalformed(ServiceError):
    """Bytes that are no HTTP request."""

    status, code, title = 400, "request_malformed", "Request malformed"


# 401


class Unauthorized(ServiceError):
    """No key, or one that is not known."""

    status, code, title = 401, "unauthorized", "Key missing or unknown"


# 403


class OriginRefused(ServiceError):
    """A keyless service was called by another site's page or under another name."""

    status, code, title = 403, "origin_refused", "Origin refused"


class ScopeMissing(ServiceError):
    """A key without the scope that this route needs."""

    status, code, title = 403, "scope_missing", "Scope missing"


# 404


class CameraNotFound(ServiceError):
    """Nothing is stored about a camera of this id."""

    status, code, title = 404, "camera_not_found", "Camera not found"


class ItemNotFound(ServiceError):
    """No gallery item has this id."""

    status, code, title = 404, "item_not_found", "Item not found"


class ModelVersionUnknown(ServiceError):
    """The gallery has no model version of this fingerprint."""

    status, code, title = 404, "model_version_unknown", "Model version not known"


class RouteNotFound(ServiceError):
    """No route has this path."""

    status, code, title = 404, "route_not_found", "Route not found"


# 405


class MethodNotAllowed(ServiceError):
    """The path exists, the method does not."""

    status, code, title = 405, "method_not_allowed", "Method not allowed"


# 408


class BodyTimeout(ServiceError):
    """A body that did not arrive in time."""

    status, code, title = 408, "body_timeout", "Body too slow"


# 409


class BackupRunning(ServiceError):
    """A backup is being taken already."""

    status, code, title = 409, "backup_running", "Backup running"


class GalleryNotEmpty(ServiceError):
    """A backup was to be restored where there is something already."""

    status, code, title = 409, "gallery_not_empty", "Gallery not empty"


class IdempotencyConflict(ServiceError):
    """An Idempotency-Key that stands for other content."""

    status, code, title = 409, "idempotency_conflict", "Idempotency key used"


class ModelVersionConflict(ServiceError):
    """A model version that is not in the state which the call needs."""

    status, code, title = 409, "model_version_conflict", "Model version in another state"


# 413


class BodyTooLarge(ServiceError):
    """A request body over the limit."""

    status, code, title = 413, "body_too_large", "Body too large"


class ImageTooLarge(ServiceError):
    """More bytes or pixels than the limits allow."""

    status, code, title = 413, "image_too_large", "Image too large"


# 415


class ContentTypeUnsupported(ServiceError):
    """A body that is no multipart form."""

    status, code, title = 415, "content_type_unsupported", "Content type not supported"


class ImageTypeUnsupported(ServiceError):
    """Not one of the supported image formats."""

    status, code, title = 415, "image_type_unsupported", "Image type not supported"


# 422


class BackupInvalid(ServiceError):
    """A file that is no backup, a damaged one, or one of a newer release."""

    status, code, title = 422, "backup_invalid", "Backup not valid"


class BoxOutside(ServiceError):
    """A box that is not wholly inside its image."""

    status, code, title = 422, "box_outside", "Box outside the image"


class CheckpointUnusable(ServiceError):
    """A checkpoint that is missing, damaged or no checkpoint."""

    status, code, title = 422, "checkpoint_unusable", "Checkpoint not usable"


class CursorInvalid(ServiceError):
    """A list cursor that this gallery did not give out."""

    status, code, title = 422, "cursor_invalid", "Cursor not valid"


class DecodeBudgetSpent(ServiceError):
    """An image of a request whose other images took all the time to decode that it has."""

    status, code, title = 422, "decode_budget_spent", "Time to decode used up"


class ImageBlank(ServiceError):
    """A picture of one shade, or of noise."""

    status, code, title = 422, "image_blank", "Image blank"


class ImageTooComplex(ServiceError):
    """A file that would take far longer to decode than its pixels should."""

    status, code, title = 422, "image_too_complex", "Image too complex"


class ImageEmpty(ServiceError):
    """An upload without a byte."""

    status, code, title = 422, "image_empty", "Image empty"


class ImageMultiFrame(ServiceError):
    """An animation or several pages."""

    status, code, title = 422, "image_multi_frame", "Image of several frames"


class ImageTooSmall(ServiceError):
    """Fewer pixels than a person needs."""

    status, code, title = 422, "image_too_small", "Image too small"


class ImageTruncated(ServiceError):
    """A file that ends before its pixels do."""

    status, code, title = 422, "image_truncated", "Image truncated"


class ImageUndecodable(ServiceError):
    """A damaged file, or a variant that the decoder does not know."""

    status, code, title = 422, "image_undecodable", "Image not decodable"


class ParametersInvalid(ServiceError):
    """A parameter that is missing, unknown or out of range."""

    status, code, title = 422, "parameters_invalid", "Parameters not valid"


# 429


class Overloaded(ServiceError):
    """More requests than the service can queue."""

    status, code, title = 429, "overloaded", "Overloaded"


class RateLimited(ServiceError):
    """More requests in a while than the limit of this key."""

    status, code, title = 429, "rate_limited", "Rate limit reached"


# 499: nginx's code for a client that is gone; it is logged, never sent


class ClientGone(ServiceError):
    """The client closed the connection before the answer."""

    status, code, title = 499, "client_gone", "Client gone"


# 500


class EmbeddingFailed(ServiceError):
    """The network fails on an image."""

    status, code, title = 500, "embedding_failed", "Embedding failed"


class InternalError(ServiceError):
    """A defect of the service."""

    status, code, title = 500, "internal_error", "Internal error"


# 503


class ClockWrong(ServiceError):
    """The machine's clock cannot be right."""

    status, code, title = 503, "clock_wrong", "Clock wrong"


class CropsUnavailable(ServiceError):
    """The object storage of the crops cannot be reached or used; searches go on."""

    status, code, title = 503, "crops_unavailable", "Crops not available"


class DatabaseUnavailable(ServiceError):
    """The database cannot be reached or does not answer."""

    status, code, title = 503, "database_unavailable", "Database not available"


class GalleryDamaged(ServiceError):
    """Stored data that cannot be read."""

    status, code, title = 503, "gallery_damaged", "Gallery damaged"


class GalleryLocked(ServiceError):
    """Another process has the data folder open."""

    status, code, title = 503, "gallery_locked", "Gallery in use"


class GalleryVersion(ServiceError):
    """A database of another release."""

    status, code, title = 503, "gallery_version", "Gallery of another release"


class IndexOutOfStep(ServiceError):
    """The search index and the database disagree."""

    status, code, title = 503, "index_out_of_step", "Index out of step"


class MemoryExhausted(ServiceError):
    """No memory to decode or embed an image."""

    status, code, title = 503, "memory_exhausted", "Memory exhausted"


class NotReady(ServiceError):
    """A part of the service that does not work at the moment."""

    status, code, title = 503, "not_ready", "Not ready"


class RuntimeUnavailable(ServiceError):
    """A device or inference runtime that this machine does not have."""

    status, code, title = 503, "runtime_unavailable", "Runtime not available"


class ShardsMissing(ServiceError):
    """Too few shards of a gallery answer."""

    status, code, title = 503, "shards_missing", "Shards missing"


class ShuttingDown(ServiceError):
    """The service ends; requests in flight are finished, others refused."""

    status, code, title = 503, "shutting_down", "Shutting down"


class StorageMoved(ServiceError):
    """The database, its folder or its lock was moved, replaced or removed meanwhile."""

    status, code, title = 503, "storage_moved", "Storage moved"


class StorageUnwritable(ServiceError):
    """The data folder cannot be written."""

    status, code, title = 503, "storage_unwritable", "Storage not writable"


class KeysUnreadable(ServiceError):
    """The file of API keys cannot be read, so nobody is let in."""

    status, code, title = 503, "keys_unreadable", "Keys not readable"


# 504


class RequestTimedOut(ServiceError):
    """A request that could not be answered in the time that its sender gave it."""

    status, code, title = 504, "request_timed_out", "Not answered in time"


# 507


class GalleryFull(ServiceError):
    """No memory to search more items in, so that none is stored."""

    status, code, title = 507, "gallery_full", "Gallery full"


class StorageFull(ServiceError):
    """No space left for what was to be written."""

    status, code, title = 507, "storage_full", "Storage full"


def error_of(code: str, detail: str) -> ServiceError:
    """The error of this code, as another process reported it."""
    for kind in ServiceError.__subclasses__():
        if kind.code == code:
            return kind(detail)
    return InternalError(detail)
