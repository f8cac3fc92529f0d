"""Distillation losses as pure functions of embeddings, and of the tokens of each image.

Embeddings are (batch, dim) float32 of unit length. Row i of student and teacher belongs to the same view. Every loss is
a mean over the batch, at least 0, and smallest where the student's embeddings equal the teacher's.

Tokens are (batch, tokens, width) float32.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_MAX_UPSAMPLING = 4  # tokens of the teacher for one of the student


def cosine_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean of 1 - cos(student, teacher), half the squared distance."""
    return (1 - (student * teacher).sum(dim=1)).mean()


def mse_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean squared distance ("FD" of Yang et al., "CLIP-KD", CVPR 2024).

    It is twice the cosine loss for vectors of unit length. The literature compares by this name.
    """
    return (student - teacher).square().sum(dim=1).mean()


def similarity_kl(
    student: Tensor, teacher: Tensor, bank: Tensor, temperature: float, student_bank: Tensor | None = None
) -> Tensor:
    """Return the KL divergence of softened similarities to a (size, dim) bank of teacher embeddings.

    mean over the batch of KL(softmax(teacher bank^T / T) || softmax(student bank^T / T)): the student
    ranks the bank as the teacher does (Fang et al., "SEED", ICLR 2021, eq. 4-6). A student of another width is compared
    with ``student_bank``, the bank in that width.
    """
    compared = bank if student_bank is None else student_bank
    return _kl_divergence(student @ compared.T / temperature, teacher @ bank.T / temperature)


def affinity_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return the KL divergence of softened similarities to the rest of the batch.

    CLIP-KD's contrastive relations ("CRD") within one modality. The similarity of an image to itself is excluded: it
    is 1 in both and would take most of the softmax.

    Raises:
        ValueError: A batch of fewer than two images has no relations.
    """
    similarities = (_off_diagonal(vectors @ vectors.T) / temperature for vectors in (student, teacher))
    return _kl_divergence(*similarities)


def rkd_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the Huber loss of pairwise distances over their mean.

    Source: Park et al., "RKD", CVPR 2019, 3.2.1.
    """
    return F.smooth_l1_loss(_relative_distances(student), _relative_distances(teacher))


def rkd_angle(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the Huber loss of the cosines of the angles in triples (RKD, 3.2.2).

    It needs batch^3 values of float32: 64 MiB for 256 images.
    """
    return F.smooth_l1_loss(_angle_cosines(student), _angle_cosines(teacher))


def interactive_contrastive(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return the cross-entropy of matching images to teacher embeddings.

    -log(exp(s_i t_i / T) / sum_j exp(s_i t_j / T)), CLIP-KD's "ICL". Its minimum is above 0.
    """
    logits = student @ teacher.T / temperature
    return F.cross_entropy(logits, torch.arange(len(logits), device=logits.device))


def token_similarity(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return the KL divergence of the softened similarities among the tokens of one image.

    mean over images and tokens of KL(softmax(teacher_i teacher^T / T) || softmax(student_i student^T / T)), with tokens
    of unit length: the local loss of lightly-train's ``distillationv3``. Each token is also compared with itself, as
    there. lightly-train projects the student's tokens first; here they are compared in their own width.
    """
    logits = []
    for tokens in (student, teacher):
        unit = F.normalize(tokens, dim=2)
        logits.append((unit @ unit.transpose(1, 2)).flatten(0, 1) / temperature)
    return _kl_divergence(*logits)


def token_feature(student: Tensor, teacher: Tensor) -> Tensor:
    """Return 0.9 (1 - cosine) + 0.1 smooth L1 of tokens of one width, a mean over all tokens.

    Source: Ranzinger et al., "AM-RADIO", CVPR 2024, section 3.3. The smooth L1 loss is also a mean over channels.
    """
    cosine = 1 - F.cosine_similarity(student, teacher, dim=2).mean()
    return 0.9 * cosine + 0.1 * F.smooth_l1_loss(student, teacher)


def common_grid(student: tuple[int, int], teacher: tuple[int, int]) -> tuple[int, int]:
    """Return the (rows, columns) in which tokens are compared: the teacher's, if the student's can be resampled to it.

    A teacher of more than 4 times as many tokens is resampled instead. Bilinear tokens between the student's would add
    no information, and the memory of the similarities grows with the square of their number.
    """
    is_far_finer = teacher[0] * teacher[1] > _MAX_UPSAMPLING * student[0] * student[1]
    return student if is_far_finer else teacher


def align_tokens(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Resample maps of tokens to :func:`common_grid`.

    The student's are resampled as in lightly-train's ``distillationv3`` (bilinear, without a filter), the teacher's
    with a filter, so that each token of the teacher has a weight.

    Args:
        student: (batch, student width, rows, columns) tokens.
        teacher: (batch, teacher width, rows, columns) tokens, of another grid or the same.

    Returns:
        (batch, tokens, width) tokens of both, row after row.
    """
    grid = common_grid(_grid_of(student), _grid_of(teacher))
    if _grid_of(student) != grid:
        student = F.interpolate(student, grid, mode="bilinear", align_corners=False)
    if _grid_of(teacher) != grid:
        teacher = F.interpolate(teacher, grid, mode="bilinear", align_corners=False, antialias=True)
    return student.flatten(2).transpose(1, 2), teacher.flatten(2).transpose(1, 2)


def cut_prefix(vectors: Tensor, dim: int) -> Tensor:
    """Return the first ``dim`` dimensions of (n, D) vectors, scaled to unit length."""
    return F.normalize(vectors[:, :dim], dim=1)


def _kl_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    target = F.log_softmax(teacher, dim=1)
    return F.kl_div(F.log_softmax(student, dim=1), target, log_target=True, reduction="batchmean")


def _off_diagonal(square: Tensor) -> Tensor:
    """Return an (n, n) matrix without its diagonal: (n, n - 1)."""
    n = len(square)
    if n < 2:
        raise ValueError("relations within a batch need at least two images")
    return square.flatten()[1:].view(n - 1, n + 1)[:, :-1].reshape(n, n - 1)


def _relative_distances(vectors: Tensor) -> Tensor:
    """Return (n, n - 1) Euclidean distances to the other rows, divided by their mean."""
    squares = (vectors[:, None] - vectors[None]).square().sum(dim=2)
    distances = _off_diagonal(squares).clamp_min(1e-12).sqrt()  # The square root has no gradient at 0.
    return distances / distances.mean()


def _angle_cosines(vectors: Tensor) -> Tensor:
    """Return (n, n, n) cosines of the angles at i between j and k, 0 where j equals k."""
    directions = F.normalize(vectors[None] - vectors[:, None], dim=2, eps=1e-6)
    cosines = directions @ directions.transpose(1, 2)
    return cosines - torch.diag_embed(torch.diagonal(cosines, dim1=1, dim2=2))


def _grid_of(tokens: Tensor) -> tuple[int, int]:
    return tokens.shape[2], tokens.shape[3]
