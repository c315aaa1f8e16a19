import pytest
import torch

from tests.ranks import call
from torchrecipes.data.batching.examples import Examples
from torchrecipes.errors import UserError
from torchrecipes.losses import BatchHardTriplet, SupervisedContrastive, Triplet


def distance(a, b, kind):
    return 1 - a @ b / (a.norm() * b.norm()) if kind == "cosine" else (a - b).norm()


def labeled(labels, seed=0):
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(len(labels), 5, dtype=torch.float64, generator=generator).requires_grad_()
    hashes = torch.randint(0, 2**62, (len(labels),), generator=generator)
    return embeddings, Examples(torch.randperm(len(labels), generator=generator)[:, None], hashes, None, labels)


def check(loss, embeddings, examples, expected):
    total, sums = loss(embeddings, examples)
    torch.testing.assert_close(total, expected)
    assert sums["loss"] == total.detach() and not sums["loss"].requires_grad
    gradients = [torch.autograd.grad(value, embeddings)[0] for value in (total, expected)]
    torch.testing.assert_close(*gradients)
    return sums


@pytest.mark.parametrize("kind", ["cosine", "euclidean"])
def test_triplet_equals_a_loop_over_ragged_negatives(kind):
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(16, 5, dtype=torch.float64, generator=generator).requires_grad_()
    texts = torch.randperm(16, generator=generator).view(4, 4)
    texts[1, 3] = texts[2, 2] = texts[2, 3] = -1
    expected, correct = 0, 0
    for row in texts.tolist():
        positive = distance(embeddings[row[0]], embeddings[row[1]], kind)
        negatives = [distance(embeddings[row[0]], embeddings[text], kind) for text in row[2:] if text >= 0]
        for negative in negatives:
            expected = expected + max(0, positive - negative + 0.7) / len(negatives)
        correct += all(positive < negative for negative in negatives)
    sums = check(Triplet(0.7, kind), embeddings, Examples(texts, torch.arange(16)), expected)
    assert sums["accuracy"] == correct


def hard(embeddings, examples, kind, margin):
    rows, labels, total = examples.texts[:, 0].tolist(), examples.labels.tolist(), 0
    for i, anchor in enumerate(rows):
        others = [(distance(embeddings[anchor], embeddings[row], kind), j) for j, row in enumerate(rows) if j != i]
        positives = [d for d, j in others if labels[j] == labels[i]]
        negatives = [
            d for d, j in others if labels[j] != labels[i] and examples.hashes[rows[j]] != examples.hashes[anchor]
        ]
        if positives and negatives:
            difference = max(positives) - min(negatives)
            total = total + ((1 + difference.exp()).log() if margin is None else max(0, difference + margin))
    return total


def semi_hard(embeddings, examples, kind, margin):
    rows, labels, total = examples.texts[:, 0].tolist(), examples.labels.tolist(), 0
    for i, anchor in enumerate(rows):
        others = [(distance(embeddings[anchor], embeddings[row], kind), j) for j, row in enumerate(rows) if j != i]
        positives = [d for d, j in others if labels[j] == labels[i]]
        negatives = [d for d, j in others if labels[j] != labels[i]]
        for positive in positives if negatives else []:
            farther = [d for d in negatives if d > positive]
            total = total + max(0, positive - (min(farther) if farther else max(negatives)) + margin) / len(positives)
    return total


LABELS = [[0, 0, 1, 1, 1, 0, 2], [0, 1, 2], [0, 0, 0]]  # with a label of its own; only those; one label


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("kind", ["cosine", "euclidean"])
@pytest.mark.parametrize("margin", [0.7, None])
def test_batch_hard_equals_a_loop(labels, kind, margin):
    embeddings, examples = labeled(torch.tensor(labels))
    expected = hard(embeddings, examples, kind, margin) + 0 * embeddings.sum()
    check(BatchHardTriplet(margin, kind), embeddings, examples, expected)


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("kind", ["cosine", "euclidean"])
def test_semi_hard_equals_a_loop(labels, kind):
    embeddings, examples = labeled(torch.tensor(labels))
    expected = semi_hard(embeddings, examples, kind, 0.7) + 0 * embeddings.sum()
    check(BatchHardTriplet(0.7, kind, "semi_hard"), embeddings, examples, expected)


