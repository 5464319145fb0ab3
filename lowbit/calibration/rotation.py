"""Orthogonal rotations that spread outliers over all channels, and how they fold into the weights.

A residual stream h may be replaced by h·Q for any orthogonal Q: RMSNorm without a gain
commutes with it, what reads the stream multiplies by W·Q, what writes it by Qᵀ·W (QuaRot,
arXiv:2404.00456, and SpinQuant's R1, arXiv:2405.16406). Heads of v rotate into o_proj the same way (R2). What cannot
be folded is the input of down_proj, behind a product: there the rotation must run online (R4).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor


def _legendre(q: int) -> Tensor:
    """χ(0..q−1) for a prime q: 1 for squares, −1 for the rest, 0 for 0."""
    chi = -torch.ones(q, dtype=torch.float64)
    chi[[(i * i) % q for i in range(1, q)]] = 1.0
    chi[0] = 0.0
    return chi


def _is_prime(q: int) -> bool:
    return q > 1 and all(q % d for d in range(2, math.isqrt(q) + 1))


@cache
def _odd_hadamard(n: int) -> Tensor | None:
    """Hadamard matrix of order n (1, 2 or a multiple of 4) by Paley's constructions; None where they give none."""
    if n in (1, 2):
        return torch.tensor([[1.0]]) if n == 1 else torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    if n % 4:
        return None
    for q, double in ((n - 1, False), (n // 2 - 1, True)):
        if not _is_prime(q) or q % 4 != (1 if double else 3):
            continue
        index = torch.arange(q)
        jacobsthal = _legendre(q)[(index[:, None] - index[None, :]) % q]
        border = torch.ones(q, dtype=torch.float64)
        core = torch.zeros(q + 1, q + 1, dtype=torch.float64)
        core[0, 1:] = border
        core[1:, 0] = border if double else -border
        core[1:, 1:] = jacobsthal
        eye = torch.eye(q + 1, dtype=torch.float64)
        if not double:
            return (eye + core).float()
        plus = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        minus = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return (torch.kron(core, plus) + torch.kron(eye, minus)).float()
    return None


def hadamard_factors(n: int) -> tuple[int, int]:
    """(m, 2^k) with m·2^k = n and a Hadamard matrix of order m known, m as small as possible.

    Raises ValueError when there is none (n odd, or no Paley matrix of a divisor of n).
    """
    power = n & -n
    while power >= 1:
        if _odd_hadamard(n // power) is not None:
            return n // power, power
        power //= 2
    raise ValueError(f"expected a size with a known Hadamard matrix, found {n}")


def has_hadamard(n: int) -> bool:
    try:
        hadamard_factors(n)
    except ValueError:
        return False
    return True


def apply_hadamard(x: Tensor) -> Tensor:
    """x[…, n] @ H/√n with H = H_m ⊗ Sylvester(2^k), without building H. Keeps the dtype."""
    n = x.shape[-1]
    m, power = hadamard_factors(n)
    y = x.reshape(-1, m, power)
    step = 1
    while step < power:
        y = y.reshape(-1, m, power // (2 * step), 2, step)
        y = torch.stack((y[..., 0, :] + y[..., 1, :], y[..., 0, :] - y[..., 1, :]), dim=-2)
        step *= 2
    y = y.reshape(-1, m, power)
    if m > 1:
        small = _odd_hadamard(m)
        assert small is not None  # hadamard_factors found it
        y = torch.einsum("bmp,mn->bnp", y, small.to(y))
    return (y / math.sqrt(n)).reshape(x.shape)


def online_block(n: int) -> int:
    """Size of the blocks in which n inputs are rotated while running: the largest power of two that divides n.

    Power-of-two blocks are what the operator `lowbit::hadamard` and its kernels run, for n = 3 · 512 too.
    """
    return n & -n


def apply_online_hadamard(x: Tensor) -> Tensor:
    """x[…, n] times the orthonormal Hadamard matrix, block by block of `online_block(n)`. Keeps the dtype."""
    return apply_hadamard(x.unflatten(-1, (-1, online_block(x.shape[-1])))).flatten(-2)


@dataclass(frozen=True)
class Rotation:
    """An orthogonal Q of size n: x ↦ x·Q. Random signs and then a Hadamard matrix, or a dense matrix."""

    size: int
    signs: Tensor | None = None
    matrix: Tensor | None = None

    def apply(self, x: Tensor) -> Tensor:
        """x[…, n] → x·Q, in the dtype of x."""
        if self.matrix is not None:
            return x @ self.matrix.to(x)
        assert self.signs is not None
        return apply_hadamard(x * self.signs.to(x))

    def apply_output(self, weight: Tensor) -> Tensor:
        """W [n, K] (or a bias [n]) → Qᵀ·W: what the module writes is then rotated."""
        return self.apply(weight.transpose(0, -1)).transpose(0, -1).contiguous()

    def dense(self, dtype: torch.dtype = torch.float64) -> Tensor:
        return self.apply(torch.eye(self.size, dtype=dtype))


def make_rotation(size: int, kind: str, seed: int) -> Rotation:
    """A random rotation: `hadamard` (random signs, then H/√n) or `orthogonal` (Haar-distributed).

    A size without a known Hadamard matrix gets an orthogonal one.
    """
    generator = torch.Generator().manual_seed(seed)
    if kind == "hadamard" and has_hadamard(size):
        signs = torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1
        return Rotation(size, signs=signs)
    if kind in ("hadamard", "orthogonal"):
        gaussian = torch.randn(size, size, generator=generator, dtype=torch.float64)
        q, r = torch.linalg.qr(gaussian)
        return Rotation(size, matrix=q * r.diagonal().sign())
    raise ValueError(f"expected rotation hadamard or orthogonal, found {kind!r}")
