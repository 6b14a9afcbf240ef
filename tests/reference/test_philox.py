"""The random-number rule: published vectors, and what masks and mixing draws depend on."""

from __future__ import annotations

import math

import pytest
import torch

from gcahng.reference.philox import dropout_threshold, edge_dropout_masks, mixing_draws, philox_4x32

# Random123's kat_vectors for Philox4x32-10: counter, key, result.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
P, SEED = 0.1, 0x123456789ABCDEF


def words(*counter, seed=SEED):
    return tuple(word.item() for word in philox_4x32(tuple(torch.tensor(c) for c in counter), seed))


def masks(n=9, *, layer=1, draw=4, seed=SEED, p=P, symmetric=True):
    return edge_dropout_masks(n, layer=layer, draw=torch.tensor(draw), seed=seed, p=p, symmetric=symmetric)


@pytest.mark.parametrize(("counter", "key", "wanted"), KNOWN_ANSWERS)
def test_known_answers(counter, key, wanted):
    assert words(*counter, seed=key[0] | key[1] << 32) == wanted


def test_known_answers_all_at_once():
    counter = tuple(torch.tensor(c) for c in zip(*(case[0] for case in KNOWN_ANSWERS), strict=True))
    for place, (_, key, wanted) in enumerate(KNOWN_ANSWERS):
        result = philox_4x32(counter, key[0] | key[1] << 32)
        assert tuple(word[place].item() for word in result) == wanted


def test_counters_broadcast():
    i, j = torch.arange(3)[:, None], torch.arange(4)[None, :]
    result = philox_4x32((i, j, torch.tensor(7), torch.tensor(9)), SEED)
    assert all(word.shape == (3, 4) for word in result)
    assert tuple(word[2, 3].item() for word in result) == words(2, 3, 7, 9)


def test_threshold():
    assert dropout_threshold(0.1) == round(0.1 * 4294967296) == 429496730
    assert dropout_threshold(0.5) == 2147483648


@pytest.mark.parametrize("symmetric", [True, False])
def test_masks_word_by_word(symmetric):
    """Word 0 for the token of i, word 1 for that of j; tied: counter (min, max), word 0 for the smaller index."""
    n, p = 6, 0.4
    keep = masks(n, layer=3, draw=5, p=p, symmetric=symmetric)
    assert keep.shape == (n, n, 2) and keep.dtype is torch.bool
    for i in range(n):
        for j in range(n):
            low, high = (min(i, j), max(i, j)) if symmetric else (i, j)
            kept = [word >= round(p * 2**32) for word in words(low, high, 3, 5)[:2]]
            if symmetric and i > j:
                kept.reverse()
            assert keep[i, j].tolist() == kept, (i, j)
    assert keep.any() and not keep.all()


def test_tied_masks_are_those_of_the_other_direction_with_the_tokens_swapped():
    edges = ~torch.eye(40, dtype=torch.bool)
    for symmetric in (True, False):
        keep = masks(40, symmetric=symmetric)
        assert torch.equal(keep.transpose(0, 1)[edges], keep.flip(-1)[edges]) == symmetric


def test_both_words_count_on_the_diagonal():
    keep = masks(400, p=0.3).diagonal().T  # (n, 2)
    assert (keep[:, 0] != keep[:, 1]).any()
    assert not keep[:, 0].all() and not keep[:, 1].all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_rates(symmetric, p):
    """Each token of the independent edges is dropped at the rate p: within five standard deviations."""
    n = 200
    dropped = ~masks(n, p=p, symmetric=symmetric)
    edges = torch.triu(torch.ones(n, n, dtype=torch.bool)) if symmetric else torch.ones(n, n, dtype=torch.bool)
    count = int(edges.sum())
    for token in range(2):
        rate = dropped[..., token][edges].double().mean().item()
        assert abs(rate - p) < 5 * math.sqrt(p * (1 - p) / count)
    both = dropped.all(dim=-1)[edges].double().mean().item()
    assert abs(both - p**2) < 5 * math.sqrt(p**2 * (1 - p**2) / count), "the two tokens are independent"


def test_masks_depend_on_edge_layer_draw_and_seed_alone():
    keep = masks(9)
    torch.manual_seed(99)
    assert torch.equal(masks(9), keep)
    assert torch.equal(masks(30)[:9, :9], keep), "not on the batch's size"
    for other in (masks(30, layer=2), masks(30, draw=5), masks(30, seed=SEED + 1), masks(30, seed=SEED + (1 << 32))):
        assert not torch.equal(other, masks(30))


def test_a_larger_p_drops_more_of_the_same():
    few, many = ~masks(30, p=0.1), ~masks(30, p=0.3)
    assert (many | ~few).all() and many.sum() > few.sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mixing_draws(dtype):
    """u_{k,v} = (word 0 >> 8)·2⁻²⁴ of stream 2³¹ + kK + v, i = j = 0."""
    views, draw = 4, 6
    u = mixing_draws(views, draw=torch.tensor(draw), seed=SEED, dtype=dtype)
    assert u.shape == (views, views - 1) and u.dtype is dtype
    for k in range(views):
        for v in range(1, views):
            assert u[k, v - 1].item() == (words(0, 0, 2**31 + k * views + v, draw)[0] >> 8) * 2.0**-24
    assert 0 <= u.min() < u.max() < 1


def test_mixing_draws_are_uniform():
    u = mixing_draws(64, draw=torch.tensor(0), seed=SEED, dtype=torch.float64).flatten().sort().values
    steps = torch.arange(1, len(u) + 1, dtype=torch.float64) / len(u)
    # Kolmogorov-Smirnov at the level 1e-4.
    assert (u - steps).abs().max() < math.sqrt(math.log(2 / 1e-4) / 2 / len(u))
