"""The kernel by which weights on a GPU change places."""

import torch


def test_two_pieces_of_memory_exchange_what_they_hold(device):
    from ramet.srt.model_loader.arena.cuda_swap import BLOCK_NBYTES, swap

    both = torch.randint(256, (2, 3 * BLOCK_NBYTES), dtype=torch.uint8).to(device)
    before = both.clone()
    swap(both[0, BLOCK_NBYTES:], both[1, BLOCK_NBYTES:])
    assert torch.equal(both[:, BLOCK_NBYTES:], before[:, BLOCK_NBYTES:].flip(0))
    assert torch.equal(both[:, :BLOCK_NBYTES], before[:, :BLOCK_NBYTES])
