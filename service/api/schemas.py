"""What a client sends and sees: the models of every body, form and parameter of the API."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Json,
    ValidationError,
)
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError

from model.modalities import Polarity
from service.api.fields import (
    AnyLabel,
    Box,
    CapturedTo,
    Label,
    Metadata,
    MetadataObject,
    OptionalLabel,
    Timestamp,
    names_once,
    plain_text,
)
from service.http.problem import Problem

Modality = Literal["rgb", "ir"]
ModalityChoice = Literal["auto", "rgb", "ir"]
ModalitySource = Literal["given", "camera", "detected"]
Rerank = Literal["none", "k_reciprocal"]

QUERY_IMAGES = 16
BATCH_IMAGES = 256
KEY_PATTERN = r"^[\x21-\x7e]+$"  # of an Idempotency-Key


class FormModel(BaseModel):
    """Fields of a multipart form, given as text. An empty field counts as not given."""

    model_config = ConfigDict(extra="forbid")

    @classmethod
    def parse(cls, fields: Iterable[tuple[str, str]]) -> Self:
        """Validate the text fields of a form, in their order. Raises ValidationError."""
        values: dict[str, Any] = {}
        twice: list[InitErrorDetails] = []
        for name, text in fields:
            field = cls.model_fields.get(name)
            if field is not None and text == "":
                continue
            if field is not None and field.default == ():  # the fields that may be repeated
                values[name] = (*values.get(name, ()), text)
            elif name not in values:
                values[name] = text
            else:
                kind = PydanticCustomError("repeated", "must be given once")
                twice.append(InitErrorDetails(type=kind, loc=(name,), input=None))
        if twice:
            raise ValidationError.from_exception_data(cls.__name__, twice)
        return cls.model_validate(values)


_MODALITY = "Default: the camera's, else `auto`, which takes an image without chroma for infrared."
_POLARITY = "Of infrared: `black_hot` where warm is dark. Default: the camera's, else `white_hot`."


class EnrollForm(FormModel):
    """What accompanies the image of POST /gallery."""

    person_id: Label | None = Field(default=None, description="Identity label.")
    camera_id: Label | None = Field(
        default=None, description="Its defaults (PUT /cameras/{camera_id}) hold for the image."
    )
    captured_at: Timestamp | None = Field(default=None, description="RFC 3339 time with an offset.")
    modality: ModalityChoice | None = Field(default=None, description=_MODALITY)
    polarity: Polarity | None = Field(default=None, description=_POLARITY)
    box: Box | None = Field(
        default=None,
        description="Enroll only this part: x,y,width,height in pixels, after orientation.",
    )
    metadata: Metadata = Field(default={}, description="A JSON object of at most 8 KB.")


class BatchItem(BaseModel):
    """What accompanies one image of POST /gallery/batch."""

    model_config = ConfigDict(extra="forbid")

    person_id: OptionalLabel = None
    camera_id: OptionalLabel = None
    captured_at: Timestamp | None = None
    modality: ModalityChoice | None = None
    polarity: Polarity | None = None
    box: Box | None = None
    metadata: MetadataObject = {}
    key: str | None = Field(
        default=None,
        min_length=1,
        max_length=255,
        pattern=KEY_PATTERN,
        description="As the header Idempotency-Key of a single enrollment.",
    )


class BatchForm(FormModel):
    """What accompanies the images of POST /gallery/batch."""

    items: Annotated[Json[list[BatchItem]] | None, BeforeValidator(names_once)] = Field(
        default=None,
        description="JSON array with one object per image, in order: person_id, camera_id, "
        "captured_at, modality, polarity, box, metadata (an object), key. Without it no image has "
        "labels.",
    )


class ItemPatch(BaseModel):
    """Body of PATCH /gallery/{id}: what is given changes, null empties, the rest stays."""

    model_config = ConfigDict(extra="forbid")

    person_id: OptionalLabel = None
    camera_id: OptionalLabel = None
    captured_at: Timestamp | None = None
    metadata: MetadataObject = {}


class QueryForm(FormModel):
    """What accompanies the images of POST /query."""

    query_camera_id: Label | None = Field(
        default=None,
        description="The camera that took the images: its defaults hold. It filters nothing.",
    )
    modality: ModalityChoice | None = Field(
        default=None,
        description="Of all images. Default: the camera's, else `auto`, which looks at each.",
    )
    polarity: Polarity | None = Field(default=None, description=_POLARITY)
    box: Box | None = Field(default=None, description="With one image: search for this part of it.")
    top_k: int = Field(20, ge=1, le=1000)
    candidates: int | None = Field(
        default=None,
        ge=1,
        le=100_000,
        examples=[256],
        description="Shortlist of the recall stage, of each gallery modality that is searched; "
        "never fewer than `top_k`.",
    )
    exhaustive: bool = Field(False, description="Score the whole gallery in modulated space.")
    modulation: bool = Field(True, description="false ranks by the unmodulated distance.")
    rerank: Rerank | None = Field(
        default=None,
        description="Whether what the neighbours of the best items say counts too. Default: as the "
        "checkpoint's held-out people say.",
    )
    prior: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        allow_inf_nan=False,
        examples=[0.5],
        description="Probability, before looking, that the person is among what is searched; "
        "default in GET /model.",
    )
    group_by: Literal["person_id"] | None = Field(
        default=None, description="Best image per person."
    )
    person_id: tuple[AnyLabel, ...] = Field((), description="Any of these; repeat the field.")
    camera_id: tuple[AnyLabel, ...] = Field((), description="Any of these; repeat the field.")
    exclude_camera_id: tuple[AnyLabel, ...] = Field((), description="None of these.")
    gallery_modality: tuple[Modality, ...] = Field((), description="Any of these.")
    captured_from: Timestamp | None = None
    captured_to: CapturedTo = None
    max_distance: float | None = Field(
        default=None,
        ge=0,
        allow_inf_nan=False,
        examples=[100.0],
        description="Drops weaker results.",
    )
    explain: bool = Field(False, description="Adds `parts`, `agreement` and both other ranks.")
    debug: bool = Field(False, description="Adds `timings_ms`, and `items_on_host` if any.")


class ListParameters(BaseModel):
    """Filters and page of GET /gallery."""

    model_config = ConfigDict(extra="forbid")

    person_id: list[AnyLabel] = Field([], description="Any of these.")
    camera_id: list[AnyLabel] = Field([], description="Any of these.")
    modality: list[Modality] = Field([], description="Any of these.")
    captured_from: Timestamp | None = None
    captured_to: CapturedTo = None
    limit: int = Field(100, ge=1, le=1000)
    cursor: Annotated[str, AfterValidator(plain_text)] | None = Field(
        default=None, max_length=512, description="`next_cursor` of the page before."
    )


class ImageParameters(BaseModel):
    """How GET /gallery/{id}/image answers."""

    model_config = ConfigDict(extra="forbid")

    height: int | None = Field(
        default=None,
        ge=64,
        le=512,
        description="A JPEG thumbnail of that height, in the crop's aspect, which clients may "
        "cache. Default: the crop as it is stored.",
    )


class EraseParameters(BaseModel):
    """Whom DELETE /gallery erases."""

    model_config = ConfigDict(extra="forbid")

    person_id: AnyLabel = Field(min_length=1)


class GalleryItem(BaseModel):
    """One enrolled crop."""

    model_config = ConfigDict(from_attributes=True)

    id: str = Field(description="UUIDv7.")
    person_id: str | None
    camera_id: str | None
    captured_at: datetime | None
    enrolled_at: datetime
    modality: Modality
    modality_source: ModalitySource = Field(
        description="Who said it: the sender, the camera's defaults, or the image."
    )
    polarity: Polarity | None = Field(description="null of a visible crop.")
    width: int
    height: int
    bit_depth: int = Field(description="Of the upload; the crop is ranked at 8 bits.")
    sha256: str = Field(description="Of the uploaded bytes.")
    metadata: dict[str, Any]
    model: str = Field(description="Fingerprint of the checkpoint that embedded it.")


class GalleryPage(BaseModel):
    """One page of GET /gallery."""

    items: list[GalleryItem]
    next_cursor: str | None = Field(description="null on the last page.")
    total: int = Field(description="Items that the filters match, on all pages.")


class Erased(BaseModel):
    """Answer of DELETE /gallery, and of DELETE /gallery/{id} with 202."""

    deleted: int
    pending: int = Field(
        default=0,
        description="With 202: so many pictures are still in the object storage, which does not "
        "answer, and are deleted once it does. Nothing finds them.",
    )


class QuerySummary(BaseModel):
    """What was searched for."""

    modality: Modality | Literal["mixed"] = Field(
        description="`mixed` where several images are of both modalities."
    )
    modality_source: ModalitySource
    polarity: Polarity | None = Field(description="Of the infrared images; null without one.")
    images: int


class Result(BaseModel):
    """One ranked item.

    `parts`, `agreement`, `unmodulated_rank` and `rank_before_rerank` are there with `explain`.
    """

    rank: int
    probability: float | None = Field(
        ge=0,
        le=1,
        description="That the person asked for is this person (by that person's best image; all "
        "images of a person have the same number), or, for an item without a label, that it shows "
        "the person. null where the checkpoint has no fit.",
    )
    item: GalleryItem
    score: float = Field(
        description="What orders the answer: larger is better, comparable between visible and "
        "infrared items, re-ranking included."
    )
    distance: float = Field(description="Euclidean, after modulation by the query's γ and β.")
    similarity: float | None = Field(
        ge=0,
        le=1,
        description="Calibrated probability that one pair of images shows the same person, drawn "
        "with the calibration's `prior` (GET /model): not that of the best of many, which is "
        "`probability`. null where the checkpoint has no calibration for this pair of modalities, "
        "or the query's images are of both.",
    )
    recall_rank: int | None = Field(
        description="Place in the shortlist of its modality before rescoring; null without one."
    )
    unmodulated_rank: int | None = Field(
        default=None, description="Place by unmodulated distance among what was scored."
    )
    rank_before_rerank: int | None = Field(
        default=None, description="Place by score before re-ranking."
    )
    parts: list[float] | None = Field(
        default=None, description="Squared distance per part; null for a cosine checkpoint."
    )
    agreement: list[Annotated[float, Field(ge=0, le=1)]] | None = Field(
        default=None,
        description="How well each part agrees, from the top: the probability at even odds that "
        "two images with this part's distance show one person. Of distances without γ and β, which "
        "tell people apart better part by part, whatever ranks.",
    )


class Timings(BaseModel):
    """Milliseconds of each stage of one query; together they are the total.

    From the request's headers until the answer is put together; it is then written and sent.
    """

    receive: float = Field(description="Reading the request.")
    queue: float = Field(
        description="Waiting: for other requests, and for one thread or process to go on where "
        "another one ended."
    )
    decode: float
    embed: float
    modulate: float = Field(description="γ, β, and the distances to the checkpoint's references.")
    recall: float
    rescore: float = Field(description="Exact distances, scores and probabilities.")
    rerank: float
    fetch: float
    rank: float = Field(description="The rest of the search.")
    audit: float = Field(description="Waiting for the audit log.")
    answer: float = Field(description="Putting the answer together.")
    total: float


Match = Literal["likely", "possible", "none"]


class QueryAnswer(BaseModel):
    """Answer of POST /query."""

    query: QuerySummary
    probability_enrolled: float | None = Field(
        ge=0, le=1, description="That the person asked for is among what was searched."
    )
    match: Match | None = Field(
        description="`likely`: the first result is probably the person; `none`: the person is "
        "probably not enrolled; else `possible`. The cut-offs are in GET /model."
    )
    results: list[Result]
    searched: int = Field(description="Items that the filters left.")
    people: int = Field(
        description="Distinct people among them, each item without a label counting as one."
    )
    candidates: int = Field(description="Items that were rescored.")
    exhaustive: bool
    rerank: Rerank
    model: str = Field(description="Fingerprint of the checkpoint.")
    shards_ok: int | None = Field(
        None, description="With the engine ray: shards of the gallery that were searched."
    )
    shards_total: int | None = Field(None, description="And how many there are.")
    timings_ms: Timings | None = None
    items_on_host: int | None = Field(
        default=None,
        description="With `debug`, where a GPU's memory does not hold the gallery: as in /readyz.",
    )


class MatchCutoffs(BaseModel):
    """What `match` of an answer goes by."""

    likely: float = Field(description="Least `probability` of the first result.")
    none: float = Field(description="`probability_enrolled` below which nobody matches.")


class ModelCard(BaseModel):
    """Answer of GET /model."""

    fingerprint: str
    metric: str
    config: dict[str, Any]
    calibration: dict[str, Any] | None = Field(
        description="How distances become similarities: `prior`, the share of pairs of one person "
        "that they assume; `maps`, one for each query and gallery modality, modulated and not, "
        "with method, log loss, calibration error, and `thresholds`: accept above the similarity "
        "for that share of false accepts among pairs of two people. null where the checkpoint has "
        "none."
    )
    match: MatchCutoffs
    prior: float = Field(description="`prior` of queries that do not set it.")
    device: str
    runtime: str
    precision: str = Field(description="What was chosen on this machine, and why.")


class Health(BaseModel):
    """Answer of the probes."""

    status: Literal["ok"] = "ok"


class Readiness(Health):
    """Answer of /readyz."""

    crops: Literal["ok", "unavailable"] | None = Field(
        default=None,
        description="Only where there is an object storage. `unavailable`: it cannot be used; "
        "searches go on, enrollments of large crops and pictures are refused meanwhile.",
    )
    items_on_host: int | None = Field(
        default=None,
        description="Only where a GPU's memory does not hold the gallery: items that are searched "
        "in the host's memory, which is slower and finds the same.",
    )
    lag_seconds: float | None = Field(
        default=None,
        description="Only with PostgreSQL: how old the state of the database is that is surely in "
        "what this replica searches. Searches go by one of 1 s at most; beyond 3 s the answer is "
        "503.",
    )


class CameraDefaults(BaseModel):
    """Body of PUT /cameras/{camera_id}: what holds where a picture's sender does not say it."""

    model_config = ConfigDict(extra="forbid")

    modality: ModalityChoice | None = Field(default=None, description="null: `auto`.")
    polarity: Polarity | None = Field(default=None, description="null: `white_hot`.")


