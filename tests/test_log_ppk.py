"""log-PPK and proxy-NCA: every backend against float64, and against the contract."""

import itertools
import math
import subprocess
import sys
from typing import Any, NamedTuple

import pytest
import torch
from conftest import SPLIT, device_of, golden
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import nivmf_fast
from nivmf_fast import _backends, reference
from nivmf_fast._partials import combine_partials, loss_of_partial
from nivmf_fast._schemas import Options
from nivmf_fast.functional import proxy_nca_shard

GOLDEN = golden("nivmf")["entries"]
OPTIONS = [
    pytest.param({"normalizer": n, "projection": p}, id=f"{n}-{'projected' if p else 'plain'}")
    for n in ("exact", "released")
    for p in (True, False)
]


class Batch(NamedTuple):
    samples: Tensor
    loc: Tensor
    concentration: Tensor
    temperature: Tensor
    labels: Tensor

    def to(self, *args: Any) -> "Batch":
        return Batch(*(t.to(*args) for t in self[:4]), self.labels)

    def on(self, device: str) -> "Batch":
        return Batch(*(t.to(device) for t in self))


def make_batch(
    N: int,
    B: int,
    P: int,
    D: int,
    T: float,
    k_mu: float = 20.0,
    spread: float = 0.05,
    dtype: torch.dtype = torch.float32,
) -> Batch:
    """Every image lies between its own proxy and another, so that many are confused."""
    g = torch.Generator().manual_seed(0)

    def unit(t: Tensor) -> Tensor:
        return torch.nn.functional.normalize(t.to(dtype), dim=-1)

    loc = unit(torch.randn(P, D, generator=g))
    concentration = torch.exp(spread * torch.randn(P, D, generator=g)).to(dtype)
    length = torch.linalg.vector_norm(concentration * loc, dim=-1, keepdim=True)
    labels = torch.randint(P, (B,), generator=g)
    other = torch.randint(P, (B,), generator=g)
    noise = torch.randn(B, D, generator=g) + torch.randn(N, B, D, generator=g) / 2
    samples = unit(loc[labels] + loc[other] + noise / math.sqrt(D))
    return Batch(samples, loc, concentration * k_mu / length, torch.tensor(T, dtype=dtype), labels)


def losses(batch: Batch, backend: str, **options: Any) -> Tensor:
    x, loc, kappa, T, labels = batch
    return nivmf_fast.proxy_nca(x, loc, kappa, labels, T, backend=backend, **options)


def kernels(batch: Batch, backend: str, **options: Any) -> Tensor:
    return nivmf_fast.log_ppk(*batch[:4], backend=backend, constants=False, **options)


def outcome(function: Any, batch: Batch, /, **options: Any) -> dict[str, Tensor]:
    """The value, and all gradients of its sum with fixed weights, in float64 on the CPU."""
    tensors = [t.detach().clone().requires_grad_() for t in batch[:4]]
    value = function(Batch(*tensors, batch.labels), **options)
    weight = torch.randn(value.shape, generator=torch.Generator().manual_seed(1)).to(value)
    gradients = torch.autograd.grad((value * weight).sum(), tensors)
    found = dict(zip(("value", *Batch._fields), (value, *gradients), strict=False))
    return {name: t.detach().double().cpu() for name, t in found.items()}


def eager(batch: Batch, function: str, normalizer: str, projection: bool) -> Tensor:
    x, loc, kappa, T, labels = batch
    if function == "losses":
        return reference.proxy_nca(x, loc, kappa, labels, T, normalizer, projection)
    return reference.log_ppk(x, loc, kappa, T, normalizer, projection, constants=False)


def relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm().clamp(min=1e-300))


CASES = [  # N, B, P, D, T, |K mu|, spread
    (1, 1, 1, 2, 1.0, 1.0, 0.3),
    (3, 1, 2, 3, 0.1, 5.0, 0.3),
    (5, 7, 33, 17, 0.01, 20.0, 0.05),
    (7, 13, 127, 64, 0.1, 100.0, 0.3),
    (1, 40, 128, 64, 1.0, 500.0, 0.05),
    (4, 30, 129, 128, 0.003, 20.0, 0.0),
    (5, 24, 100, 128, 1.0, 20.0, 0.05),
    (3, 40, 257, 512, 0.003, 20.0, 0.05),
    (6, 33, 65, 512, 0.01, 200.0, 0.3),
    (2, 5, 31, 1000, 0.1, 50.0, 0.3),
    (130, 3, 17, 16, 0.1, 20.0, 0.3),
]


