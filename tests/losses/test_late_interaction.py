import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from tests.ranks import call
from torchrecipes.data.batching.examples import Examples
from torchrecipes.errors import UserError
from torchrecipes.losses import (
    BatchHardTriplet,
    CoSENT,
    CosineRegression,
    InfoNCE,
    KLDistillation,
    MarginMSE,
    Matryoshka,
    SupervisedContrastive,
    Triplet,
    max_sim,
)


def scores_of(queries, documents):
    """MaxSim of lists of `[tokens, D]`, token by token."""
    rows = [[sum(max(q @ d for d in document) for q in query) for document in documents] for query in queries]
    return torch.stack([torch.stack(row) for row in rows])


@pytest.mark.parametrize("at_once", [1, 40, 1 << 24])
def test_max_sim_equals_a_loop_with_gradients(at_once, monkeypatch):
    monkeypatch.setattr("torchrecipes.losses.late_interaction.PRODUCTS_AT_ONCE", at_once)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([3, 1, 4]), torch.tensor([2, 7, 1, 3, 7])
    queries = torch.randn(8, 5, dtype=torch.float64, generator=generator).requires_grad_()
    documents = torch.randn(20, 5, dtype=torch.float64, generator=generator).requires_grad_()
    scores = max_sim(queries, lengths[0], documents, lengths[1])
    expected = scores_of(queries.split(lengths[0].tolist()), documents.split(lengths[1].tolist()))
    torch.testing.assert_close(scores, expected)
    weights = torch.randn(3, 5, dtype=torch.float64, generator=generator)
    ours = torch.autograd.grad((scores * weights).sum(), [queries, documents])
    torch.testing.assert_close(ours, torch.autograd.grad((expected * weights).sum(), [queries, documents]))
    with torch.no_grad():
        torch.testing.assert_close(max_sim(queries, lengths[0], documents, lengths[1]), expected)


def make(num_examples=4, width=3, num_absent=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    size = num_examples * width
    lengths = torch.randint(1, 5, (size,), generator=generator)
    vectors = torch.randn(int(lengths.sum()), 6, dtype=torch.float64, generator=generator).requires_grad_()
    texts = torch.randperm(size, generator=generator).view(num_examples, width)
    texts[:num_absent, -1] = -1
    hashes = torch.randint(0, 2**62, (size,), generator=generator)
    hashes[texts[-1, 1]] = 7  # a positive that all ranks share
    scores = torch.randn(num_examples, width - 1, generator=generator)
    return vectors, Examples(texts, hashes, scores, lengths=lengths)


def texts_of(vectors, examples):
    return F.normalize(vectors, dim=-1).split(examples.lengths.tolist())


def check(loss, vectors, examples, expected):
    total, sums = loss(vectors, examples)
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(sums["loss"], expected.detach())
    torch.testing.assert_close(
        torch.autograd.grad(total, vectors), torch.autograd.grad(expected, vectors, retain_graph=True)
    )


def test_info_nce_equals_a_loop():
    vectors, examples = make()
    parts, rows, expected = texts_of(vectors, examples), examples.texts.tolist(), 0
    for query, positive, _ in rows:
        terms = [scores_of([parts[query]], [parts[positive]])[0, 0]]
        for row in rows:
            for text in row[1:]:
                if text >= 0 and examples.hashes[text] != examples.hashes[positive]:
                    terms.append(scores_of([parts[query]], [parts[text]])[0, 0])
        expected = expected + (torch.stack(terms) / 0.5).logsumexp(0) - terms[0] / 0.5
    check(InfoNCE(0.5), vectors, examples, expected)
    loss, sums = InfoNCE(0.5, bidirectional=True)(vectors, examples)
    chunked = InfoNCE(0.5, bidirectional=True, chunk_size=3)(vectors, examples)
    assert loss != expected
    torch.testing.assert_close(chunked, (loss, sums))


def test_distillation_equals_a_loop():
    vectors, examples = make()
    parts, mse, kl = texts_of(vectors, examples), 0, 0
    for row, teacher in zip(examples.texts.tolist(), examples.scores.double(), strict=True):
        present = [text for text in row[1:] if text >= 0]
        student = scores_of([parts[row[0]]], [parts[text] for text in present])[0]
        teacher = teacher[: len(present)]
        for number in range(1, len(present)):
            mse = mse + ((student[0] - student[number]) - (teacher[0] - teacher[number])) ** 2
        p, q = teacher.softmax(0), student.softmax(0)
        kl = kl + (p * (p / q).log()).sum()
    check(MarginMSE("cosine"), vectors, examples, mse)
    check(KLDistillation(similarity="cosine"), vectors, examples, kl)


def test_matryoshka_cuts_every_vector():
    vectors, examples = make()
    expected = InfoNCE()(vectors, examples)[0] + InfoNCE()(vectors[:, :3], examples)[0]
    check(Matryoshka(InfoNCE(), [6, 3]), vectors, examples, expected)


def losses_and_gradients():
    vectors, examples = make([4, 3][dist.get_rank()], [3, 4][dist.get_rank()], seed=dist.get_rank())
    loss, _ = InfoNCE(bidirectional=True)(vectors, examples)
    loss.backward()
    return loss.item(), vectors.grad.tolist()


def test_unequal_ranks_equal_one_process():
    ranks = call(losses_and_gradients)
    shares = [make(4, 3, seed=0), make(3, 4, seed=1)]
    vectors = torch.cat([vectors.detach() for vectors, _ in shares]).requires_grad_()
    expected, _ = InfoNCE(bidirectional=True)(vectors, Examples.join([examples for _, examples in shares]))
    expected.backward()
    assert sum(loss for loss, _ in ranks) == pytest.approx(expected.item())
    gradients = torch.tensor([row for _, gradient in ranks for row in gradient], dtype=torch.float64)
    torch.testing.assert_close(gradients, vectors.grad)


@pytest.mark.parametrize(
    "loss",
    [
        CoSENT(),
        CosineRegression(),
        Triplet(),
        BatchHardTriplet(),
        SupervisedContrastive(),
        InfoNCE(margin=0.1),
    ],
)
def test_losses_of_single_vectors_refuse_several(loss):
    with pytest.raises(UserError) as error:
        loss(*make())
    assert error.value.code == "several_vectors"
