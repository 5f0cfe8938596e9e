import dataclasses
import hashlib
import http.server
import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import meshes
from jax.tree_util import Partial
from messages import missing, raises
from scipy import linalg

from ddim_jax import data
from ddim_jax.evaluation import classifier, digits_classifier, frechet, inception, metrics, reference
from ddim_jax.evaluation import features as features_lib
from ddim_jax.evaluation import metrics as metrics_lib
from ddim_jax.evaluation.feature_network import Output, feature_network
from ddim_jax.utils import download
from ddim_jax.utils.errors import CheckpointError

RNG = np.random.default_rng(0)


def test_frechet_distance_of_known_gaussians():
    """In one dimension it is (m - m')^2 + (s - s')^2. For commuting covariances it is the sum over the axes."""
    a = frechet.Moments(np.array([1.0, 2.0]), np.diag([4.0, 9.0]))
    b = frechet.Moments(np.array([0.0, 4.0]), np.diag([1.0, 25.0]))
    assert frechet.distance(a, b) == pytest.approx(1 + 4 + (2 - 1) ** 2 + (3 - 5) ** 2)
    assert frechet.distance(a, a) == pytest.approx(0, abs=1e-12)


def test_frechet_distance_with_the_matrix_root_of_scipy():
    a, b = (frechet.moments(RNG.normal(size=(200, 6)) @ RNG.normal(size=(6, 6)) + shift) for shift in (0, 0.5))
    expected = np.sum((a.mean - b.mean) ** 2) + np.trace(a.cov + b.cov - 2 * linalg.sqrtm(a.cov @ b.cov).real)
    assert frechet.distance(a, b) == pytest.approx(expected, rel=1e-8)


def test_frechet_distance_of_singular_covariances():
    """Three points in five dimensions: the covariances have no full rank, and the distance is finite."""
    a, b = frechet.moments(RNG.normal(size=(3, 5))), frechet.moments(RNG.normal(size=(4, 5)))
    assert 0 < frechet.distance(a, b) == pytest.approx(frechet.distance(b, a), rel=1e-12)
    with raises(ValueError, "2", "got 1"):
        frechet.moments(np.zeros((1, 5)))


def test_moments_of_features_in_parts():
    """Far from the origin, where E[x^2] - E[x]^2 would lose all digits."""
    features = RNG.normal(size=(101, 5)) + 1e7
    parts = [frechet.scatter(features[i : i + 7]) for i in range(0, 101, 7)]
    total = parts[0]
    for part in parts[1:]:
        total = frechet.merged(total, part)
    found = frechet.moments(total)
    np.testing.assert_allclose(found.mean, features.mean(0), rtol=1e-15)
    np.testing.assert_allclose(found.cov, np.cov(features, rowvar=False), rtol=1e-7, atol=1e-8)
    with raises(ValueError, "2", "got 1"):
        frechet.moments(frechet.scatter(features[:1]))
    with raises(ValueError, "features", "1"):
        frechet.scatter(features[:0])


def test_kid_is_a_difference_of_moments():
    """In one dimension (x y + 1)^3 is sum_k C(3, k) x^k y^k, so MMD^2 = sum_k C(3, k) (E a^k - E b^k)^2. The unbiased
    estimate excludes the pairs of a point with itself.
    """
    a, b = np.array([0.5, 1.0, -1.0, 2.0]), np.array([0.0, 0.3, 1.5, 1.0])
    expected = 0.0
    for k, binomial in enumerate([1, 3, 3, 1]):
        pairs = lambda x, k=k: ((x**k).sum() ** 2 - (x ** (2 * k)).sum()) / 12
        expected += binomial * (pairs(a) + pairs(b) - 2 * (a**k).mean() * (b**k).mean())
    kid = metrics.kid(a[:, None], b[:, None], subset_size=4, num_subsets=3)
    assert kid.mean == pytest.approx(expected, rel=1e-12) and kid.std == pytest.approx(0, abs=1e-12)


