"""Who is measured on priors: loops as they are commonly written, in plain PyTorch, and transformers' Llama."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.layout import CodeLayout
from pipelines.benchmarks.harness import Run
from pipelines.devices import default_device
from prior import build_prior
from prior.autoregressive import AutoregressivePrior
from prior.maskgit import MaskGIT

WIDTH, NUM_LAYERS, NUM_HEADS, VOCAB_SIZE, NUM_CLASSES = 384, 6, 6, 1024, 10
PIXELCNN_WIDTH, PIXELCNN_LAYERS = 128, 12
SCALE = 2.0


@dataclass(frozen=True)
class Work:
    """What a case does."""

    model: str
    side: int
    """The grid has side x side codes."""
    batch_size: int
    dtype: torch.dtype = torch.float32
    guided: bool = False
    compiled: bool = False
    steps: int = 8
    """Of MaskGIT."""

    @property
    def num_codes(self) -> int:
        return self.side**2

    def prior(self) -> Any:
        """Ours, as a run of this size would build it."""
        sizes: dict[str, Any] = {"width": WIDTH, "num_layers": NUM_LAYERS, "num_heads": NUM_HEADS, "dropout": 0.0}
        if self.model == "pixelcnn":
            sizes = {"width": PIXELCNN_WIDTH, "num_layers": PIXELCNN_LAYERS, "dropout": 0.0}
        layout = CodeLayout.single((self.side, self.side), VOCAB_SIZE)
        prior = build_prior({"name": self.model, **sizes}, layout, num_classes=NUM_CLASSES)
        model: Any = prior
        return model.to(default_device())

    def labels(self) -> Tensor:
        return torch.arange(self.batch_size, device=default_device()) % NUM_CLASSES


def sample(work: Work) -> Run:
    """Ours: a call of `Prior.sample`."""
    prior = work.prior().to(work.dtype).eval().compile_sampling(work.compiled)
    options: dict[str, Any] = {"guidance_scale": SCALE} if work.guided else {}
    if work.model == "maskgit":
        options["steps"] = work.steps

    def run() -> Tensor:
        seeds = torch.arange(work.batch_size, device=default_device())
        return prior.sample(work.batch_size, work.labels(), seeds=seeds, **options)

    if work.compiled:
        run()  # what compiling takes belongs to the set-up
    return run


class PlainLayer(nn.Module):
    """Attention and SwiGLU behind norms."""

    def __init__(self) -> None:
        super().__init__()
        hidden = math.ceil(WIDTH * 8 / 3 / 32) * 32
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.gate, self.up = nn.Linear(WIDTH, hidden, bias=False), nn.Linear(WIDTH, hidden, bias=False)
        self.down = nn.Linear(hidden, WIDTH, bias=False)

    def forward(self, x: Tensor, place: Tensor, rotation: Tensor, cache: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).view(len(x), 1, 3, NUM_HEADS, -1).unbind(2)
        keys, values = cache
        keys[:, :, place], values[:, :, place] = _rotate(k, rotation).transpose(1, 2), v.transpose(1, 2)
        q = _rotate(q, rotation).transpose(1, 2)
        x = x + self.out(F.scaled_dot_product_attention(q, keys, values, attn_mask=mask).reshape(len(x), 1, WIDTH))
        hidden = self.norm2(x)
        return x + self.down(F.silu(self.gate(hidden)) * self.up(hidden))


class PlainDecoder(nn.Module):
    """A decoder-only transformer of the same size, written like gpt-fast: a static cache behind a mask."""

    rotations: Tensor

    def __init__(self, num_codes: int) -> None:
        super().__init__()
        self.codes = nn.Embedding(VOCAB_SIZE + NUM_CLASSES + 1, WIDTH)  # classes are further codes, the first of all
        self.layers = nn.ModuleList(PlainLayer() for _ in range(NUM_LAYERS))
        self.norm = nn.RMSNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB_SIZE, bias=False)
        half = WIDTH // NUM_HEADS // 2
        angles = torch.arange(num_codes)[:, None] * 10_000 ** -(torch.arange(half) / half)
        self.register_buffer("rotations", torch.stack([angles.cos(), angles.sin()]))

    def forward(self, codes: Tensor, place: Tensor, cache: list[tuple[Tensor, Tensor]], mask: Tensor) -> Tensor:
        """Logits `(B, K)` after the codes `(B, 1)` at `place` `(1,)`."""
        x, rotation, visible = self.codes(codes), self.rotations[:, place], mask[place]
        for layer, kept in zip(self.layers, cache, strict=True):
            x = layer(x, place, rotation, kept, visible)
        return self.head(self.norm(x))[:, 0]


def _rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotary positions of `(B, 1, heads, head_dim)`."""
    cos, sin = rotation[:, :, None]
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).type_as(x)


