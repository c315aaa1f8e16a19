import pytest
import torch

from tests.ranks import call
from torchrecipes.data.batching.examples import Examples
from torchrecipes.errors import UserError
from torchrecipes.losses import CoSENT, CosineRegression


def make(num_examples, seed=0):
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(2 * num_examples, 6, dtype=torch.float64, generator=generator).requires_grad_()
    texts = torch.randperm(2 * num_examples, generator=generator).view(num_examples, 2)
    scores = torch.randint(0, 5, (num_examples, 1), generator=generator) / 4  # with ties
    return embeddings, Examples(texts, torch.arange(2 * num_examples), scores)


def cosines(embeddings, examples):
    return [
        embeddings[a] @ embeddings[b] / (embeddings[a].norm() * embeddings[b].norm())
        for a, b in examples.texts.tolist()
    ]


def cosent(embeddings, examples, temperature=0.05):
    values, scores, total = cosines(embeddings, examples), examples.scores[:, 0].tolist(), 1
    for value, score in zip(values, scores, strict=True):
        for other, other_score in zip(values, scores, strict=True):
            if score < other_score:
                total = total + ((value - other) / temperature).exp()
    return torch.as_tensor(total, dtype=torch.float64).log() * len(values)


def check(loss, embeddings, examples, expected):
    total, sums = loss(embeddings, examples)
    torch.testing.assert_close(total, expected)
    assert sums["loss"] == total.detach() and not sums["loss"].requires_grad
    torch.testing.assert_close(
        torch.autograd.grad(total, embeddings)[0], torch.autograd.grad(expected, embeddings)[0], atol=1e-9, rtol=1e-6
    )


@pytest.mark.parametrize("num_examples", [2, 5, 12])
@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_cosent_equals_a_loop_over_pairs_of_pairs(num_examples, temperature):
    embeddings, examples = make(num_examples)
    check(CoSENT(temperature), embeddings, examples, cosent(embeddings, examples, temperature))


def test_cosent_without_two_different_scores_is_zero():
    embeddings, examples = make(3)
    examples.scores.fill_(0.5)
    loss, _ = CoSENT()(embeddings, examples)
    loss.backward()
    assert loss == 0 and embeddings.grad.abs().max() == 0


def test_cosine_regression_equals_a_loop():
    embeddings, examples = make(5)
    scores = examples.scores[:, 0].tolist()
    expected = sum((value - score) ** 2 for value, score in zip(cosines(embeddings, examples), scores, strict=True))
    check(CosineRegression(), embeddings, examples, expected)


def test_equal_sentence_transformers():
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    embeddings, examples = make(9)
    for ours, theirs in [
        (CoSENT(), losses.CoSENTLoss(torch.nn.Identity())),
        (CosineRegression(), losses.CosineSimilarityLoss(torch.nn.Identity())),
    ]:
        columns = [embeddings[column] for column in examples.texts.T]
        expected = theirs.compute_loss_from_embeddings(columns, examples.scores[:, 0].double()) * 9
        check(ours, embeddings, examples, expected)


def losses_and_gradients(counts):
    import torch.distributed as dist

    embeddings, examples = make(counts[dist.get_rank()], seed=dist.get_rank())
    loss, _ = CoSENT()(embeddings, examples)
    loss.backward()
    return loss.item(), embeddings.grad.tolist()


def test_cosent_of_unequal_ranks_equals_one_process():
    counts = [4, 7]
    ranks = call(losses_and_gradients, counts)
    shares = [make(count, seed) for seed, count in enumerate(counts)]
    embeddings = torch.cat([embeddings.detach() for embeddings, _ in shares]).requires_grad_()
    expected = cosent(embeddings, Examples.join([examples for _, examples in shares]))
    expected.backward()
    assert sum(loss for loss, _ in ranks) == pytest.approx(expected.item())
    gradients = torch.tensor([row for _, gradient in ranks for row in gradient], dtype=torch.float64)
    torch.testing.assert_close(gradients, embeddings.grad)


@pytest.mark.parametrize("loss", [CoSENT(), CosineRegression()])
def test_examples_without_scores_are_refused(loss):
    embeddings, examples = make(3)
    with pytest.raises(UserError) as error:
        loss(embeddings, Examples(examples.texts, examples.hashes))
    assert error.value.code == "no_scores"