def test_kid_of_one_distribution_is_zero_without_bias():
    rng = np.random.default_rng(0)
    values = [metrics.kid(*rng.normal(size=(2, 50, 8)), subset_size=50, num_subsets=1).mean for _ in range(300)]
    assert abs(np.mean(values)) < 4 * np.std(values) / 300**0.5
    far = metrics.kid(rng.normal(size=(50, 8)), rng.normal(size=(50, 8)) + 1, subset_size=20, num_subsets=10)
    assert far.mean > 10 * np.std(values) and far.std > 0


def test_the_inception_score_of_certain_and_of_uniform_predictions():
    certain = 100 * np.eye(5)[np.arange(50) % 5]
    assert metrics.inception_score(certain) == pytest.approx((5, 0), abs=1e-9)
    assert metrics.inception_score(np.zeros((20, 5))) == pytest.approx((1, 0), abs=1e-12)
    assert metrics.inception_score(100 * np.eye(5)[np.arange(50) // 10], splits=5) == pytest.approx((1, 0), abs=1e-9)
    half = np.log(np.array([[0.9, 0.1], [0.1, 0.9]]))
    assert metrics.inception_score(half, splits=1).mean == pytest.approx(
        np.exp(np.log(2) + 0.9 * np.log(0.9) + 0.1 * np.log(0.1))
    )


def test_precision_and_recall_by_hand():
    """Real images at 0, 1, 2, 10 with radii 1, 1, 1, 8; samples at 0.5, 2.9, 30, 31 with radii 2.4, 2.4, 1, 1."""
    column = lambda *values: np.array(values)[:, None]
    found = metrics.precision_recall(column(0.5, 2.9, 30, 31), column(0, 1, 2, 10.0), neighbours=1)
    assert found == (0.5, 0.75)
    assert metrics.precision_recall(column(0, 1, 2.0), column(0, 1, 2.0), neighbours=1) == (1, 1)


def test_the_block_size_changes_nothing(monkeypatch):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(37, 4)), rng.normal(size=(23, 4)) + 0.5
    whole = metrics.precision_recall(a, b)
    monkeypatch.setattr(metrics, "BLOCK", 5)
    assert metrics.precision_recall(a, b) == whole


def test_invalid_features_are_refused():
    good, bad = np.ones((5, 3)), np.ones((5, 3))
    bad[3, 1] = np.nan
    with raises(ValueError, "finite", "image 3"):
        metrics.kid(good, bad, subset_size=2)
    with raises(ValueError, "finite", "image 3"):
        frechet.moments(bad)
    with raises(ValueError, "(5, 3)", "(5, 2)"):
        metrics.precision_recall(good, good[:, :2])
    with raises(ValueError, "subset_size", "2..5", "got 1000"):
        metrics.kid(good, good)
    with raises(ValueError, "splits", "1..5", "got 10"):
        metrics.inception_score(good)
    with raises(ValueError, "neighbours", "1..4", "got 5"):
        metrics.precision_recall(good, good, neighbours=5)


def test_resize_is_that_of_tensorflow_1():
    """Output pixel i is input pixel i H / size: the corners are not aligned, and the last pixel repeats."""
    row = np.array([0.0, 10, 20, 40])
    image = np.broadcast_to(row[None, None, :, None], (1, 4, 4, 1)).astype(np.float32)
    out = np.asarray(inception.resize(image, 8))
    np.testing.assert_allclose(out[0, :, :, 0], np.broadcast_to([0, 5, 10, 15, 20, 30, 40, 40], (8, 8)), rtol=1e-6)
    np.testing.assert_allclose(inception.resize(image, 2)[0, 0, :, 0], [0, 20], rtol=1e-6)
    np.testing.assert_array_equal(inception.resize(image, 4), image)


def test_images_of_another_dtype_or_shape_are_refused():
    for images in (np.zeros((1, 8, 8, 3), np.float32), np.zeros((1, 8, 8, 2), np.uint8), np.zeros((8, 8, 3), np.uint8)):
        with raises(ValueError, "images", "uint8", str(images.shape)):
            inception.apply({}, images)


def test_confidence_by_hand():
    found = metrics.confidence(np.log([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.2, 0.7, 0.1]]))
    assert found == pytest.approx(((0.5 + 0.8 + 0.7) / 3, 0, 2 / 3))


