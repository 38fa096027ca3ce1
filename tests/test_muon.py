"""Muon against the singular value decomposition and against PyTorch's own Muon and AdamW."""

import pytest
import torch

from support import muon

JORDAN = ((3.4445, -4.7750, 2.0315),) * 5  # what PyTorch's Muon uses


def after_polynomials(s):
    """What becomes of the singular values s (..., n) of a matrix."""
    s = s / (1.02 * s.square().sum(dim=-1, keepdim=True).sqrt())
    for a, b, c in muon.POLYNOMIALS:
        s = a * s + b * s**3 + c * s**5
    return s


@pytest.mark.parametrize("shape", [(1, 64, 576), (1, 128, 27), (1, 50, 50), (3, 20, 30)])
def test_orthogonalize_keeps_directions_and_changes_sizes_as_the_polynomials_say(shape):
    m = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, s, vh = torch.linalg.svd(m, full_matrices=False)
    norm = s.square().sum(dim=-1, keepdim=True).sqrt()
    sizes = after_polynomials(s)
    expected = u @ sizes.diag_embed() @ vh
    assert (muon.orthogonalize(m) - expected).norm() < 1e-6 * expected.norm()
    rough = muon.orthogonalize(m.bfloat16())
    assert rough.dtype == torch.bfloat16
    assert (rough - expected).norm() < 0.1 * expected.norm()  # the first polynomial magnifies its rounding
    assert sizes[s > 0.02 * norm].min() > 0.1 and sizes.max() < 1.9


def test_a_step_is_that_of_pytorchs_muon_on_matrices_and_of_adamw_on_the_rest(monkeypatch):
    monkeypatch.setattr(muon, "POLYNOMIALS", JORDAN)
    monkeypatch.setattr(muon, "SCALE", 1.0)
    random = torch.Generator().manual_seed(0)
    kernel, matrix, bias = (torch.randn(s, generator=random) for s in ((16, 8, 3, 3), (12, 20), (16,)))
    ours = [torch.nn.Parameter(p.clone()) for p in (kernel, matrix, bias)]
    theirs = [torch.nn.Parameter(p.clone()) for p in (kernel.flatten(1), matrix, bias)]
    optimizer = muon.Muon(ours, 1e-2, (0.9, 0.99), weight_decay=0.1)
    references = (
        torch.optim.Muon(theirs[:2], 1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(theirs[2:], 1e-2, (0.9, 0.99), weight_decay=0.1),
    )
    for _ in range(5):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn(a.shape, generator=random)
            b.grad = a.grad.view(b.shape).clone()
        for each in (optimizer, *references):
            each.step()
    for a, b, start in zip(ours, theirs, (kernel, matrix, bias)):
        assert (a - start).norm() > 0.01
        # Both round to bfloat16, in another order, and the iteration is steep.
        assert (a.view(b.shape) - b).norm() < 0.05 * (a - start).norm()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(64, 32), (32, 64), (16, 8, 3, 3)])
def test_a_step_has_the_documented_size(shape, precision):
    g = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    p = torch.nn.Parameter(torch.zeros_like(g))
    p.grad = g.clone()
    muon.Muon([p], 1e-2, (0.9, 0.99), weight_decay=0.0, precision=precision).step()
    u, s, vh = torch.linalg.svd(g.flatten(1), full_matrices=False)
    sizes = after_polynomials(s)
    about_1 = sizes.square().mean().sqrt().item()
    assert 1 < about_1 < 1.4
    assert p.square().mean().sqrt().item() == pytest.approx(1e-2 * 0.2 * 2 * about_1, rel=0.02)
    expected = -1e-2 * 0.2 * 2 * max(u.shape[0], vh.shape[1]) ** 0.5 * (u @ sizes.diag() @ vh)
    assert (p.flatten(1) - expected).norm() < 0.05 * expected.norm()