class CameraRecord(BaseModel):
    """What the gallery knows of a camera."""

    model_config = ConfigDict(from_attributes=True)

    camera_id: str
    modality: ModalityChoice | None
    polarity: Polarity | None


class CameraRecords(BaseModel):
    """Answer of GET /cameras, by id."""

    cameras: list[CameraRecord]


class AuditRecord(BaseModel):
    """One entry of the audit log."""

    model_config = ConfigDict(from_attributes=True)

    number: int
    moment: datetime
    actor: str = Field(description="`key:ID`, `address:IP` without keys, or a part of the service.")
    action: str
    subject: str | None = Field(description="An item's id, or the pseudonym of a person.")
    details: dict[str, Any]


class AuditRecords(BaseModel):
    """One page of GET /admin/audit, newest first."""

    entries: list[AuditRecord]
    next_cursor: str | None = Field(description="null on the last page.")


class AuditParameters(BaseModel):
    """Page of GET /admin/audit."""

    model_config = ConfigDict(extra="forbid")

    limit: int = Field(100, ge=1, le=1000)
    cursor: Annotated[str, AfterValidator(plain_text)] | None = Field(
        default=None, max_length=512, description="`next_cursor` of the page before."
    )


class ModelVersionRecord(BaseModel):
    """A checkpoint whose features the gallery holds."""

    model_config = ConfigDict(from_attributes=True)

    fingerprint: str
    state: Literal["building", "active", "retired"] = Field(
        description="`active`: searched with; `building`: not all items are embedded with it yet; "
        "`retired`: another one took its place."
    )
    created_at: datetime
    embedded: int = Field(description="How many items have features of it.")
    configuration: dict[str, Any] | None = Field(
        description="The checkpoint's; null where an older release did not store it."
    )


