"""The sampler, the product kernel and a loss, in one page.

    python examples/quickstart.py

prints, up to rounding:

    mean cosine of 1,000 samples to their direction: 0.395 (exact: 0.396)
    nearest proxy of each image: [0, 1, 2]
    loss: 5.94 at the start, 0.24 after 100 steps
"""

import torch
from torch.nn.functional import normalize

from nivmf_fast import ELNivMFLoss, log_ppk, vmf_mean_resultant_length, vmf_rsample

torch.manual_seed(0)

# An image is a direction on the sphere and its certainty. Sampling is exact in any dimension.
loc, concentration = torch.eye(128)[:3], torch.full((3,), 60.0)
samples = vmf_rsample(loc, concentration, 1000, seed=0)  # [1000, 3, 128]
cosine = (samples * loc).sum(-1).mean()
exact = vmf_mean_resultant_length(concentration, 128)[0]
print(f"mean cosine of 1,000 samples to their direction: {cosine:.3f} (exact: {exact:.3f})")

# How well each class (a direction, and a concentration for every dimension) explains an image.
similarity = log_ppk(samples, loc, torch.full((3, 128), 30.0))
print(f"nearest proxy of each image: {similarity.argmax(1).tolist()}")

# The loss holds the classes. It takes raw embeddings: their norm is the concentration.
classes, dim = 20, 16
centres = normalize(torch.randn(classes, dim), dim=1)
loss = ELNivMFLoss(classes, dim, n_samples=5, temperature=0.5)
network = torch.nn.Linear(dim, dim)
optimiser = torch.optim.Adam(
    [{"params": network.parameters()}, *loss.param_groups(lr=0.1)], lr=0.01
)
values = []
for _ in range(100):
    labels = torch.randint(classes, (64,))
    images = 10 * normalize(centres[labels] + 0.1 * torch.randn(64, dim), dim=1)
    value = loss(network(images), labels)
    optimiser.zero_grad()
    value.backward()
    optimiser.step()
    values.append(value.item())
print(f"loss: {values[0]:.2f} at the start, {values[-1]:.2f} after 100 steps")
