# SPDX-License-Identifier: Apache-2.0
"""Quantizers under FSDP2: the losses and states of DistributedDataParallel."""

import pytest
import torch
import train_sharded_quantizers
from forked_ranks import results_of_ranks
from torch.distributed.fsdp import fully_shard
from train_sharded_quantizers import CASES, OTHERS, runs

from genperf.nn import VectorQuantizer


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Results of every case, by number of ranks and rank."""
    return results_of_ranks(train_sharded_quantizers.__file__, tmp_path_factory.mktemp("sharded"), (2, 3), seconds=180)


@pytest.mark.parametrize(("case", "world"), [(case, world) for case in CASES for world in (2, 3) if runs(case, world)])
def test_training_matches_distributed_data_parallel(results, case, world):
    for rank in range(world):
        expected, found = results[world][rank][case]["DDP"], results[world][rank][case]["FSDP2"]
        torch.testing.assert_close(found["losses"], expected["losses"])
        for moment in ("trained", "after forward"):
            assert found[moment].keys() == expected[moment].keys()
            for name, value in expected[moment].items():
                message = lambda text, name=name, moment=moment: f"{name}, {moment}: {text}"  # noqa: E731
                torch.testing.assert_close(found[moment][name], value, rtol=1e-4, atol=1e-5, msg=message)
                if ".pending." in name or name.startswith("pending."):
                    continue  # what waits for the next update is that of the rank
                assert torch.equal(found[moment][name], results[world][0][case]["FSDP2"][moment][name]), f"{name} of rank {rank}"


def test_compiled_layer():
    """One rank is enough: the gathered parameter is a copy then too."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        layers = []
        for sharded in (False, True):
            torch.manual_seed(0)
            layer = VectorQuantizer(9, 4, replace_dead_below=1.0, usage_decay=0.5)
            if sharded:
                layer.compile(backend="eager")
                fully_shard(layer)
            for seed in range(3):
                layer(torch.randn(20, 4, generator=torch.Generator().manual_seed(seed)))
            layers.append(layer.state_dict())
        for name, value in layers[0].items():
            found = layers[1][name]
            torch.testing.assert_close(found.full_tensor() if name == "codebook" else found, value)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("world", [2, 3])
def test_mixed_precision_does_not_round_other_codes(results, world):
    for rank in results[world]:
        changed, float32, dtype = rank["mixed_precision"].values()
        assert dtype
        assert 0 < changed.sum() < len(changed)
        assert (float32 & ~changed).any()


@pytest.mark.parametrize("world", [2, 3])
def test_codes_from_data_outside_of_forward(results, world):
    initial, vectors = results[world][0]["methods"]["initial"], torch.cat([rank["methods"]["batch"] for rank in results[world]])
    assert (initial.unsqueeze(1) == vectors).all(-1).any(1).all()


@pytest.mark.parametrize("world", [2, 3])
def test_loaded_codes_stay(results, world):
    for rank in results[world]:
        found = rank["loaded"]
        assert found["codes"].any()
        for name in ("second", "third", "averages"):
            assert torch.equal(found[name], found["codes"]), name


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_have_equal_codes(results, world):
    for case in OTHERS:
        for name, value in results[world][0][case.__name__].items():
            if name != "batch":
                assert all(torch.equal(torch.as_tensor(rank[case.__name__][name]), torch.as_tensor(value)) for rank in results[world]), name
