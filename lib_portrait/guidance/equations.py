"""RB-Guidance as it is printed (OmniPortrait, section 3.3, eq. 6 to 11), as plain functions.

Notation: h x w positions, C channels of the decoder features D, n points of the references inside M_ref, m positions of
the generated picture inside M_gen, z_t (c, H, W) the latent.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Distances held at once in eq. 7: 64 MiB in single precision.
BLOCK = 2**24


# ------------------------------------------------------------------------------------------- where the face is, eq. 6


def norm(attention: Tensor) -> Tensor:
    """Min-max normalisation to [0, 1], over all positions; zero where all are equal."""
    low, high = attention.min(), attention.max()
    return (attention - low) / (high - low).clamp(min=torch.finfo(attention.dtype).tiny)


def refined(attention: Tensor, self_attention: Tensor, rounds: int = 3, power: float = 2.0) -> Tensor:
    """Eq. 6, normalised: (h, w) in [0, 1].

    attention (h, w): A^c(m), the cross-attention to one token. self_attention (h * w, h * w): A_s, whose rows sum to 1.
    rounds: gamma. power: alpha. A_s times the map takes each position's mean over those that it attends to, which
    lowers the peaks; beta is a share of the highest one, so the product is normalised once more than it is printed.
    """
    for _ in range(rounds):
        attention = norm(attention) ** power
    return norm((self_attention @ attention.flatten()).reshape(attention.shape))


def region_mask(attention: Tensor, shape: tuple[int, int], threshold: float = 0.5) -> Tensor:
    """M_gen at another size: (h, w) in [0, 1] -> `shape` bool, true above beta."""
    return F.interpolate(attention[None, None], size=shape, mode="bilinear", align_corners=False)[0, 0] > threshold


# ------------------------------------------------------------------------------------------ correspondence, eq. 7 to 9


@torch.no_grad()
def match(reference: Tensor, generated: Tensor, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """Eq. 7: to each reference feature (n, C) the nearest generated one (m, C): number (n) and distance (n).

    Euclidean. As printed the minimum is sought in M_ref; meant is M_gen, to which `generated` belongs. No more than
    `block` distances are held at once, and none of them has a gradient.
    """
    lengths = generated.square().sum(dim=1)
    found = [
        torch.addmm(lengths, part, generated.T, alpha=-2).min(dim=1)
        for part in reference.split(max(block // len(generated), 1))
    ]
    squares = torch.cat([one.values for one in found]) + reference.square().sum(dim=1)
    return torch.cat([one.indices for one in found]), squares.clamp(min=0).sqrt()


def nearest_reference(matched: Tensor, distances: Tensor, owners: Tensor, positions: int) -> Tensor:
    """Which points take part where one identity has several references: (n) bool, all of them where it has one.

    matched, distances: of `match`. owners (n): the number of each point's reference. positions: m. A generated
    position that points of several references are nearest to is compared with the reference that is nearest of all.
    """
    nearest = distances.new_full((positions,), torch.inf).scatter_reduce(0, matched, distances, "amin")
    nobody = int(owners.max()) + 1
    closest = owners.masked_fill(distances > nearest[matched], nobody)
    winner = owners.new_full((positions,), nobody).scatter_reduce(0, matched, closest, "amin")
    return owners == winner[matched]


def similarity(reference: Tensor, generated: Tensor, reduction: str = "sum") -> Tensor:
    """Eq. 8: the sum over pairs of (cos + 1) / 2, or their mean; reference (n, C), generated (n, C) matched to it.

    Eq. 9 multiplies it with M_gen, inside of which every match lies, so that the number is the same: what it says is
    that the gradient is masked, `background_masked`.
    """
    pairs = (F.cosine_similarity(generated, reference, dim=1) + 1) / 2
    return pairs.mean() if reduction == "mean" else pairs.sum()


def centred(reference: Tensor, generated: Tensor) -> tuple[Tensor, Tensor]:
    """Both with each channel centred and scaled as the reference's is: (n, C), (m, C).

    Not in the paper: the features' common mean makes all cosines nearly 1.
    """
    mean, deviation = reference.mean(dim=0), reference.std(dim=0, unbiased=False)
    # A channel that hardly differs over the reference says little, and would be magnified.
    deviation = deviation.clamp(min=max(1e-3 * deviation.mean().item(), 1e-6))
    return (reference - mean) / deviation, (generated - mean) / deviation


# -------------------------------------------------------------------------------------------------- energy, eq. 9 to 11


def energy(similarity: Tensor, strength: float) -> Tensor:
    """Eq. 10: p / (1 + S)."""
    return strength / (1 + similarity)


def background_masked(gradient: Tensor, mask: Tensor) -> Tensor:
    """Eq. 9 ("background gradient masking"): grad E (c, H, W) inside M_gen (H, W), zero outside.

    The printed product of a sum with M_gen would change nothing; the text filters the background's gradients out.
    """
    return gradient * mask.to(gradient.dtype)


def as_share(gradient: Tensor, eps: Tensor, mask: Tensor, share: float) -> Tensor:
    """The gradient (c, H, W) scaled so that inside the mask (H, W) its norm is `share` of eps's. Not in the paper."""
    norm = gradient.norm()
    return gradient if norm == 0 else gradient * (share * background_masked(eps, mask).norm() / norm)


def guides(t: float, begin: float, timesteps: int) -> bool:
    """Eq. 11's condition t <= u T. begin: u. timesteps: T."""
    return t <= begin * timesteps


def guided(predicted: Tensor, gradient: Tensor, alpha: Tensor | float = 1.0) -> Tensor:
    """Eq. 11's addition of grad E, for any row of a picture: eps + grad E, or v + grad E / alpha.

    alpha: sqrt(abar_t) of a model that predicts v = (eps - sigma z_t) / alpha; 1 for one that predicts eps. With the
    same gradient in all rows, eps_uncond + w (eps_cond - eps_uncond) has it once, whatever w is.
    """
    return predicted + gradient / alpha


def eps_of(predicted: Tensor, z: Tensor, alpha: Tensor | None) -> Tensor:
    """eps of what a model predicts at z_t: itself, or alpha v + sigma z_t; alpha: sqrt(abar_t), None for eps."""
    return predicted if alpha is None else alpha * predicted + (1 - alpha**2).sqrt() * z


def z0_of(eps: Tensor, z: Tensor, alpha: Tensor) -> Tensor:
    """Eq. 2: (z_t - sqrt(1 - abar_t) eps) / sqrt(abar_t). alpha: sqrt(abar_t)."""
    return (z - (1 - alpha**2).sqrt() * eps) / alpha
