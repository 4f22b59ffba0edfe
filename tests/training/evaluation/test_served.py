"""Rankings beside the plain one: strength, mirror, both modalities, and what a service answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from model import CMT, Calibration, Modality, Modulation, Strength, modulated_distance
from model.calibration import CalibrationFacts
from model.cli import main
from model.config import MODALITIES
from model.ranking import AgreementFit, RankingFacts, Reranking, reciprocal_similarity
from tests.paths import MINI
from training.datasets import LAYOUTS, DatasetError, DatasetName, Sample, read_sysu
from training.evaluation import Split, protocol_splits
from training.evaluation.embedding import Embedded, embed_samples
from training.evaluation.explained import PartAreas, part_areas
from training.evaluation.metrics import BoolArray, FloatArray, QueryScores, score_queries
from training.evaluation.protocols import mixed_splits
from training.evaluation.report import Evaluation, score_model, summarise
from training.evaluation.scoring import SplitScores, score_splits
from training.evaluation.tables import explained_lines

SYSU = DatasetName.SYSU


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return read_sysu(MINI)


@pytest.fixture(scope="module")
def embedded(tiny_model: CMT, samples: list[Sample]) -> Embedded:
    return embed_samples(tiny_model, samples)


@pytest.fixture
def weakened(tiny_model: CMT) -> Iterator[CMT]:
    """The network at a strength of 0.4."""
    tiny_model.strength = Strength(0.4, 1.1)
    yield tiny_model
    tiny_model.strength = None


def calibration(embedded: Embedded) -> Calibration:
    """Facts that say something, and eight references of each modality."""
    facts = RankingFacts(
        prior_items=12,
        between={
            "rgb rgb": (0.9, 0.2),
            "rgb ir": (1.1, 0.1),
            "ir rgb": (1.1, 0.1),
            "ir ir": (1, 3),
        },
        reranking=Reranking(weight=1.5, neighbours=2),
    )
    rows = {m: [i for i, s in enumerate(embedded.samples) if s.modality == m] for m in MODALITIES}
    references = {m: embedded.embedding[rows[m][::3][:8]] for m in MODALITIES}
    return Calibration(
        CalibrationFacts(prior=0.5, people=(), maps=(), ranking=facts), references, "euclidean"
    )


def same(found: list[QueryScores], expected: list[QueryScores]) -> bool:
    return all(
        np.array_equal(a.first_rank, b.first_rank)
        and np.allclose(a.average_precision, b.average_precision)
        for a, b in zip(found, expected, strict=True)
    )


def test_strength_stands_beside_none_all_and_the_mean(weakened: CMT, embedded: Embedded) -> None:
    splits = protocol_splits(SYSU, embedded.samples)[:1]
    (found,) = score_splits(weakened, embedded, splits)
    assert weakened.strength == Strength(0.4, 1.1)
    x = embedded.embedding[torch.from_numpy(splits[0].queries)]
    with torch.no_grad():
        shared = Modulation(*(part.mean(0, keepdim=True) for part in weakened.modulation(x)))
    assert found.gamma_beta[0] == pytest.approx(float(shared.gamma.mean()))
    weakened.strength = None
    (trained,) = score_splits(weakened, embedded, splits)
    assert same(found.rankings["as_trained"], trained.modulated)
    assert same(found.unmodulated, trained.unmodulated)
    assert not same(found.modulated, trained.modulated)
    assert trained.gamma_beta[1] * 0.4 == pytest.approx(found.gamma_beta[1], rel=1e-4)
    assert "as_trained" not in trained.rankings
    people = np.array([s.person_id for s in embedded.samples])
    cameras = np.array([s.camera for s in embedded.samples])
    plain = []
    for gallery in splits[0].galleries:
        y = embedded.embedding[torch.from_numpy(gallery)]
        rows = [
            modulated_distance(
                one[None].double(), y.double(), Modulation(*(p.double() for p in shared))
            )
            for one in x
        ]
        labels = people[splits[0].queries], people[gallery]
        plain.append(
            score_queries(
                torch.cat(rows).numpy(), *labels, cameras[splits[0].queries], cameras[gallery]
            )
        )
    assert same(found.rankings["mean_modulation"], plain)


def test_a_network_without_a_strength_counts_as_trained_beside_one_with(
    weakened: CMT, samples: list[Sample]
) -> None:
    splits = protocol_splits(SYSU, samples)[:1]
    one = score_model(weakened, samples, splits)
    weakened.strength = None
    other = score_model(weakened, samples, splits)
    both = summarise(SYSU, [one, other])
    trained = summarise(SYSU, [other]).splits[0].modulated
    assert both.splits[0].rankings["as_trained"].mean_ap.mean == pytest.approx(trained.mean_ap.mean)
    assert both.strengths == [Strength(0.4, 1.1), None]
    written = json.loads(json.dumps(both.to_json()))
    assert written["strengths"] == [{"s": 0.4, "c": 1.1}, None]
    assert written["splits"][0]["as_trained"]["mean_ap"]["mean"] == pytest.approx(
        trained.mean_ap.mean
    )
    assert written["splits"][0]["reranked"] is None


@pytest.mark.parametrize("mirror", [False, True])
def test_the_other_choice_of_mirror_image_is_a_row(
    tiny_model: CMT, samples: list[Sample], mirror: bool
) -> None:
    def evaluated(mirror: bool, *, compare: bool) -> Evaluation:
        config = tiny_model.config.model_copy(update={"mirror": mirror})
        model = CMT(config).eval()
        model.load_state_dict(tiny_model.state_dict())
        splits = protocol_splits(SYSU, samples)[:1]
        return summarise(SYSU, [score_model(model, samples, splits, compare_mirror=compare)])

    found = evaluated(mirror, compare=True)
    assert found.mirror == mirror
    row = found.splits[0].rankings["without_mirror" if mirror else "with_mirror"]
    assert row == evaluated(not mirror, compare=False).splits[0].modulated
    assert row != found.splits[0].modulated


def test_mixed_galleries_of_sysu_leave_out_the_place_of_the_query(samples: list[Sample]) -> None:
    splits = mixed_splits(SYSU, samples)
    assert [split.title for split in splits] == [
        "mixed gallery, camera 3",
        "mixed gallery, camera 6",
    ]
    for split, camera, others in zip(splits, (3, 6), ({1, 4, 5, 6}, {1, 2, 3, 4, 5}), strict=True):
        assert {samples[i].camera for i in split.queries} == {camera}
        assert split.queries.size == sum(s.camera == camera for s in samples)
        cells = {(s.person_id, s.camera) for s in samples if s.camera in others}
        assert len(split.galleries) == 10
        for gallery in split.galleries:
            assert sorted((samples[i].person_id, samples[i].camera) for i in gallery) == sorted(
                cells
            )
    draws = {tuple(gallery) for split in splits for gallery in split.galleries}
    assert len(draws) > 10  # not the same ten times
    assert all(
        np.array_equal(a, b)
        for a, b in zip(splits[0].galleries, mixed_splits(SYSU, samples)[0].galleries, strict=True)
    )


def test_mixed_galleries_of_llcm_hold_both_lights_of_a_camera(llcm_root: Path) -> None:
    samples = LAYOUTS[DatasetName.LLCM].test(llcm_root)
    infrared, visible = mixed_splits(DatasetName.LLCM, samples)
    assert {samples[i].modality for i in infrared.queries} == {"ir"}
    assert {samples[i].modality for i in visible.queries} == {"rgb"}
    cells = {(s.person_id, s.camera, s.modality) for s in samples}
    for gallery in infrared.galleries:
        drawn = [(samples[i].person_id, samples[i].camera, samples[i].modality) for i in gallery]
        assert sorted(drawn) == sorted(cells)


@pytest.mark.parametrize("name", ["regdb", "folder"])
def test_sets_without_cameras_have_no_mixed_galleries(
    request: pytest.FixtureRequest,
    name: str,
    tiny_checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = request.getfixturevalue(f"{name}_root")
    with pytest.raises(DatasetError, match="which camera"):
        mixed_splits(DatasetName(name), LAYOUTS[DatasetName(name)].test(root))
    where = ("--dataset", name, "--root", str(root), "--checkpoint", str(tiny_checkpoint))
    assert main(["evaluate", *where, "--protocol", "mixed", "--device", "cpu"]) == 1
    error = capsys.readouterr().err
    assert "without --protocol mixed" in error
    assert error.count("\n") == 1


def plainly(
    model: CMT, embedded: Embedded, split: Split, facts: RankingFacts | None, *, rerank: bool
) -> list[QueryScores]:
    """Query by query and item by item, as the design of the service says."""
    samples = embedded.samples
    references = calibration(embedded).references
    trials = []
    for gallery in split.galleries:
        rows: list[FloatArray] = []
        for q in split.queries.tolist():
            x = embedded.embedding[q : q + 1].double()
            with torch.no_grad():
                own = Modulation(*(p.double() for p in model.modulation(x.float())))
            gone = [samples[q].camera == 3 and samples[i].camera == 2 for i in gallery]
            kept = [i for i, out in zip(gallery.tolist(), gone, strict=True) if not out]
            found: dict[int, float] = {}
            for modality in MODALITIES:
                of_it = [i for i in kept if samples[i].modality == modality]
                if not of_it:
                    continue
                d = modulated_distance(x, embedded.embedding[of_it].double(), own)[0].numpy()
                pool, weight = d, np.full(len(d), 1.0)
                if facts:
                    r = modulated_distance(x, references[modality].double(), own)[0].numpy()
                    pool = np.append(d, r)  # the references count for `prior_items` items
                    weight = np.append(weight, np.full(len(r), facts.prior_items / len(r)))
                mean = np.average(pool, weights=weight)
                deviation = np.average((pool - mean) ** 2, weights=weight) ** 0.5
                found |= dict(zip(of_it, (mean - d) / deviation, strict=True))
            if rerank and facts and facts.reranking:
                people = len({samples[i].person_id for i in kept})
                images = len(kept) / people
                best = sorted(kept, key=lambda i: -found[i])[:100]
                apart = np.zeros((len(best), len(best)))
                for a, i in enumerate(best):
                    for b, j in enumerate(best):
                        pair = f"{samples[i].modality} {samples[j].modality}"
                        center, width = facts.between[pair]
                        between = float((embedded.embedding[i] - embedded.embedding[j]).norm())
                        apart[a, b] = (between - center) / width
                again = reciprocal_similarity(
                    np.array([-found[i] for i in best]),
                    apart,
                    facts.reranking.size(images),
                    facts.reranking,
                )
                for i, similarity in zip(best, again.tolist(), strict=True):
                    found[i] += facts.reranking.share(images) * similarity
            rows.append(np.array([-found.get(i, -np.inf) for i in gallery.tolist()]))
        people_of = np.array([s.person_id for s in samples])
        cameras = np.array([s.camera for s in samples])
        labels = people_of[split.queries], people_of[gallery]
        trials.append(
            score_queries(np.array(rows), *labels, cameras[split.queries], cameras[gallery])
        )
    return trials


def few(split: Split) -> Split:
    """Two trials and a third of the queries, for a plain loop."""
    return Split(
        split.protocol,
        split.setting,
        split.shots,
        split.convention,
        split.queries[::3],
        split.galleries[:2],
    )


@pytest.mark.parametrize("kind", ["mixed", "visible"])
def test_rankings_as_served_equal_a_plain_loop(
    tiny_model: CMT, embedded: Embedded, kind: str
) -> None:
    splits = (mixed_splits if kind == "mixed" else protocol_splits)(SYSU, embedded.samples)
    split = few(splits[0])
    known = calibration(embedded)
    (found,) = score_splits(tiny_model, embedded, [split], calibration=known)
    facts = known.facts.ranking
    again = plainly(tiny_model, embedded, split, facts, rerank=True)
    assert same(found.rankings["reranked_as_served"], again)
    assert not same(found.rankings["reranked_as_served"], found.modulated)
    if kind == "mixed":
        plain = plainly(tiny_model, embedded, split, facts, rerank=False)
        assert same(found.rankings["score"], plain)
        assert found.compared[0] is found.rankings["score"]
        assert set(found.open_set) == {"modulated score", "unmodulated score"}
        (alone,) = score_splits(tiny_model, embedded, [split])
        assert same(
            alone.rankings["score"], plainly(tiny_model, embedded, split, None, rerank=False)
        )
        assert "reranked_as_served" not in alone.rankings
    else:
        assert "score" not in found.rankings  # within a modality it is the order of the distances


def test_the_command_shows_mixed_galleries(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    where = ["--dataset", "sysu", "--root", str(MINI), "--checkpoint", str(tiny_checkpoint)]
    asked = ["--protocol", "mixed", "--mirror", "--json", str(out)]
    ids = ["--ids", str(MINI / "exp" / "available_id.txt"), "--device", "cpu"]
    assert main(["evaluate", *where, *ids, *asked]) == 0
    printed = capsys.readouterr().out
    assert "…" not in printed
    assert "Table 1" not in printed
    for row in ("modulated", "unmodulated", "mean γ, β", "with mirror", "score"):
        assert f"\n{row} " in printed
    splits = json.loads(out.read_text())["splits"]
    assert [split["setting"] for split in splits] == [
        "mixed gallery, camera 3",
        "mixed gallery, camera 6",
    ]
    for split in splits:
        assert f"{100 * split['score']['mean_ap']['mean']:.2f} ± " in printed
    assert main(["evaluate", *where, *asked, "--convention", "official"]) == 2
    assert "seeded draws" in capsys.readouterr().err


def test_every_way_of_ranking_is_of_all_models_or_of_none(
    tiny_model: CMT, samples: list[Sample], embedded: Embedded
) -> None:
    splits = protocol_splits(SYSU, samples)[:1]
    with_facts = score_model(tiny_model, samples, splits, calibration=calibration(embedded))
    without = score_model(tiny_model, samples, splits)
    found: list[SplitScores] = with_facts.splits
    assert "reranked_as_served" in found[0].rankings
    assert "reranked_as_served" not in summarise(SYSU, [with_facts, without]).splits[0].rankings


def agreeing(embedded: Embedded) -> Calibration:
    """The same with agreement, fitted for infrared queries of visible galleries."""
    known = calibration(embedded)
    assert known.facts.ranking is not None
    parts = embedded.embedding.shape[1]
    slopes, intercepts = (tuple(part + step for part in range(parts)) for step in (1.0, -1.0))
    fit = AgreementFit(query="ir", gallery="rgb", slopes=slopes, intercepts=intercepts)
    ranking = known.facts.ranking.model_copy(update={"agreements": (fit,)})
    facts = known.facts.model_copy(update={"ranking": ranking})
    return Calibration(facts, known.references, known.metric)


def test_what_parts_and_agreement_tell_by_hand(embedded: Embedded) -> None:
    known = agreeing(embedded)
    x, y = embedded.embedding[:6], embedded.embedding[6:12]
    distance = np.array([0.3, 0.9, 0.5, 0.4, 0.7, 0.1])
    right = np.array([True, True, False, True, False, False])
    references = known.references["rgb"].double()
    agreement = []
    for mine, other in zip(x.double(), y.double(), strict=True):
        found = 0.0
        for part in range(x.shape[1]):
            to_references = (mine[part] - references[:, part]).square().sum(1).numpy()
            apart = float((mine[part] - other[part]).square().sum())
            standard = (to_references.mean() - apart) / to_references.std()
            found += 1 / (1 + np.exp(-((part + 1) * standard + part - 1)))
        agreement.append(found)

    def area(values: list[float]) -> float:
        pairs = [
            (r, w) for r in np.flatnonzero(right).tolist() for w in np.flatnonzero(~right).tolist()
        ]
        return float(np.mean([values[r] > values[w] for r, w in pairs]))

    def told(right: BoolArray, *, query: str = "ir") -> PartAreas | None:
        kinds: list[Modality] = ["rgb"] * 6
        return part_areas(known, x, y, distance, right, query=query, gallery=kinds, seed=0)

    expected = PartAreas(3, area((-distance).tolist()), area(agreement))
    assert told(right) == pytest.approx(expected)
    assert expected.parts == pytest.approx(4 / 9)
    assert told(np.ones(6, np.bool_)) is None
    assert told(right, query="rgb") is None  # was not fitted


def test_first_answers_of_every_trial_are_told_apart(
    tiny_model: CMT, samples: list[Sample], embedded: Embedded
) -> None:
    splits = protocol_splits(SYSU, samples)[:1]
    known = agreeing(embedded)
    scores = score_model(tiny_model, samples, splits, calibration=known)
    explained = scores.splits[0].explained
    rights = [int((trial.first_rank == 1).sum()) for trial in scores.splits[0].modulated]
    counts = [min(20, right, splits[0].queries.size - right) for right in rights]
    assert [areas.answers for areas in explained] == counts
    assert min(counts) > 0
    assert len({areas.agreement for areas in explained}) > 1
    evaluation = summarise(SYSU, [scores])
    written = json.loads(json.dumps(evaluation.to_json()))["splits"][0]["explained"]
    assert written["answers"] == pytest.approx(np.mean(counts))
    for score in ("parts", "agreement"):
        areas = [getattr(one, score) for one in explained]
        assert all(0 <= area <= 1 for area in areas)
        assert written[score] == pytest.approx({"mean": np.mean(areas), "std": np.std(areas)})
    (line,) = explained_lines(evaluation)
    assert line.startswith("all-search single-shot: of ")
    assert f"{written['agreement']['mean']:.3f} ± " in line
    plain = summarise(SYSU, [score_model(tiny_model, samples, splits)])
    assert plain.splits[0].explained is None
    assert explained_lines(plain) == []
