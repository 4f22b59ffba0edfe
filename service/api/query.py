"""Find a person."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic_core import to_json

from service import errors
from service.api.deps import NO_QUERY, ActorDep, ResourcesDep
from service.api.labels import meant
from service.api.openapi import documented, form_body, images_part
from service.api.schemas import (
    QUERY_IMAGES,
    Match,
    QueryAnswer,
    QueryForm,
)
from service.api.uploads import (
    IMAGE_ERRORS,
    UPLOAD_ERRORS,
    LeanRoute,
    RequestTimeout,
    check_image_count,
    invalid_field,
    read_upload,
)
from service.gallery import Filters, Hit, SearchResult
from service.images.decode import Box
from service.observability.stages import Stages
from service.pipeline.pipeline import Answer
from service.pipeline.reading import picture_of
from service.pipeline.search_batcher import Search
from service.resources import Resources

router = APIRouter(tags=["query"], route_class=LeanRoute)


@router.post(
    "/query",
    response_model=QueryAnswer,
    dependencies=[NO_QUERY],
    openapi_extra=form_body(
        QueryForm,
        images_part(QUERY_IMAGES, "Images of the same person; several are fused into one query."),
    ),
    responses=documented(
        *UPLOAD_ERRORS,
        *IMAGE_ERRORS,
        errors.GalleryDamaged,
        errors.IndexOutOfStep,
        errors.ShardsMissing,
    ),
)
async def query(
    request: Request,
    state: ResourcesDep,
    actor: ActorDep,
    request_timeout: RequestTimeout = None,
) -> Response:
    """Rank the gallery for one person, best first.

    The query's γ and β modulate every gallery item. By default a shortlist is recalled in the
    modulated space and then rescored exactly; `exhaustive` scores every item. Several images are
    fused: the mean of their complete representations, modulating once. An empty gallery answers
    with no results.
    """
    async with read_upload(request, QUERY_IMAGES, within=request_timeout) as upload:
        stages = Stages(request.state.started)
        stages.end("receive")
        form = upload.parse(QueryForm)
        check_image_count(upload.images, most=QUERY_IMAGES)
        if form.box is not None and len(upload.images) > 1:
            raise invalid_field("box", "goes with one image; cut the crops out before")
        box = None if form.box is None else Box(*form.box)
        camera = await state.pipeline.camera(form.query_camera_id)
        answer = await state.pipeline.query(
            [
                picture_of(image, box, form.modality, form.polarity, camera)
                for image in upload.whole()
            ],
            await _search(state, form),
            actor,
            stages,
        )
    body = _answer(state, answer, form, len(upload.images), stages)
    # As `QueryAnswer` says, without making one: models of a thousand results would take most of
    # the time.
    return Response(to_json(body, inf_nan_mode="null"), media_type="application/json")


async def _search(state: Resources, form: QueryForm) -> Search:
    labels = await meant(
        state,
        "body",
        person_id=form.person_id,
        camera_id=form.camera_id,
        exclude_camera_id=form.exclude_camera_id,
    )
    return Search(
        top_k=form.top_k,
        candidates=form.candidates,
        exhaustive=form.exhaustive,
        modulation=form.modulation,
        rerank=form.rerank or state.settings.rerank,
        prior=state.settings.prior if form.prior is None else form.prior,
        group_by=form.group_by,
        filters=Filters(
            **labels,
            gallery_modality=form.gallery_modality,
            captured_from=form.captured_from,
            captured_to=form.captured_to,
        ),
        max_distance=form.max_distance,
        explain=form.explain,
    )


def _answer(
    state: Resources, answer: Answer, form: QueryForm, images: int, stages: Stages
) -> dict[str, Any]:
    ranking = answer.ranking
    result = ranking.result
    body: dict[str, Any] = {
        "query": {
            "modality": answer.modality,
            "modality_source": answer.modality_source,
            "polarity": answer.polarity,
            "images": images,
        },
        "results": [
            _result(*parts, explain=form.explain)
            for parts in zip(result.hits, ranking.similarities, ranking.agreements, strict=True)
        ],
        "probability_enrolled": result.probability_enrolled,
        "match": _match(state, result),
        "searched": result.searched,
        "people": result.people,
        "candidates": result.candidates,
        "exhaustive": result.exhaustive,
        "rerank": ranking.rerank,
        "model": answer.model,
    }
    if result.shards_total is not None:
        body |= {"shards_ok": result.shards_ok, "shards_total": result.shards_total}
    stages.end("answer")
    if form.debug:
        seconds = {**stages.seconds, "total": stages.total}
        body["timings_ms"] = {stage: 1e3 * passed for stage, passed in seconds.items()}
        if spilled := state.gallery.spilled:
            body["items_on_host"] = spilled
    return body


def _match(state: Resources, result: SearchResult) -> Match | None:
    """What an answer says in one word; None where the checkpoint has no fit."""
    if result.probability_enrolled is None:
        return None
    first = result.hits[0].probability if result.hits else None
    if first is not None and first >= state.settings.match_likely:
        return "likely"
    return "none" if result.probability_enrolled < state.settings.match_none else "possible"


def _result(
    hit: Hit, similarity: float | None, agreement: list[float] | None, *, explain: bool
) -> dict[str, Any]:
    explained = {
        "unmodulated_rank": hit.unmodulated_rank,
        "rank_before_rerank": hit.rank_before_rerank,
        "parts": hit.parts,
        "agreement": agreement,
    }
    return {
        "rank": hit.rank,
        "item": hit.item,
        "probability": hit.probability,
        "score": hit.score,
        "distance": hit.distance,
        "similarity": similarity,
        "recall_rank": hit.recall_rank,
        **(explained if explain else {}),
    }
