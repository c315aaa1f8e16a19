import pytest
import torch

from torchrecipes.data.batching.examples import Examples
from torchrecipes.errors import UserError
from torchrecipes.losses import KLDistillation, MarginMSE


def make(num_examples=4, width=4, absent=()):
    generator = torch.Generator().manual_seed(0)
    size = num_examples * width
    embeddings = torch.randn(size, 5, dtype=torch.float64, generator=generator).requires_grad_()
    texts = torch.randperm(size, generator=generator).view(num_examples, width)
    scores = torch.randn(num_examples, width - 1, generator=generator)
    for row, column in absent:
        texts[row, column], scores[row, column - 1] = -1, torch.nan
    return embeddings, Examples(texts, torch.arange(size), scores)


def rows_of(embeddings, examples, similarity):
    """Of every example, the similarities and the teacher's scores of its candidates."""
    for texts, scores in zip(examples.texts.tolist(), examples.scores.tolist(), strict=True):
        present = [(text, score) for text, score in zip(texts[1:], scores, strict=True) if text >= 0]
        query = embeddings[texts[0]]
        dots = [query @ embeddings[text] for text, _ in present]
        if similarity == "cosine":
            dots = [dot / query.norm() / embeddings[text].norm() for dot, (text, _) in zip(dots, present, strict=True)]
        yield torch.stack(dots), torch.tensor([score for _, score in present], dtype=torch.float64)


def check(loss, embeddings, examples, expected):
    total, sums = loss(embeddings, examples)
    torch.testing.assert_close(total, expected)
    assert sums["loss"] == total.detach() and not sums["loss"].requires_grad
    gradients = [torch.autograd.grad(value, embeddings)[0] for value in (total, expected)]
    assert gradients[0].isfinite().all()
    torch.testing.assert_close(*gradients)


ABSENT = [(), [(1, 3), (2, 2), (2, 3)]]


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
@pytest.mark.parametrize("absent", ABSENT)
def test_margin_mse_equals_a_loop(similarity, absent):
    embeddings, examples = make(absent=absent)
    expected = 0
    for student, teacher in rows_of(embeddings, examples, similarity):
        for negative in range(1, len(student)):
            difference = (student[0] - student[negative]) - (teacher[0] - teacher[negative])
            expected = expected + difference**2 / (len(student) - 1)
    check(MarginMSE(similarity), embeddings, examples, expected)


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
@pytest.mark.parametrize("absent", ABSENT)
@pytest.mark.parametrize("temperatures", [(1.0, None), (0.5, 2.0)])
def test_kl_distillation_equals_a_loop(similarity, absent, temperatures):
    embeddings, examples = make(absent=absent)
    own, theirs = temperatures[0], temperatures[1] or temperatures[0]
    expected = 0
    for student, teacher in rows_of(embeddings, examples, similarity):
        p, q = (teacher / theirs).softmax(0), (student / own).softmax(0)
        expected = expected + (p * (p / q).log()).sum() * own**2
    check(KLDistillation(*temperatures, similarity), embeddings, examples, expected)


def test_equal_sentence_transformers():
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    embeddings, examples = make()
    for ours, theirs in [
        (MarginMSE(), losses.MarginMSELoss(torch.nn.Identity())),
        (KLDistillation(2.0), losses.DistillKLDivLoss(torch.nn.Identity(), temperature=2.0)),
    ]:
        columns = [embeddings[column] for column in examples.texts.T]
        expected = theirs.compute_loss_from_embeddings(columns, examples.scores.double()) * 4
        check(ours, embeddings, examples, expected)


@pytest.mark.parametrize("loss", [MarginMSE(), KLDistillation()])
def test_wrong_input(loss):
    embeddings, examples = make()
    for given, code in [
        (Examples(examples.texts[:, :2], examples.hashes, examples.scores[:, :1]), "no_negatives"),
        (Examples(examples.texts, examples.hashes), "no_scores"),
        (Examples(examples.texts, examples.hashes, examples.scores[:, :1]), "no_scores"),
    ]:
        with pytest.raises(UserError) as error:
            loss(embeddings, given)
        assert error.value.code == code and error.value.key == "loss"


def test_temperatures_are_positive():
    for arguments, key in [((0.0,), "temperature"), ((1.0, -1.0), "teacher_temperature")]:
        with pytest.raises(UserError) as error:
            KLDistillation(*arguments)
        assert error.value.key == key