def rounding(dtype: torch.dtype, name: str, D: int, k_mu: float) -> float:
    """What may come on top of twice the error of eager code, which is now and then tiny by luck.

    float32: 8 ulp, for the cases of two or three dimensions (5 are needed at D = 2, else 1). In
    float64 the truth is rounded as well, and every bias is a sum of D logarithms and about |K mu|
    before it is centred: 4 ulp of that (1.7 are needed). The temperature's gradient is one number,
    which cancels over all pairs and images: 64 ulp (12 needed), and 160 of the sum (145 needed).
    """
    single, number = dtype == torch.float32, name == "temperature"
    ulps = (64 if number else 8) if single else (160 if number else 4) * (D + k_mu)
    return ulps * torch.finfo(dtype).eps


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c)))
def test_errors_are_at_most_twice_those_of_eager_code(backend, case, options):
    batch = make_batch(*case)
    _, _, P, D, T, k_mu, _ = case
    if P > 1:
        assert losses(batch.to(torch.float64), "reference", **options).mean() > 0.1
    for function in (losses, kernels):
        want = outcome(function, batch.to(torch.float64), backend="reference", **options)
        for dtype in (torch.float32, torch.float64):
            given = batch.to(dtype)
            got = outcome(function, given.on(device_of(backend)), backend=backend, **options)
            allowed = dict.fromkeys(want, 0.0)
            for seed in range(4):  # eager code with its sums in four orders: its error is luck too
                order = torch.randperm(D, generator=torch.Generator().manual_seed(seed))
                turned = Batch(*(t[..., order] for t in given[:3]), *given[3:])
                plain = outcome(eager, turned, function=function.__name__, **options)
                for name in want:
                    value = plain[name]
                    if name in Batch._fields[:3]:
                        value = value[..., order.argsort()]
                    allowed[name] = max(allowed[name], 2 * relative(value, want[name]))
            for name in want:
                if P == 1 and function is losses:  # one class: loss and gradients are 0
                    logit = torch.finfo(dtype).eps * k_mu / T  # an ulp of a score, over T
                    assert got[name].abs().max() <= 2 * logit, (name, dtype)
                    continue
                error = relative(got[name], want[name])
                floor = rounding(dtype, name, D, k_mu)
                if backend == "triton" and dtype == torch.float32 and name != "value":
                    floor += SPLIT
                assert error <= allowed[name] + floor, (name, dtype, error)


@pytest.mark.parametrize(("spread", "bound"), [(0.05, 2e-3), (0.3, 2e-2)])
def test_float32_losses_are_exact_at_the_lowest_temperature(backend, spread, bound):
    batch = make_batch(5, 64, 500, 512, 0.003, 20.0, spread)
    want = outcome(losses, batch.to(torch.float64), backend="reference")
    assert want["value"].mean() > 0.1
    if backend == "reference":
        bound *= 2  # its products add up all 512 terms in one go
    got = outcome(losses, batch.on(device_of(backend)), backend=backend)
    assert (got["value"] - want["value"]).abs().max() <= bound
    if spread == 0.05:
        for name in ("samples", "loc", "concentration"):
            assert relative(got[name], want[name]) <= 5e-5, name
        assert relative(got["temperature"], want["temperature"]) <= 1e-4


def unit_tensor(numbers: list[Any]) -> Tensor:
    t = torch.tensor([float(n) for n in numbers], dtype=torch.float64)
    return t / t.norm()


