"""ddpm_mnist.py in a process of its own, with a small network, a witness and, if asked, a fault.

python tests/mnist_process.py FAULT FLAGS ...
FAULT: none; kill (kill -9 in the midst of the second checkpoint); raise (in process 1 at its third
step); full (a disk with room for two kilobytes); full-once (until the first save has failed).
In FLAGS, RANK is the number of the process. Leaves pid0, pid1, ... and rank0.pt, ...: weights at
the end, and what the network was trained on.
"""

import faulthandler
import os
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
import ddpm_mnist  # noqa: E402


class Small(nn.Module):
    """Stands in for UNet where the network does not matter. seen: x_t, t, y and v in training."""

    seen = []

    def __init__(self, channels=1, classes=10, width=32):
        super().__init__()
        self.classes = classes
        self.label = nn.Embedding(classes + 1, channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, xt, t, y=None):
        y = torch.full_like(t, self.classes) if y is None else y
        v = self.conv(xt) + self.label(y)[..., None, None]
        if torch.is_grad_enabled():
            self.seen.append((xt, t, y, v.detach()))
        return v


def room(size):
    """No file may grow beyond this size, as on a disk that is full."""
    import resource

    most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (most if size is None else size, most))


def main(fault, *flags):
    faulthandler.dump_traceback_later(300, exit=True)  # tells where, should it ever hang
    rank = os.environ.get("RANK", "0")
    Path(f"pid{rank}").write_text(str(os.getpid()))
    save = torch.save
    velocity = ddpm_mnist.Diffusion.velocity
    saves = []
    nets = []

    def spoiled(state, file):
        saves.append(file)
        if fault == "full-once" and len(saves) == 2:
            room(None)
        save(state, file)
        if fault == "kill" and len(saves) == 2:
            os.truncate(file, file.stat().st_size // 2)
            os.kill(os.getpid(), 9)

    def network(*args):
        nets.append(Small(*args))
        return nets[0]

    def failing(*args):
        if fault == "raise" and rank == "1" and len(Small.seen) == 3:
            raise RuntimeError("process 1 fails")
        return velocity(*args)

    torch.save = spoiled
    ddpm_mnist.UNet = network
    ddpm_mnist.Diffusion.velocity = failing
    if fault.startswith("full"):
        room(2000)
    ddpm_mnist.main([flag.replace("RANK", rank) for flag in flags])
    assert "matplotlib.pyplot" not in sys.modules  # a notebook's figures and windows stay as is
    if fault != "full":
        save((nets[0].state_dict(), Small.seen), f"rank{rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
