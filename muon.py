"""Muon: orthogonalized momentum for the matrices, AdamW for the rest (--optimizer muon).

Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/: the momentum of a matrix is replaced by the nearest
(semi-)orthogonal matrix, so that every direction of the weights moves at the same rate, not only the few that dominate the
gradient.
"""

import torch

# Of the quintic Newton-Schulz iteration: Jordan's, steep at 0, which brings singular values to about 0.7 ... 1.2.
A, B, C = 3.4445, -4.7750, 2.0315
NEWTON_SCHULZ_STEPS = 5


def orthogonalize(m):
    """The orthogonal factor U V^T of m = U S V^T, roughly: (rows, columns) -> the same, bfloat16.

    Singular values become 0.7 to 1.2, smaller where they were below a hundredth of the norm of m.
    """
    x = m.bfloat16()
    if tall := len(m) > len(m[0]):
        x = x.T
    x = x / (x.norm() + 1e-7)  # the iteration needs singular values of at most 1
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.T
        x = A * x + (B * gram + C * gram @ gram) @ x
    return x.T if tall else x


class Muon(torch.optim.AdamW):
    """AdamW in which parameters of two and more dimensions take orthogonalized steps; a kernel is a matrix (out, in * k * k).

    Nesterov momentum of `momentum`. A step's root mean square is 0.2 * scale * lr, that of a typical AdamW step being
    0.2 * lr (Liu et al. 2025, arXiv 2502.16982), so that one learning rate and weight decay serve both kinds.
    """

    def __init__(self, params, lr, betas, weight_decay, fused=None, momentum=0.95, scale=2.0):
        super().__init__(params, lr, betas, weight_decay=weight_decay, fused=fused)
        self.momentum, self.scale = momentum, scale

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim >= 2 and p.grad is not None:
                    self.orthogonal_step(p, group["lr"], group["weight_decay"])
                    p.grad = None  # AdamW passes over it
        return super().step(closure)

    def orthogonal_step(self, p, lr, weight_decay):
        if not self.state[p]:
            self.state[p].update(step=torch.tensor(0.0), momentum=torch.zeros_like(p))  # AdamW looks for a step in each
        momentum = self.state[p]["momentum"]
        momentum.lerp_(p.grad, 1 - self.momentum)
        direction = orthogonalize(p.grad.lerp(momentum, self.momentum).flatten(1))
        rms = 0.2 * self.scale * max(direction.shape) ** 0.5  # times 1 / sqrt(columns), an orthogonal matrix's own
        p.mul_(1 - lr * weight_decay).add_(direction.view_as(p), alpha=-lr * rms)
