"""Retrieval metrics against hand-worked cases and independent implementations."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats
import torch
from conftest import allocated
from scipy.spatial.distance import pdist
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.neighbors import NearestNeighbors
from torch.nn.functional import normalize

from nivmf_fast import vmf_log_ppk
from train import evaluate as evaluation
from train.evaluate import (
    auroc,
    evaluate,
    k_means,
    pairwise_f1,
    retrieve,
    retrieve_spaces,
    spearman,
    spectral_decay,
    uncertainty,
)


def random_set(n=150, classes=12, dim=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    centres = torch.randn(classes, dim, generator=generator)
    return centres[labels] + torch.randn(n, dim, generator=generator), labels


def in_space(features, space):
    return normalize(features) if space == "c" else features


@pytest.fixture(params=["faiss", "scikit-learn"])
def library(request, monkeypatch):
    if request.param == "faiss":
        pytest.importorskip("faiss")
    else:
        monkeypatch.setattr(evaluation, "faiss", None)
    return request.param


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
    assert found.mean_average_precision(1000) == pytest.approx(sum(by_query) / 5)
    # The class size as the last rank: 3 for a, 2 for b, so that only ranks 2, 3, 2 and 2 count
    by_query = [1 / 2 / 3, 0, 1 / 3 / 3, 1 / 2 / 2, 1 / 2 / 3]
    assert found.mean_average_precision() == pytest.approx(sum(by_query) / 5)
    assert found.class_distance.tolist() == [6.5, 3, 5, 3, 8.5]


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
    assert found.class_distance[:2].tolist() == [1, 1] and found.class_distance[2].isnan()
    assert found.mean_average_precision(1000) == pytest.approx((1 / 2 + 1 / 2 + 0) / 3)


@pytest.mark.parametrize("space", ["e", "c"])
def test_ranks_are_those_of_a_full_sort(space):
    features, labels = random_set(dim=4)
    if space == "e":
        features = features.round()  # with many ties, and exact in floating point
        scores = -(features[:, None] - features).square().sum(2)
    else:
        features = torch.where(features > 0, 1.0, -1.0)
        scores = features @ features.T / 4
    found = retrieve(features, labels, space, k=10, memory=30_000)
    for query in range(len(labels)):
        others = sorted((i for i in range(150) if i != query), key=lambda i: (-scores[query, i], i))
        ranks = [r for r, i in enumerate(others, start=1) if labels[i] == labels[query]]
        assert found.ranks[query, : len(ranks)].tolist() == ranks
        assert (found.ranks[query, len(ranks) :] > len(labels)).all()
        assert found.nearest[query].tolist() == others[:10]


def equal(a, b):
    return all(torch.equal(x.nan_to_num(-1), y.nan_to_num(-1)) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("space", ["e", "c"])
def test_the_size_of_the_chunks_does_not_matter(space):
    features, labels = random_set(n=400, dim=33)
    labels[3] = 99
    whole, *parts = (retrieve(features, labels, space, memory=m) for m in (1 << 24, 1, 100_000))
    assert all(equal(vars(whole).values(), vars(part).values()) for part in parts)


def test_both_spaces_at_once_are_each_alone():
    features, labels = random_set(n=200)
    both = retrieve_spaces(features, labels, ("e", "c"))
    for space, found in both.items():
        assert equal(vars(found).values(), vars(retrieve(features, labels, space)).values())


@pytest.mark.parametrize("space", ["e", "c"])
def test_copies_of_an_image_are_equally_near_in_high_dimension(space):
    generator = torch.Generator().manual_seed(0)
    features = 30 * torch.randn(37, 129, generator=generator).repeat(3, 1)
    found = retrieve(features, torch.arange(37).repeat(3), space, k=4)
    assert found.ranks[:, :2].tolist() == [[1, 2]] * 111
    assert found.nearest[:2, :2].tolist() == [[37, 74], [38, 75]]
    assert (found.nearest[:, 3] == found.nearest[:, 2] + 37).all()
    assert found.class_distance.tolist() == [0] * 111


def test_an_embedding_of_zeros_is_everyones_neighbour_at_the_same_distance():
    features = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, -2.0]])
    found = retrieve(features, torch.tensor([0, 0, 1]), "c", k=2)
    assert found.nearest.tolist() == [[1, 2], [0, 2], [0, 1]]
    assert all(map(math.isfinite, evaluate(features, torch.tensor([0, 0, 1])).values()))


def test_a_chunk_takes_the_memory_it_was_given():
    n, memory = 1000, 4 << 20  # all pairs at once would take 24 MB
    features, labels = torch.randn(n, 16), torch.arange(n) // 5
    outputs = 2 * n * (5 + 8 + 8) * 8
    taken = allocated(lambda: retrieve_spaces(features, labels, ("e", "c"), memory=memory))
    assert memory < taken <= 1.1 * memory + outputs


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
    assert found.mean_average_precision(1000) == pytest.approx(np.mean(expected), abs=1e-9)


def test_map_at_1000_stops_at_rank_1000():
    features = torch.arange(1502.0)[:, None]
    labels = torch.zeros(1502, dtype=torch.int64)
    labels[1:1400] = 1 + torch.arange(1399)  # 0 sees its class from rank 1400 on
    assert retrieve(features, labels, "e").ranks[0, 0] == 1400
    sums = retrieve(features, labels, "e")._precision_sum(1000)
    assert sums[0] == 0
    assert sums[1501] == pytest.approx(102 - 1)  # the others of the class are its nearest


def calculator(space, include, **options):
    from pytorch_metric_learning.distances import CosineSimilarity, LpDistance
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
    from pytorch_metric_learning.utils.inference import CustomKNN

    distance = {"e": LpDistance(normalize_embeddings=False), "c": CosineSimilarity()}[space]
    return AccuracyCalculator(
        include=include, device=torch.device("cpu"), knn_func=CustomKNN(distance), **options
    )


@pytest.mark.parametrize("space", ["e", "c"])
def test_recall_and_map_at_r_are_those_of_pytorch_metric_learning(space):
    features, labels = random_set(n=300)
    labels[7] = 99  # alone: left out of the means of that library
    names = ("precision_at_1", "mean_average_precision_at_r")
    expected = calculator(space, names, k="max_bin_count").get_accuracy(features, labels)
    found = retrieve(features, labels, space)
    assert found.recall(1) * 300 / 299 == pytest.approx(expected["precision_at_1"], abs=1e-6)
    assert found.map_at_r() == pytest.approx(expected["mean_average_precision_at_r"], abs=1e-6)


@pytest.mark.parametrize("space", ["e", "c"])
def test_map_is_that_of_pytorch_metric_learning_by_whole_class_size(space):
    features, _ = random_set(n=300)
    labels = torch.arange(300) % 12  # of 25 images each
    features += 2 * torch.nn.functional.one_hot(labels)[:, :6]
    expected = calculator(space, ("mean_average_precision",), k=None).get_accuracy(features, labels)
    name = {"e": "mAP", "c": "c_mAP"}[space]
    found = evaluate(features, labels, clustering=False)[name]
    assert found == pytest.approx(expected["mean_average_precision"] * 24 / 25, abs=1e-6)


@pytest.mark.parametrize("space", ["e", "c"])
def test_nmi_is_that_of_pytorch_metric_learning_for_the_same_clusters(space):
    features, labels = random_set()
    clusters = k_means(in_space(features, space), 12, seed=3)
    options = {"kmeans_func": lambda *_: torch.from_numpy(clusters)}
    expected = calculator(space, ("NMI",), k=1, **options).get_accuracy(features, labels)["NMI"]
    found = evaluate(features, labels, seed=3)[{"e": "nmi", "c": "c_nmi"}[space]]
    assert found == pytest.approx(expected, abs=1e-6)


def test_evaluate_names_its_metrics_as_the_protocol_does():
    features, labels = random_set()
    result = evaluate(features, labels, degradation=-features.norm(dim=1))
    recalls = [f"{space}_recall@{k}" for k in (1, 2, 4, 8, 10, 100) for space in "ec"]
    means = ["mAP_1000", "c_mAP_1000", "e_MAP@R", "c_MAP@R", "nmi", "c_nmi", "f1", "c_f1"]
    assert list(result)[: len(recalls + means)] == recalls + means
    assert {"mAP_c", "c_mAP_c", "mAP_lim", "c_mAP_lim", "mAP", "c_mAP"} <= set(result)
    assert all(type(value) is float and math.isfinite(value) for value in result.values())
    assert result["spearman_norm_degradation"] == pytest.approx(-1)

    without = evaluate(features, labels, clustering=False)
    assert set(result) - set(without) == {"nmi", "c_nmi", "f1", "c_f1", "spearman_norm_degradation"}


def test_each_map_stops_at_its_own_rank():
    # Images on a line, of 3 that share a class: all others are alone and count nothing.
    features, labels = torch.arange(1500.0)[:, None].repeat(1, 2), torch.arange(1500) + 1
    labels[[0, 1000, 1010]] = 0
    found = retrieve(features, labels, "e")
    ranks = found.ranks[[0, 1000, 1010], :2].tolist()
    # 1000 has 9 images nearer than 1010, and 9 at its left no further than that. The first image
    # is nearer to it than to 1010, which have 499 and 489 images at their right.
    assert ranks == [[1000, 1010], [20, 1499], [19, 1499]]

    def expected(last_rank):
        return sum(hit / r for own in ranks for hit, r in enumerate(own, 1) if r <= last_rank) / 3

    result = evaluate(features, labels, clustering=False)
    for name, last_rank in (("mAP_c", 3), ("mAP_1000", 1000), ("mAP_lim", 1023), ("mAP", 1499)):
        assert result[name] * 1500 == pytest.approx(expected(last_rank), abs=1e-6), name
    assert expected(1000) < expected(1023) < expected(1499)


@pytest.mark.parametrize("threads", [1, 2])
def test_metrics_are_the_same_to_the_last_bit_for_any_number_of_threads(threads, library):
    features, labels = random_set(n=600, classes=80, dim=65)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        found = evaluate(features, labels, seed=1)
        torch.set_num_threads(3 - threads)
        assert evaluate(features, labels, seed=1) == found
    finally:
        torch.set_num_threads(before)


def test_clusters_of_their_own_have_full_mutual_information_and_f1(library):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(20).repeat_interleave(10)
    features = torch.eye(20)[labels] * 100 + torch.rand(200, 20, generator=generator)
    for seed in range(5):
        found = evaluate(features, labels, seed=seed)
        names = ("nmi", "c_nmi", "f1", "c_f1")
        assert [found[name] for name in names] == pytest.approx([1] * 4)
    found = evaluate(torch.rand(200, 20, generator=generator), labels)
    assert found["nmi"] < 0.6 and found["f1"] < 0.2


def test_clusters_of_cosine_are_of_directions_and_the_euclidean_ones_are_not(library):
    # Directions tell the classes apart; lengths, which are far more spread, do not.
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(100) % 2
    angle = labels * 0.5 + 0.01 * torch.rand(100, generator=generator)
    length = torch.where(torch.arange(100) < 50, 1.0, 100.0)
    features = length[:, None] * torch.stack([angle.cos(), angle.sin()], 1)
    found = evaluate(features, labels)
    assert found["c_nmi"] == pytest.approx(1)
    assert found["nmi"] < 0.5


def test_k_means_is_the_same_for_a_seed_and_uses_every_cluster(library):
    features, _ = random_set(n=600)
    first = k_means(features, 12, seed=0)
    assert (k_means(features, 12, seed=0) == first).all()
    assert set(first.tolist()) == set(range(12))
    assert any((k_means(features, 12, seed=s) != first).any() for s in (1, 2))


def test_f1_counts_pairs():
    generator = np.random.default_rng(0)
    truth, clusters = generator.integers(0, 5, (2, 60))
    pairs = list(itertools.combinations(range(60), 2))
    said = np.array([clusters[a] == clusters[b] for a, b in pairs])
    true = np.array([truth[a] == truth[b] for a, b in pairs])
    precision, recall = (said & true).sum() / said.sum(), (said & true).sum() / true.sum()
    expected = 2 * precision * recall / (precision + recall)
    assert pairwise_f1(truth, clusters) == pytest.approx(expected, abs=1e-12)
    assert pairwise_f1(np.arange(4), np.arange(4)) == 0  # no pair that could be right
    assert pairwise_f1(np.array([0, 0, 1, 1]), np.array([0, 0, 0, 1])) == pytest.approx(2 / 5)


@pytest.mark.parametrize("space", ["e", "c"])
def test_structure_is_that_of_all_pairs(space):
    features, labels = random_set(n=90)
    labels[4] = 77  # alone: has no distance within, but a mean
    found = evaluate(features, labels, clustering=False)
    points = in_space(features.double(), space).numpy()
    classes = [points[labels.numpy() == label] for label in labels.unique().tolist()]
    intra = np.mean([pdist(own).mean() for own in classes if len(own) > 1])
    inter = pdist(np.array([own.mean(0) for own in classes])).mean()
    values = np.linalg.svd(points, compute_uv=False)
    expected = {
        "dists@intra": intra,
        "dists@inter": inter,
        "dists@intra_over_inter": intra / inter,
        "rho_spectrum": scipy.stats.entropy(np.full(6, 1 / 6), values / values.sum()),
    }
    for name, value in expected.items():
        assert found[f"{space}_{name}"] == pytest.approx(value, abs=1e-6), name


def test_spectral_decay_is_zero_for_a_ball_and_finite_for_a_line():
    assert spectral_decay(torch.eye(5).double()) == pytest.approx(0, abs=1e-12)
    line = spectral_decay(torch.arange(1.0, 9.0).double()[:, None] * torch.tensor([1.0, 0.0]))
    eps = torch.finfo(torch.float32).eps  # the values are s and eps s
    assert line == pytest.approx(math.log((1 + eps) / 2) - math.log(eps) / 2, abs=1e-9)
    assert math.isnan(spectral_decay(torch.zeros(3, 2).double()))


def test_percentiles_are_of_the_norm():
    length = torch.arange(101.0).flip(0)
    found = evaluate(length[:, None] * torch.tensor([0.6, 0.8]), torch.arange(101) % 7)
    assert [found[f"norm_p{p}"] for p in (5, 25, 50, 75, 95)] == pytest.approx([5, 25, 50, 75, 95])
    assert found["norm_mean"] == pytest.approx(50)


def test_uncertainty_is_that_of_loops_over_scikit_learns_neighbours():
    features, labels = random_set(n=200)
    features *= 3
    search = NearestNeighbors(n_neighbors=8, metric="cosine", algorithm="brute").fit(features)
    cosine_distance, nearest = search.kneighbors()
    norm = features.double().norm(dim=1)
    loc = features.double() / norm[:, None]
    log_ppk = vmf_log_ppk(loc, norm, loc, norm).numpy()
    right = labels.numpy()[nearest[:, 0]] == labels.numpy()
    l2 = [(features[i] - features[j]).norm().item() for i, j in enumerate(nearest[:, 0])]
    expected = {
        "auroc_norm": roc_auc_score(right, norm),
        "auroc_cosine": roc_auc_score(right, -cosine_distance[:, 0]),
        "auroc_l2": roc_auc_score(right, -np.array(l2)),
        "auroc_log_ppk": roc_auc_score(right, log_ppk[np.arange(200), nearest[:, 0]]),
    }
    likelihoods, hits = [], []
    for query in range(200):
        votes = dict.fromkeys(labels.tolist(), 0.0)
        for neighbour in nearest[query]:
            votes[labels[neighbour].item()] += math.exp(log_ppk[query, neighbour])
        own = votes[labels[query].item()] / sum(votes.values())
        likelihoods.append(math.log(max(own, 1 / 200)))
        hits.append(max(votes, key=votes.get) == labels[query].item())
    expected |= {"vote_log_likelihood": np.mean(likelihoods), "vote_accuracy": np.mean(hits)}
    found = uncertainty(features, labels, retrieve(features, labels, "c"))
    assert found == pytest.approx(expected, abs=1e-6)


def test_a_class_that_no_neighbour_votes_for_has_the_floor_as_its_likelihood():
    features, _ = random_set(n=20)
    labels = torch.arange(20)  # all alone
    found = uncertainty(features, labels, retrieve(features, labels, "c"))
    assert found["vote_log_likelihood"] == pytest.approx(-math.log(20))
    assert found["vote_accuracy"] == 0
    assert math.isnan(found["auroc_log_ppk"])  # none is right


@pytest.mark.filterwarnings("error")
def test_a_set_whose_classes_are_all_of_one_image_has_no_hits_and_no_distance_within():
    features, _ = random_set(n=20)
    found = evaluate(features, torch.arange(20), clustering=False)
    assert found["c_recall@8"] == found["mAP"] == 0
    assert math.isnan(found["c_MAP@R"]) and math.isnan(found["c_dists@intra"])


def test_of_classes_with_equal_votes_the_nearest_wins():
    features = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, -1.0]])
    found = retrieve(features, torch.tensor([0, 0, 1]), "c", k=2)
    assert found.nearest[0].tolist() == [1, 2]
    assert uncertainty(features, torch.tensor([0, 0, 1]), found)["vote_accuracy"] == 2 / 3
    assert uncertainty(features, torch.tensor([0, 1, 0]), found)["vote_accuracy"] == 1 / 3


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


def test_spearman_of_what_does_not_vary_is_not_a_number():
    assert math.isnan(spearman(torch.ones(5), torch.arange(5.0)))
