"""Retrieval metrics against hand-worked cases and independent implementations."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from sklearn.metrics import average_precision_score
from sklearn.neighbors import NearestNeighbors

from train.evaluate import auroc, evaluate, nmi, retrieve, spearman


def random_set(n=150, classes=12, dim=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    centres = torch.randn(classes, dim, generator=generator)
    return centres[labels] + torch.randn(n, dim, generator=generator), labels


def test_a_hand_worked_case():
    # On a line, class in brackets: 0 (a), 1 (b), 3 (a), 4 (b), 10 (a)
    features = torch.tensor([[0.0], [1.0], [3.0], [4.0], [10.0]])
    found = retrieve(features, torch.tensor([0, 1, 0, 1, 0]), "e", k=2)
    assert found.nearest.tolist() == [[1, 2], [0, 2], [3, 1], [2, 1], [3, 2]]
    assert found.ranks[:, :2].tolist()[0] == [2, 4]  # of 0: 1 3 4 10
    assert found.ranks[1, 0].item() == 3  # of 1: 0 3 4 10
    assert found.ranks[2, :2].tolist() == [3, 4]  # of 3: 4 1 0 10
    assert found.ranks[3, 0].item() == 2  # of 4: 3 1 0 10
    assert found.ranks[4, :2].tolist() == [2, 4]  # of 10: 4 3 1 0
    assert found.recall(1) == 0
    assert found.recall(2) == pytest.approx(3 / 5)
    # R is 2 for a and 1 for b: only hits at rank 2 of 0 and 10 count, each 1/2 / 2
    assert found.map_at_r() == pytest.approx((1 / 4 + 0 + 0 + 0 + 1 / 4) / 5)
    by_query = [(1 / 2 + 2 / 4) / 3, 1 / 3 / 2, (1 / 3 + 2 / 4) / 3, 1 / 2 / 2, (1 / 2 + 2 / 4) / 3]
    assert found.map_at_1000() == pytest.approx(sum(by_query) / 5)


def test_ties_count_in_the_order_of_the_set():
    features = torch.tensor([[0.0], [1.0], [-1.0], [1.0], [-1.0]])
    found = retrieve(features, torch.tensor([0, 1, 2, 0, 1]), "e", k=4)
    assert found.nearest[0].tolist() == [1, 2, 3, 4]
    assert found.ranks[0, 0].item() == 3
    assert found.nearest[1].tolist() == [3, 0, 2, 4]
    assert found.ranks[1, 0].item() == 4


def test_all_images_alike_rank_by_their_order():
    found = retrieve(torch.ones(6, 3), torch.tensor([0, 0, 0, 1, 1, 1]), "c", k=5)
    assert found.nearest[0].tolist() == [1, 2, 3, 4, 5]
    assert found.ranks[:, :2].tolist() == [[1, 2], [1, 2], [1, 2], [4, 5], [4, 5], [4, 5]]


def test_a_query_alone_in_its_class_is_a_miss_and_has_no_map_at_r():
    features = torch.tensor([[0.0], [1.0], [5.0]])
    found = retrieve(features, torch.tensor([0, 0, 1]), "e", k=2)
    assert found.recall(1) == found.recall(2) == pytest.approx(2 / 3)
    assert found.map_at_r() == 1
    assert found.map_at_1000() == pytest.approx((1 / 2 + 1 / 2 + 0) / 3)


@pytest.mark.parametrize("space", ["e", "c"])
def test_ranks_are_those_of_a_full_sort(space):
    features, labels = random_set(dim=4)
    if space == "e":
        features = features.round()  # with many ties, and exact in floating point
        scores = -(features[:, None] - features).square().sum(2)
    else:
        features = torch.where(features > 0, 1.0, -1.0)
        scores = features @ features.T / 4
    found = retrieve(features, labels, space, k=10, chunk=1000)
    for query in range(len(labels)):
        others = sorted((i for i in range(150) if i != query), key=lambda i: (-scores[query, i], i))
        ranks = [r for r, i in enumerate(others, start=1) if labels[i] == labels[query]]
        assert found.ranks[query, : len(ranks)].tolist() == ranks
        assert (found.ranks[query, len(ranks) :] > len(labels)).all()
        assert found.nearest[query].tolist() == others[:10]


@pytest.mark.parametrize("space", ["e", "c"])
def test_the_size_of_the_chunks_does_not_matter(space):
    features, labels = random_set()
    whole, parts = (retrieve(features, labels, space, chunk=c) for c in (1 << 20, 1))
    assert whole.ranks.equal(parts.ranks)
    assert whole.nearest.equal(parts.nearest)


@pytest.mark.parametrize("space", ["e", "c"])
def test_recall_is_that_of_scikit_learns_neighbours(space):
    features, labels = random_set()
    found = retrieve(features, labels, space)
    metric = {"e": "euclidean", "c": "cosine"}[space]
    search = NearestNeighbors(n_neighbors=8, metric=metric, algorithm="brute").fit(features)
    neighbours = search.kneighbors(return_distance=False)
    for k in (1, 2, 4, 8):
        hits = (labels.numpy()[neighbours[:, :k]] == labels.numpy()[:, None]).any(1)
        assert found.recall(k) == pytest.approx(hits.mean(), abs=1e-12)


def test_map_at_1000_is_scikit_learns_average_precision_by_class_size():
    features, labels = random_set()  # fewer than 1000: all hits count
    found = retrieve(features, labels, "e")
    expected = []
    for query in range(len(labels)):
        others = np.arange(len(labels)) != query
        relevant = (labels == labels[query]).numpy()[others]
        score = -(features - features[query]).norm(dim=1).numpy()[others]
        size = relevant.sum() + 1
        expected.append(average_precision_score(relevant, score) * (size - 1) / size)
    assert found.map_at_1000() == pytest.approx(np.mean(expected), abs=1e-9)


def test_map_at_1000_stops_at_rank_1000():
    features = torch.arange(1502.0)[:, None]
    labels = torch.zeros(1502, dtype=torch.int64)
    labels[1:1400] = 1 + torch.arange(1399)  # 0 sees its class from rank 1400 on
    assert retrieve(features, labels, "e").ranks[0, 0] == 1400
    sums = retrieve(features, labels, "e")._precision_sum(1000)
    assert sums[0] == 0
    assert sums[1501] == pytest.approx(102 - 1)  # the others of the class are its nearest


@pytest.mark.parametrize("space", ["e", "c"])
def test_recall_and_map_at_r_are_those_of_pytorch_metric_learning(space):
    from pytorch_metric_learning.distances import CosineSimilarity, LpDistance
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
    from pytorch_metric_learning.utils.inference import CustomKNN

    features, labels = random_set(n=300)
    labels[7] = 99  # alone: left out of the means of that library
    distance = {"e": LpDistance(normalize_embeddings=False), "c": CosineSimilarity()}[space]
    calculator = AccuracyCalculator(
        include=("precision_at_1", "mean_average_precision_at_r"),
        k="max_bin_count",
        device=torch.device("cpu"),
        knn_func=CustomKNN(distance),
    )
    expected = calculator.get_accuracy(features, labels)
    found = retrieve(features, labels, space)
    assert found.recall(1) * 300 / 299 == pytest.approx(expected["precision_at_1"], abs=1e-6)
    assert found.map_at_r() == pytest.approx(expected["mean_average_precision_at_r"], abs=1e-6)


def test_evaluate_names_its_metrics_as_the_protocol_does():
    features, labels = random_set()
    result = evaluate(features, labels, degradation=-features.norm(dim=1))
    assert list(result)[:4] == ["e_recall@1", "c_recall@1", "e_recall@2", "c_recall@2"]
    assert {"mAP_1000", "c_mAP_1000", "e_MAP@R", "c_MAP@R", "nmi", "c_nmi"} <= set(result)
    assert all(math.isfinite(value) for value in result.values())
    assert result["spearman_norm_degradation"] == pytest.approx(-1)
    assert "spearman_norm_degradation" not in evaluate(features, labels)


def test_clusters_of_their_own_have_full_mutual_information():
    labels = torch.arange(4).repeat_interleave(10)
    features = torch.eye(4)[labels] * 100 + torch.rand(40, 4)
    assert nmi(features, labels, 0) == pytest.approx(1)
    assert nmi(torch.rand(40, 4), labels, 0) < 0.6


def test_auroc_is_the_share_of_pairs_in_the_right_order():
    right, score = torch.tensor([True, True, False, False]), torch.tensor([3.0, 1.0, 1.0, 0.0])
    assert auroc(right, score) == pytest.approx((1 + 1 + 1 / 2 + 1) / 4)
    assert math.isnan(auroc(torch.tensor([True, True]), torch.tensor([0.0, 1.0])))


def test_auroc_takes_the_cosine_neighbour():
    # By cosine 0 and 1 find each other; 2 and 3 too, but are of two classes.
    features = torch.tensor([[5.0, 0.0], [9.0, 0.1], [0.1, 1.0], [0.0, 2.0]])
    result = evaluate(features, torch.tensor([0, 0, 1, 2]))
    assert result["c_recall@1"] == 0.5
    assert result["auroc_norm"] == 1
    assert result["norm_mean"] == pytest.approx(features.norm(dim=1).mean().item())


def test_spearman_is_scipys_with_ties():
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(10, (200,), generator=generator).float()
    y = x + torch.randint(10, (200,), generator=generator)
    assert spearman(x, y) == pytest.approx(scipy.stats.spearmanr(x, y).statistic, abs=1e-12)
