import pytest
import torch
import torch.nn.functional as F

from torchrecipes.data.batching.examples import Examples
from torchrecipes.errors import UserError
from torchrecipes.losses import CoSENT, InfoNCE, Matryoshka


def make(size=8):
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(12, size, dtype=torch.float64, generator=generator).requires_grad_()
    texts = torch.randperm(12, generator=generator).view(6, 2)
    return embeddings, Examples(texts, torch.arange(12), torch.rand(6, 1, generator=generator))


@pytest.mark.parametrize("inner", [InfoNCE(), CoSENT()])
@pytest.mark.parametrize("weights", [None, [1.0, 0.5, 2.0]])
def test_is_the_weighted_sum_of_the_losses_of_cut_embeddings(inner, weights):
    embeddings, examples = make()
    expected, parts = 0, {}
    for dim, weight in zip([8, 2, 4], weights or [1, 1, 1], strict=True):
        part, _ = inner(F.normalize(embeddings[:, :dim], dim=-1), examples)
        expected, parts[f"loss_dim{dim}"] = expected + weight * part, part.detach()
    loss, logged = Matryoshka(inner, [8, 2, 4], weights)(embeddings, examples)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(logged.pop("loss"), expected.detach())
    accuracy = inner(embeddings, examples)[1].get("accuracy")
    assert logged.pop("accuracy", None) == accuracy  # that of the largest size
    torch.testing.assert_close(logged, parts)
    torch.testing.assert_close(torch.autograd.grad(loss, embeddings), torch.autograd.grad(expected, embeddings))


def test_a_learned_temperature_in_the_length_holds_for_every_size():
    embeddings, examples = make()
    directions = F.normalize(embeddings.detach(), dim=-1)
    log_scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    loss, _ = Matryoshka(InfoNCE(None), [8, 3])(directions * (0.5 * log_scale).exp(), examples)
    expected = 0
    for dim in (8, 3):
        cut = F.normalize(directions[:, :dim], dim=-1)
        logits = cut[examples.texts[:, 0]] @ cut[examples.texts[:, 1]].T * log_scale.exp()
        expected = expected + F.cross_entropy(logits, torch.arange(6), reduction="sum")
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, log_scale), torch.autograd.grad(expected, log_scale))


def test_equals_sentence_transformers():
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    embeddings, examples = make()

    class Model(torch.nn.Module):
        def forward(self, features):
            return {"sentence_embedding": features["embedding"]}

        def get_embedding_dimension(self):
            return 8

    model = Model()
    theirs = losses.MatryoshkaLoss(model, losses.MultipleNegativesRankingLoss(model), [8, 4], [1.0, 0.3])
    columns = [{"embedding": embeddings[column]} for column in examples.texts.T]
    expected = theirs(columns, None) * 6
    loss, _ = Matryoshka(InfoNCE(), [8, 4], [1.0, 0.3])(embeddings, examples)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, embeddings), torch.autograd.grad(expected, embeddings))


def test_an_embedding_whose_first_numbers_are_zero_has_a_finite_gradient():
    embeddings, examples = make()
    with torch.no_grad():
        embeddings[0, :2] = 0
    Matryoshka(InfoNCE(), [8, 2])(embeddings, examples)[0].backward()
    assert embeddings.grad.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "key"), [(([],), "dims"), (([4, 0],), "dims"), (([4, 4],), "dims"), (([4, 2], [1.0]), "weights")]
)
def test_wrong_arguments(arguments, key):
    with pytest.raises(UserError) as error:
        Matryoshka(InfoNCE(), *arguments)
    assert error.value.key == key and error.value.code == "invalid_loss"


def test_sizes_beyond_the_embeddings_are_refused():
    with pytest.raises(UserError) as error:
        Matryoshka(InfoNCE(), [16])(*make())
    assert error.value.key == "loss.dims"
