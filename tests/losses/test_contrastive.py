import pytest
import torch

from tests.ranks import call
from torchrecipes.data.batching.examples import Examples
from torchrecipes.errors import UserError
from torchrecipes.losses import InfoNCE


def make(num_examples, width=2, num_absent=0, seed=0, equal=()):
    """Embeddings `[n * width, 6]` in fp64 and examples; the last examples lack their last text; `equal` places of texts
    have equal texts."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(num_examples * width, 6, dtype=torch.float64, generator=generator)
    texts = torch.randperm(num_examples * width, generator=generator).view(num_examples, width)
    texts[num_examples - num_absent :, -1] = -1
    hashes = torch.randint(-(2**62), 2**62, (num_examples * width,), generator=generator)
    for one, other in equal:
        hashes[texts[other]] = hashes[texts[one]].clone()
    return embeddings.requires_grad_(), Examples(texts, hashes)


def cosine(a, b):
    return a @ b / (a.norm() * b.norm())


def reference(embeddings, examples, temperature, own=None, bidirectional=False, leave_out=lambda *_: False):
    """InfoNCE written as loops over queries and candidates. `leave_out(query, positive, candidate)` gets texts."""
    rows, hashes = examples.texts.tolist(), examples.hashes.tolist()
    own = range(len(rows)) if own is None else own

    def similarity(a, b):
        if temperature is None:
            return embeddings[a] @ embeddings[b]
        return cosine(embeddings[a], embeddings[b]) / temperature

    def direction(anchor, target, columns):
        total, correct = 0, 0
        for number in own:
            row = rows[number]
            targets = {hashes[other[target]] for other in rows if hashes[other[anchor]] == hashes[row[anchor]]}
            terms, best = [similarity(row[anchor], row[target])], True
            for other_number, other in enumerate(rows):
                for column in columns:
                    text = other[column] if column < len(other) else -1
                    if text < 0 or (other_number == number and column == target):
                        continue
                    if hashes[text] in targets or hashes[text] == hashes[row[anchor]]:
                        continue
                    if leave_out(row[anchor], row[target], text):
                        continue
                    terms.append(similarity(row[anchor], text))
                    best &= bool(terms[-1] < terms[0])
            total = total + torch.stack(terms).logsumexp(0) - terms[0]
            correct += best
        return total, correct

    loss, correct = direction(0, 1, range(1, examples.texts.shape[1]))
    if bidirectional:
        loss = (loss + direction(1, 0, [0])[0]) / 2
    return loss, correct


def check(loss, embeddings, examples, expected, correct=None, guide=None):
    total, sums = loss(embeddings, examples, guide)
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(sums["loss"], expected.detach())
    assert not sums["loss"].requires_grad
    if correct is not None:
        assert sums["accuracy"] == correct
    (gradient,) = torch.autograd.grad(total, embeddings)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, embeddings)[0])


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(("width", "num_absent"), [(2, 0), (3, 0), (4, 2), (3, 5)])
def test_equals_a_loop_with_in_batch_and_ragged_hard_negatives(width, num_absent, bidirectional):
    embeddings, examples = make(5, width, num_absent)
    expected = reference(embeddings, examples, 0.1, bidirectional=bidirectional)
    check(InfoNCE(0.1, bidirectional=bidirectional), embeddings, examples, *expected)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(
    "equal",
    [
        [((0, 0), (1, 0))],  # two queries
        [((0, 1), (1, 1))],  # two positives
        [((0, 0), (1, 0)), ((0, 1), (1, 1))],  # two examples
        [((0, 1), (2, 2))],  # a positive and another query's negative
        [((0, 0), (2, 2))],  # a query and another query's negative
        [((0, 0), (0, 1))],  # a query and its positive, as in SimCSE
        [((0, 0), (1, 0)), ((1, 1), (2, 2)), ((3, 0), (3, 2))],  # a negative is the positive of an equal query
        [((0, 1), (0, 2))],  # an example's own positive and negative
    ],
)
def test_equal_texts_are_no_negatives(equal, bidirectional):
    embeddings, examples = make(4, 3, 1, equal=equal)
    expected = reference(embeddings, examples, 0.1, bidirectional=bidirectional)
    check(InfoNCE(0.1, bidirectional=bidirectional), embeddings, examples, *expected)


def test_an_excluded_negative_has_no_influence():
    embeddings, examples = make(4, 3, equal=[((0, 1), (1, 2))])
    with torch.no_grad():
        first = InfoNCE()(embeddings, examples)[0]
        _, kept = make(4, 3)
        assert abs(InfoNCE()(embeddings, kept)[0] - first) > 1e-4


def test_margin_leaves_out_candidates_that_are_more_similar_than_the_positive():
    embeddings, examples = make(6, 3)

    def leave_out(query, positive, text):
        return cosine(embeddings[query], embeddings[text]) > cosine(embeddings[query], embeddings[positive]) + 0.1

    expected = reference(embeddings, examples, 0.1, leave_out=leave_out)
    check(InfoNCE(0.1, margin=0.1), embeddings, examples, *expected)
    assert expected[0] != reference(embeddings, examples, 0.1)[0]


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(("kind", "margin"), [("absolute", 0.0), ("absolute", 0.2), ("relative", 0.5)])
def test_the_guide_leaves_out_candidates(kind, margin, bidirectional):
    embeddings, examples = make(6, 3, 2)
    guide = torch.randn(18, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5))

    def leave_out(query, positive, text):
        target = cosine(guide[query], guide[positive])
        limit = target - margin * (abs(target) if kind == "relative" else 1)
        return cosine(guide[query], guide[text]) > limit

    expected = reference(embeddings, examples, 0.1, leave_out=leave_out, bidirectional=bidirectional)
    loss = InfoNCE(0.1, guide_margin=margin, guide_margin_type=kind, bidirectional=bidirectional)
    check(loss, embeddings, examples, *expected, guide=guide)
    assert expected[0] != reference(embeddings, examples, 0.1, bidirectional=bidirectional)[0]


def test_without_temperature_the_dot_products_are_the_logits():
    embeddings, examples = make(4, 3)
    scale = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    directions = torch.nn.functional.normalize(embeddings.detach(), dim=-1)
    loss, _ = InfoNCE(None)(directions * (0.5 * scale).exp(), examples)
    expected, _ = reference(directions, examples, temperature=1)
    assert loss != expected
    temperature = 1 / scale.exp()
    torch.testing.assert_close(loss, reference(directions, examples, temperature)[0])
    (gradient,) = torch.autograd.grad(loss, scale)
    torch.testing.assert_close(gradient, torch.autograd.grad(reference(directions, examples, temperature)[0], scale)[0])


def test_dot_products():
    embeddings, examples = make(4)
    expected, _ = reference(embeddings / 0.5**0.5, examples, None)
    check(InfoNCE(0.5, similarity="dot"), embeddings, examples, expected)


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 5])
def test_chunks_change_nothing(chunk_size):
    embeddings, examples = make(5, 4, 2, equal=[((0, 0), (3, 0)), ((1, 1), (2, 2))])
    guide = torch.randn(20, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    options = {"bidirectional": True, "guide_margin": 0.1, "margin": 0.3}
    expected, sums = InfoNCE(**options)(embeddings, examples, guide)
    check(InfoNCE(**options, chunk_size=chunk_size), embeddings, examples, expected, sums["accuracy"], guide)


def test_logits_are_in_fp32_under_autocast():
    embeddings, examples = make(5, 3)
    embeddings = embeddings.detach().float()
    expected = InfoNCE()(embeddings, examples)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert InfoNCE()(embeddings, examples)[0] == expected
    loss = InfoNCE()(embeddings.bfloat16(), examples)[0]
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, InfoNCE()(embeddings.bfloat16().float(), examples)[0])


@pytest.mark.parametrize(("width", "symmetric"), [(2, False), (4, False), (2, True), (4, True)])
def test_equals_sentence_transformers(width, symmetric):
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    embeddings, examples = make(7, width)
    directions = (
        {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"} if symmetric else {}
    )
    theirs = losses.MultipleNegativesRankingLoss(torch.nn.Identity(), scale=20, **directions)
    expected = theirs.compute_loss_from_embeddings([embeddings[column] for column in examples.texts.T], None) * 7
    check(InfoNCE(0.05, bidirectional=symmetric), embeddings, examples, expected)


def share(rank, counts, widths, equal):
    """One rank's part of `together`: unequal numbers of examples and of negatives."""
    num_absent = counts[rank] // 2 if widths[rank] > 2 else 0
    embeddings, examples = make(counts[rank], widths[rank], num_absent, seed=rank)
    if equal and counts[rank]:
        examples.hashes[examples.texts[0, 1]] = 7  # a positive that all ranks share
        examples.hashes[examples.texts[-1, 0]] = 8  # and a query
    guide = torch.randn(len(embeddings), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(9 + rank))
    return embeddings, examples, guide


