"""Vision Transformer on handwritten digits, in stock torch.nn.

The architecture is that of Dosovitskiy et al., "An Image is Worth 16x16 Words: Transformers for Image Recognition at
Scale", ICLR 2021 (arXiv:2010.11929), at the size of the data: 1,797 grey images of 8x8 pixels that scikit-learn brings.

An image is cut into patches, each patch becomes one token, and from there on it is a Transformer encoder:

    image [B, 1, 8, 8] -> 16 patches of 2x2 pixels -> tokens [B, 16, D]      one linear map per patch
    prepend a learned class token, add learned positions   [B, 17, D]        attention itself knows no order
    depth x block:  x = x + attention(norm(x))                               tokens exchange information
                    x = x + mlp(norm(x))                                     each token is transformed on its own
    norm, then a linear map of the class token             [B, 10]

Run it with `python -m examples.vision_transformer`.
"""

import math

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

BATCH_SIZE = 64
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.3
WARMUP_EPOCHS = 2


class PatchEmbedding(nn.Module):
    """Cuts the image into patches and maps each one to a token: a convolution whose stride is its kernel size."""

    def __init__(self, patch_size: int, channels: int, dim: int):
        super().__init__()
        self.project = nn.Conv2d(channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.project(images).flatten(2).transpose(1, 2)  # [B, D, H/p, W/p] -> [B, T, D]


class Block(nn.Module):
    """Pre-norm encoder block: the normalisation stands inside the branch, so the residual path stays a plain sum."""

    def __init__(self, dim: int, heads: int, mlp_dim: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, mlp_dim), nn.GELU(), nn.Linear(mlp_dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        h, _ = self.attention(h, h, h, need_weights=False)
        x = x + h
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """Images [B, channels, image_size, image_size] -> logits [B, classes]."""

    def __init__(
        self,
        image_size: int = 8,
        patch_size: int = 2,
        channels: int = 1,
        classes: int = 10,
        dim: int = 64,
        depth: int = 4,
        heads: int = 4,
        mlp_dim: int = 128,
    ):
        super().__init__()
        tokens = (image_size // patch_size) ** 2 + 1
        self.patches = PatchEmbedding(patch_size, channels, dim)
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.positions = nn.Parameter(torch.randn(1, tokens, dim) * 0.02)
        self.blocks = nn.Sequential(*(Block(dim, heads, mlp_dim) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images)
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], dim=1)
        x = self.blocks(x + self.positions)
        return self.head(self.norm(x[:, 0]))


def load_data(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images, training labels, test images, test labels; a fifth of the images is held out for the test."""
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 8 - 1  # 0..16 -> -1..1
    labels = torch.from_numpy(digits.target).long()
    train, test = train_test_split(range(len(labels)), test_size=0.2, random_state=seed, stratify=labels)
    return images[train], labels[train], images[test], labels[test]


def jitter(images: Tensor) -> Tensor:
    """Rotates, scales and shifts each image a little: up to 8 degrees, 10 % and half a pixel.

    A Transformer has none of a convolution's built-in knowledge of images; on little data this takes its place.
    """

    def uniform(limit: float, *shape: int) -> Tensor:
        return limit * (2 * torch.rand(len(images), *shape) - 1)

    angle, scale = uniform(math.radians(8)), 1 + uniform(0.1)
    rotation = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=1).view(-1, 2, 2)
    offset = uniform(0.5 * 2 / images.shape[-1], 2, 1)  # the image spans -1..1
    grid = F.affine_grid(torch.cat([scale.view(-1, 1, 1) * rotation, offset], dim=2), images.shape, align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


class Trainer:
    """One model with its data, optimizer and learning-rate schedule (linear warm-up, then cosine to zero)."""

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor, epochs: int, seed: int = 0):
        self.model, self.images, self.labels, self.seed = model, images, labels, seed
        self.epoch = 0
        self.losses: list[float] = []  # of every step
        steps = math.ceil(len(images) / BATCH_SIZE)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)

        def scale(step: int) -> float:
            warmup = min(1.0, (step + 1) / (WARMUP_EPOCHS * steps))
            return warmup * 0.5 * (1 + math.cos(math.pi * step / (epochs * steps)))

        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, scale)

    def train_epoch(self) -> float:
        """One pass over the data and its mean loss. Seed and epoch fix the order and the jitter."""
        torch.manual_seed(1000 * self.seed + self.epoch)
        self.model.train()
        losses = []
        for batch in torch.randperm(len(self.images)).split(BATCH_SIZE):
            losses.append(self.step(jitter(self.images[batch]), self.labels[batch]))
        self.epoch += 1
        self.losses += losses
        return sum(losses) / len(losses)

    def step(self, images: Tensor, labels: Tensor) -> float:
        loss = F.cross_entropy(self.model(images), labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        return loss.item()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    return (model(images).argmax(1) == labels).float().mean().item()


def main(epochs: int = 30) -> None:
    torch.set_num_threads(1)  # the model is too small for more
    train_images, train_labels, test_images, test_labels = load_data()
    torch.manual_seed(0)
    trainer = Trainer(VisionTransformer(), train_images, train_labels, epochs)
    for epoch in range(epochs):
        print(f"epoch {epoch + 1:3d}  loss {trainer.train_epoch():.4f}")
    print(f"test accuracy {accuracy(trainer.model, test_images, test_labels):.2%}")


if __name__ == "__main__":
    main()
