"""ddpm_mnist.py in a process of its own, with a small network, a witness and, if asked, a fault.

python tests/mnist_process.py FAULT FLAGS ...
FAULT: none; kill (kill -9 in the midst of the second checkpoint); full (a disk with room for two
kilobytes). In FLAGS, RANK is the number of the process. Leaves pid0, pid1, ... and rank0.pt, ...:
weights at the end, and what the network was trained on.
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
    latest = None

    def __init__(self, channels=1, classes=10, width=32):
        super().__init__()
        self.classes = classes
        self.label = nn.Embedding(classes + 1, channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        Small.latest = self

    def forward(self, xt, t, y=None):
        y = torch.full_like(t, self.classes) if y is None else y
        v = self.conv(xt) + self.label(y)[..., None, None]
        if torch.is_grad_enabled():
            self.seen.append((xt, t, y, v.detach()))
        return v


def main(fault, *flags):
    faulthandler.dump_traceback_later(300, exit=True)  # tells where, should it ever hang
    rank = os.environ.get("RANK", "0")
    Path(f"pid{rank}").write_text(str(os.getpid()))
    save = torch.save

    def save_and_die(state, file):
        save(state, file)
        if file.with_suffix(".pt").exists():  # the first checkpoint
            os.truncate(file, file.stat().st_size // 2)
            os.kill(os.getpid(), 9)

    if fault == "kill":
        torch.save = save_and_die
    if fault == "full":
        import resource  # not on Windows

        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))  # of any file
    ddpm_mnist.UNet = Small
    ddpm_mnist.main([flag.replace("RANK", rank) for flag in flags])
    save((Small.latest.state_dict(), Small.seen), f"rank{rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
