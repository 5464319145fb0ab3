"""Hadamard matrices and rotations are orthogonal, fast ones equal dense ones, and they spread outliers."""

from __future__ import annotations

import pytest
import torch

from lowbit.calibration.rotation import (
    apply_hadamard,
    apply_online_hadamard,
    has_hadamard,
    make_rotation,
    online_block,
)
from lowbit.calibration.smoothquant import search_smoothing, smooth_scale
from lowbit.scheme import get_scheme

SIZES = (1, 2, 4, 12, 20, 24, 28, 36, 48, 64, 96, 576, 768, 896, 1536, 2560, 3072, 5120, 11008, 14336)


@pytest.mark.parametrize("n", [s for s in SIZES if s <= 1536])
def test_hadamard_is_orthogonal_with_entries_of_one_size(n):
    h = apply_hadamard(torch.eye(n, dtype=torch.float64))
    assert torch.allclose(h @ h.t(), torch.eye(n, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(h.abs(), torch.full_like(h, n**-0.5), atol=1e-12)


def test_the_sizes_of_common_models_have_one():
    assert all(has_hadamard(n) for n in SIZES)
    assert not has_hadamard(17)
    with pytest.raises(ValueError, match="17"):
        apply_hadamard(torch.zeros(17))


@pytest.mark.parametrize("kind", ["hadamard", "orthogonal"])
@pytest.mark.parametrize("n", [48, 30])
def test_rotations_keep_products_and_spread_outliers(kind, n):
    rotation = make_rotation(n, kind, seed=1)
    q = rotation.dense()
    assert torch.allclose(q @ q.t(), torch.eye(n, dtype=torch.float64), atol=1e-12)
    assert torch.equal(q, make_rotation(n, kind, seed=1).dense())
    assert not torch.equal(q, make_rotation(n, kind, seed=2).dense())
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(20, n, generator=g).double(), torch.randn(8, n, generator=g).double()
    assert torch.allclose(rotation.apply(x) @ rotation.apply(w).t(), x @ w.t(), atol=1e-10)
    out = torch.randn(n, 5, generator=g).double()
    assert torch.allclose(rotation.apply_output(out), q.t() @ out, atol=1e-10)
    x[:, 3] *= 100
    spread = rotation.apply(x)
    assert (spread.abs().amax(1) / spread.norm(dim=1)).mean() < 0.7 * (x.abs().amax(1) / x.norm(dim=1)).mean()


def test_smoothing_search_beats_no_smoothing_on_outliers_and_never_loses():
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(256, 64, generator=g), torch.randn(48, 64, generator=g) * 0.1
    scheme = get_scheme("int8")
    calm = search_smoothing(x, x.abs().amax(0), [w], scheme.weights, scheme.activations)
    assert calm.error <= calm.plain_error
    x[:, 5] *= 60
    found = search_smoothing(x, x.abs().amax(0), [w[:20], w[20:]], scheme.weights, scheme.activations)
    assert found.alpha is not None and found.error < 0.3 * found.plain_error
    assert float(found.scale[5] / found.scale.median()) > 4
    dead = smooth_scale(torch.tensor([0.0, 2.0]), torch.tensor([1.0, 0.5]), 0.5)
    assert torch.allclose(dead, torch.ones(2))


def test_inputs_are_rotated_online_in_blocks_of_a_power_of_two():
    assert [online_block(n) for n in (96, 1536, 4096, 11008)] == [32, 512, 4096, 256]
    block = apply_hadamard(torch.eye(32, dtype=torch.float64))
    x = torch.randn(5, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wanted = x @ torch.block_diag(block, block, block)
    assert torch.allclose(apply_online_hadamard(x), wanted, atol=1e-12)


def test_orthogonal_rotations_are_drawn_evenly():
    """Q of QR is Haar-distributed where R's diagonal is positive (Mezzadri, math-ph/0609050)."""
    gaussian = torch.randn(24, 24, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    r = make_rotation(24, "orthogonal", 3).matrix.t() @ gaussian
    assert (r.diagonal() > 0).all() and torch.allclose(r.tril(-1), torch.zeros(24, 24).double(), atol=1e-12)
