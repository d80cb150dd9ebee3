"""What one would write without this project: DDP by torchrun, the other side of benchmarks/train_throughput.py.

    torchrun --nproc_per_node 2 -m benchmarks._plain_ddp --data digits.npz --classes 6 --samples 10 --steps 30

A timm backbone with a linear projection, P x K batches of images in memory, a loss on the embeddings of all ranks,
fused AdamW, a cosine schedule with warm-up, clipping, channels_last; no evaluation, no checkpoint, no tracking.
"""

import argparse
import math
import os
import time

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather
from torch.nn.parallel import DistributedDataParallel

STAMPS = "BENCHMARK_STAMPS"
"""Environment variable: where the loss notes when it was made and called; a file a rank."""


class MultiSimilarity(nn.Module):
    """Multi-similarity (Wang et al., CVPR 2019, arXiv 1904.06627) without its miner, that says when it is called."""

    def __init__(self, alpha: float = 2.0, beta: float = 50.0, base: float = 0.5) -> None:
        super().__init__()
        self.alpha, self.beta, self.base = alpha, beta, base
        self.file = os.environ.get(STAMPS)
        stamp(self.file, "made")

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Unit embeddings (N, D) of all ranks, labels (N,) -> scalar."""
        stamp(self.file, "called")
        similarity = embeddings @ embeddings.T
        same = labels[:, None] == labels[None]
        off_diagonal = ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
        positive = torch.exp(-self.alpha * (similarity - self.base)) * (same & off_diagonal)
        negative = torch.exp(self.beta * (similarity - self.base)) * ~same
        return (positive.sum(1).log1p() / self.alpha + negative.sum(1).log1p() / self.beta).mean()


def stamp(file: str | None, event: str) -> None:
    if file is not None:
        rank = dist.get_rank() if dist.is_initialized() else 0
        with open(f"{file}.{rank}", "a") as lines:
            lines.write(f"{event} {time.time()} {time.process_time()}\n")


class Model(nn.Module):
    """Backbone, projection, unit norm."""

    def __init__(self, name: str, channels: int, dim: int) -> None:
        import timm

        super().__init__()
        self.backbone = timm.create_model(name, num_classes=0, in_chans=channels)
        self.projection = nn.Linear(self.backbone.num_features, dim)

    def forward(self, images: Tensor) -> Tensor:
        """(B, c, H, W) -> (B, D)."""
        return F.normalize(self.projection(self.backbone(images)), dim=1)


def batch_of(labels: np.ndarray, classes: int, samples: int, generator: np.random.Generator) -> np.ndarray:
    chosen = generator.choice(labels.max() + 1, classes, replace=False)
    return np.concatenate([generator.choice(np.flatnonzero(labels == c), samples, replace=False) for c in chosen])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a .npz of pixels, uint8 (N, c, H, W), and labels (N,)")
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--classes", type=int, required=True)
    parser.add_argument("--samples", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--lr", type=float, default=1e-3)
    options = parser.parse_args()

    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    with np.load(options.data) as arrays:
        pixels, labels = torch.from_numpy(arrays["pixels"]), arrays["labels"]
    torch.manual_seed(0)
    model = Model(options.model, pixels.shape[1], options.dim).to(device, memory_format=torch.channels_last)
    net = DistributedDataParallel(model) if world > 1 else model
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 1e-4}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=options.lr, fused=True)
    warmup = max(1, options.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / options.steps))),
    )
    loss_of = MultiSimilarity()
    generator = np.random.default_rng(0)  # the same on every rank
    for _ in range(options.steps):
        chosen = batch_of(labels, options.classes, options.samples, generator)
        mine = np.array_split(chosen, world)[rank]
        images = (pixels[torch.from_numpy(mine)].to(device).float() / 255 - 0.5) / 0.5
        optimizer.zero_grad(set_to_none=True)
        embeddings = net(images)
        if world > 1:
            embeddings = torch.cat(all_gather(embeddings))
        loss = loss_of(embeddings, torch.from_numpy(labels[chosen]).to(device))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    if rank == 0:
        print(f"loss {float(loss):.4f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
