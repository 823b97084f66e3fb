"""The losses and miners of pytorch-metric-learning that a run knows by name."""

import math
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Entry:
    """A class of pytorch-metric-learning, with the arguments that the released code gives it."""

    kind: str
    defaults: dict[str, Any] = field(default_factory=dict)
    takes_miner: bool = False


LOSSES = {
    "proxy-anchor": Entry("ProxyAnchorLoss", {"margin": 0.1, "alpha": 32}),
    # of embeddings and proxies of length 3, hence 3^2 times the squared distance of directions
    "proxy-nca": Entry("ProxyNCALoss", {"softmax_scale": 9.0}),
    "normalized-softmax": Entry("NormalizedSoftmaxLoss", {"temperature": 0.05}),
    "arcface": Entry("ArcFaceLoss", {"margin": math.degrees(0.5), "scale": 16}),
    "soft-triple": Entry(
        "SoftTripleLoss",
        {"centers_per_class": 2, "la": 8, "gamma": 0.1, "margin": 0.01, "weight_reg_weight": 0.2},
    ),
    "triplet": Entry("TripletMarginLoss", {"margin": 0.2}, True),
    "margin": Entry(
        "MarginLoss", {"margin": 0.2, "nu": 0.0, "beta": 1.2, "learn_beta": True}, True
    ),
    "contrastive": Entry("ContrastiveLoss", {"pos_margin": 0.0, "neg_margin": 1.0}, True),
    "multi-similarity": Entry(
        "MultiSimilarityLoss", {"alpha": 2.0, "beta": 40.0, "base": 0.5}, True
    ),
    "lifted": Entry(
        "GeneralizedLiftedStructureLoss",
        {"neg_margin": 1.0, "pos_margin": 0.0, "embedding_reg_weight": 0.005},
        True,
    ),
    "n-pair": Entry("NPairsLoss", {"embedding_reg_weight": 0.005}, True),
    "angular": Entry("AngularLoss", {"alpha": 45.0}, True),
    "snr": Entry("TripletMarginLoss", {"margin": 0.2, "embedding_reg_weight": 0.005}, True),
}
MINERS = {
    "distance-weighted": Entry(
        "DistanceWeightedMiner", {"cutoff": 0.5, "nonzero_loss_cutoff": 1.4}
    ),
    "semihard": Entry("TripletMarginMiner", {"margin": 0.2, "type_of_triplets": "semihard"}),
    "hard": Entry("TripletMarginMiner", {"margin": 0.2, "type_of_triplets": "hard"}),
    "all": Entry("TripletMarginMiner", {"margin": 0.2, "type_of_triplets": "all"}),
    "easy-hard": Entry("BatchEasyHardMiner"),
    "batch-hard": Entry("BatchHardMiner"),
    "multi-similarity": Entry("MultiSimilarityMiner", {"epsilon": 0.1}),
    "pair-margin": Entry("PairMarginMiner", {"pos_margin": 0.2, "neg_margin": 0.8}),
    "angular": Entry("AngularMiner", {"angle": 20}),
}