class ModelVersions(BaseModel):
    """Answer of GET /admin/versions, oldest first."""

    versions: list[ModelVersionRecord]


class ReembedRequest(BaseModel):
    """Body of POST /admin/reembed."""

    model_config = ConfigDict(extra="forbid")

    checkpoint: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*\.safetensors$",
        max_length=128,
        description="Name of a checkpoint beside the one that the service was started with. "
        "Without it: embed the items that another checkpoint embedded with the present one.",
    )


class ReembedStatus(BaseModel):
    """How far embedding the gallery again is."""

    state: Literal["idle", "running", "done", "failed"]
    checkpoint: str | None = Field(description="Fingerprint that is embedded with.")
    done: int
    total: int
    detail: str | None = Field(description="Why it failed.")


class BatchResult(BaseModel):
    """What became of one image of a batch: `item` or `problem`."""

    status: int = Field(description="201 new, 200 enrolled before under the same key, or an error.")
    item: GalleryItem | None = None
    problem: Problem | None = None


class BatchAnswer(BaseModel):
    """Answer of POST /gallery/batch, one result per image, in order."""

    results: list[BatchResult]


def form_errors(error: ValidationError) -> list[dict[str, Any]]:
    """Errors of a form in FastAPI's own form: located in the body."""
    details: list[ErrorDetails] = error.errors(include_input=False, include_context=False)
    return [{**detail, "loc": ("body", *detail["loc"])} for detail in details]
