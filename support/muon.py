"""Muon: orthogonalized momentum for the matrices, AdamW for the rest (--optimizer muon).

Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/: the momentum of a matrix is replaced by the nearest
(semi-)orthogonal matrix, so that every direction of the weights moves at the same rate, not only the few that dominate
the gradient. torch.optim.Muon is for matrices alone: convolution kernels would have to be flattened, and all other
parameters need an optimizer of their own. It also computes in bfloat16 everywhere, even where that is slow.
"""

import collections

import torch

MOMENTUM = 0.95
SCALE = 2.0  # root mean square of a matrix's step over that of a typical AdamW step
# Odd polynomials a x + b x^3 + c x^5, applied one after the other to the singular values: the first three of Polar
# Express (Amsel et al. 2025, arXiv 2505.16932). More, or Jordan's five, bring the values nearer to 1, cost more and
# train no better.
POLYNOMIALS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
)


class Muon(torch.optim.AdamW):
    """AdamW in which parameters of two and more dimensions take orthogonalized steps.

    A kernel is a matrix (out, in * k * k), that of a transposed convolution (in, out * k * k). Nesterov momentum of
    MOMENTUM. A step's root mean square is about 0.2 * SCALE * lr, that of a typical AdamW step being 0.2 * lr (Liu et
    al. 2025, arXiv 2502.16982), so that one learning rate and weight decay serve both kinds. precision: "float32" or
    "bfloat16", in which matrices are orthogonalized.
    """

    def __init__(self, *args, precision="float32", **options):
        super().__init__(*args, **options)
        self.dtype = getattr(torch, precision)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            matrices = [p for p in group["params"] if p.ndim >= 2 and p.grad is not None]
            if matrices:
                self.orthogonal_step(matrices, group["lr"], group["weight_decay"])
        super().step()

    def orthogonal_step(self, matrices, lr, weight_decay):
        gradients, momenta = [p.grad for p in matrices], [self.momentum(p) for p in matrices]
        torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
        steps = unit_steps(torch._foreach_lerp(gradients, momenta, MOMENTUM), self.dtype)
        torch._foreach_mul_(matrices, 1 - lr * weight_decay)
        torch._foreach_add_(matrices, steps, alpha=-lr)
        for p in matrices:
            p.grad = None  # AdamW passes over it

    def momentum(self, p):
        if not self.state[p]:  # step: not used here, but checkpoints have it, as AdamW's have
            self.state[p].update(step=torch.tensor(0.0), momentum=torch.zeros_like(p))
        return self.state[p]["momentum"]


def unit_steps(gradients, dtype):
    """Orthogonalized steps at a learning rate of 1, shaped like `gradients`, which have Nesterov momentum.

    dtype: of the computation.
    """
    same_shape = collections.defaultdict(list)
    steps = [torch.empty_like(gradient) for gradient in gradients]
    for gradient, step in zip(gradients, steps):
        matrix = gradient.flatten(1)
        same_shape[matrix.shape].append((matrix, step))
    for shape, pairs in same_shape.items():
        matrices, places = zip(*pairs)
        rms = 0.2 * SCALE * max(shape) ** 0.5  # times that of an orthogonal matrix, 1 / sqrt(longer side)
        for step, direction in zip(places, orthogonalize(torch.stack(matrices).to(dtype))):
            step.copy_(direction.view_as(step)).mul_(rms)
    return steps


def orthogonalize(x):
    """The orthogonal factors U V^T of matrices x = U S V^T, roughly: (B, rows, columns) -> the same, in their dtype.

    Singular values that are above a hundredth of the norm of x become 0.1 to 1.9.
    """
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (1.02 * x.norm(dim=(-2, -1), keepdim=True) + 1e-7)  # the polynomials grow fast above 1
    for a, b, c in POLYNOMIALS:
        gram = x @ x.mT
        even = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, even, x, beta=a)
    return x.mT if tall else x