@torch.no_grad()
def sample_plainly(work: Work) -> Run:
    """The loop around `PlainDecoder`: guidance as one batch of twice the size, a draw by multinomial."""
    device = default_device()
    model = PlainDecoder(work.num_codes).to(device).eval()
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding | nn.RMSNorm):
            module.to(work.dtype)
    rows = work.batch_size * (2 if work.guided else 1)
    shape = (rows, NUM_HEADS, work.num_codes, WIDTH // NUM_HEADS)
    mask = torch.ones(work.num_codes, work.num_codes, dtype=torch.bool, device=device).tril()
    step = torch.compile(model, dynamic=False, fullgraph=True) if work.compiled else model

    @torch.no_grad()
    def run() -> Tensor:
        empty = torch.zeros((NUM_LAYERS, 2, *shape), dtype=work.dtype, device=device)
        cache = [(keys, values) for keys, values in empty]
        codes = VOCAB_SIZE + work.labels()
        if work.guided:
            codes = torch.cat([codes, torch.full_like(codes, VOCAB_SIZE + NUM_CLASSES)])
        codes, drawn = codes[:, None], []
        for place in range(work.num_codes):
            logits = step(codes, torch.tensor([place], device=device), cache, mask).float()
            if work.guided:
                conditional, unconditional = logits.chunk(2)
                logits = unconditional + SCALE * (conditional - unconditional)
            drawn.append(torch.multinomial(logits.softmax(-1), 1))
            codes = torch.cat([drawn[-1], drawn[-1]]) if work.guided else drawn[-1]
        return torch.cat(drawn, dim=1)

    if work.compiled:
        run()
    return run


def llama(num_codes: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden = math.ceil(WIDTH * 8 / 3 / 32) * 32
    options: dict[str, Any] = {"attn_implementation": "sdpa", "bos_token_id": None, "eos_token_id": None}
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE + NUM_CLASSES + 1,
        hidden_size=WIDTH,
        intermediate_size=hidden,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=NUM_HEADS,
        max_position_embeddings=num_codes + 1,
        pad_token_id=VOCAB_SIZE + NUM_CLASSES,
        **options,
    )
    model: Any = LlamaForCausalLM(config)
    return model.to(default_device())


def sample_llama(work: Work) -> Run:
    """transformers' generate with a static cache."""
    model = llama(work.num_codes).to(work.dtype).eval()

    def run() -> object:
        return model.generate(
            VOCAB_SIZE + work.labels()[:, None],
            max_new_tokens=work.num_codes,
            do_sample=True,
            cache_implementation="static",
            disable_compile=True,
            suppress_tokens=list(range(VOCAB_SIZE, VOCAB_SIZE + NUM_CLASSES + 1)),
        )

    return run


@torch.no_grad()
def fill_in_plainly(work: Work) -> Run:
    """MaskGIT's loop on our network as commonly written: logits of all codes at each step, confidence, a cosine."""
    prior = work.prior().to(work.dtype).eval()
    assert isinstance(prior, MaskGIT)
    L, none = work.num_codes, torch.full((work.batch_size,), NUM_CLASSES, device=prior.device)

    def logits_of(rows: Tensor, labels: Tensor) -> Tensor:
        x = prior.code_embedding(rows) + prior.position_embedding.weight + prior.class_embedding(labels)[:, None]
        return prior.head(prior.transformer(x, prior.tables()[1]))

    network = torch.compile(logits_of, dynamic=False, fullgraph=True) if work.compiled else logits_of

    @torch.no_grad()
    def run() -> Tensor:
        codes = torch.zeros(work.batch_size, L, dtype=torch.int64, device=prior.device)
        masked = torch.ones_like(codes, dtype=torch.bool)
        for step in range(work.steps):
            rows = codes.masked_fill(masked, VOCAB_SIZE)
            labels = work.labels()
            if work.guided:
                rows, labels = torch.cat([rows, rows]), torch.cat([labels, none])
            logits = network(rows, labels).float()
            if work.guided:
                conditional, unconditional = logits.chunk(2)
                logits = unconditional + SCALE * (conditional - unconditional)
            probabilities = logits.softmax(-1)
            drawn = torch.multinomial(probabilities.flatten(0, 1), 1).view_as(codes)
            confidence = probabilities.gather(-1, drawn[..., None])[..., 0].log()
            noise = -torch.log(-torch.log(torch.rand_like(confidence).clamp(min=1e-20)))
            confidence = confidence + 4.5 * (1 - (step + 1) / work.steps) * noise
            left = 0 if step + 1 == work.steps else math.ceil(math.cos(math.pi / 2 * (step + 1) / work.steps) * L)
            order = confidence.masked_fill(~masked, float("-inf")).argsort(dim=1, descending=True)
            revealed = torch.zeros_like(masked).scatter_(1, order[:, : int(masked[0].sum()) - left], True)
            codes, masked = torch.where(revealed, drawn, codes), masked & ~revealed
        return codes

    if work.compiled:
        run()
    return run


def recompute(work: Work) -> Run:
    """Code by code with the whole network anew for each, as samplers of PixelCNN are commonly written."""
    prior = work.prior().to(work.dtype).eval()
    assert isinstance(prior, AutoregressivePrior)

    @torch.no_grad()
    def run() -> Tensor:
        codes = torch.zeros(work.batch_size, work.num_codes, dtype=torch.int64, device=prior.device)
        for j in range(work.num_codes):
            logits = prior.logits(codes.view(-1, work.side, work.side), work.labels())[:, j]
            codes[:, j] = torch.multinomial(logits.softmax(-1), 1)[:, 0]
        return codes

    return run