@pytest.mark.parametrize("entry", GOLDEN, ids=lambda e: f"{e['D']}-{'-'.join(e['K_diagonal'])}")
def test_golden_densities_and_kernels(backend, entry):
    device = device_of(backend)
    loc = unit_tensor(entry["mu_proxy_unnormalised"])[None].to(device)
    kappa = torch.tensor([[float(k) for k in entry["K_diagonal"]]], dtype=torch.float64).to(device)
    for point, want in entry["log_density_at_points"]:
        x = unit_tensor(point)[None, None].to(device)
        got = nivmf_fast.log_ppk(x, loc, kappa, backend=backend)
        assert got.item() == pytest.approx(float(want), abs=1e-10, rel=1e-12)
    n = 200_000
    image = unit_tensor(entry["mu_image_unnormalised"])[None].to(device)
    concentration = torch.tensor([float(entry["kappa_image"])], dtype=torch.float64).to(device)
    x = nivmf_fast.vmf_rsample(image, concentration, n, seed=7)
    log_p = nivmf_fast.log_ppk(x.view(1, n, -1), loc, kappa, backend=backend)[:, 0]
    for key, normalizer in (
        ("log_kernel", "exact"),
        ("log_kernel_research_normaliser", "released"),
    ):
        for T, want in entry[key].items():
            if float(T) < 0.1:  # a handful of samples would carry the mean
                continue
            got = nivmf_fast.log_ppk(
                x, loc, kappa, float(T), normalizer=normalizer, backend=backend
            )
            weight = torch.exp((log_p - log_p.max()) / float(T))
            standard_error = float(weight.std() / weight.mean()) / math.sqrt(n)
            # the samples are weighted by the exact density, so allow the released one some slack
            slack = 5 if normalizer == "exact" else 8
            assert abs(got.item() - float(want)) <= slack * standard_error + 1e-9


@pytest.mark.parametrize("options", OPTIONS)
def test_gradcheck(backend, options):
    batch = make_batch(3, 4, 5, 3, 0.3, 4.0, 0.3, dtype=torch.float64).on(device_of(backend))
    tensors = [t.clone().requires_grad_() for t in batch[:4]]
    given = {"backend": backend, "validate": False, **options}

    def loss(x: Tensor, loc: Tensor, kappa: Tensor, T: Tensor) -> Tensor:
        return nivmf_fast.proxy_nca(x, loc, kappa, batch.labels, T, **given)

    def kernel(*tensors: Tensor) -> Tensor:
        return nivmf_fast.log_ppk(*tensors, **given)

    for function in (loss, kernel):
        assert torch.autograd.gradcheck(function, tensors, fast_mode=True)


def test_reference_differentiates_like_its_own_backward():
    batch = make_batch(3, 5, 7, 6, 0.1, 20.0, 0.3, dtype=torch.float64)
    for normalizer in ("exact", "released"):
        for projection in (True, False):
            options: Any = {"normalizer": normalizer, "projection": projection}
            for function in (losses, kernels):
                got = outcome(function, batch, backend="reference", **options)
                want = outcome(eager, batch, function=function.__name__, **options)
                for name in want:
                    assert relative(got[name], want[name]) < 1e-12, (name, options)


def test_opcheck(backend):
    batch = make_batch(3, 4, 5, 6, 0.1).on(device_of(backend))
    tensors = [t.clone().requires_grad_() for t in batch[:4]]
    options = *Options(True, True, 0, 1 << 20, True), backend
    op = torch.ops.nivmf_fast
    torch.library.opcheck(op.log_ppk.default, (*tensors, *options))
    torch.library.opcheck(op.proxy_nca.default, (*tensors[:3], batch.labels, tensors[3], *options))
    _, partial, saved = op.proxy_nca(*batch[:3], batch.labels, batch.temperature, *options)
    torch.library.opcheck(
        op.proxy_nca_backward.default,
        (
            torch.ones_like(partial[0], dtype=torch.float32),
            *batch[:3],
            batch.labels,
            batch.temperature,
            partial,
            saved,
            *options,
        ),
    )
    s, saved, _ = op.log_ppk(*batch[:4], *options)
    torch.library.opcheck(
        op.log_ppk_backward.default, (torch.ones_like(s), *batch[:4], saved, *options)
    )


