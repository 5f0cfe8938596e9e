"""FID's network and the metrics against torch-fidelity and pytorch-fid."""

import contextlib
import sys
import types

import jax
import numpy as np
import pytest
import safetensors.numpy
from messages import raises

torch = pytest.importorskip("torch", reason="parity with PyTorch: pip install -e '.[parity]'")

from ddim_jax.data.sources import ArraySource  # noqa: E402
from ddim_jax.evaluation import features as features_lib  # noqa: E402
from ddim_jax.evaluation import frechet, inception, metrics  # noqa: E402
from ddim_jax.utils.errors import CheckpointError  # noqa: E402

TORCHVISION = ("", ".transforms", ".transforms.functional", ".datasets", ".models")


class Any_(type):
    """The type of a class whose attributes are classes of this type."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Any_(name, (), {})


@contextlib.contextmanager
def torchvision_or_nothing():
    """A torchvision of empty classes, unless there is one for this PyTorch. Both packages import it, and the tests do
    not use it.
    """
    try:
        import torchvision  # noqa: F401

        yield
        return
    except (ImportError, RuntimeError):
        pass
    forget = lambda: [sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "torchvision"]
    forget()
    for suffix in TORCHVISION:
        module = types.ModuleType(f"torchvision{suffix}")
        module.__path__, module.__getattr__ = [], lambda name: Any_(name, (), {})
        sys.modules[module.__name__] = module
        parent, _, name = module.__name__.rpartition(".")
        if parent:
            setattr(sys.modules[parent], name, module)
    try:
        yield
    finally:
        forget()


with torchvision_or_nothing():
    reason = "parity with torch-fidelity: pip install --no-deps torch-fidelity pytorch-fid"
    fidelity = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3", reason=reason)
    fid_score = pytest.importorskip("pytorch_fid.fid_score", reason=reason)
    from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """(torch-fidelity's network, the file of its random weights)"""
    path = tmp_path_factory.mktemp("weights") / "random.pth"
    generator = torch.Generator().manual_seed(0)
    make = fidelity.FeatureExtractorInceptionV3
    state = {}

    def random(state_dict):  # random weights instead of those that its constructor loads
        for name, tensor in state_dict.items():
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("conv.weight"):
                state[name] = noise * (2 / tensor[0].numel()) ** 0.5
            elif name.endswith("running_var"):
                state[name] = 0.5 + noise.abs()
            elif name.endswith("num_batches_tracked"):
                state[name] = tensor
            else:
                state[name] = 0.1 * noise + (1 if name.endswith("bn.weight") else 0)
        return state

    class Empty(make):
        def load_state_dict(self, state_dict, **kwargs):
            return torch.nn.Module.load_state_dict(self, random(torch.nn.Module.state_dict(self)))

    torch.save({}, path)
    net = Empty("inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path))
    torch.save(state, path)
    return net, path


def difference(output, reference):
    return float(np.abs(np.asarray(output) - reference).max() / np.abs(reference).max())


@pytest.mark.parametrize("size", [32, 299])
def test_features_and_logits_equal_those_of_torch_fidelity(published, size):
    net, path = published
    params = inception.load(path)
    images = np.random.default_rng(size).integers(0, 256, (2, size, size, 3), dtype=np.uint8)
    features, logits = (leaf.numpy() for leaf in net(torch.tensor(images.transpose(0, 3, 1, 2))))
    output = jax.jit(inception.apply)(params, images)
    assert difference(output.features, features) < 1e-4
    assert difference(output.logits, logits) < 1e-4


@pytest.mark.slow
def test_extract_equals_torch_fidelity(published, mesh):
    """With an incomplete last batch, and grey images as RGB."""
    net, path = published
    grey = np.random.default_rng(0).integers(0, 256, (5, 28, 28, 1), dtype=np.uint8)
    found = features_lib.extract(inception.open_network(str(path)), ArraySource(grey), mesh, 2, ("features", "logits"))
    images = torch.tensor(np.broadcast_to(grey, (5, 28, 28, 3)).transpose(0, 3, 1, 2).copy())
    features, logits = (leaf.numpy() for leaf in net(images))
    assert difference(found.features, features) < 1e-4 and difference(found.logits, logits) < 1e-4
    statistics = metric_fid.fid_features_to_statistics(torch.tensor(features, dtype=torch.float64))
    assert difference(found.moments.mean, statistics["mu"]) < 1e-4
    assert difference(found.moments.cov, statistics["sigma"]) < 1e-3  # of 5 images: differences of large numbers


def test_weights_as_safetensors(published, tmp_path):
    _, path = published
    state = {name: tensor.numpy() for name, tensor in torch.load(path, weights_only=True).items()}
    safetensors.numpy.save_file(state, tmp_path / "w.safetensors")
    jax.tree.map(np.testing.assert_array_equal, inception.load(tmp_path / "w.safetensors"), inception.load(path))
    state["Mixed_6e.branch_pool.bn.bias"] = np.ones(191, np.float32)
    safetensors.numpy.save_file(state, tmp_path / "shape.safetensors")
    del state["Mixed_6e.branch_pool.bn.bias"]
    safetensors.numpy.save_file(state, tmp_path / "missing.safetensors")
    for name, words in [("shape", ("(191,)", "(192,)")), ("missing", ())]:
        with raises(CheckpointError, f"{name}.safetensors", "Mixed_6e.branch_pool.bn.bias", *words):
            inception.load(tmp_path / f"{name}.safetensors")


@pytest.fixture(scope="module")
def sets():
    """Features of two sets of images that differ slightly, with more images than dimensions."""
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(16, 16)) / 4
    return [
        (rng.normal(size=(n, 16)) @ mix + shift + 0.1 * rng.exponential(size=(n, 16))).astype(np.float32)
        for n, shift in ((400, 0), (300, 0.2))
    ]


def test_fid_equals_both_packages(sets):
    a, b = (frechet.moments(features) for features in sets)
    found = frechet.distance(a, b)
    expected = metric_fid.fid_statistics_to_metric(
        {"mu": a.mean, "sigma": a.cov}, {"mu": b.mean, "sigma": b.cov}, verbose=False
    )["frechet_inception_distance"]
    assert found == pytest.approx(expected, rel=1e-6)
    assert found == pytest.approx(fid_score.calculate_frechet_distance(a.mean, a.cov, b.mean, b.cov), rel=1e-6)
    of_features = metric_fid.fid_features_to_statistics(torch.tensor(sets[0], dtype=torch.float64))
    np.testing.assert_allclose(a.cov, of_features["sigma"], rtol=1e-9)


def test_kid_equals_torch_fidelity(sets):
    """For whole sets, without random subsets."""
    a, b = (torch.tensor(features[:300], dtype=torch.float64) for features in sets)
    expected = metric_kid.kid_features_to_metric(a, b, kid_subsets=1, kid_subset_size=300, verbose=False)
    found = metrics.kid(a.numpy(), b.numpy(), subset_size=300, num_subsets=1)
    assert found.mean == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-6) and found.std == 0


def test_the_inception_score_equals_torch_fidelity(sets):
    logits = 3 * sets[0]
    expected = metric_isc.isc_features_to_metric(torch.tensor(logits), splits=7, shuffle=False)
    found = metrics.inception_score(logits, splits=7)
    assert found.mean == pytest.approx(expected["inception_score_mean"], rel=1e-6)
    assert found.std == pytest.approx(expected["inception_score_std"], rel=1e-5)


def test_precision_and_recall_equal_torch_fidelity(sets):
    a, b = (torch.tensor(features, dtype=torch.float64) for features in sets)
    precision, recall = metric_prc.calculate_precision_recall_full(a, b, 3)
    found = metrics.precision_recall(a.numpy(), b.numpy())
    assert 0.05 < precision < 0.99 and 0.05 < recall < 0.99
    assert (found.precision, found.recall) == pytest.approx((precision, recall), abs=1e-6)
