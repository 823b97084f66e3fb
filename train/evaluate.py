"""How well embeddings retrieve and cluster, and how well their uncertainty predicts errors.

"e_" metrics are Euclidean on the raw embeddings, "c_" metrics on the normalised ones (cosine). The
query itself is never a hit. Ties keep the order of the data set. On a CPU every metric is the same
to the last bit for any number of threads.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.metrics import normalized_mutual_info_score, roc_auc_score
from sklearn.metrics.cluster import pair_confusion_matrix
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.nn.functional import normalize

from nivmf_fast import vmf_log_ppk

try:
    import faiss
except ImportError:
    faiss = None

Space = Literal["e", "c"]
MEMORY = 56 << 20  # bytes that a chunk of queries may take
NEVER = torch.iinfo(torch.int64).max
INDEX = (1 << 29) - 1  # the bits that a float64 has beyond a float32: room for an image's index
NOISE = 1e-13  # rounding of a squared distance in float64, in units of the query's square
RECALLS = (1, 2, 4, 8, 10, 100)
PERCENTILES = (5, 25, 50, 75, 95)


@dataclass(frozen=True)
class Retrieval:
    """Exact neighbours of every image among all others."""

    ranks: Tensor  # int64 [n, m]: of each query's class, from 1, ascending, padded with NEVER
    class_sizes: Tensor  # int64 [n], the query included
    class_distance: Tensor  # float64 [n]: mean distance to the others of its class, NaN for none
    nearest: Tensor  # int64 [n, k]
    similarity: Tensor  # float32 [n, k]: cosine, or minus the squared distance

    def recall(self, k: int) -> float:
        """Share of queries with a hit among the k nearest; a class of one image has none."""
        return mean(self.ranks[:, 0] <= k)

    def map_at_r(self) -> float:
        """MAP@R (Musgrave et al. 2020), R = class size - 1; over queries that have an R above 0."""
        others = self.class_sizes - 1
        return mean((self._precision_sum(others[:, None]) / others)[others > 0])

    def mean_average_precision(self, last_rank: int | None = None) -> float:
        """mAP of the released code: precision@hit summed up to a rank, divided by the class size.

        The last rank is the class size by default.
        """
        last = self.class_sizes[:, None] if last_rank is None else last_rank
        return mean(self._precision_sum(last) / self.class_sizes)

    def _precision_sum(self, last_rank: Tensor | int) -> Tensor:
        hits = torch.arange(1, self.ranks.shape[1] + 1, device=self.ranks.device)
        precision = hits / self.ranks.double()
        return precision.masked_fill(self.ranks > last_rank, 0).sum(1)


def retrieve(
    features: Tensor, labels: Tensor, space: Space, k: int = 8, memory: int = MEMORY
) -> Retrieval:
    """Exact ranks for each image as a query, in chunks of `memory` bytes, without a full sort."""
    return retrieve_spaces(features, labels, (space,), k, memory)[space]


@torch.no_grad()
def retrieve_spaces(
    features: Tensor, labels: Tensor, spaces: Sequence[Space], k: int = 8, memory: int = MEMORY
) -> dict[Space, Retrieval]:
    """Like `retrieve`, in several spaces: they share the products, which take most of the time."""
    n = len(labels)
    features = features.double()
    squares = features.norm(dim=1).square()  # not of all entries, which would take their memory
    scale = {"e": torch.ones_like(squares), "c": squares.rsqrt().masked_fill(squares == 0, 0)}
    sizes = torch.bincount(labels)
    members = torch.full((len(sizes), int(sizes.max())), -1, device=labels.device)
    order = labels.argsort(stable=True)
    index = torch.arange(n, device=labels.device)
    place = index - (sizes.cumsum(0) - sizes)[labels[order]]
    members[labels[order], place] = order
    members = members[labels]

    # Allocated before the chunks: small tensors that outlive a chunk would fragment its memory.
    results = {
        space: Retrieval(
            ranks=torch.empty_like(members),
            class_sizes=sizes[labels],
            class_distance=squares.new_empty(n),
            nearest=index.new_empty(n, min(k, n - 1)),
            similarity=squares.new_empty(n, min(k, n - 1), dtype=torch.float32),
        )
        for space in spaces
    }
    for query in index.split(max(1, memory // (24 * n))):
        products = features[query] @ features.T
        for space, result in results.items():
            _rank(result, space, query, members, _distances(products, squares, scale[space], query))
    return results


def _distances(products: Tensor, squares: Tensor, scale: Tensor, query: Tensor) -> Tensor:
    """Squared distances [rows, n] of scaled embeddings, from the products of unscaled ones."""
    lengths = squares * scale.square()
    distances = (products * scale).mul_(-2 * scale[query, None])
    distances.add_(lengths).add_(lengths[query, None])
    return distances.masked_fill_(distances <= NOISE * lengths[query, None], 0)


def _rank(
    result: Retrieval, space: Space, query: Tensor, members: Tensor, distances: Tensor
) -> None:
    """Enter the rows of these queries, overwriting their squared distances [rows, n]."""
    rows, n = distances.shape
    index = torch.arange(n, device=query.device)
    # One integer holds the distance in float32 (non-negative floats sort as their bits do) and, in
    # the bits below, the index, which breaks ties. Unique keys make every rank well defined, and
    # the order in which a matrix product adds up does not show.
    keys = distances.copy_(distances.float()).view(torch.int64).bitwise_or_(index)
    keys[index[:rows], query] = NEVER
    best, result.nearest[query] = keys.topk(result.nearest.shape[1], largest=False)
    squared = _squared(best)
    result.similarity[query] = (1 - squared / 2 if space == "c" else -squared).float()

    own = members[query]
    positive = keys.gather(1, own.clamp(min=0)).masked_fill_(own < 0, NEVER).sort(1).values
    never = positive == NEVER
    to_class = _squared(positive).sqrt().masked_fill(never, 0).sum(1)
    result.class_distance[query] = to_class / (~never).sum(1)
    # The positives cut the row into intervals; counting the images in each gives their ranks.
    result.ranks[query] = _count_up_to(positive, keys).masked_fill(never, NEVER)


def _count_up_to(bounds: Tensor, values: Tensor) -> Tensor:
    """Count the values [rows, n] up to each sorted bound [rows, m]."""
    interval = torch.searchsorted(bounds, values)
    counts = interval.new_zeros(len(bounds), bounds.shape[1] + 1)
    counts.scatter_add_(1, interval, interval.new_ones(1, 1).expand_as(interval))
    return counts.cumsum(1)[:, :-1]


def _squared(keys: Tensor) -> Tensor:
    return (keys & ~INDEX).view(torch.float64)


def embedded(features: Tensor, space: Space) -> Tensor:
    """The embeddings of a space, in float64."""
    features = features.double()
    return normalize(features) if space == "c" else features


@torch.no_grad()
def evaluate(
    features: Tensor,
    labels: Tensor,
    degradation: Tensor | None = None,
    seed: int = 0,
    clustering: bool = True,
) -> dict[str, float]:
    """All metrics of a test set, in the order of metrics.csv; without `clustering`, no k-means."""
    spaces = retrieve_spaces(features, labels, ("e", "c"))
    released = {"": spaces["e"], "c_": spaces["c"]}
    result = {f"{s}_recall@{k}": found.recall(k) for k in RECALLS for s, found in spaces.items()}
    result |= {f"{s}mAP_1000": f.mean_average_precision(1000) for s, f in released.items()}
    result |= {f"{s}_MAP@R": found.map_at_r() for s, found in spaces.items()}
    if clustering:
        result |= clustering_quality(features, labels, seed)
    for name, last_rank in (("mAP_c", None), ("mAP_lim", 1023), ("mAP", len(labels))):
        for s, found in released.items():
            result[s + name] = found.mean_average_precision(last_rank)
    result |= structure(features, labels, spaces)
    result |= uncertainty(features, labels, spaces["c"])
    norm = features.norm(dim=1)
    result["norm_mean"] = mean(norm)
    values = np.percentile(norm.double().cpu().numpy(), PERCENTILES)
    result |= {f"norm_p{p}": float(v) for p, v in zip(PERCENTILES, values, strict=True)}
    if degradation is not None:
        result["spearman_norm_degradation"] = spearman(norm, degradation)
    return result


def clustering_quality(features: Tensor, labels: Tensor, seed: int) -> dict[str, float]:
    """NMI and pairwise F1 of the classes and an equal number of k-means clusters."""
    truth = labels.cpu().numpy()
    count = len(np.unique(truth))
    clusters = {
        "": k_means(features, count, seed),
        "c_": k_means(normalize(features), count, seed),
    }
    nmi = {f"{s}nmi": float(normalized_mutual_info_score(truth, c)) for s, c in clusters.items()}
    return nmi | {f"{s}f1": pairwise_f1(truth, c) for s, c in clusters.items()}


def k_means(features: Tensor, count: int, seed: int) -> NDArray[np.int64]:
    """The cluster of every image: by faiss where it is installed, else by scikit-learn."""
    points = features.float().cpu().numpy()
    if faiss is None:
        with threadpool_limits(1):  # the order in which threads add up the centres varies
            return KMeans(count, n_init=1, random_state=seed).fit_predict(points)
    means = faiss.Kmeans(
        points.shape[1],
        count,
        seed=seed,
        niter=20,
        init_method=faiss.ClusteringInitMethod_KMEANS_PLUS_PLUS,
        min_points_per_centroid=1,  # only a warning
        max_points_per_centroid=len(points),  # all images count
        gpu=faiss.get_num_gpus() > 0,
    )
    means.train(points)
    return means.assign(points)[1]


def pairwise_f1(truth: NDArray[np.int64], clusters: NDArray[np.int64]) -> float:
    """F1 of predicting that two images of one cluster share their class."""
    (_, wrong), (missed, right) = pair_confusion_matrix(truth, clusters).tolist()
    return 2 * right / (2 * right + wrong + missed) if right else 0.0


def structure(features: Tensor, labels: Tensor, spaces: dict[Space, Retrieval]) -> dict[str, float]:
    """Distances within and between classes, and the spectrum (Roth et al., 2020)."""
    found: dict[str, dict[str, float]] = {}
    for space, retrieval in spaces.items():
        points = embedded(features, space)
        paired = retrieval.class_sizes > 1
        weight = 1 / retrieval.class_sizes[paired].double()  # every class counts once
        intra = mean(retrieval.class_distance[paired] * weight) / mean(weight)
        inter = mean_class_distance(points, labels)
        found[space] = {
            "dists@intra": intra,
            "dists@inter": inter,
            "dists@intra_over_inter": intra / inter if inter else math.nan,
            "rho_spectrum": spectral_decay(points),
        }
    return {f"{space}_{name}": found[space][name] for name in found["e"] for space in found}


def mean_class_distance(points: Tensor, labels: Tensor) -> float:
    """Mean Euclidean distance between the means of two classes; NaN for a single class."""
    sizes = labels.unique(return_counts=True)[1]
    centres = torch.segment_reduce(points[labels.argsort(stable=True)], "mean", lengths=sizes)
    count = len(centres)
    rows = centres.split(max(1, MEMORY // (16 * count)))
    total = torch.cat([torch.cdist(part, centres).sum(1) for part in rows])
    return mean(total) / (count - 1) if count > 1 else math.nan


def spectral_decay(points: Tensor) -> float:
    """KL(uniform | normalised singular values), in nats: 0 if all directions are used equally.

    Values are clamped to float32's rounding of the largest: an unused direction leaves it finite.
    """
    with threadpool_limits(1):
        values = np.linalg.svd(points.cpu().numpy(), compute_uv=False)
    if not values[0] > 0:
        return math.nan
    values = values.clip(min=values[0] * np.finfo(np.float32).eps)
    return float(-np.log(len(values) * values / values.sum()).mean())


def uncertainty(features: Tensor, labels: Tensor, found: Retrieval) -> dict[str, float]:
    """How well norm, cosine, distance and log-PPK predict that the cosine neighbour is right.

    The nearest images also vote for their classes, weighted by exp(log-PPK). A true class with less
    than 1 / n of the vote counts as having 1 / n: the log-likelihood is at least -log n.
    """
    distance, log_ppk = (torch.cat(p) for p in zip(*_to_neighbours(features, found), strict=True))
    voters = labels[found.nearest]
    hits = voters == labels[:, None]
    scores = {
        "norm": features.norm(dim=1),
        "cosine": found.similarity[:, 0],
        "l2": -distance[:, 0],
        "log_ppk": log_ppk[:, 0],
    }
    result = {f"auroc_{name}": auroc(hits[:, 0], score) for name, score in scores.items()}

    weight = log_ppk.softmax(1)
    vote = (weight[:, None] * (voters[:, None] == voters[:, :, None])).sum(2)
    winner = vote.cpu().numpy().argmax(1)  # of equal votes, the nearest
    share = (weight * hits).sum(1)
    result["vote_log_likelihood"] = mean(share.clamp(min=1 / len(labels)).log())
    result["vote_accuracy"] = float(
        np.take_along_axis(hits.cpu().numpy(), winner[:, None], 1).mean()
    )
    return result


def _to_neighbours(features: Tensor, found: Retrieval) -> Iterator[tuple[Tensor, Tensor]]:
    """Euclidean distance and log-PPK to the nearest [rows, k]; the norm is the concentration."""
    features = features.double()
    norm = features.norm(dim=1).clamp(min=1e-6)
    loc = features / norm[:, None]
    k, dim = found.nearest.shape[1], features.shape[1]
    index = torch.arange(len(features), device=features.device)
    rows = max(1, MEMORY // (32 * k * dim))
    for query, nearest in zip(index.split(rows), found.nearest.split(rows), strict=True):
        a, b = query.repeat_interleave(k), nearest.flatten()
        distance = (features[a] - features[b]).norm(dim=1)
        log_ppk = vmf_log_ppk(loc[a], norm[a], loc[b], norm[b], pairwise=False)
        yield distance.view(-1, k), log_ppk.view(-1, k)


def mean(values: Tensor) -> float:
    """The mean, summed in an order independent of the number of threads; NaN without values."""
    return float(values.double().cpu().numpy().mean()) if len(values) else math.nan


def auroc(right: Tensor, score: Tensor) -> float:
    """How well a score tells right from wrong; 0.5 is chance, NaN if all are of one kind."""
    if bool(right.all()) or not bool(right.any()):
        return math.nan
    return float(roc_auc_score(right.cpu(), score.cpu()))


def spearman(x: Tensor, y: Tensor) -> float:
    """Rank correlation, ties sharing their mean rank; NaN if all values are equal."""
    ranks = []
    for values in (x.cpu(), y.cpu()):
        _, which, counts = values.unique(return_inverse=True, return_counts=True)
        # Twice the rank less its mean is an integer: the sums below are exact.
        ranks.append((2 * counts.cumsum(0) - counts - len(values))[which])
    a, b = ranks
    return ((a * b).sum() / ((a * a).sum().double() * (b * b).sum()).sqrt()).item()