def test_compiles_into_one_graph(backend):
    batch = make_batch(3, 6, 40, 16, 0.1).on(device_of(backend))

    def step(x: Tensor, loc: Tensor, kappa: Tensor, T: Tensor, labels: Tensor) -> Tensor:
        given = Batch(x, loc, kappa, T, labels)
        return losses(given, backend).sum() + kernels(given, backend).logsumexp(1).sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    grads = []
    for function in (step, compiled):
        tensors = [t.clone().requires_grad_() for t in batch[:4]]
        grads.append(torch.autograd.grad(function(*tensors, batch.labels), tensors))
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("shape", [(5, 37, 301, 64), (3, 20, 100, 40), (2, 300, 7, 16)])
@pytest.mark.parametrize("workspace", [None, 1 << 16])
def test_bits_repeat_for_any_number_of_threads(backend, shape, workspace):
    if backend == "reference":
        pytest.skip("the reference's matrix products are torch's")
    batch = make_batch(*shape, 0.05).on(device_of(backend))
    threads = torch.get_num_threads()
    try:
        for function in (losses, kernels):
            runs = []
            for count in (1, 2, 2, 5):
                torch.set_num_threads(count)
                runs.append(outcome(function, batch, backend=backend, workspace=workspace))
            for run in runs[1:]:
                for name, value in runs[0].items():
                    assert torch.equal(value, run[name]), name
    finally:
        torch.set_num_threads(threads)


def test_isotropic_proxies_are_plain_vmf(backend):
    batch = make_batch(1, 6, 5, 17, 1.0, dtype=torch.float64).on(device_of(backend))
    k = torch.linspace(1, 300, 5, dtype=torch.float64, device=batch.loc.device)
    got = nivmf_fast.log_ppk(
        batch.samples, batch.loc, k[:, None].expand(5, 17).contiguous(), backend=backend
    )
    density = nivmf_fast.vmf_log_normalizer(k, 17) + k * (batch.samples[0] @ batch.loc.T)
    torch.testing.assert_close(got, density, rtol=1e-12, atol=1e-10)

    image, k1, n = batch.loc[:2], torch.tensor([5.0, 40.0], dtype=torch.float64), 100_000
    k1, k = k1.to(k.device), k[:2]
    x = nivmf_fast.vmf_rsample(image, k1, n, seed=3)
    sampled = nivmf_fast.log_ppk(
        x, batch.loc[:2], k[:, None].expand(2, 17).contiguous(), backend=backend
    )
    closed = nivmf_fast.vmf_log_ppk(image, k1, batch.loc[:2], k)
    assert (sampled - closed).abs()[:, 0].max() < 0.02  # k = 1: the integrand is nearly flat


def test_skipping_what_is_dead_changes_no_gradient():
    """Each panel's maxima lead `saved`: with all of them at infinity nothing is dead."""
    if not nivmf_fast.backends()["cpu"].usable:
        pytest.skip(f"backend cpu: {nivmf_fast.backends()['cpu'].reason}")
    batch = make_batch(5, 64, 2000, 128, 0.01)
    N, B, P = 5, 64, 2000
    for workspace in (1 << 26, 1 << 16):  # scores kept, scores computed twice
        given = *batch[:3], batch.labels, batch.temperature
        options = True, True, 0, workspace, True
        op = torch.ops.nivmf_kernels
        values, partial, saved = op.proxy_nca(*given, *options)
        assert values.mean() > 0.1
        maxima = saved[:, :B].double()
        share = (maxima - maxima.amax(0)) / 0.01 - partial[1]
        dead = share < math.log(2.0**-24 / (N * P))
        assert dead.double().mean() > 0.5
        grad = torch.ones(B)
        skipped = op.proxy_nca_backward(grad, *given, partial, saved, *options)
        saved[:, :B] = math.inf
        whole = op.proxy_nca_backward(grad, *given, partial, saved, *options)
        for got, want in zip(skipped, whole, strict=True):
            assert relative(got.double(), want.double()) <= 1e-7
        assert not all(map(torch.equal, skipped, whole))  # something was skipped