def test_nearest_by_hand():
    """The distance is 5 for (0, 0), and 0 for (3, 4)."""
    assert metrics.nearest(np.array([[0.0, 0], [3, 4]]), np.array([[3.0, 4], [60, 80]])) == pytest.approx(2.5)


@pytest.mark.slow
def test_the_accuracy_of_the_shipped_digits_classifier():
    train, held_out = (data.load("digits", split=split) for split in data.SPLITS)
    accuracy = lambda params: (
        np.asarray(digits_classifier.apply(params, held_out.images).logits).argmax(1) == held_out.labels
    ).mean()
    (params,) = digits_classifier.open_network().feature_fn.args
    assert accuracy(params) > 0.98
    assert accuracy(classifier.fit(digits_classifier.Classifier(), train, steps=300)) > 0.95
    with raises(ValueError, "8x8x1", "got 16x16x3"):
        digits_classifier.apply(params, np.zeros((1, 16, 16, 3), np.uint8))


class Counting:
    """A source that records the largest number of images in one read."""

    image_shape, num_classes, crop, jpegs = (8, 8, 1), 0, "none", 0

    def __init__(self, images):
        self.images, self.most = images, 0

    def __len__(self):
        return len(self.images)

    def __getitem__(self, indices):
        self.most = max(self.most, len(indices))
        return data.Batch(self.images[indices], None)


