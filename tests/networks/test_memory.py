from __future__ import annotations

import pytest
import torch

from nnunet_multimodal.networks.memory import REACH_MM, Memory, MemoryReader, join_memories, mix_memories


def memory(seed: int, organs: int = 2, places: int = 5, present: tuple[bool, ...] = (True, True)) -> Memory:
    """One level, one sample, two heads, shared keys."""
    draw = torch.Generator().manual_seed(seed)
    keys = torch.nn.functional.normalize(torch.randn(1, 1, places, 2, 3, generator=draw), dim=-1)
    where = 30 * torch.randn(1, 1, places, 2, generator=draw)
    values = torch.rand(1, organs, places, 2, 4, generator=draw)
    return Memory([keys], [where], [torch.ones(1, 1, places, dtype=torch.bool)], [values], torch.tensor([[*present]]))


def read(reader: MemoryReader, of: Memory, queries: torch.Tensor, places: torch.Tensor):
    return reader(queries, places, of.keys[0], of.places[0], of.valid[0], of.values[0])


def asked(seed: int = 9, number: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    queries = torch.nn.functional.normalize(torch.randn(1, number, 2, 3, generator=draw), dim=-1)
    return queries, 30 * torch.randn(1, number, 2, generator=draw)


def test_reading_is_a_softmax_over_likeness_and_distance() -> None:
    """softmax(tau cos - |x_q - x_k|^2 / (2 sigma^2)) v, written out voxel by voxel."""
    reader, of = MemoryReader(2, 2, temperature=3.0, sigma_mm=(20, 50)), memory(0)
    queries, places = asked()
    features, probability = read(reader, of, queries, places)
    assert features.shape == (2, 4, 2 * 3) and probability.shape == (2, 4, 1)
    for organ in range(2):
        for n in range(4):
            means = []
            for head, sigma in enumerate((20.0, 50.0)):
                likeness = 3.0 * (of.keys[0][0, 0, :, head] @ queries[0, n, head])
                distance = (of.places[0][0, 0] - places[0, n]).square().sum(1)
                weight = (likeness - distance / (2 * sigma**2)).softmax(0)
                expected = weight @ of.values[0][0, organ, :, head]
                torch.testing.assert_close(features[organ, n, 3 * head : 3 * head + 3], expected[:3])
                means.append(expected[3])
            torch.testing.assert_close(probability[organ, n, 0], torch.stack(means).mean())
    assert REACH_MM > 0


def test_the_common_origin_of_the_frame_does_not_matter() -> None:
    reader, of = MemoryReader(2, 2), memory(0)
    queries, places = asked()
    moved = of._replace(places=[of.places[0] + 400])
    torch.testing.assert_close(
        read(reader, moved, queries, places + 400)[0], read(reader, of, queries, places)[0], atol=1e-4, rtol=1e-4
    )


def test_keys_of_their_own_read_as_shared_ones() -> None:
    reader, of = MemoryReader(2, 2), memory(1)
    queries, places = asked()
    for expected, found in zip(read(reader, of, queries, places), read(reader, of.unshared(), queries, places)):
        torch.testing.assert_close(found, expected)


def test_many_places_are_read_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, of = MemoryReader(2, 2), memory(1)
    queries, places = asked()
    expected = read(reader, of, queries, places)
    monkeypatch.setattr("nnunet_multimodal.networks.memory.AT_ONCE", 10)  # two queries of five places each
    for whole, parts in zip(expected, read(reader, of, queries, places)):
        torch.testing.assert_close(parts, whole)


def test_mixing_takes_each_organ_from_its_own_memory() -> None:
    reader, first, second = MemoryReader(2, 2), memory(1), memory(2)
    queries, places = asked()
    mixed = mix_memories([second, first])
    assert mixed.present.tolist() == [[True, True]]
    found = read(reader, mixed, queries, places)[0]
    torch.testing.assert_close(found[0], read(reader, second, queries, places)[0][0])
    torch.testing.assert_close(found[1], read(reader, first, queries, places)[0][1])
    assert mix_memories([None, first]).present.tolist() == [[False, True]]
    assert mix_memories(
        [
            first,
            None,
        ][:2]
    ).present.tolist() == [[True, False]]
    assert mix_memories([second, None]).values[0].shape == second.values[0].shape


def test_joined_windows_are_read_together_but_not_where_an_organ_was_not_drawn() -> None:
    reader = MemoryReader(2, 2)
    first, second = memory(1), memory(2, present=(True, False))
    queries, places = asked()
    joined = join_memories([first, second])
    assert joined.present.tolist() == [[True, True]] and joined.keys[0].shape[2] == 10
    features = read(reader, joined, queries, places)[0]
    torch.testing.assert_close(features[1], read(reader, first, queries, places)[0][1])  # only the first has organ 1
    both = torch.cat((first.values[0][:, :1], second.values[0][:, :1]), dim=2)
    assert not torch.allclose(features[0], read(reader, first, queries, places)[0][0])
    assert torch.equal(joined.values[0][:, :1], both)
    assert join_memories([first]) is first


def test_an_organ_that_no_window_holds_reads_something_finite() -> None:
    absent = memory(1, present=(True, False))
    joined = join_memories([absent, memory(2, present=(True, False))])
    assert joined.present.tolist() == [[True, False]]
    queries, places = asked()
    assert torch.isfinite(read(MemoryReader(2, 2), joined, queries, places)[0]).all()