def losses_and_gradients(counts, widths, options):
    import torch.distributed as dist

    embeddings, examples, guide = share(dist.get_rank(), counts, widths, equal=True)
    loss, sums = InfoNCE(**options)(embeddings, examples, guide)
    loss.backward()
    return loss.item(), sums["accuracy"].item(), embeddings.grad.tolist()


@pytest.mark.parametrize(
    ("counts", "widths", "options"),
    [
        ([3, 5], [4, 2], {}),
        ([3, 5], [2, 3], {"bidirectional": True, "margin": 0.2, "guide_margin": 0.1, "chunk_size": 2}),
        ([2, 0, 4, 3], [3, 2, 5, 2], {"bidirectional": True}),
    ],
)
def test_ranks_with_unequal_negatives_equal_one_process(counts, widths, options):
    ranks = call(losses_and_gradients, counts, widths, options, world_size=len(counts))
    shares = [share(rank, counts, widths, equal=True) for rank in range(len(counts))]
    embeddings = torch.cat([embeddings.detach() for embeddings, _, _ in shares]).requires_grad_()
    examples = Examples.join([examples for _, examples, _ in shares])
    loss, sums = InfoNCE(**options)(embeddings, examples, torch.cat([guide for _, _, guide in shares]))
    loss.backward()
    assert sum(loss for loss, _, _ in ranks) == pytest.approx(loss.item(), rel=1e-9)
    assert sum(correct for _, correct, _ in ranks) == sums["accuracy"]
    gradients = torch.tensor([row for _, _, gradient in ranks for row in gradient], dtype=torch.float64)
    torch.testing.assert_close(gradients, embeddings.grad, rtol=1e-9, atol=1e-12)
    if not options:
        assert reference(embeddings, examples, 0.05)[0].item() == pytest.approx(loss.item())


def test_wrong_input():
    embeddings, examples = make(4, 1)
    with pytest.raises(UserError) as error:
        InfoNCE()(embeddings, examples)
    assert error.value.code == "no_positives" and error.value.key == "loss"
    embeddings, examples = make(4)
    with pytest.raises(UserError) as error:
        InfoNCE(guide_margin=0.0)(embeddings, examples)
    assert error.value.code == "no_guide"
    for temperature in (0, -1, float("nan")):
        with pytest.raises(UserError) as error:
            InfoNCE(temperature)
        assert error.value.code == "invalid_loss" and error.value.key == "temperature"