@pytest.mark.parametrize("batch_size", [16, 37, 100])
@pytest.mark.parametrize("devices", [1, 8])
def test_features_do_not_depend_on_the_batch_size_or_the_devices(batch_size, devices):
    """The last batch is not dropped, padding is not counted, and at most one batch is in memory."""
    images = RNG.integers(0, 256, (83, 8, 8, 1), dtype=np.uint8)
    network = features_lib.open_features("digits")
    whole = network.feature_fn(images[:70])
    source = Counting(images)
    found = features_lib.extract(network, source, meshes()[devices > 1], batch_size, ("features", "logits"), count=70)
    assert found.count == 70 and source.most <= -(-min(batch_size, 70) // devices) * devices
    np.testing.assert_allclose(found.features, whole.features, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.logits, whole.logits, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.moments.cov, np.cov(found.features.astype(np.float64), rowvar=False), rtol=1e-9)
    assert features_lib.extract(network, source, meshes()[0], 50).features is None


def own_network(weights):
    """A user's classifier with two features, the mean and the largest pixel."""

    def feature_fn(params, images):
        flat = images.reshape(images.shape[0], -1).astype(jnp.float32)
        features = params["scale"] * jnp.stack([flat.mean(1), flat.max(1)], axis=1)
        return Output(features, features)

    return feature_network("mine", feature_fn, {"scale": np.float32(2)})


def blind_network(weights):
    return own_network(weights)._replace(
        feature_fn=Partial(lambda images: Output(*2 * (jnp.where(images[:, 0, 0, :1] > 250, jnp.nan, 1.0),)))
    )


def test_a_feature_network_of_the_user(tmp_path, monkeypatch, mesh):
    (tmp_path / "my_features.py").write_text(
        "from test_evaluation import own_network as make, blind_network\nnothing = lambda weights: None\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    network = features_lib.open_features("my_features:make")
    source = data.load("digits")
    found = features_lib.extract(network, source, mesh, 100, ("features",))
    expected = 2 * source.images.reshape(len(source), -1).mean(1)
    np.testing.assert_allclose(found.features[:, 0], expected, rtol=1e-5)
    assert len(network.weights) == 64
    pixels = np.zeros((9, 8, 8, 1), np.uint8)
    pixels[7] = 255
    blind = features_lib.open_features("my_features:blind_network")
    with raises(ValueError, "image 7", "finite", "mine"):
        features_lib.extract(blind, data.sources.ArraySource(pixels), mesh, 4)
    for name, words in [
        ("inceptoin", ("'inceptoin'", "'inception'")),
        ("my_features:nope", ("my_features", "nope")),
        ("no_such_module:make", ("no_such_module", "ModuleNotFoundError")),
        ("my_features:nothing", ("my_features:nothing", "FeatureNetwork", "got NoneType")),
    ]:
        with raises(ValueError, *words):
            features_lib.open_features(name)


def test_metrics_name_the_missing_features():
    moments = frechet.moments(RNG.normal(size=(10, 3)))
    bare = features_lib.ImageFeatures(0, moments)
    full = features_lib.ImageFeatures(
        10, moments, RNG.normal(size=(10, 3)), RNG.normal(size=(10, 4)), RNG.integers(0, 4, 10)
    )
    assert metrics_lib.compute(["fid"], full, bare) == {"fid": pytest.approx(0, abs=1e-9)}
    for name in ("kid", "precision_recall", "nearest"):
        with raises(ValueError, name, "features"):
            metrics_lib.compute([name], full, bare)
    numbers = metrics_lib.compute(list(metrics_lib.METRICS), full, full)
    assert numbers["kid_subset_size"] == 10 and numbers["inception_score_splits"] == 10 and numbers["recall"] == 1


def test_agreement_is_the_accuracy_of_the_labels(mesh):
    """It is near 1 for the labels of training images, and near 0 for wrong labels."""
    network, real = features_lib.open_features("digits"), data.load("digits")
    agreement = lambda labels: metrics_lib.compute(
        ["agreement"],
        features_lib.extract(
            network, data.sources.ArraySource(real.images[:200], labels), mesh, 64, {"logits", "labels"}
        ),
        features_lib.ImageFeatures(0, None),
    )["agreement"]
    assert agreement(real.labels[:200]) > 0.97 and agreement((real.labels[:200] + 1) % 10) < 0.03
    with raises(ValueError, "agreement"):
        agreement(None)


def make_reference(**changes):
    """Statistics of random features, with these fields of `About`."""
    network = features_lib.open_features("digits")
    about = reference.about(data.load("digits"), "8x8x1", network, "digits", "train")
    features = RNG.normal(size=(1438, 3)).astype(np.float32)
    image_features = features_lib.ImageFeatures(1438, frechet.moments(features), features)
    return reference.Reference(image_features, dataclasses.replace(about, **changes))


def test_statistics_are_saved_with_their_metadata(tmp_path):
    saved = make_reference()
    reference.save(tmp_path / "a.npz", saved)
    loaded = reference.load(tmp_path / "a.npz")
    assert loaded.about == saved.about
    assert loaded.about.count == 1438 and loaded.about.crop == "none" and len(loaded.about.weights) == 64
    for a, b in zip(jax.tree.leaves(saved.features), jax.tree.leaves(loaded.features), strict=True):
        np.testing.assert_array_equal(a, b)
    with np.load(tmp_path / "a.npz", allow_pickle=False) as file:  # as other programs read them
        assert file["mu"].shape == (3,) and file["sigma"].shape == (3, 3) and file["sigma"].dtype == np.float64


@pytest.mark.parametrize(
    "field, value",
    [
        ("data", "npz other.npz"),
        ("split", "test"),
        ("crop", "centre 128"),
        ("count", 1000),
        ("resolution", "32x32x3"),
        ("resize", "bicubic"),
        ("features", "inception-2015-12-05"),
        ("weights", "0" * 64),
        ("version", 0),
    ],
)
def test_a_difference_in_the_metadata_is_named(field, value):
    about, changed = make_reference().about, make_reference(**{field: value}).about
    message = reference.difference(changed, about)
    assert message.startswith(field) and f"--accept {field}" in message
    assert not missing(message, repr(value), repr(getattr(about, field)))
    assert reference.difference(changed, about, [field]) is None
    assert reference.difference(about, make_reference(**{field: None}).about) is None  # None is not compared


def test_statistics_of_other_programs_and_damaged_ones(tmp_path):
    path = tmp_path / "s.npz"
    np.savez(path, mu=np.zeros(3, np.float32), sigma=np.eye(3))
    found = reference.load(path)
    assert found.about is None and found.features.features is None and found.features.moments.mean.dtype == np.float64
    for arrays, words in [
        ({"mu": np.zeros(3)}, ("mu", "sigma")),
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, ("mu", "(3,)", "sigma", "(4, 4)")),
        ({"mu": np.full(3, np.nan), "sigma": np.eye(3)}, ("mu", "finite")),
        ({"mu": np.array([{}], object), "sigma": np.eye(1)}, ()),
        ({"mu": np.zeros(3), "sigma": np.eye(3), "about": np.array("[]")}, ("about",)),
        ({"mu": np.zeros(3), "sigma": np.eye(3), "about": np.array('{"datum": 1}')}, ("about", "datum")),
    ]:
        np.savez(path, **arrays)
        with raises(ValueError, "s.npz", *words):
            reference.load(path)
    path.write_bytes(path.read_bytes()[:100])
    with raises(ValueError, "s.npz"):
        reference.load(path)


CONTENT = b"weights " * 1000


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A web server on loopback, with files and an empty cache."""
    monkeypatch.setenv("DDIM_JAX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "www").mkdir()
    (tmp_path / "www" / "net.pth").write_bytes(CONTENT)

    class Handler(http.server.SimpleHTTPRequestHandler):
        requests = 0

        def __init__(self, *args):
            super().__init__(*args, directory=str(tmp_path / "www"))

        def do_GET(self):
            Handler.requests += 1
            super().do_GET()

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield types.SimpleNamespace(url=f"http://127.0.0.1:{server.server_port}", handler=Handler, root=tmp_path)
        server.shutdown()


def test_a_file_is_downloaded_once_and_checked(server):
    digest = hashlib.sha256(CONTENT).hexdigest()
    path = download.fetch(f"{server.url}/net.pth", digest, "the weights")
    assert path == server.root / "cache" / "net.pth" and path.read_bytes() == CONTENT
    assert download.fetch(f"{server.url}/net.pth", digest, "the weights") == path and server.handler.requests == 1
    path.write_bytes(CONTENT[:-1])
    with raises(CheckpointError, str(path), digest, "the weights"):
        download.fetch(f"{server.url}/net.pth", digest, "the weights")


def test_a_failed_download_names_the_url_and_the_path(server):
    cache = server.root / "cache"
    with raises(CheckpointError, "the weights", f"{server.url}/net.pth", f"{cache}/net.pth", "0" * 64):
        download.fetch(f"{server.url}/net.pth", "0" * 64, "the weights")
    with raises(CheckpointError, "the weights", f"{server.url}/nope.pth", f"{cache}/nope.pth", "404"):
        download.fetch(f"{server.url}/nope.pth", "0" * 64, "the weights")
    assert list(cache.iterdir()) == []
    with raises(CheckpointError, "http://127.0.0.1:1/net.pth", "refused"):
        download.fetch("http://127.0.0.1:1/net.pth", "0" * 64, "the weights")


def test_missing_inception_weights_are_named(tmp_path, monkeypatch):
    with raises(CheckpointError, "nope.pth", "pt_inception-2015-12-05-6726825d.pth"):
        features_lib.open_features("inception", str(tmp_path / "nope.pth"))
    monkeypatch.setenv("DDIM_JAX_CACHE", str(tmp_path))
    (tmp_path / inception.WEIGHTS).write_bytes(b"something else")
    with raises(CheckpointError, str(tmp_path / inception.WEIGHTS), "SHA-256"):
        features_lib.open_features("inception")
