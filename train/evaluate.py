"""How well embeddings retrieve, and how well their norm and cosine tell when they do.

Every metric comes in two spaces: Euclidean on the raw embeddings ("e_") and cosine ("c_"). The
query itself is never a hit. Equally near images count in the order of the set.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from sklearn.cluster import KMeans
from sklearn.metrics import normalized_mutual_info_score, roc_auc_score
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.nn.functional import normalize

Space = Literal["e", "c"]
NEVER = torch.iinfo(torch.int64).max
CHUNK = 1 << 21  # entries of the query x image matrix that are held at a time


@dataclass(frozen=True)
class Retrieval:
    """Exact neighbours of every image among all others."""

    ranks: Tensor  # int64 [n, m]: where each query's class comes, from 1, ascending; then NEVER
    class_sizes: Tensor  # int64 [n], the query included
    nearest: Tensor  # int64 [n, k]
    similarity: Tensor  # float32 [n, k]: cosine, or minus the squared distance

    def recall(self, k: int) -> float:
        """Share of queries with a hit among the k nearest; a query alone in its class has none."""
        return (self.ranks[:, 0] <= k).double().mean().item()

    def map_at_r(self) -> float:
        """MAP@R (Musgrave et al. 2020), R = class size - 1; over queries that have an R above 0."""
        others = self.class_sizes - 1
        scores = self._precision_sum(others[:, None])[others > 0] / others[others > 0]
        return scores.mean().item()

    def map_at_1000(self) -> float:
        """The released mAP@1000: sum of precision@hit up to rank 1000, by whole class size."""
        return (self._precision_sum(1000) / self.class_sizes).mean().item()

    def _precision_sum(self, last_rank: Tensor | int) -> Tensor:
        hits = torch.arange(1, self.ranks.shape[1] + 1, device=self.ranks.device)
        precision = hits / self.ranks.double()
        return torch.where(self.ranks <= last_rank, precision, 0.0).sum(1)


@torch.no_grad()
def retrieve(
    features: Tensor, labels: Tensor, space: Space, k: int = 8, chunk: int = CHUNK
) -> Retrieval:
    """Exact ranks for each image as a query, in chunks of `chunk` pairs, without a full sort."""
    n = len(labels)
    k = min(k, n - 1)
    features = features.double()
    features = normalize(features) if space == "c" else features
    squares = features.square().sum(1)
    sizes = torch.bincount(labels)
    members = torch.full((len(sizes), int(sizes.max())), -1, device=labels.device)
    order = labels.argsort(stable=True)
    place = torch.arange(n, device=labels.device) - (sizes.cumsum(0) - sizes)[labels[order]]
    members[labels[order], place] = order

    ranks, nearest, similarity = [], [], []
    backwards = torch.arange(n - 1, -1, -1, device=labels.device)
    for query in torch.arange(n, device=labels.device).split(max(1, chunk // n)):
        scores = features[query] @ features.T
        if space == "e":
            scores = 2 * scores - squares - squares[query, None]
        # One integer says both how near (the float's bits, made to sort as integers do) and, where
        # that is equal, which comes first: with unique keys every rank is well defined.
        bits = (scores.float() + 0.0).view(torch.int32)  # + 0.0: no negative zero
        keys = ((bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32) + backwards
        row = torch.arange(len(query), device=labels.device)
        keys[row, query] = -NEVER
        best = keys.topk(k).indices
        nearest.append(best)
        similarity.append(scores.gather(1, best).float())

        # The positives cut the row into intervals; counting the images in each gives their ranks.
        own = members[labels[query]]
        positive = keys.gather(1, own.clamp(min=0)).masked_fill(own < 0, -NEVER).sort(1).values
        above = torch.searchsorted(positive, keys, right=True)
        counts = torch.zeros(len(query), own.shape[1] + 1, dtype=torch.int64, device=labels.device)
        counts.scatter_add_(1, above, torch.ones_like(above))
        rank = counts.flip(1).cumsum(1)[:, :-1]
        hits = torch.arange(1, own.shape[1] + 1, device=labels.device)
        ranks.append(rank.masked_fill(hits >= sizes[labels[query], None], NEVER))
    return Retrieval(torch.cat(ranks), sizes[labels], torch.cat(nearest), torch.cat(similarity))


def evaluate(
    features: Tensor, labels: Tensor, degradation: Tensor | None = None, seed: int = 0
) -> dict[str, float]:
    """All metrics of a test set, in the order of metrics.csv."""
    spaces = {space: retrieve(features, labels, space) for space in ("e", "c")}
    result = {
        f"{space}_recall@{k}": spaces[space].recall(k) for k in (1, 2, 4, 8) for space in spaces
    }
    result["mAP_1000"] = spaces["e"].map_at_1000()
    result["c_mAP_1000"] = spaces["c"].map_at_1000()
    result["e_MAP@R"] = spaces["e"].map_at_r()
    result["c_MAP@R"] = spaces["c"].map_at_r()
    result["nmi"] = nmi(features, labels, seed)
    result["c_nmi"] = nmi(normalize(features), labels, seed)
    right = labels[spaces["c"].nearest[:, 0]] == labels
    norm = features.norm(dim=1)
    result["auroc_norm"] = auroc(right, norm)
    result["auroc_cosine"] = auroc(right, spaces["c"].similarity[:, 0])
    result["norm_mean"] = norm.mean().item()
    if degradation is not None:
        result["spearman_norm_degradation"] = spearman(norm, degradation)
    return result


def nmi(features: Tensor, labels: Tensor, seed: int) -> float:
    """Normalised mutual information of the classes and as many k-means clusters."""
    with threadpool_limits(1):  # several threads would add up the centres in any order
        clusters = KMeans(len(labels.unique()), n_init=1, random_state=seed).fit_predict(
            features.cpu()
        )
    return float(normalized_mutual_info_score(labels.cpu(), clusters))


def auroc(right: Tensor, score: Tensor) -> float:
    """How well a score tells right from wrong; 0.5 is chance, NaN where all are of one kind."""
    if bool(right.all()) or not bool(right.any()):
        return float("nan")
    return float(roc_auc_score(right.cpu(), score.cpu()))


def spearman(x: Tensor, y: Tensor) -> float:
    """Rank correlation, ties sharing their mean rank."""
    ranks = []
    for values in (x.cpu(), y.cpu()):
        _, which, counts = values.unique(return_inverse=True, return_counts=True)
        ranks.append((counts.cumsum(0) - (counts - 1) / 2)[which])
    return torch.corrcoef(torch.stack(ranks).double())[0, 1].item()