def test_equal_texts_of_other_labels_are_no_negatives():
    embeddings, examples = labeled(torch.tensor([0, 0, 1, 1]))
    before = hard(embeddings, examples, "cosine", 0.7)
    rows = examples.texts[:, 0]
    closest = 1 - torch.nn.functional.normalize(embeddings[rows]) @ torch.nn.functional.normalize(embeddings[rows]).T
    examples.hashes[rows[2 + closest[0, 2:].argmin()]] = examples.hashes[rows[0]].clone()
    expected = hard(embeddings, examples, "cosine", 0.7)
    assert expected != before
    check(BatchHardTriplet(0.7), embeddings, examples, expected)


def supervised(embeddings, examples, temperature):
    rows, labels, total = examples.texts[:, 0].tolist(), examples.labels.tolist(), 0
    for i, anchor in enumerate(rows):
        others = [j for j in range(len(rows)) if j != i]
        similarity = {
            j: (1 - distance(embeddings[anchor], embeddings[rows[j]], "cosine")) / temperature for j in others
        }
        positives = [j for j in others if labels[j] == labels[i]]
        for j in positives:
            log_sum = torch.stack(list(similarity.values())).logsumexp(0)
            total = total + (log_sum - similarity[j]) / len(positives)
    return total


@pytest.mark.parametrize("labels", LABELS)
def test_supervised_contrastive_equals_a_loop(labels):
    embeddings, examples = labeled(torch.tensor(labels))
    expected = supervised(embeddings, examples, 0.2) + 0 * embeddings.sum()
    check(SupervisedContrastive(0.2), embeddings, examples, expected)


def test_equal_sentence_transformers():
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    model = torch.nn.Identity()
    embeddings, examples = labeled(torch.tensor([0, 0, 1, 1, 2, 2]))
    distances = losses.BatchHardTripletLossDistanceFunction
    for ours, theirs in [
        (
            BatchHardTriplet(0.7, "euclidean"),
            losses.BatchHardTripletLoss(model, distance_metric=distances.euclidean_distance, margin=0.7),
        ),
        (BatchHardTriplet(0.7), losses.BatchHardTripletLoss(model, distances.cosine_distance, margin=0.7)),
        (
            BatchHardTriplet(0.7, mining="semi_hard"),
            losses.BatchSemiHardTripletLoss(model, distances.cosine_distance, margin=0.7),
        ),
        (BatchHardTriplet(None), losses.BatchHardSoftMarginTripletLoss(model, distances.cosine_distance)),
    ]:
        batch = [embeddings[examples.texts[:, 0]]]
        check(ours, embeddings, examples, theirs.compute_loss_from_embeddings(batch, examples.labels) * 6)


LOSSES = {
    "hard": BatchHardTriplet(0.7),
    "semi_hard": BatchHardTriplet(0.7, mining="semi_hard"),
    "supervised": SupervisedContrastive(),
}


def part(rank):
    return labeled(torch.tensor([[0, 1, 2, 0], [1, 0, 3]][rank]), seed=rank)


def losses_and_gradients():
    import torch.distributed as dist

    results = {}
    for name, loss in LOSSES.items():
        embeddings, examples = part(dist.get_rank())
        total, _ = loss(embeddings, examples)
        total.backward()
        results[name] = (total.item(), embeddings.grad.tolist())
    return results


def test_unequal_ranks_equal_one_process():
    ranks = call(losses_and_gradients)
    for name, loss in LOSSES.items():
        embeddings = torch.cat([part(rank)[0].detach() for rank in (0, 1)]).requires_grad_()
        expected, _ = loss(embeddings, Examples.join([part(rank)[1] for rank in (0, 1)]))
        expected.backward()
        assert sum(results[name][0] for results in ranks) == pytest.approx(expected.item())
        gradients = torch.tensor([row for results in ranks for row in results[name][1]], dtype=torch.float64)
        torch.testing.assert_close(gradients, embeddings.grad)


def test_wrong_input():
    embeddings, examples = labeled(torch.tensor([0, 1, 0]))
    pairs = Examples(torch.tensor([[0, 1]]), torch.arange(3))
    for loss, given, code in [
        (Triplet(), pairs, "no_negatives"),
        (BatchHardTriplet(), pairs, "no_labels"),
        (SupervisedContrastive(), Examples(examples.texts, examples.hashes, None, torch.ones(3)), "no_labels"),
    ]:
        with pytest.raises(UserError) as error:
            loss(embeddings, given)
        assert error.value.code == code and error.value.key == "loss"
    with pytest.raises(UserError) as error:
        SupervisedContrastive(0)
    assert error.value.code == "invalid_loss"