class RecordOptions(TorchDispatchMode):
    """Keeps the options that the ops of log-PPK are called with."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Options] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name() in ("nivmf_fast::log_ppk", "nivmf_fast::proxy_nca"):
            self.seen.append(Options(*args[-1 - len(Options._fields) : -1]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("function", [losses, kernels], ids=["proxy_nca", "log_ppk"])
def test_scores_are_kept_only_for_a_backward_and_workspace_always_bounds(function):
    batch = make_batch(2, 3, 20, 8, 1.0)
    trained = batch._replace(loc=batch.loc.clone().requires_grad_())
    with RecordOptions() as record:
        function(trained, "reference", workspace=12345)
        function(batch, "reference", workspace=12345)
        with torch.no_grad():
            function(trained, "reference", workspace=12345)
            function(trained, "reference")
    assert [options.keep for options in record.seen] == [True, False, False, False]
    assert [options.workspace for options in record.seen] == [*[12345] * 3, 64 << 20]


@pytest.mark.parametrize("T", [0.01, 1.0])
def test_ranges_of_proxies_combine_to_the_whole(backend, T):
    batch = make_batch(4, 20, 300, 64, T)
    cuts = (0, 140, 170, 300)
    labels = torch.where(batch.labels < 170, batch.labels % 140, batch.labels)  # none in the middle
    batch = batch._replace(labels=labels).on(device_of(backend))
    x, loc, kappa, temperature, labels = batch
    options = *Options(True, True, 0, 1 << 26, True), backend
    op = torch.ops.nivmf_fast
    want, partial, saved = op.proxy_nca(x, loc, kappa, labels, temperature, *options)
    grad = torch.linspace(-1, 2, 20, device=x.device)
    whole = op.proxy_nca_backward(
        grad, x, loc, kappa, labels, temperature, partial, saved, *options
    )
    shards = []
    for begin, end in itertools.pairwise(cuts):
        given = x, loc[begin:end], kappa[begin:end], labels - begin, temperature
        shards.append((given, *op.proxy_nca(*given, *options)))
    combined = combine_partials([shard[2] for shard in shards], temperature)
    got = loss_of_partial(combined, temperature)
    assert shards[1][1].isnan().all()
    assert relative(got, want) <= 1e-6
    parts = [
        op.proxy_nca_backward(grad, *given, combined, saved, *options)
        for given, _, _, saved in shards
    ]
    d_samples, d_loc, d_kappa, d_temperature = zip(*parts, strict=True)
    found = sum(d_samples), torch.cat(d_loc), torch.cat(d_kappa), sum(d_temperature)
    for part, all_at_once in zip(found, whole, strict=True):
        assert relative(part, all_at_once) <= 1e-6


def test_bad_values_raise_or_give_nan_for_their_image_only(backend):
    device = device_of(backend)
    batch = make_batch(3, 6, 20, 16, 0.1).on(device)
    good = losses(batch, backend)
    known = [0, 1, 2, 4, 5]

    bad_label = batch.labels.clone()
    bad_label[3] = 20
    bad_sample = batch.samples.clone()
    bad_sample[1, 3, 2] = math.nan
    for bad in (batch._replace(labels=bad_label), batch._replace(samples=bad_sample)):
        with pytest.raises(ValueError, match=r"labels must be in 0 .. 19|samples must be finite"):
            losses(bad, backend, validate=True)
        x = bad.samples.clone().requires_grad_()
        got = losses(bad._replace(samples=x), backend, validate=False)
        assert got[3].isnan()
        assert torch.equal(got[known], good[known])
        (d_x,) = torch.autograd.grad(got.sum(), x)
        assert d_x[:, 3].isnan().any()
        assert d_x[:, known].isfinite().all()
    for T in (0.0, -0.1, math.nan):
        temperature = torch.tensor(T, device=device)
        with pytest.raises(ValueError, match="temperature must be positive and finite"):
            losses(batch._replace(temperature=temperature), backend, validate=True)
        bad = batch._replace(temperature=temperature)
        assert losses(bad, backend, validate=False).isnan().all()
        assert kernels(bad, backend, validate=False).isnan().all()
    negative = batch.concentration.clone()
    negative[4, 3] = -1
    with pytest.raises(ValueError, match=r"concentration must be positive and finite; got -1.0"):
        losses(batch._replace(concentration=negative), backend, validate=True)
    assert losses(batch._replace(concentration=negative), backend, validate=False).isnan().all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"samples": torch.ones(3, 16)}, ValueError, r"samples must have shape \[N, B, D\]"),
        ({"samples": torch.ones(0, 6, 16)}, ValueError, "N >= 1"),
        ({"loc": torch.ones(20, 15)}, ValueError, r"loc must have shape \[P, D\] with D = 16"),
        ({"loc": torch.ones(0, 16)}, ValueError, "P = 0"),
        ({"concentration": torch.ones(16)}, ValueError, "concentration must have shape"),
        ({"labels": torch.zeros(5, dtype=torch.int64)}, ValueError, "labels must have shape"),
        ({"labels": torch.zeros(6)}, TypeError, "labels must be a torch.int64 tensor"),
        ({"temperature": torch.ones(1)}, ValueError, "temperature must have shape"),
        ({"temperature": True}, TypeError, "temperature must be a number"),
        ({"samples": torch.ones(3, 6, 16, dtype=torch.int64)}, TypeError, "floating type"),
        ({"loc": torch.ones(20, 16, device="meta")}, ValueError, "on one device"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_computed_is_refused(change, error, message):
    batch = make_batch(3, 6, 20, 16, 0.1)._replace(**change)
    with pytest.raises(error, match=message):
        losses(batch, "auto")
    x, loc, kappa, temperature, labels = batch
    with pytest.raises(error, match=message):
        proxy_nca_shard(x, loc, kappa, labels, temperature, combine=lambda partial: partial)


def test_what_is_not_kept_is_computed_again():
    if not nivmf_fast.backends()["cpu"].usable:
        pytest.skip(f"backend cpu: {nivmf_fast.backends()['cpu'].reason}")
    batch = make_batch(5, 16, 300, 32, 0.1)
    given, op = (*batch[:3], batch.labels, batch.temperature), torch.ops.nivmf_kernels
    results = []
    for keep in (True, False):
        options = Options(True, True, 0, 1 << 26, keep)
        values, partial, saved = op.proxy_nca(*given, *options)
        gradients = op.proxy_nca_backward(torch.ones(16), *given, partial, saved, *options)
        results.append((saved.shape, (values, partial, *gradients)))
    (kept, with_scores), (least, without) = results
    assert least == (3, 16) and kept == (3, 16 + 2 * 5 * 16 * 128)
    assert all(map(torch.equal, with_scores, without))


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_saved_tensors_have_the_shape_of_the_fake_kernels(name):
    library = _backends.BACKENDS[name].library
    if not library.usable:
        pytest.skip(f"backend {name}: {library.reason}")
    shape_of = getattr(torch.ops.nivmf_kernels, f"proxy_nca_saved_{name}")
    sizes = [(1, 1, 1, 2), (5, 16, 37, 24), (3, 7, 128, 8), (5, 64, 1003, 128), (2, 0, 5, 3)]
    for shape, dtype in itertools.product(sizes, (torch.float32, torch.float64)):
        N, B, P, D = shape
        double, samples = dtype == torch.float64, torch.empty(N, B, D, dtype=dtype)
        for workspace, keep in itertools.product((0, 1 << 14, 1 << 22, 1 << 26), (True, False)):
            options = Options(True, True, 0, workspace, keep)
            expected = shape_of(*shape, double, *options)
            if name == "cuda":
                assert expected[0] == 1
                continue
            given = samples, *(torch.ones(P, D, dtype=dtype) for _ in range(2))
            labels, temperature = torch.zeros(B, dtype=torch.int64), torch.ones((), dtype=dtype)
            saved = torch.ops.nivmf_kernels.proxy_nca(*given, labels, temperature, *options)[2]
            assert list(saved.shape) == expected
            symbolic = _backends.Cpu.saved_shape(N, B, P, samples.element_size(), options)
            assert list(symbolic) == expected


def test_another_batch_size_compiles_no_third_graph():
    if not nivmf_fast.backends()["cpu"].usable:
        pytest.skip(f"backend cpu: {nivmf_fast.backends()['cpu'].reason}")
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(lambda *args: losses(Batch(*args), "cpu"), backend=count)
    for B in (16, 17, 19, 23):
        batch = make_batch(5, B, 37, 24, 0.1)
        assert torch.equal(compiled(*batch), losses(batch, "cpu"))
    assert len(graphs) <= 2  # one for 16, one for any size


def test_kernel_ops_check_what_they_are_given():
    if not nivmf_fast.backends()["cpu"].usable:
        pytest.skip(f"backend cpu: {nivmf_fast.backends()['cpu'].reason}")
    batch = make_batch(3, 6, 20, 16, 0.1)
    op, options = torch.ops.nivmf_kernels.proxy_nca, (True, True, 0, 1 << 20, True)
    x, loc, kappa, T, labels = batch
    with pytest.raises(RuntimeError, match=r"labels is Int \[6\], expected Long \[6\]"):
        op(x, loc, kappa, labels.int(), T, *options)
    for changed, message in (
        (
            (True, True, 2, 1 << 20, True),
            "precision is 2, expected 0 to 1, an index into PRECISIONS",
        ),
        ((True, True, -1, 1 << 20, True), "precision is -1"),
        ((True, True, 0, -1, True), "workspace is -1 bytes, expected at least 0"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(x, loc, kappa, labels, T, *changed)
    with pytest.raises(RuntimeError, match="concentration is Double"):
        op(x, loc, kappa.double(), labels, T, *options)
    with pytest.raises(RuntimeError, match="samples is not contiguous"):
        op(x.transpose(0, 1).contiguous().transpose(0, 1), loc, kappa, labels, T, *options)


def test_a_second_derivative_is_refused(backend):
    batch = make_batch(2, 3, 4, 5, 0.1).on(device_of(backend))
    x = batch.samples.clone().requires_grad_()
    for function in (losses, kernels):
        value = function(batch._replace(samples=x), backend)
        (grad,) = torch.autograd.grad(value.sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="can be differentiated once"):
            grad.sum().backward()


def test_half_precision_strides_autocast_and_empty_batches(backend):
    device = device_of(backend)
    batch = make_batch(3, 6, 20, 16, 0.1).on(device)
    want = losses(batch, backend)
    strided = Batch(
        batch.samples.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        batch.loc.T.contiguous().T,
        batch.concentration.repeat(1, 2)[:, :16],
        *batch[3:],
    )
    with torch.autocast(device, dtype=torch.bfloat16):
        assert torch.equal(losses(strided, backend), want)
    half = batch.to(torch.bfloat16)
    rounded = losses(half.to(torch.float32), backend)
    assert torch.equal(losses(half, backend), rounded)
    empty = batch._replace(samples=batch.samples[:, :0], labels=batch.labels[:0])
    tensors = [t.clone().requires_grad_() for t in empty[:4]]
    given = Batch(*tensors, empty.labels)
    assert losses(given, backend).shape == (0,)
    assert kernels(given, backend).shape == (0, 20)
    (losses(given, backend).sum() + kernels(given, backend).sum()).backward()
    assert all(bool((t.grad == 0).all()) for t in tensors)


def test_constants_are_added_once_and_temperature_outside_is_its_own_formula(backend):
    batch = make_batch(4, 5, 7, 8, 0.2, dtype=torch.float64).on(device_of(backend))
    for outside in (False, True):
        full = nivmf_fast.log_ppk(*batch[:4], temperature_outside=outside, backend=backend)
        bare = kernels(batch, backend, temperature_outside=outside)
        log_p = nivmf_fast.log_ppk(
            batch.samples.flatten(0, 1)[None], *batch[1:3], backend=backend
        ).view(4, 5, 7)
        inner, outer = (1, 0.2) if outside else (0.2, 1)
        direct = (torch.logsumexp(log_p / inner, 0) - math.log(4)) / outer
        torch.testing.assert_close(full, direct, rtol=1e-9, atol=1e-9)
        difference = full - bare
        torch.testing.assert_close(difference, difference[:1, :1].expand(5, 7))
        got = losses(batch, backend, temperature_outside=outside)
        want = torch.nn.functional.cross_entropy(direct, batch.labels, reduction="none")
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)


MEMORY = """
import sys, torch, nivmf_fast
def status(name):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
def step(N, B, P, D):
    g = torch.Generator().manual_seed(0)
    make = lambda *s: torch.nn.functional.normalize(torch.randn(*s, generator=g), dim=-1)
    tensors = make(N, B, D), make(P, D), torch.full((P, D), 20.0), torch.tensor(0.1)
    tensors = [t.requires_grad_() for t in tensors]
    labels = torch.arange(B)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = status("VmRSS")
    nivmf_fast.proxy_nca(*tensors[:3], labels, tensors[3],
                         backend=sys.argv[1]).sum().backward()
    gradients = sum(t.grad.numel() * 4 for t in tensors)
    return status("VmHWM") - before - gradients
step(5, 64, 100, 64)
print(step(5, 64, 50_000, 64))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_step_over_fifty_thousand_proxies_takes_64_megabytes():
    if not nivmf_fast.backends()["cpu"].usable:
        pytest.skip(f"backend cpu: {nivmf_fast.backends()['cpu'].reason}")
    command = [sys.executable, "-c", MEMORY, "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 0 < int(done.stdout) <= 64e6
